"""Every DataModule: dict batches, labels by index, local files of every kind, and what is wrong with them."""

import json

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from d2dmoe_pl.data import Augmentation, DatasetSource, Digits, ImageClassification, TextClassification
from d2dmoe_pl.data.digits import jitter
from d2dmoe_pl.errors import ConfigError

ROWS = [("a b c", "x", "joy"), ("b", "y z", "fear"), ("c c", "x", "joy"), ("a", "z", "anger")]


def table(rows=ROWS, label=lambda value: value):
    return Dataset.from_list([{"text": a, "other": b, "label": label(c)} for a, b, c in rows])


def write(dataset, path):
    {".csv": dataset.to_csv, ".json": dataset.to_json, ".jsonl": dataset.to_json, ".parquet": dataset.to_parquet}[
        path.suffix
    ](path)
    return str(path)


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.tokenizer(tmp_path / "tok", "abcxyz")


def source(tmp_path, suffix=".csv", train=None, validation=None, test=None):
    parts = {"train": train, "validation": validation, "test": test}
    return DatasetSource(**{name: write(part or table(), tmp_path / f"{name}{suffix}") for name, part in parts.items()})


def first(loader):
    return next(iter(loader))


class TestDigits:
    def test_fixed_disjoint_splits(self):
        one, other = Digits(), Digits()
        one.setup()
        torch.manual_seed(1)
        other.setup()
        sizes = {name: len(split) for name, split in one._splits.items()}
        assert sizes == {"train": 1247, "validation": 150, "test": 400}
        indices = [index for split in one._splits.values() for index in split.indices]
        assert sorted(indices) == list(range(1797))
        assert indices == [index for split in other._splits.values() for index in split.indices]

    def test_batches(self):
        digits = Digits(batch_size=5)
        digits.setup()
        batch = first(digits.val_dataloader())
        assert batch["pixel_values"].shape == (5, 1, 8, 8)
        assert batch["labels"].shape == (5,)
        assert 0 <= batch["pixel_values"].min() < batch["pixel_values"].max() == 1
        assert digits.task.label_names == list("0123456789")

    def test_only_training_is_shuffled_and_augmented_and_only_until_ordered(self):
        digits = Digits(batch_size=64)
        digits.setup()
        originals = torch.stack([digits._splits["train"][i][0] for i in range(64)])
        assert not torch.equal(first(digits.train_dataloader())["pixel_values"], originals)
        digits.ordered = True
        assert torch.equal(first(digits.train_dataloader())["pixel_values"], originals)

    def test_jitter_moves_images_a_little(self):
        digits = Digits()
        digits.setup()
        images = torch.stack([digits._splits["train"][i][0] for i in range(32)])
        moved = jitter(images)
        assert moved.shape == images.shape
        change = (moved - images).abs().mean()
        assert 0.01 < change < (images[torch.randperm(32)] - images).abs().mean()
        torch.testing.assert_close(jitter(images, 0, 0, 0), images)

    @pytest.mark.parametrize(("key", "value"), [("batch_size", 0), ("num_workers", -1)])
    def test_bad_numbers(self, key, value):
        with pytest.raises(ConfigError, match=f"{key}={value}: must"):
            Digits(**{key: value})


class TestText:
    @pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
    def test_local_files(self, tmp_path, tokenizer, suffix):
        data = TextClassification(source(tmp_path, suffix), tokenizer, batch_size=4)
        data.setup()
        assert data.task.label_names == ["anger", "fear", "joy"]
        batch = first(data.test_dataloader())
        assert batch["labels"].tolist() == [2, 1, 2, 0]
        assert batch["input_ids"].tolist() == [[2, 3, 4], [3, 0, 0], [4, 4, 0], [2, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]

    def test_folder_by_convention(self, tmp_path, tokenizer):
        for name in ("train", "validation", "test"):
            write(table(), tmp_path / f"{name}.csv")
        data = TextClassification(DatasetSource(str(tmp_path)), tokenizer)
        data.setup()
        assert len(data.val_dataloader().dataset) == 4

    def test_pairs_and_truncation(self, tmp_path, tokenizer):
        data = TextClassification(
            source(tmp_path), tokenizer, text_columns=["text", "other"], max_length=3, batch_size=4
        )
        data.setup()
        assert first(data.test_dataloader())["input_ids"].tolist() == [[2, 3, 5], [3, 6, 7], [4, 4, 5], [2, 7, 0]]

    def test_integer_labels_need_not_begin_at_zero(self, tmp_path, tokenizer):
        number = {"joy": 7, "fear": 3, "anger": 5}
        tables = {name: table(label=number.get) for name in ("train", "validation", "test")}
        data = TextClassification(source(tmp_path, **tables), tokenizer, batch_size=4)
        data.setup()
        assert data.task.label_names == ["3", "5", "7"]
        assert first(data.test_dataloader())["labels"].tolist() == [2, 0, 2, 1]

    def test_held_out_splits_are_disjoint(self, tmp_path, tokenizer):
        train = write(table(ROWS * 10), tmp_path / "train.csv")
        splits = DatasetSource(train=train, validation=None, test=None, held_out=0.2).load()
        assert {name: len(split) for name, split in splits.items()} == {"train": 25, "validation": 8, "test": 7}
        again = DatasetSource(train=train, validation=None, test=None, held_out=0.2).load()
        assert all(splits[name].to_list() == again[name].to_list() for name in splits)

    def test_a_path_is_read_whatever_the_dataset(self, tmp_path):
        where = source(tmp_path)
        where.dataset = "nobody/nothing"
        assert {name: len(split) for name, split in where.load().items()} == dict.fromkeys(
            ("train", "validation", "test"), 4
        )

    def test_batches_of_like_length(self, tmp_path, tokenizer):
        rows = [("a " * (1 + 7 * i % 32), "x", "joy") for i in range(256)]
        tables = {name: table(rows) for name in ("train", "validation", "test")}
        data = TextClassification(source(tmp_path, **tables), tokenizer, batch_size=8, group_by_length=True)
        data.setup()
        assert [list(batch["input_ids"].shape) for batch in data.test_dataloader()] == [
            [8, length] for length in range(1, 33)
        ]
        assert first(data.predict_dataloader())["input_ids"].shape == (8, 29)  # in their own order
        batches = list(data.train_dataloader())
        lengths = [length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]
        assert sorted(lengths) == sorted(len(text.split()) for text, _, _ in rows)
        padded = sum(batch["attention_mask"].numel() for batch in batches)
        assert padded < 1.2 * sum(lengths)
        again = [length for batch in data.train_dataloader() for length in batch["attention_mask"].sum(1).tolist()]
        assert again == lengths  # until the trainer sets another epoch
        data.ordered = True
        assert first(data.train_dataloader())["input_ids"].shape == (8, 29)

    def test_the_tokenizer_is_saved(self, tmp_path, tokenizer):
        (tmp_path / "out").mkdir()
        data = TextClassification(source(tmp_path), tokenizer)
        data.load_processor()
        data.save_processor(tmp_path / "out")
        assert (tmp_path / "out" / "tokenizer.json").is_file()

    def test_a_label_unseen_in_training(self, tmp_path, tokenizer):
        test = table([*ROWS, ("a", "b", "awe")])
        data = TextClassification(source(tmp_path, test=test), tokenizer)
        message = "label: the test split has labels unseen in training: awe; allowed are anger, fear, joy"
        with pytest.raises(ConfigError, match=message):
            data.setup()

    def test_an_empty_split(self, tmp_path, tokenizer):
        where = source(tmp_path)
        (tmp_path / "validation.csv").write_text("text,other,label\n")
        with pytest.raises(ConfigError, match="validation"):
            TextClassification(where, tokenizer).setup()

    def test_a_missing_column(self, tmp_path, tokenizer):
        data = TextClassification(source(tmp_path), tokenizer, text_columns=["sentence"])
        message = r"text_columns\[0\]='sentence': not a column of the train split, which has text, other, label"
        with pytest.raises(ConfigError, match=message):
            data.setup()

    def test_a_missing_file(self, tmp_path, tokenizer):
        with pytest.raises(ConfigError, match=r"train='.*nowhere.csv': no such file or folder"):
            TextClassification(DatasetSource(train=str(tmp_path / "nowhere.csv")), tokenizer).setup()

    def test_an_unknown_ending(self, tmp_path, tokenizer):
        (tmp_path / "train.xls").write_text("")
        with pytest.raises(ConfigError, match=r"train='.*train.xls': the ending must be one of .csv, .tsv, .json"):
            TextClassification(DatasetSource(train=str(tmp_path / "train.xls")), tokenizer).setup()

    def test_an_unreachable_hub_name(self, tokenizer):
        with pytest.raises(ConfigError, match="train='train' of dataset='nobody/nothing': cannot be loaded"):
            TextClassification(DatasetSource("nobody/nothing"), tokenizer).setup()

    def test_an_unreachable_tokenizer(self, tmp_path):
        with pytest.raises(ConfigError, match="tokenizer='nobody/nothing': neither a folder nor a reachable hub name"):
            TextClassification(source(tmp_path), "nobody/nothing").load_processor()

    def test_a_tokenizer_that_has_nothing_to_pad_with(self, tmp_path, tokenizer):
        bare = transformers.AutoTokenizer.from_pretrained(tokenizer)
        bare.pad_token = None
        bare.save_pretrained(tmp_path / "bare")
        with pytest.raises(ConfigError, match=r"tokenizer='.*': has neither a token to pad with nor one that ends"):
            TextClassification(source(tmp_path), str(tmp_path / "bare")).load_processor()
        bare.eos_token = "z"
        bare.save_pretrained(tmp_path / "decoders")
        data = TextClassification(source(tmp_path), str(tmp_path / "decoders"))
        data.load_processor()
        batch = data.collate([{"input_ids": [3, 4, 5], "labels": 0}, {"input_ids": [3], "labels": 1}], augment=False)
        assert batch["input_ids"].tolist() == [[3, 4, 5], [3, bare.eos_token_id, bare.eos_token_id]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]

    def test_three_text_columns(self, tmp_path, tokenizer):
        with pytest.raises(ConfigError, match=r"text_columns=.*: must be one column or two"):
            TextClassification(source(tmp_path), tokenizer, text_columns=["a", "b", "c"])


class TestImages:
    def images(self, count=6):
        return [Pillow.fromarray(np.random.randint(0, 255, (9, 12, 3), dtype=np.uint8)) for _ in range(count)]

    def parquet(self, tmp_path):
        features = Features({"picture": Image(), "kind": ClassLabel(names=["cat", "dog"])})
        rows = {"picture": self.images(), "kind": [0, 1, 0, 1, 1, 0]}
        dataset = Dataset.from_dict(rows, features=features)
        return DatasetSource(**{n: write(dataset, tmp_path / f"{n}.parquet") for n in ("train", "validation", "test")})

    def test_parquet_with_class_labels(self, tmp_path):
        data = ImageClassification(
            self.parquet(tmp_path), image_column="picture", label_column="kind", image_size=8, batch_size=4
        )
        data.setup()
        assert data.task.label_names == ["cat", "dog"]
        batch = first(data.val_dataloader())
        assert batch["pixel_values"].shape == (4, 3, 8, 8)
        assert batch["labels"].tolist() == [0, 1, 0, 1]
        assert torch.equal(batch["pixel_values"], first(data.val_dataloader())["pixel_values"])
        data.ordered = True
        assert torch.equal(first(data.train_dataloader())["pixel_values"], batch["pixel_values"])

    def test_image_folder(self, tmp_path):
        for split in ("train", "validation", "test"):
            for i, image in enumerate(self.images()):
                folder = tmp_path / "images" / split / ("cat" if i % 2 else "dog")
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{i}.png")
        for where in (
            DatasetSource(str(tmp_path / "images")),
            DatasetSource(**{n: str(tmp_path / "images" / n) for n in ("train", "validation", "test")}),
        ):
            data = ImageClassification(where, image_size=8, batch_size=6)
            data.setup()
            assert data.task.label_names == ["cat", "dog"]
            assert first(data.test_dataloader())["pixel_values"].shape == (6, 3, 8, 8)

    def test_only_training_is_mixed_and_only_until_ordered(self, tmp_path):
        mixing = Augmentation(mixup=1.0, cutmix=1.0, label_smoothing=0.1, auto_augment="3a")
        where = self.parquet(tmp_path)
        data = ImageClassification(where, "picture", "kind", image_size=8, batch_size=5, augmentation=mixing)
        data.setup()
        assert data.augmented
        for batch in data.train_dataloader():  # of 5, and of 1
            assert batch["pixel_values"].shape[1:] == (3, 8, 8)
            assert batch["labels"].shape == (len(batch["pixel_values"]), 2)
            torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(len(batch["labels"])))
        assert all(first(loader)["labels"].dim() == 1 for loader in (data.val_dataloader(), data.test_dataloader()))
        data.ordered = True
        assert torch.equal(first(data.train_dataloader())["labels"], first(data.val_dataloader())["labels"])
        plain = ImageClassification(where, "picture", "kind", image_size=8, batch_size=6, augment=False)
        plain.setup()
        assert not plain.augmented
        one, other = (first(plain.train_dataloader())["pixel_values"].sum((1, 2, 3)).tolist() for _ in range(2))
        assert sorted(one) == sorted(other)

    def test_preprocessing_is_saved_and_taken_up(self, tmp_path):
        data = ImageClassification(
            self.parquet(tmp_path), "picture", "kind", image_size=8, mean=[0.1] * 3, std=[0.5] * 3
        )
        data.save_processor(tmp_path)
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert saved["size"] == {"height": 8, "width": 8}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
        again = ImageClassification(self.parquet(tmp_path), "picture", "kind", processor=str(tmp_path))
        again.load_processor()
        assert (again.image_size, again.mean, again.std) == (8, [0.1] * 3, [0.5] * 3)

    def test_an_unreachable_processor(self, tmp_path):
        data = ImageClassification(self.parquet(tmp_path), "picture", "kind", processor="nobody/nothing")
        with pytest.raises(ConfigError, match="processor='nobody/nothing': neither a folder nor a reachable hub name"):
            data.load_processor()


def test_string_value_features_are_not_needed():
    """Labels may be any hashable values; their names are what ``str`` makes of them."""
    features = Features({"text": Value("string"), "label": Value("bool")})
    splits = {"train": Dataset.from_dict({"text": ["a", "b"], "label": [True, False]}, features=features)}
    from d2dmoe_pl.data.dataset_source import encode_labels  # noqa: PLC0415

    encoded, names = encode_labels(splits, "label")
    assert names == ["False", "True"]
    assert encoded["train"]["labels"][:] == [1, 0]
