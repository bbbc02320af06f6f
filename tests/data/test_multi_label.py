"""Any number of labels a text: read from one column or many, and learnt."""

import datasets
import pytest
import tiny
import torch

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.callbacks.prediction_file import PredictionFile
from d2dmoe_pl.data import DatasetSource, MultiLabel, TextMultiLabel
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import FineTuning

TEXTS = ["rude", "loud", "rude loud", "mild"]
FLAGS = {"loud": [0, 1, 1, 0], "rude": [1, 0, 1, 0]}
COLUMNS = {
    "flags": FLAGS,
    "lists": {"labels": [["rude"], ["loud"], ["loud", "rude"], []]},
    "texts": {"labels": ["rude", "loud", "rude, loud", ""]},
    "lists of pandas": {"labels": ["['rude']", "['loud']", "['loud', 'rude']", "[]"]},
    "tuples of pandas": {"labels": ["('rude',)", "('loud',)", "('loud', 'rude')", "()"]},
    "sets of pandas": {"labels": ["{'rude'}", "{'loud'}", "{'rude', 'loud'}", "set()"]},
    "lists of JSON": {"labels": ['["rude"]', '["loud"]', '["loud", "rude"]', "[]"]},
}
SINGLE = {"label_columns": ["loud", "rude"]}
PLACES = [[0, 1], [1, 0], [1, 1], [0, 0]]
OTHER_FLAGS = {
    "truth values": {name: list(map(bool, values)) for name, values in FLAGS.items()},
    "written by pandas": {name: [f"{value:.1f}" for value in values] for name, values in FLAGS.items()},
    "written by a spreadsheet": {name: [f" {value == 1}".upper() for value in each] for name, each in FLAGS.items()},
    "places": {"labels": PLACES},
    "places as fractions": {"labels": [list(map(float, each)) for each in PLACES]},
    "places as truth values": {"labels": [list(map(bool, each)) for each in PLACES]},
    "places as texts": {"labels": [str(each) for each in PLACES[:3]] + [None]},
    "places as texts with an empty cell": {"labels": [str(each) for each in PLACES[:3]] + [""]},
    "places parted by commas": {"labels": ["0,1", "1,0", "1, 1", " "]},
}


def data_of(folder, columns, **kwargs):
    dataset = datasets.Dataset.from_dict({"text": TEXTS, **columns})
    datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), dataset)).save_to_disk(folder / "data")
    tokenizer = tiny.tokenizer(folder / "tokenizer", ["rude", "loud", "mild"])
    return TextMultiLabel(DatasetSource(str(folder / "data")), tokenizer, **kwargs)


@pytest.mark.parametrize("kind", list(COLUMNS))
def test_several_ways_to_say_the_same(kind, tmp_path):
    data = data_of(tmp_path, COLUMNS[kind], **({"label_columns": ["loud", "rude"]} if kind == "flags" else {}))
    data.setup()
    assert data.task.label_names == ["loud", "rude"]
    labels = next(iter(data.test_dataloader()))["labels"]
    assert labels.tolist() == [[0, 1], [1, 0], [1, 1], [0, 0]]
    assert labels.is_floating_point()


@pytest.mark.parametrize("kind", list(OTHER_FLAGS))
def test_flags_are_no_names(kind, tmp_path):
    data = data_of(tmp_path, OTHER_FLAGS[kind], **(SINGLE if "loud" in OTHER_FLAGS[kind] else {}))
    data.setup()
    assert data.task.label_names == (["0", "1"] if "labels" in OTHER_FLAGS[kind] else ["loud", "rude"])
    assert next(iter(data.test_dataloader()))["labels"].tolist() == PLACES


def test_places_are_the_outputs_of_a_model(tmp_path):
    data = data_of(tmp_path, {"labels": [[0, 1], [0, 0], [0, 1], [0, 0]]})
    data.setup()
    data.number_labels_as(["mild", "rude"])
    assert data.task.label_names == ["mild", "rude"]
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [[0, 1], [0, 0], [0, 1], [0, 0]]


def test_names_may_be_0_and_1(tmp_path):
    data = data_of(tmp_path, {"labels": [[0], [1], [0, 1], []]})
    data.setup()
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]


def test_learnt_saved_and_written(tmp_path, trainer):
    source = HuggingFaceModel("multi-label-classification", config=tiny.bert_config(hidden_dropout_prob=0.0))
    phase = FineTuning(source=source)
    data = data_of(tmp_path, COLUMNS["lists"])
    trainer(callbacks=[SaveArtifact()], max_epochs=60).fit(phase, datamodule=data)
    assert phase.model.config.problem_type == "multi_label_classification"
    again = FineTuning(init_from=str(tmp_path / "run" / "artifact"))
    [measured] = trainer().test(again, datamodule=data_of(tmp_path, COLUMNS["lists"]))
    assert set(measured) >= {"test/f1", "test/macro_f1", "test/exact_match", "test/loss"}
    file = PredictionFile(str(tmp_path / "labels.csv"))
    trainer(callbacks=[file]).predict(again, datamodule=data_of(tmp_path, COLUMNS["lists"]))
    assert [row["label"] for row in file.rows] == ["rude", "loud", "loud, rude", ""]
    for row in file.rows:
        likely = [name for name in ("loud", "rude") if row[f"probability of {name}"] > 0.5]
        assert row["prediction"] == ", ".join(likely)


def test_loss_and_divergence():
    task = MultiLabel(["a", "b"])
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    expected = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), labels)
    torch.testing.assert_close(task.loss(logits, {"labels": labels}), expected)
    assert task.prediction_loss(logits, logits, {}) == 0
    other = torch.tensor([[0.5, 0.3]])
    p, q = logits.sigmoid(), other.sigmoid()
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    back = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    torch.testing.assert_close(task.prediction_loss(logits, other, {}), (kl + back) / 2)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (
            {"labels": [[0, 1], [1, 0], [1, 1, 0], [0, 0]]},
            {},
            r"sample 1 of the train split has \[0, 1\]; must be 3 numbers of 0 and 1, one a label",
        ),
        ({"labels": [[["rude"]], [["loud"]], [], []]}, {}, r"has the label \['rude'\]; must be one name"),
        ({"labels": [[0.2, 0.8], [0.5], [], []]}, {}, r"has the label 0.2; must be one name or whole number"),
        (
            {"loud": [0, 1, 2, 0], "rude": [0] * 4},
            {"label_columns": ["loud", "rude"]},
            "sample 3 of the .* has 2; must",
        ),
        ({"labels": [1, 2, 3, 4]}, {}, "has 1; must be a list of labels, or a text in which commas part them"),
        ({"labels": ["a"] * 4}, {}, "has fewer than two labels in the train split"),
        (FLAGS, {"label_columns": []}, "must be one at least"),
        (
            {"labels": ["['loud' 'rude']"] * 4},
            {},
            "sample 1 of .* has .*; must be a list as Python or JSON writes",
        ),
        ({"labels": ["[0 1 0]"] * 4}, {}, "sample 1 of .* has .*; must be a list as Python or JSON writes"),
        ({"labels": [["loud", None]] * 4}, {}, "sample 1 of .* has the label None, which is none"),
        (
            {"labels": ["rude", "loud;rude", "long", ""]},
            {},
            r"sample 2 of .* has 'loud;rude', parts of which are labels too; must be parted by commas, or be a list",
        ),
        ({"labels": ["a | b", "b | c", "", ""]}, {}, r"sample 1 of .* has 'a \| b', parts of which are labels too"),
    ],
)
def test_labels_that_cannot_be_used(columns, settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        data_of(tmp_path, columns, **settings).setup()
