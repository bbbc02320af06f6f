"""Wrong files and settings, one by one: each ends the command in the line that the tables beside this file say."""

import json
from pathlib import Path

import pytest
import tiny
import transformers
import yaml
from stand_ins import WORDS

from d2dmoe_pl.cli import main

HERE = Path(__file__).parent
SPLITS = ("train", "validation", "test")
GOOD = "text,label\n" + "".join(f"a {animal},{animal}\n" for animal in ("cat", "dog", "eel", "cat", "dog", "eel"))


def table(name):
    return yaml.safe_load((HERE / f"{name}.yaml").read_text())


def file_cases():
    for case in table("files"):
        for ending in case["files"]:
            for split in case.get("splits", SPLITS):
                # every split of one kind of file, and every kind in one split, are enough for each change
                is_more = split != SPLITS[0] and ending != case["files"][0]
                marks = pytest.mark.thorough if is_more else ()
                yield pytest.param(case, ending, split, id=f"{case['fault']} in {split}.{ending}", marks=marks)


def setting_cases():
    for case in table("settings"):
        for key, values in case["settings"].items():
            for index, value in enumerate(values if isinstance(values, list) else [values]):
                marks = pytest.mark.thorough if index else ()  # one value a setting is enough for each change
                yield pytest.param(case, key, value, id=f"{key}={value}", marks=marks)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model with its tokenizer, good files, and a config that works with them."""
    folder = tmp_path_factory.mktemp("wrong")
    tiny.tokenizer(folder / "model", WORDS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    transformers.BertModel(tiny.bert_config()).save_pretrained(folder / "model")
    for split in SPLITS:
        (folder / f"{split}.csv").write_text(GOOD)
    source = {split: str(folder / f"{split}.csv") for split in SPLITS}
    model = {
        "class_path": "HuggingFaceModel",
        "init_args": {"task": "text-classification", "name": str(folder / "model")},
    }
    config = {
        "seed_everything": 0,
        "model": {"class_path": "FineTuning", "init_args": {"source": model}},
        "data": {
            "class_path": "TextClassification",
            "init_args": {"source": source, "tokenizer": str(folder / "model"), "max_length": 12},
        },
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def line_of(capfd, home, *args):
    """The one line in which a command ends."""
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(home / "config.yaml"), *args])
    said = capfd.readouterr().err
    assert exit_info.value.code not in (0, None)
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said.count("error: ") == 1
    return last.removeprefix("error: ")


@pytest.mark.parametrize(("case", "ending", "split"), [*file_cases()])
def test_files(capfd, home, tmp_path, case, ending, split):
    content = case["content"]
    content = content if isinstance(content, bytes) else content.encode()
    file = tmp_path / f"{split}.{ending}"
    file.write_bytes(content.replace(b",", b"\t") if ending == "tsv" else content)
    said = line_of(capfd, home, f"--data.init_args.source.{split}={file}")
    expected = case["says"].format(file=file, split=split)
    assert any(said.startswith(each) for each in expected.split("|")), said


@pytest.mark.parametrize(("case", "key", "value"), [*setting_cases()])
def test_settings(capfd, home, case, key, value):
    said = line_of(capfd, home, f"--{key}={value}")
    expected = case["says"].format(name=key.rpartition(".")[2], key=key, value=value)
    assert said.startswith(expected) or (expected.startswith("...") and expected[3:] in said), said


def test_what_the_wrong_inputs_differ_from_works(home):
    main(["fit", "--config", str(home / "config.yaml")])


def test_there_are_two_hundred():
    assert len([*file_cases(), *setting_cases()]) >= 200
