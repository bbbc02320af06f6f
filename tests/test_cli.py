"""The command line as Lightning users know it."""

import csv
import json

import pytest
import tiny
import torch
import yaml
from recipe import arguments, write_recipe

from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.cli import EVALUATIONS, main
from d2dmoe_pl.recipe import SHAPE


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "recipe.yaml")


def fit(recipe, phase, tmp_path, *more):
    return ["--config", f"{recipe}:{phase}", f"--trainer.default_root_dir={tmp_path}", *more]


def out(capsys, *args):
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


def test_help_lists_every_subcommand(capsys):
    code, said, _ = out(capsys, "--help")
    assert code == 0
    for subcommand in ("fit", "validate", "test", "predict", "chain"):
        assert f"\n    {subcommand}" in said


def test_help_of_a_phase_shows_its_docstring(capsys):
    code, said, _ = out(capsys, "fit", "--model.help=RouterRegression")
    assert code == 0
    said = " ".join(said.split())
    assert "Hidden neurons of a router" in said
    assert "Share of the training over which the learning rate rises linearly from 0" in said  # inherited
    assert "or a phase of a recipe, RECIPE:PHASE, such as configs/digits_vit.yaml:fine_tuning" in " ".join(
        out(capsys, "fit", "--help")[1].split()
    )
    code, said, _ = out(capsys, "chain", "--help")
    assert "Redo from this phase on" in said


@pytest.mark.parametrize("subcommand", EVALUATIONS)
def test_help_of_an_evaluation_says_what_it_does_and_that_a_run_is_enough(capsys, subcommand):
    code, said, _ = out(capsys, subcommand, "--help")
    assert code == 0
    assert f"{EVALUATIONS[subcommand]} --run FOLDER, of a finished phase or a chain" in " ".join(said.split())


def test_help_of_numbers_to_be_learnt_says_that_the_column_holds_any(capsys):
    _, said, _ = out(capsys, "fit", "--data.help=TextRegression")
    assert "of ``TextRegression``, any numbers" in " ".join(said.split())


def test_print_config_can_be_run(capsys, recipe, tmp_path):
    code, said, _ = out(capsys, "fit", *fit(recipe, "fine_tuning", tmp_path), "--print_config")
    assert code == 0
    config = yaml.safe_load(said)
    assert config["model"]["class_path"] == "d2dmoe_pl.phases.FineTuning"
    assert config["data"]["init_args"]["batch_size"] == 64
    (tmp_path / "whole.yaml").write_text(said)
    main(["fit", "--config", str(tmp_path / "whole.yaml"), "--trainer.max_epochs=1"])


def test_a_phase_of_a_recipe_and_plain_yaml_together(capsys, recipe, tmp_path):
    (tmp_path / "more.yaml").write_text("data: {init_args: {batch_size: 8}}\ntrainer: {max_epochs: 7}\n")
    given = ["--config", str(tmp_path / "more.yaml"), "--trainer.max_epochs=5"]
    for subcommand in ("fit", "validate", "test", "predict"):
        code, said, _ = out(capsys, subcommand, *fit(recipe, "router_regression", tmp_path, *given), "--print_config")
        config = yaml.safe_load(said)
        assert code == 0
        assert config["model"]["init_args"]["width"] == 8
        assert config["data"]["init_args"]["batch_size"] == 8
        assert (config["trainer"]["max_epochs"], config["trainer"]["limit_train_batches"]) == (5, 6)
        (tmp_path / "printed.yaml").write_text(said)
        assert out(capsys, subcommand, "--config", str(tmp_path / "printed.yaml"), "--print_config")[1] == said


def test_a_recipe_without_one_of_its_phases_ends_in_one_line(capsys, recipe, tmp_path):
    phases = "fine_tuning, sparsity_enforcement, expert_clustering, router_regression"
    (tmp_path / "old.yaml").write_text("base: base.yaml\nphases: [{name: fine_tuning, config: fine_tuning.yaml}]\n")
    old = f"{tmp_path / 'old.yaml'}: recipes are no longer a list of phases with a file each; {SHAPE}"
    for given, message in (
        (recipe, f"config='{recipe}': is a recipe; add :PHASE, one of {phases}"),
        (f"{recipe}:fine_tunning", f"phase='fine_tunning': allowed are {phases}"),
        (str(tmp_path / "old.yaml"), old),
        (f"{tmp_path / 'old.yaml'}:fine_tuning", old),
    ):
        assert out(capsys, "fit", "--config", given) == (2, "", f"error: {message}\n")
    assert out(capsys, "chain", "--config", str(tmp_path / "old.yaml")) == (2, "", f"error: {old}\n")


def test_fit_validate_test_predict_of_every_phase(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where predictions are written
    previous = None
    for version, phase in enumerate(["fine_tuning", "sparsity_enforcement", "expert_clustering", "router_regression"]):
        more = [] if previous is None else [f"--model.init_args.init_from={previous}"]
        main(["fit", *fit(recipe, phase, tmp_path / phase, *more)])
        previous = tmp_path / phase / "lightning_logs" / "version_0" / "artifact"
        assert read_artifact(previous).history[version]
        evaluate = fit(recipe, phase, tmp_path / phase, f"--model.init_args.init_from={previous}")
        if phase == "fine_tuning":
            evaluate.append("--model.init_args.source=null")
        for subcommand in ("validate", "test", "predict"):
            main([subcommand, *evaluate])
    assert "test/accuracy" in capsys.readouterr().out


def test_fit_resumes_from_a_checkpoint(recipe, tmp_path):
    main(["fit", *fit(recipe, "fine_tuning", tmp_path, "--trainer.max_epochs=1")])
    checkpoint = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=False)["epoch"] == 0
    main(["fit", *fit(recipe, "fine_tuning", tmp_path), "--ckpt_path", str(checkpoint), "--weights_only=false"])
    resumed = tmp_path / "lightning_logs" / "version_1" / "checkpoints" / "last.ckpt"
    assert torch.load(resumed, weights_only=False)["epoch"] == 1


@pytest.mark.parametrize(
    ("phase", "more", "message"),
    [
        ("fine_tuning", ["--model.init_args.warmup=2"], "warmup=2.0: must lie in [0, 1]"),
        ("fine_tuning", ["--model.init_args.source.init_args.architecture=resnet"], "timm has no such model"),
        ("fine_tuning", ["--data.init_args.batch_size=0"], "batch_size=0: must be positive"),
        ("fine_tuning", ["--trainer.max_epoks=3"], "max_epoks"),
        ("fine_tuning", ["--model=FineTunning"], "FineTunning"),
        ("router_regression", ["--model.init_args.tau=-0.5"], "tau=-0.5: must lie in [0, 1]"),
        ("router_regression", ["--model.init_args.init_from=nowhere"], "init_from='nowhere': no such folder"),
        (
            "router_regression",
            ["--model.init_args.rule=best"],
            "rule='best': allowed are dynk_cumulative, dynk_max",
        ),
        ("router_regression", [], "init_from=None: RouterRegression needs the artifact of an earlier phase"),
        (
            "expert_clustering",
            ["--model.init_args.split=magic"],
            "split='magic': allowed are activation, coactivation, parameter",
        ),
    ],
)
def test_a_wrong_config_ends_in_one_line_and_leaves_no_files(recipe, tmp_path, capsys, phase, more, message):
    code, _, said = out(capsys, "fit", *fit(recipe, phase, tmp_path / "run", *more))
    assert code == 2
    assert "Traceback" not in said
    assert message in "\n".join(said.strip().splitlines()[-4:])
    assert not (tmp_path / "run").exists()


@pytest.fixture
def questions(tmp_path):
    """The config of a tiny BERT that answers questions of three words."""
    tokenizer = tiny.tokenizer(tmp_path / "tok", ["who", "cat", "dog"], ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    answers = {"text": ["cat"], "answer_start": [4]}
    row = json.dumps({"id": "0", "title": "", "context": "dog cat", "question": "who", "answers": answers})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 4)
    source = {split: str(tmp_path / "rows.jsonl") for split in ("train", "validation", "test")}
    bert = {"class_path": "transformers.BertConfig", "init_args": {"vocab_size": 40, **tiny.SHAPE}}
    lengths = {"max_length": 16, "doc_stride": 2, "max_question_length": 4}
    config = {
        "model": {
            "class_path": "FineTuning",
            "init_args": {
                "source": {
                    "class_path": "HuggingFaceModel",
                    "init_args": {"task": "question-answering", "config": bert},
                }
            },
        },
        "data": {
            "class_path": "SQuAD",
            "init_args": {"tokenizer": tokenizer, "version": 2, "source": source, **lengths},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
    }
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(tmp_path / "questions.yaml"), f"--trainer.default_root_dir={tmp_path / 'run'}"]


def test_questions_are_answered_from_the_command_line(questions, tmp_path):
    main(["fit", *questions])
    answers = tmp_path / "answers.csv"
    start = f"--model.init_args.init_from={tmp_path / 'run' / 'lightning_logs' / 'version_0' / 'artifact'}"
    main(["predict", *questions, "--model.init_args.source=null", start, "--output", str(answers)])
    rows = list(csv.DictReader(answers.open()))
    assert rows[0].keys() == {"sample", "question", "prediction", "margin"}
    assert {row["question"] for row in rows} == {"who"}
    assert any(row["prediction"] for row in rows)
    artifact = read_artifact(tmp_path / "run" / "lightning_logs" / "version_0" / "artifact")
    assert "validation/f1" in artifact.history[0].metrics
    assert (artifact.path / "tokenizer.json").is_file()


def test_a_head_that_the_data_does_not_fit_ends_in_one_line(questions, recipe, tmp_path, capsys):
    timm = fit(recipe, "fine_tuning", tmp_path / "run")
    data = [f"--data={tmp_path / 'data.yaml'}"]
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((tmp_path / "questions.yaml").read_text())["data"])
    )
    for given, message in (
        ([*timm, *data], "head='classification' of VisionTransformer: the data needs a model with head 'question-ans"),
        ([*questions, "--model.init_args.source.init_args.task=text-regression"], "head='regression' of Bert"),
    ):
        code, _, said = out(capsys, "fit", *given)
        assert code == 2
        assert said.strip().splitlines()[-1].startswith(f"error: {message}")
        assert not (tmp_path / "run").exists()


def test_init_from_another_phase(recipe, tmp_path, capsys):
    main(["fit", *fit(recipe, "fine_tuning", tmp_path / "first")])
    artifact = tmp_path / "first" / "lightning_logs" / "version_0" / "artifact"
    more = f"--model.init_args.init_from={artifact}"
    code, _, said = out(capsys, "fit", *fit(recipe, "router_regression", tmp_path / "second", more))
    assert code == 2
    assert (
        said.strip()
        .splitlines()[-1]
        .endswith("is the work of FineTuning, at stage 'dense'; RouterRegression starts from stage 'experts'")
    )
    assert not (tmp_path / "second").exists()


def test_a_misspelt_subcommand(capsys):
    code, _, said = out(capsys, "chian")
    assert code == 2
    assert "chian" in said
    assert "chain" in said


def test_chain_without_config_is_the_embedded_default(capsys):
    with pytest.raises(SystemExit):
        main(["chain", "--from", "nothing"])
    assert "from='nothing': allowed are fine_tuning, sparsity_enforcement" in capsys.readouterr().err


def test_set_reaches_one_phase_or_all(recipe, tmp_path):
    more = ["--set", "trainer.max_epochs=1", "router_regression.model.init_args.width=4"]
    main(arguments(recipe, tmp_path / "run", *more))
    layers = read_artifact(tmp_path / "run" / "router_regression" / "artifact").layers
    assert {made["router"]["width"] for made in layers.values()} == {4}
