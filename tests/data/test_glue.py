"""GLUE from local files: columns, labels, metrics, and MNLI's two validation sets."""

import json
import math

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data import GLUE, DatasetSource
from d2dmoe_pl.data.glue import GLUE_TASKS, hub_source, with_labels
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RouterRegression

WORDS = "abcdefgh"


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.tokenizer(tmp_path / "tok", WORDS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))


def rows(name, count, label=None):
    """Texts whose first word tells the label."""
    made_of = GLUE_TASKS[name]
    outputs = len(made_of.label_names) or 6
    made = []
    for i in range(count):
        words = [WORDS[i % outputs], *(WORDS[(i * 5 + j) % len(WORDS)] for j in range(i % 4))]
        texts = {column: " ".join(words) for column in made_of.columns}
        made.append({**texts, "label": i % outputs if label is None else label, "idx": i})
    return made


def write(folder, name, **more):
    """A folder of JSON lines: 24 rows to train on, 7 to validate, an unlabelled test split."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": rows(name, 24), "validation": rows(name, 7), "test": rows(name, 5, label=-1), **more}
    files = {}
    for split, content in parts.items():
        files[split] = str(folder / f"{split}.jsonl")
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    own = {split: files.pop(split) for split in ("train", "validation", "test")}
    return DatasetSource(**own, more=files)


def glue(tmp_path, tokenizer, name, **more):
    return GLUE(name, tokenizer, write(tmp_path / name, name, **more), max_length=12, batch_size=4)


METRICS = {
    "cola": {"matthews_correlation"},
    "sst2": {"accuracy"},
    "mrpc": {"accuracy", "f1"},
    "stsb": {"pearson", "spearman"},
    "qqp": {"accuracy", "f1"},
    "mnli": {"accuracy"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
    "wnli": {"accuracy"},
}


@pytest.mark.parametrize("name", METRICS)
def test_every_task(tmp_path, tokenizer, name):
    data = glue(tmp_path, tokenizer, name)
    assert data.head == ("regression" if name == "stsb" else "classification")  # known before any data is
    data.setup()
    assert data.task.head == data.head
    assert set(data.task.metrics()) == {"loss", *METRICS[name]}
    assert data.task.main_metric in METRICS[name]
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == [i % (len(GLUE_TASKS[name].label_names) or 6) for i in range(4)]
    assert batch["labels"].is_floating_point() == (name == "stsb")
    separators = (batch["input_ids"] == 3).sum(dim=1)
    assert (separators == len(GLUE_TASKS[name].columns)).all()
    test = list(data.test_dataloader())  # the validation split, since the test split has no labels
    assert sum(len(each["labels"]) for each in test) == 7
    assert min(int(each["labels"].min()) for each in test) == 0


def test_a_labelled_test_split_is_used(tmp_path, tokenizer):
    data = glue(tmp_path, tokenizer, "rte", test=rows("rte", 3))
    data.setup()
    assert len(data.test_dataloader().dataset) == 3


@pytest.mark.parametrize("name", ["rte", "stsb"])
@pytest.mark.parametrize("label", [-1, -1.0, "-1", "-1.0", None, ""])
def test_a_test_split_without_labels_is_replaced(name, label, tmp_path, tokenizer, caplog):
    unlabelled = [{**row, "label": label} for row in rows(name, 3)]
    data = glue(tmp_path, tokenizer, name, test=unlabelled)
    data.setup("test")
    assert not caplog.messages
    data.setup("predict")
    assert caplog.messages == ["The test split has no labels; predictions are for the validation split, in its place."]
    assert data._splits["test"]["labels"][:] == data._splits["validation"]["labels"][:]


def test_a_test_split_without_a_column_of_labels(tmp_path, tokenizer):
    source = write(tmp_path / "rte", "rte", test=[{"sentence1": "a", "sentence2": "b"}])
    data = GLUE("rte", tokenizer, source, max_length=12)
    data.setup()
    assert len(data._splits["test"]) == 7
    source = write(tmp_path / "rte", "rte", validation=[{"sentence1": "a", "sentence2": "b"}])
    with pytest.raises(ConfigError, match=r"^rte column 2='label': not a column of the validation split, which has"):
        GLUE("rte", tokenizer, source, max_length=12).setup()


def test_pairs_of_texts_to_predict_for(tmp_path, tokenizer, caplog):
    data = glue(tmp_path, tokenizer, "rte")
    data.predict_for(["a b\tc", "d\t"])
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3, 6, 3], [2, 7, 3, 3, 0, 0]]
    assert not caplog.messages
    with pytest.raises(ConfigError, match=r"^text='a b': must be 2 texts, parted by a tab$"):
        data.raw_samples(["a b"])


def test_the_hub_has_two_validation_sets_of_mnli():
    source = hub_source("mnli")
    assert (source.dataset, source.config, source.validation) == ("nyu-mll/glue", "mnli", "validation_matched")
    assert source.more == {"validation_mismatched": "validation_mismatched"}
    assert hub_source("rte") == DatasetSource("nyu-mll/glue", "rte")


@pytest.mark.parametrize(
    "labels", [[0, 1, 1], ["0", "1", "1"], ["0.0", "1.0", " 1 "], ["not_equivalent", "equivalent", "equivalent"]]
)
def test_labels_by_index_or_name(labels):
    split = with_labels(Dataset.from_dict({"label": labels}), "train", GLUE_TASKS["mrpc"].label_names)
    assert split["labels"][:] == [0, 1, 1]


def test_an_unknown_label(tmp_path, tokenizer):
    data = glue(tmp_path, tokenizer, "rte", validation=rows("rte", 3, label=2))
    message = "label=2 in the validation split: allowed are 0 to 1, or entailment, not_entailment"
    with pytest.raises(ConfigError, match=message):
        data.setup()
    data = glue(tmp_path / "stsb", tokenizer, "stsb", validation=[{**rows("stsb", 1)[0], "label": "close"}])
    with pytest.raises(ConfigError, match="label='close' in the validation split: allowed are numbers"):
        data.setup()


def test_a_label_that_is_missing():
    names = ["entailment", "not_entailment"]
    split = Dataset.from_dict({"label": [1, None]}, features=Features({"label": ClassLabel(names=names)}))
    with pytest.raises(ConfigError, match=r"^label=None in the train split: allowed are 0 to 1, or entailment, not_"):
        with_labels(split, "train", GLUE_TASKS["rte"].label_names)


def test_a_missing_column(tmp_path, tokenizer):
    data = GLUE("rte", tokenizer, write(tmp_path / "qnli", "qnli"))
    with pytest.raises(ConfigError, match="rte column 0='sentence1': not a column of the train split, which has quest"):
        data.setup()


def test_bad_names(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="name='snli': allowed are cola, sst2, mrpc"):
        GLUE("snli", tokenizer)
    source = write(tmp_path / "mnli", "mnli", mismatched=rows("mnli", 3))
    with pytest.raises(ConfigError, match=r"more=\{'mismatched': ...\}: names must begin with validation_ or test_"):
        GLUE("mnli", tokenizer, source).setup()


def fine_tuned(trainer, data, task, **kwargs):
    source = HuggingFaceModel(task, config=tiny.bert_config(max_position_embeddings=32))
    phase = FineTuning(source=source, activation="relu", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    run = trainer(callbacks=[SaveArtifact()], max_epochs=12, limit_train_batches=1.0, limit_val_batches=1.0, **kwargs)
    run.fit(phase, datamodule=data)
    return run, phase


def test_fine_tuning_on_a_number(trainer, tokenizer, tmp_path):
    data = glue(tmp_path, tokenizer, "stsb")
    run, phase = fine_tuned(trainer, data, "text-regression")
    logged = dict(run.callback_metrics)
    assert logged["validation/pearson"] > 0.5
    assert not math.isnan(logged["validation/spearman"])
    run.test(phase, datamodule=data, verbose=False)
    assert float(run.callback_metrics["test/pearson"]) == pytest.approx(float(logged["validation/pearson"]))
    predicted = run.predict(phase, datamodule=data)
    assert torch.cat([batch["predictions"] for batch in predicted]).shape == (7,)


def test_a_number_needs_a_regression_head(trainer, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"head='classification' of Bert.*: the data needs .* head 'regression'"):
        fine_tuned(trainer, glue(tmp_path, tokenizer, "stsb"), "text-classification")


def test_both_validation_sets_of_mnli_are_reported_apart(trainer, tokenizer, tmp_path):
    mismatched = [{**row, "label": (row["label"] + 1) % 3} for row in rows("mnli", 9)]  # always wrong
    data = glue(tmp_path, tokenizer, "mnli", validation_mismatched=mismatched)
    run, phase = fine_tuned(trainer, data, "text-classification")
    expected = {f"validation{more}/{key}" for more in ("", "_mismatched") for key in ("loss", "accuracy")}
    path = tmp_path / "run" / "artifact"
    metrics = read_artifact(path).history[0].metrics
    assert set(metrics) == expected
    assert metrics["validation/accuracy"] > 0.5 > metrics["validation_mismatched/accuracy"]
    tested = run.test(phase, datamodule=data, verbose=False)
    assert {key for each in tested for key in each} == {key.replace("validation", "test") for key in expected}
    assert float(run.callback_metrics["test/accuracy"]) == pytest.approx(metrics["validation/accuracy"])

    for phase in (ExpertClustering(8, num_samples=20), RouterRegression(8)):
        phase.init_from = str(path)
        sweep = TauSweep([0.5, 1.0])
        callbacks = [SaveArtifact(), *([sweep] if phase.ends_at == "routed" else [])]
        trainer(callbacks=callbacks, limit_val_batches=1.0).fit(phase, datamodule=data)
    assert list(sweep.rows) == ["validation", "validation_mismatched"]
    for split, swept in sweep.rows.items():
        assert swept[-1].score == pytest.approx(100 * metrics[f"{split}/accuracy"])  # every expert runs


@pytest.mark.parametrize(("value", "what"), [(None, "no text"), (3, "3; must be a text")])
def test_texts_that_are_missing(value, what, tokenizer, tmp_path):
    broken = [{**row, "sentence": value} for row in rows("sst2", 24)]
    data = GLUE("sst2", tokenizer, write(tmp_path / "data", "sst2", train=broken))
    with pytest.raises(ConfigError, match=f"^column='sentence': .* has {what}$"):
        data.setup()
