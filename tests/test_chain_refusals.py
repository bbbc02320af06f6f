"""What a chain refuses ends in one line, before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from digits_models import DIGIT_LABELS, digits_source
from recipe import PHASES, arguments, write_recipe
from stand_ins import ANIMALS, COLOURS, phrase

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.cli import main


def test_a_finished_phase_whose_artifact_is_broken(tmp_path, capsys):
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    main(arguments(recipe, output))
    weights = output / "fine_tuning" / "artifact" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(recipe, output))
    assert exit_info.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: finished phase fine_tuning=")
    assert "model.safetensors is missing or truncated" in last


@pytest.mark.parametrize(
    ("models", "more", "message"),
    [
        (
            {"expert_clustering": {"num_experts": 5}},
            [],
            "num_experts=5: must divide the FFN width, which is 64 in blocks.0.mlp",
        ),
        ({"router_regression": {"tau": 1.5}}, [], "tau=1.5: must lie in [0, 1]"),
        ({"fine_tuning": {"activation": None}}, [], "penalty='hoyer' with displacement=None: allowed only on ReLU"),
        ({"fine_tuning": {"activation": "quark"}}, [], "activation='quark': timm knows no such activation"),
        ({}, ["--from", "fine_tunning"], "from='fine_tunning': allowed are fine_tuning, sparsity_enforcement"),
        ({}, ["--set", "epochs=3"], "set='epochs=3': must look like trainer.max_epochs=1"),
        ({}, ["--set", "seed=1"], "set='seed=1': is no setting of phases; must be given as --seed"),
        (
            {},
            ["--set", "router.width=3"],
            "set='router.width=3': must begin with trainer, data or model, or with a phase",
        ),
        ({}, ["--set", "trainer.max_epoch=3"], "error: fine_tuning: "),
        ({}, ["--set", "router_regression.trainer.max_epoch=3"], "error: router_regression: "),
        ({"router_regression": {"wdith": 3}}, [], "error: router_regression: "),
    ],
)
def test_a_wrong_config_ends_in_one_line_and_leaves_no_files(tmp_path, capsys, models, more, message):
    recipe = write_recipe(tmp_path / "recipe.yaml", **models)
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(recipe, tmp_path / "run", *more))
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert message in "\n".join(said.strip().splitlines()[-4:])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("phase", "sweep", "message"),
    [
        ("fine_tuning", {"taus": [0.5]}, "callbacks: TauSweep needs a phase that makes routers (RouterRegression, "),
        (
            "router_regression",
            {"rule": "topk", "ks": [2, 9]},
            "callbacks: TauSweep: k=9: must be at most the number of experts, 8 in",
        ),
        ("router_regression", {"budgets": [0.5]}, "budgets: the model knows none; the sweep must be of BudgetCalib"),
    ],
)
def test_a_sweep_that_a_phase_cannot_make_is_told_before_the_first_trains(tmp_path, capsys, phase, sweep, message):
    recipe = yaml.safe_load(Path(write_recipe(tmp_path / "recipe.yaml")).read_text())
    recipe["phases"][phase]["trainer"]["callbacks"] = [{"class_path": "TauSweep", "init_args": sweep}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(str(tmp_path / "recipe.yaml"), tmp_path / "run"))
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_phases_of_one_name(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("phases:\n  a: {}\n  b: {}\n  a: {}\n")
    with pytest.raises(SystemExit):
        main(arguments(str(recipe), tmp_path / "run"))
    assert capsys.readouterr().err == f"error: {recipe}: a: is in line 2 and in line 4\n"


def test_a_dry_run(tmp_path, capsys):
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(recipe, output, "--set", "trainer.fast_dev_run=true"))
    assert exit_info.value.code == 2
    assert "error: fast_dev_run=True: must be false in a chain, since it leaves nothing" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "trainer.strategy=ddp_fork",
            "strategy=ddp_fork: its processes end with a training, and what is trained with them; must be auto, ddp or "
            "another in a chain",
        ),
        (
            "fine_tuning.trainer.default_root_dir=elsewhere",
            "set='fine_tuning.trainer.default_root_dir=elsewhere': a chain gives each phase the folder of its name; "
            "must be --output_dir",
        ),
    ],
)
def test_what_would_be_lost_or_looked_for_elsewhere(tmp_path, capsys, setting, said):
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(recipe, output, "--set", setting))
    assert exit_info.value.code == 2
    assert f"error: {said}\n" in capsys.readouterr().err
    assert not output.exists()


def test_no_phases(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["chain", "--output_dir", str(tmp_path / "run"), "--phases", "{}"])
    assert capsys.readouterr().err == "error: phases={}: must be at least one\n"


class TestFinishedChain:
    """What a chain that is finished is not taken for."""

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("finished")
        recipe = write_recipe(folder / "recipe.yaml", epochs=1)
        main(arguments(recipe, folder / "run"))
        return folder

    @staticmethod
    def refused(finished, tmp_path, capsys, change, *more):
        """What is said to a recipe that has been changed."""
        content = yaml.safe_load((finished / "recipe.yaml").read_text())
        change(content)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(str(tmp_path / "recipe.yaml"), finished / "run", *more))
        assert exit_info.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    def test_a_phase_less(self, finished, tmp_path, capsys):
        said = self.refused(finished, tmp_path, capsys, lambda recipe: recipe["phases"].pop("sparsity_enforcement"))
        assert said.startswith("error: expert_clustering: its config has changed since it was finished; --from")
        assert said.endswith("the phase before it: sparsity_enforcement -> fine_tuning")

    @pytest.mark.parametrize(
        ("setting", "told"),
        [
            ("fine_tuning.trainer.limit_val_batches=0", "trainer.limit_val_batches: None -> 0"),
            (
                "fine_tuning.model.init_args.source.init_args.drop_path_rate=0.0",
                "model.init_args.source.init_args.drop_path_rate: None -> 0.0",
            ),
        ],
    )
    def test_nothing_where_nothing_was_said(self, finished, tmp_path, capsys, setting, told):
        said = self.refused(finished, tmp_path, capsys, lambda recipe: None, "--set", setting)
        assert said.endswith(told)

    def test_a_status_of_an_earlier_version_still_counts(self, finished, tmp_path, capsys):
        output = shutil.copytree(finished / "run", tmp_path / "run")
        for file in output.glob("*/phase.json"):
            status = json.loads(file.read_text())
            kept = {key: value for key, value in status["config"].items() if value is not None}
            kept.pop("the phase before it", None)
            file.write_text(json.dumps({**status, "config": kept}))
        main(arguments(str(finished / "recipe.yaml"), output))
        assert "Nothing to do." in capsys.readouterr().err

    def test_another_start_or_what_is_in_it(self, finished, tmp_path, capsys):
        start = [tmp_path / "a", tmp_path / "b"]
        for seed, folder in enumerate(start):
            torch.manual_seed(seed)
            save_artifact(digits_source().build(DIGIT_LABELS), folder, [PhaseRecord("FineTuning")])
        model = {"class_path": "ImportanceScoring", "init_args": {"init_from": str(start[0])}}
        shared = yaml.safe_load((finished / "recipe.yaml").read_text())["shared"]
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"shared": shared, "phases": {"importance": {"model": model}}}))
        main(arguments(str(recipe), tmp_path / "run"))
        capsys.readouterr()
        other = f"importance.model.init_args.init_from={start[1]}"
        for more, told in ((["--set", other], "/a -> "), ([], f"content of {start[0]}: ")):
            with pytest.raises(SystemExit):
                main(arguments(str(recipe), tmp_path / "run", *more))
            assert told in capsys.readouterr().err
            shutil.rmtree(start[0])
            shutil.copytree(start[1], start[0])

    def test_other_data_in_the_place_of_what_there_was(self, tmp_path, capsys):
        words = [f"{phrase(i, 4)},{ANIMALS[i % 2]}" for i in range(40)]
        (tmp_path / "all.csv").write_text("\n".join(["text,label", *words]))
        tokenizer = tiny.tokenizer(tmp_path / "tok", [*COLOURS, *ANIMALS], ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
        transformers.BertForSequenceClassification(tiny.bert_config(num_labels=2)).save_pretrained(tmp_path / "model")
        source = {"class_path": "HuggingFaceModel", "init_args": {"task": "text-classification"}}
        source["init_args"]["name"] = str(tmp_path / "model")
        file = str(tmp_path / "all.csv")
        data = {"source": {"train": file, "validation": None, "test": None}, "tokenizer": tokenizer, "batch_size": 8}
        content = {
            "shared": {
                "data": {"class_path": "TextClassification", "init_args": data},
                "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False},
            },
            "phases": {"fine_tuning": {"model": {"class_path": "FineTuning", "init_args": {"source": source}}}},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        run = arguments(str(tmp_path / "recipe.yaml"), tmp_path / "run")
        main(run)
        main(run)
        assert "Nothing to do." in capsys.readouterr().err
        (tmp_path / "all.csv").write_text("\n".join(["text,label", *words, *words[:9]]))
        with pytest.raises(SystemExit):
            main(run)
        assert f"content of {file}: " in capsys.readouterr().err
        (tmp_path / "all.csv").unlink()
        main(run)
        assert "Nothing to do." in capsys.readouterr().err


class TestTooLittleDataForALaterPhase:
    @staticmethod
    def run(tmp_path, capsys, **settings):
        recipe = write_recipe(tmp_path / "recipe.yaml", epochs=1)
        content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
        model = {"class_path": "BudgetCalibration", "init_args": {"num_samples": 5}}
        content["phases"]["budgets"] = {"model": model, **settings}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(recipe, tmp_path / "run"))
        assert exit_info.value.code == 2
        expected = "error: num_samples=5: 5 validation samples are too few; 2 layers need at least 8"
        assert capsys.readouterr().err.strip().splitlines()[-1] == expected
        return [name for name in [*PHASES, "budgets"] if (tmp_path / "run" / name / "artifact").exists()]

    def test_is_told_before_the_first_trains(self, tmp_path, capsys):
        assert self.run(tmp_path, capsys, data={"init_args": {"batch_size": 32}}) == []

    def test_of_data_of_its_own_when_that_is_read(self, tmp_path, capsys):
        assert self.run(tmp_path, capsys, data={"init_args": {"augment": False}}) == PHASES
