"""From a model, data and a wish to a model that does it: chosen, run, resumed, refused in time."""

import csv
import json

import pytest
import stand_ins
import tiny
import transformers
import yaml

from d2dmoe_pl import artifact_parts, compress, load_model
from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.cli import main
from d2dmoe_pl.compression import command
from d2dmoe_pl.compression.chosen_recipe import chosen_phases, sizes_of
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.run_folders import with_run

LABELS = stand_ins.ANIMALS[:5]


def recipe_of(place, *more):
    main(
        ["compress", "--model", "model", "--data", "texts", "--output_dir", "out", *(more or ("--target", "drop=100"))]
    )
    return yaml.safe_load((place / "out" / "recipe.yaml").read_text())


def test_in_minutes(finished):
    recipe = yaml.safe_load((finished / "out" / "recipe.yaml").read_text())
    assert list(recipe["phases"]) == [
        "expert_clustering",
        "router_regression",
        "stand_in_fitting",
        "budget_calibration",
    ]
    assert "flops=90%" in (finished / "out" / "report.html").read_text()
    assert (finished / "out" / "model" / "tokenizer.json").is_file()


def test_it_is_evaluated_as_it_was_wished_for(calibrated, caplog):
    flops = {}
    for run in ("out", "out/budget_calibration"):
        main(["predict", "--run", run, "--output", "predictions.csv", "--trainer.enable_progress_bar=false"])
        with (calibrated / "predictions.csv").open() as opened:
            flops[run] = sum(int(row["flops"]) for row in csv.DictReader(opened))
    assert flops["out"] > 1.2 * flops["out/budget_calibration"]
    assert "out/model is evaluated, as compress has set it." in caplog.messages
    config = json.loads((calibrated / "out" / "model" / "config.json").read_text())
    config["d2dmoe"]["history"].pop()  # redone since
    (calibrated / "out" / "model" / "config.json").write_text(json.dumps(config))
    with_run(["--run", "out"])
    assert caplog.messages[-1] == "out/budget_calibration is evaluated, the last phase of out that is finished."


def test_another_wish_needs_no_training(calibrated, capfd):
    taus = [layer.gate.config.tau for layer in moe_layers(load_model("out/model")).values()]
    main(["compress", "--model", "model", "--data", "texts", "--output_dir", "out", "--target", "drop=100"])
    said = capfd.readouterr().err
    assert "budget_calibration: finished" in said
    assert "drop=100: " in said
    assert "Report: out/report.html" in said
    assert [layer.gate.config.tau for layer in moe_layers(load_model("out/model")).values()] != taus


def test_a_recipe_that_was_edited_is_run_as_it_is(calibrated, capfd):
    edited = calibrated / "out" / "recipe.yaml"
    recipe = yaml.safe_load(edited.read_text())
    recipe["phases"]["budget_calibration"]["model"]["init_args"]["keep"] = 0.5
    edited.write_text(yaml.safe_dump(recipe, sort_keys=False))
    said = "out/recipe.yaml is another than this command would write, and is run as it is."
    with pytest.raises(ConfigError, match="its config has changed since it was finished"):
        compress("model", "texts", target="drop=100", output_dir="out")
    assert said in capfd.readouterr().err
    other = transformers.BertForSequenceClassification.from_pretrained("model")
    with pytest.raises(ConfigError, match="is there already, for another model or other data"):
        compress(other, "texts", output_dir="out", tokenizer="model", target="drop=9")


def test_another_effort_is_another_recipe_and_phases_can_be_redone(calibrated, capfd):
    with pytest.raises(
        ConfigError, match=r"out/recipe.yaml: is there already, of effort=minutes; must be another --ou"
    ):
        compress("model", "texts", effort="hours", target="drop=100", output_dir="out")
    given = ["--model", "model", "--data", "texts", "--output_dir", "out", "--target", "drop=100"]
    main(["compress", *given, "--from", "budget_calibration"])
    assert "budget_calibration: starts" in capfd.readouterr().err


@pytest.mark.parametrize("change", [{"label_column": "other"}, {"text_columns": ["title"]}, {"name": "cola"}])
def test_another_column_is_other_data(calibrated, change):
    edited = calibrated / "out" / "recipe.yaml"
    recipe = yaml.safe_load(edited.read_text())
    recipe["shared"]["data"]["init_args"].update(change)
    edited.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(ConfigError, match="is there already, for another model or other data"):
        compress("model", "texts", target="drop=100", output_dir="out")


def test_what_lies_beside_a_model_goes_along_in_folders_too(tmp_path):
    beside, weights = ["tokenizer.json", "1_Pooling/config.json"], ["config.json", "d2dmoe.safetensors"]
    for name in (*beside, *weights):
        (tmp_path / "artifact" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "artifact" / name).write_text(name)
    (tmp_path / "model").mkdir()
    artifact_parts.copy_processor(tmp_path / "artifact", tmp_path / "model")
    there = {str(file.relative_to(tmp_path / "model")) for file in (tmp_path / "model").rglob("*") if file.is_file()}
    assert there == set(beside)


def test_a_model_in_memory(place):
    dense = transformers.BertForSequenceClassification.from_pretrained("model")
    made = compress(dense, "texts", target="ffn_flops=80%", output_dir="out", tokenizer="model", batch_size=4)
    assert made.test.ffn_flops_percent == pytest.approx(80, rel=0.1)
    assert made.promised.ffn_flops == pytest.approx(0.8)
    assert made.dense.experts_percent == 100
    layers = moe_layers(made.load())
    assert [layer.gate.config.tau for layer in layers.values()] == pytest.approx(list(made.promised.taus))


def test_the_recipe_is_printed_and_nothing_is_run(place, capsys):
    stand_ins.write_bert(place / "bare")
    main(
        ["compress", "--model", "bare", "--data", "texts", "--effort", "hours", "--target", "drop=1", "--print_config"]
    )
    recipe = yaml.safe_load(capsys.readouterr().out)
    assert list(recipe["phases"]) == [
        "fine_tuning",
        "sparsity_enforcement",
        "expert_clustering",
        "router_regression",
        "stand_in_fitting",
        "recovery_tuning",
        "budget_calibration",
    ]
    assert recipe["phases"]["fine_tuning"]["model"]["init_args"]["activation"] == "relu"
    assert recipe["shared"]["trainer"]["log_every_n_steps"] < 50  # so few texts: once an epoch
    assert not (place / "runs").exists()


def refused(*arguments):
    with pytest.raises(ConfigError) as error:
        compress(*arguments[:2], **dict(arguments[2:]))
    return str(error.value)


def test_a_missing_head_is_seen_in_the_file(place, capsys):
    """Names do not tell: of numbers there are none, and a model without a head may be said to have two outputs."""
    transformers.BertModel(tiny.bert_config(hidden_act="relu")).save_pretrained(place / "bare")
    tiny.tokenizer(place / "bare", stand_ins.WORDS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    for name, label in (("score", lambda n: n / 7), ("label", lambda n: n % 2)):
        rows = [{"text": stand_ins.phrase(n, 5), name: label(n)} for n in range(120)]
        stand_ins.write(place, name, rows)
        said = "score" if name == "score" else "0, 1"
        assert refused("bare", f"{name}.jsonl").startswith(f"effort='minutes': bare has no head for {said}, and min")
        arguments = f"compress --model bare --data {name}.jsonl --effort hours --target drop=1 --print_config"
        main(arguments.split())
        assert next(iter(yaml.safe_load(capsys.readouterr().out)["phases"])) == "fine_tuning"


def test_refused_before_anything_is_trained(place):
    stand_ins.write_bert(place / "bare")
    assert refused("bare", "texts").startswith(
        "effort='minutes': bare has no head for cat, dog, eel, fox, gnu, and minutes trains none; must be hours"
    )
    train = place / "texts" / "train.csv"
    train.write_text(train.read_text().replace(f",{LABELS[2]}\n", ",misspelt\n", 1))
    assert refused("model", "texts").startswith(
        f"effort='minutes': model has no head for misspelt (but for {', '.join(LABELS)}), and minutes trains none"
    )
    stand_ins.write_emotion(place / "texts")
    said = refused("model", "texts", ("target", "ffn_flops=5%"))
    assert said.startswith("target='ffn_flops=5%': cannot be reached; ")
    assert said.endswith("is the least of this model, with one expert of each layer on")
    assert "cannot be reached" in refused("model", "texts", ("target", "flops=30%"))
    assert refused("model", None) == "data=None: must be given with model"
    assert refused(None, "texts") == "model=None: must be given with data"
    assert refused("model", "texts", ("effort", "days")) == "effort='days': allowed are minutes, hours"
    assert refused("model", "texts", ("colour", "red")) == "colour='red': no option of compress; see compress --help"
    assert not (place / "runs" / "compress" / "expert_clustering").exists()


def test_another_model_in_memory_is_not_taken_for_the_first(place):
    dense = transformers.BertForSequenceClassification.from_pretrained("model")
    for _ in range(2):  # where nothing began, the first is none that anything was made of
        with pytest.raises(ConfigError, match="cannot be reached"):
            compress(dense, "texts", target="flops=1%", output_dir="out", tokenizer="model")
        dense.classifier.bias.data += 1
    (place / "out" / command.RECIPE).write_text("phases: {}")
    with pytest.raises(ConfigError, match=r"out/start: is of another model than the one that is given"):
        compress(dense, "texts", target="flops=90%", output_dir="out", tokenizer="model")


def test_too_few_samples_to_calibrate_on_are_told_beforehand(place):
    rows = (place / "texts" / "validation.csv").read_text().splitlines()[:4]
    (place / "texts" / "validation.csv").write_text("\n".join(rows) + "\n")
    said = refused("model", "texts", ("target", "drop=1"))
    assert said == "data: 3 validation samples are too few; 2 layers need at least 8"
    assert not (place / "runs").exists()


def test_a_converted_model_is_refused(calibrated):
    assert refused("out/model", "texts") == "model='out/model': is at stage 'routed'; must be a dense model"


@pytest.mark.parametrize("kind", ["timm_vit", "bert", "gpt2", "llama", "gemma"])
def test_what_is_said_to_be_the_least_is(kind):
    model = tiny.dense(kind)
    sizes = sizes_of(tiny.dense(kind))
    assert 48 % sizes.num_experts == 0
    assert sizes.is_sparse
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.least_ffn_flops > 0
    assert adapter_for(model) is not None
    phases = chosen_phases(sizes, {"init_from": "a"}, "minutes", False, "text-classification", 10_000)
    assert phases["expert_clustering"]["model"]["init_args"]["init_from"] == "a"
    assert phases["expert_clustering"]["model"]["init_args"]["split"] == "activation"


def test_what_cannot_be_sparse_is_split_by_what_fires_most():
    sizes = sizes_of(tiny.dense("bert", "gelu"))
    phases = chosen_phases(sizes, {}, "minutes", False, "text-classification", 1000)
    assert phases["expert_clustering"]["model"]["init_args"]["split"] == "activation"
    assert phases["router_regression"]["trainer"]["max_epochs"] == 20
