"""What the parser refuses is told as one line that names the class or the setting, and what may have been meant."""

import json

import pytest
from jsonargparse import ArgumentError

from d2dmoe_pl.parser_line import parser_line
from d2dmoe_pl.phase_cli import PhaseCLI

START = ["--data", "Digits", "--model", "FineTuning"]
SWEEP = "d2dmoe_pl.callbacks.TauSweep"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: x", "a.b='x': must be int"),
        ("unrecognized arguments: --bla=1", "--bla=1: no such setting; --help lists them, and --model.help=CLASS"),
        ("Subcommand 'fit' does not accept option 'trainer.bla'", "trainer.bla: no such setting; --help lists them"),
        ('Key "architecture" is required but not included', "architecture: must be given, and is not"),
        ("something\n  else", "something else"),
    ],
)
def test_what_the_parser_says(text, line):
    assert parser_line(text).startswith(line)


@pytest.mark.parametrize(
    ("setting", "value", "line"),
    [
        (
            "trainer.callbacks",
            [{"class_path": "TauSwep"}],
            "trainer.callbacks: class_path='TauSwep': no such class; did you mean TauSweep?",
        ),
        (
            "trainer.callbacks",
            [{"class_path": SWEEP, "init_args": {"tau": [0.5]}}],
            "trainer.callbacks: TauSweep has no setting 'tau'; did you mean taus?",
        ),
        (
            "trainer.callbacks",
            [{"class_path": SWEEP, "taus": [0.5]}],
            "trainer.callbacks: must be a class that fits, by its class_path, with its settings under init_args",
        ),
        (
            "trainer.callbacks",
            [{"class_path": "d2dmoe_pl.data.Digits"}],
            "trainer.callbacks: must be a class that fits, by its class_path, with its settings under init_args",
        ),
        (
            "trainer.callbacks",
            [{"taus": [0.5]}],
            "trainer.callbacks: must be a class that fits, by its class_path, with its settings under init_args",
        ),
        (
            "trainer.logger",
            {"class_path": "TensorBoardLogger", "save_dir": "a"},
            "trainer.logger: must be a class that fits, by its class_path, with its settings under init_args",
        ),
        (
            "config",
            {"model": {"class_path": "FineTuning", "activation": "relu"}},
            "model: must be a class that fits, by its class_path, with its settings under init_args",
        ),
        (
            "config",
            {"trainer": {"max_epoch": 3}},
            "trainer.max_epoch: no such setting; did you mean trainer.max_epochs",
        ),
        ("trainer.max_epoch", 3, "--trainer.max_epoch=3: no such setting; did you mean trainer.max_epochs"),
        ("config", {"modle": {"class_path": "X"}}, "modle.class_path: no such setting; did you mean model?"),
        ("trainer.callbacks", [{"class_path": SWEEP, "init_args": {"taus": ["a"]}}], "taus='a': must be float"),
        (
            "trainer.callbacks",
            [{"class_path": "EarlyStopping"}],
            "trainer.callbacks: EarlyStopping must be given monitor, and is not",
        ),
        (
            "trainer.callbacks",
            [{"class_path": "my_module.Sweep"}],
            "trainer.callbacks: class_path='my_module.Sweep': no such class (No module named 'my_module'); did you",
        ),
        (
            "trainer.logger",
            {"class_path": "TensorBordLogger"},
            "trainer.logger: class_path='TensorBordLogger': no such class; did you mean TensorBoardLogger?",
        ),
        (
            "model.init_args.optimizer",
            {"class_path": "torch.optim.AdamWW"},
            "optimizer: class_path='torch.optim.AdamWW': no such class (module 'torch.optim' has no attribute "
            "'AdamWW'); did you mean AdamW",
        ),
        (
            "model.init_args.optimizer",
            {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1}},
            "optimizer: AdamW has no setting 'lrr'; did you mean lr?",
        ),
        (
            "model.init_args.optimizer",
            "Zzz",
            "optimizer: class_path='Zzz': no such class; others than this package's go by their path (torch.optim.",
        ),
        (
            "model.init_args.source.class_path",
            "TimModel",
            "source: class_path='TimModel': no such class; did you mean TimmModel?",
        ),
        ("data.init_args.batch_sise", 3, "data: Digits has no setting 'batch_sise'; did you mean batch_size?"),
        ("data.init_args.zzz", 3, "data: Digits has no setting 'zzz'"),
    ],
)
def test_a_class_or_a_setting_that_is_not_there(setting, value, line):
    with pytest.raises(ArgumentError) as refused:
        PhaseCLI([*START, f"--{setting}={value if isinstance(value, str) else json.dumps(value)}"], run=False)
    assert parser_line(str(refused.value)).startswith(line)
