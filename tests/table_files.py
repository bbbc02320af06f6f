"""Small tables of labelled texts, in files of every kind."""

from datasets import Dataset

from d2dmoe_pl.data import DatasetSource

ROWS = [("a b c", "x", "joy"), ("b", "y z", "fear"), ("c c", "x", "joy"), ("a", "z", "anger")]


def table(rows=ROWS, label=lambda value: value):
    return Dataset.from_list([{"text": a, "other": b, "label": label(c)} for a, b, c in rows])


def write(dataset, path):
    {".csv": dataset.to_csv, ".json": dataset.to_json, ".jsonl": dataset.to_json, ".parquet": dataset.to_parquet}[
        path.suffix
    ](path)
    return str(path)


def source(tmp_path, suffix=".csv", train=None, validation=None, test=None):
    parts = {"train": train, "validation": validation, "test": test}
    return DatasetSource(**{name: write(part or table(), tmp_path / f"{name}{suffix}") for name, part in parts.items()})


def first(loader):
    return next(iter(loader))
