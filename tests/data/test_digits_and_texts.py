"""Digits and texts: dict batches, labels by index, local files of every kind, and what is wrong with them."""

import pytest
import tiny
import torch
import transformers
from datasets import Dataset, Features, Value
from table_files import ROWS, first, source, table, write

from d2dmoe_pl.data import DatasetSource, Digits, TextClassification
from d2dmoe_pl.data.digits import jitter
from d2dmoe_pl.errors import ConfigError


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.tokenizer(tmp_path / "tok", "abcxyz")


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
        rows = [("a " * (1 + 7 * i % 32), "x", ["joy", "fear"][i % 2]) for i in range(256)]
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
        with pytest.raises(
            ConfigError,
            match=r"train='.*train.xls': the ending must be one of .csv, .tsv, .txt, .conll, .iob, .iob2, .bio, .json",
        ):
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


def test_string_value_features_are_not_needed():
    """Labels may be any hashable values; their names are what ``str`` makes of them."""
    features = Features({"text": Value("string"), "label": Value("bool")})
    splits = {"train": Dataset.from_dict({"text": ["a", "b"], "label": [True, False]}, features=features)}
    from d2dmoe_pl.data.class_labels import encode_labels  # noqa: PLC0415

    encoded, names = encode_labels(splits, "label")
    assert names == ["False", "True"]
    assert encoded["train"]["labels"][:] == [1, 0]
