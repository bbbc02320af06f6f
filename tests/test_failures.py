"""Whatever ends a command is one line: what a user can mend in our words, all else with its traceback in a file."""

import errno
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger
from recipe import arguments, write_recipe
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from d2dmoe_pl.cli import main
from d2dmoe_pl.errors import ConfigError, InterruptedPhaseError, NonFiniteLossError
from d2dmoe_pl.failures import Failure, failure_of, write_traceback
from d2dmoe_pl.phase_cli import with_nulls_as_configs
from d2dmoe_pl.phases import FineTuning


def raised(error, cause=None):
    try:
        raise error from cause
    except BaseException as caught:
        return caught


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise ConfigError("image_column='image': sample 2 cannot be read")


class NotThere(str):
    def __bool__(self) -> bool:
        return False


class Refuses(Callback):
    def __init__(self, times: int) -> None:
        raise KeyError(f"times={times} is too often")


class Uninstalled(Callback):
    def __init__(self, times: int) -> None:
        MLFlowLogger()


class TestFailures:
    def test_a_setting_at_the_root_of_others(self):
        error = raised(RuntimeError("outer"), raised(ConfigError("tau=2: must lie in [0, 1]")))
        assert failure_of(error).line == "tau=2: must lie in [0, 1]"
        assert failure_of(error).code == 2
        assert failure_of(NonFiniteLossError("nan")).code == 1

    def test_a_setting_that_a_process_that_loads_data_refuses(self):
        with pytest.raises(ConfigError) as info:
            next(iter(DataLoader(Broken(), num_workers=1)))
        assert "Traceback" in str(info.value)
        assert failure_of(info.value).line == "image_column='image': sample 2 cannot be read"

    def test_a_setting_that_a_process_of_several_refuses(self):
        text = "\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  File x\n"
        error = ProcessRaisedException(f"{text}d2dmoe_pl.errors.ConfigError: devices=2: must be 1\n", 1, 99)
        assert failure_of(error) == Failure("devices=2: must be 1", 2)

    @pytest.mark.parametrize(
        ("name", "code", "said"),
        [
            ("Refuses", 1, "error: KeyError: 'times=3 is too often'; the traceback is in "),
            ("Uninstalled", 2, "error: trainer: mlflow is missing"),
        ],
    )
    def test_what_is_raised_where_a_parser_makes_an_object(self, tmp_path, capsys, monkeypatch, name, code, said):
        monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", NotThere("mlflow is missing"))
        recipe, settings = write_recipe(tmp_path / "recipe.yaml"), {"class_path": f"{__name__}.{name}"}
        settings["init_args"] = {"times": 3}
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", f"--config={recipe}:fine_tuning", f"--trainer.callbacks={json.dumps([settings])}"])
        assert exit_info.value.code == code
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(said)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            (["--ckpt_path=none.ckpt"], "Checkpoint file not found: none.ckpt"),
            (["--ckpt_path=best"], '`.fit(ckpt_path="best")` is set but `ModelCheckpoint` is not configured'),
            (
                ["--trainer.logger=false", "--trainer.callbacks+=LearningRateMonitor"],
                "Cannot use `LearningRateMonitor`",
            ),
            (["--trainer.val_check_interval=99"], "`val_check_interval` (99) must be less than or equal to"),
        ],
    )
    def test_what_lightning_refuses_in_a_fit(self, tmp_path, capsys, settings, said):
        recipe = write_recipe(tmp_path / "recipe.yaml")
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", f"--config={recipe}:fine_tuning", f"--trainer.default_root_dir={tmp_path}/run", *settings])
        assert exit_info.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"error: trainer: {said}")
        assert "traceback" not in last

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        ],
    )
    def test_out_of_memory(self, error):
        failure = failure_of(error)
        assert failure.line.startswith("out of memory: a smaller data.init_args.batch_size needs less")
        assert (failure.code, failure.is_known) == (1, True)

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device", "last.ckpt"),
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
            RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)".lower()),
        ],
    )
    def test_a_full_disk(self, error):
        assert failure_of(error).line.startswith("the disk is full: make room, or choose another output folder")

    def test_a_folder_that_takes_no_files(self):
        error = PermissionError(errno.EACCES, "Permission denied", "/root/x")
        assert failure_of(error).line.startswith("/root/x: cannot be written or read (Permission denied)")

    def test_anything_else_has_its_traceback_in_a_file(self, tmp_path):
        error = raised(InterruptedPhaseError("fine_tuning", tmp_path), raised(RuntimeError("odd\nshapes " + "x" * 999)))
        failure = failure_of(error)
        assert failure.line.startswith("RuntimeError: odd shapes xxx")
        assert len(failure.line) < 450
        assert not failure.is_known
        file = Path(write_traceback(error, tmp_path))
        assert file.parent == tmp_path
        assert "Traceback" in file.read_text()
        elsewhere = Path(write_traceback(error, tmp_path / "nowhere"))
        assert "Traceback" in elsewhere.read_text()
        elsewhere.unlink()


class TestCommands:
    def test_a_chain_that_breaks_off_says_how_to_go_on(self, tmp_path, capsys, monkeypatch):
        step = FineTuning.training_step

        def breaks(self, batch, batch_idx):
            if self.global_step == 3:
                raise RuntimeError("the machine coughs")
            return step(self, batch, batch_idx)

        recipe = write_recipe(tmp_path / "recipe.yaml")
        monkeypatch.setattr(FineTuning, "training_step", breaks)
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(recipe, tmp_path / "run"))
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit_info.value.code == 1
        assert said.startswith("error: RuntimeError: the machine coughs; the traceback is in ")
        assert said.endswith("; the same command goes on from there")
        (log,) = (tmp_path / "run" / "fine_tuning").glob("error-*.log")
        assert "the machine coughs" in log.read_text()

    def test_a_wrong_setting_that_a_phase_finds_is_not_to_be_tried_again(self, tmp_path, capsys):
        stopping = [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}]
        recipe = write_recipe(tmp_path / "recipe.yaml")
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(recipe, tmp_path / "run", "--set", f"fine_tuning.trainer.callbacks={json.dumps(stopping)}"))
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit_info.value.code == 2
        assert said.startswith("error: trainer: Early stopping conditioned on metric `val_loss` which is not available")
        assert "goes on from there" not in said

    def test_a_file_in_the_place_of_a_later_phase_is_told_before_the_first(self, tmp_path, capsys):
        recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
        output.mkdir()
        (output / "router_regression").write_text("")
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(recipe, output))
        assert exit_info.value.code == 2
        said = f"error: output_dir='{output / 'router_regression'}': no files can be written there"
        assert said in capsys.readouterr().err
        assert [each.name for each in output.iterdir()] == ["router_regression"]

    def test_debug_lets_it_through(self, tmp_path):
        recipe = write_recipe(tmp_path / "recipe.yaml", fine_tuning={"warmup": 3.0})
        with pytest.raises(ValueError, match=r"warmup=3.0: must lie in"):
            main([*arguments(recipe, tmp_path / "run"), "--debug"])

    @pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
    def test_an_output_folder_that_is_none(self, tmp_path, capsys, monkeypatch, place):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(write_recipe(tmp_path / "recipe.yaml"), Path(place)))
        assert exit_info.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-1].startswith(f"error: output_dir='{place}': no files can be written there")


class TestNulls:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (["--data.init_args.source.test=null"], {"data": {"init_args": {"source": {"test": None}}}}),
            (["--data.source.test", "null"], {"data": {"init_args": {"source": {"test": None}}}}),
            (["--model.init_args.a=[null, b]"], {"model": {"init_args": {"a": [None, "b"]}}}),
        ],
    )
    def test_a_null_is_a_config_of_its_own(self, given, expected):
        (argument,) = with_nulls_as_configs(given)
        assert yaml.safe_load(argument.removeprefix("--config=")) == expected

    @pytest.mark.parametrize(
        "given",
        [["--data.init_args.source.test='null'"], ["--data.init_args.a=nullable"], ["--print_config"], ["null"]],
    )
    def test_all_else_is_as_it_was(self, given):
        assert with_nulls_as_configs(given) == given

    @pytest.mark.parametrize(("text", "expected"), [("null", None), ("./null", "./null"), ("./None", "./None")])
    def test_on_the_command_line(self, capsys, text, expected):
        start = [
            "--data",
            "GLUE",
            "--data.init_args.name=sst2",
            "--data.init_args.tokenizer=x",
            "--model",
            "FineTuning",
        ]
        with pytest.raises(SystemExit):
            main(["fit", *start, f"--data.init_args.source.validation={text}", "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["data"]["init_args"]["source"]["validation"] == expected
