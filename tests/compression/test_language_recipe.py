"""What is chosen for a language model: by its blocks, and by what the wish is about."""

import pytest
import stand_ins
import tiny
import transformers
import yaml

from d2dmoe_pl import compress
from d2dmoe_pl.cli import main
from d2dmoe_pl.compression import recipe_for_model
from d2dmoe_pl.compression.chosen_recipe import sizes_of
from d2dmoe_pl.compression.language_recipe import language_phases
from d2dmoe_pl.moe.find_layers import moe_layers

MINUTES = ["expert_clustering", "router_regression", "cutoff_fitting", "stand_in_fitting", "budget_calibration"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with a model that writes and some text."""
    monkeypatch.chdir(tmp_path)
    words = stand_ins.WORDS
    lines = [" ".join(words[(i * step) % len(words)] for step in range(1, 9)) for i in range(400)]
    (tmp_path / "all.txt").write_text("\n\n".join(lines))
    tiny.dense("llama-causal-language-modeling", activation=None).save_pretrained("model")
    tiny.tokenizer("model", words, ("[PAD]", "[UNK]", "<eos>"))
    return tmp_path


def recipe_of(capsys, *given):
    capsys.readouterr()
    main(["compress", "--model", "model", "--data", "all.txt", *given, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def arguments(recipe, phase):
    return recipe["phases"][phase]["model"]["init_args"]


@pytest.mark.parametrize("target", ["ffn_flops=50%", "flops=80%", "drop=1"])
def test_in_minutes_shares_of_cutoffs_are_found(place, capsys, target):
    recipe = recipe_of(capsys, "--target", target)
    assert list(recipe["phases"]) == MINUTES
    assert arguments(recipe, "cutoff_fitting") == {}
    assert arguments(recipe, "router_regression")["target"] == "relative_norm"
    assert arguments(recipe, "budget_calibration")["estimate"] == "gradients"


def test_for_speed_there_are_none_which_would_save_no_time(place, capsys):
    narrow, wide = (recipe_of(capsys, "--target", target) for target in ("drop=1", "speed=1.2x"))
    assert list(wide["phases"]) == [name for name in MINUTES if name != "cutoff_fitting"]
    assert arguments(wide, "expert_clustering")["num_experts"] < arguments(narrow, "expert_clustering")["num_experts"]


def test_in_hours_all_weights_learn_at_budgets(place, capsys):
    recipe = recipe_of(capsys, "--target", "drop=1", "--effort", "hours")
    assert list(recipe["phases"]) == [
        "fine_tuning", *MINUTES[:4], "first_calibration", "model_distillation", "budget_calibration"
    ]  # fmt: skip
    assert "source" in arguments(recipe, "fine_tuning")
    assert arguments(recipe, "model_distillation")["trains"] == "model"
    assert "estimate" not in arguments(recipe, "budget_calibration")


@pytest.mark.parametrize(("slowdown", "precision"), [(1.8, None), (0.3, "bf16-mixed")])
def test_bfloat16_is_for_machines_that_are_fast_in_it(place, capsys, monkeypatch, slowdown, precision):
    monkeypatch.setattr(recipe_for_model, "bfloat16_slowdown", lambda: slowdown)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    trainer = recipe_of(capsys, "--target", "drop=1")["shared"]["trainer"]
    assert trainer.get("precision") == precision


def phases_of(num_blocks, effort="minutes"):
    return language_phases(sizes_of(tiny.dense("gpt2"), is_narrow=True), {}, effort, True, 256, num_blocks, 8)


@pytest.mark.parametrize(("num_blocks", "steps"), [(40, 400), (300, 300), (384, 384), (100_000, 384)])
def test_routers_learn_from_about_as_many_blocks_whatever_there_are(num_blocks, steps):
    trainer = phases_of(num_blocks)["router_regression"]["trainer"]
    assert trainer["max_epochs"] * min(num_blocks, trainer.get("limit_train_batches", num_blocks)) == steps


def test_a_model_learns_from_no_more_text_than_hours_are_enough_for():
    for name in ("fine_tuning", "model_distillation"):
        assert "limit_train_batches" not in phases_of(3000, "hours")[name]["trainer"]
        assert phases_of(100_000, "hours")[name]["trainer"]["limit_train_batches"] * 8 * 256 <= 1.1e6


def test_masked_models_write_nothing(place, capsys):
    model = transformers.BertForMaskedLM(tiny.bert_config(vocab_size=len(stand_ins.WORDS) + 4))
    model.save_pretrained("model")
    tiny.tokenizer("model", stand_ins.WORDS, ("[PAD]", "[UNK]", "[MASK]", "<eos>"))
    recipe = recipe_of(capsys, "--target", "drop=1", "--task", "masked-language-modeling")
    assert list(recipe["phases"]) == [name for name in MINUTES if name != "cutoff_fitting"]
    assert arguments(recipe, "budget_calibration")["estimate"] == "gradients"


def test_a_model_of_gguf(place, capsys):
    gguf_files = pytest.importorskip("gguf_files", reason="gguf is not installed", exc_type=ImportError)
    (place / "of_llama").mkdir()
    gguf_files.write_gguf(gguf_files.llama(), "of_llama/tiny.gguf")
    (place / "all.txt").write_text("the the\n\nthe\n\n" * 3000)
    main(["compress", "--model", "of_llama/tiny.gguf", "--data", "all.txt", "--target", "drop=1", "--print_config"])
    recipe = yaml.safe_load(capsys.readouterr().out)
    source = arguments(recipe, "expert_clustering")["source"]["init_args"]
    assert (source["name"], source["gguf_file"]) == ("of_llama", "tiny.gguf")


@pytest.mark.thorough
def test_it_does_what_was_wished_for(place):
    made = compress("model", "all.txt", target="ffn_flops=60%", output_dir="out", batch_size=8)
    assert made.test.ffn_flops_percent == pytest.approx(60, rel=0.1)
    assert made.dense.experts_percent == 100
    assert all(layer.cutoffs is not None for layer in moe_layers(made.load()).values())
    assert "60" in (place / "out" / "report.md").read_text()
