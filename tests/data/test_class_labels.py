"""Labels go by name: those of several splits, and those of a trained model's outputs."""

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from table_files import ROWS, source, table

from d2dmoe_pl.data import GLUE, DatasetSource, TextClassification, TextRegression
from d2dmoe_pl.data.class_labels import encode_labels, encode_numbers
from d2dmoe_pl.data.output_names import places, renumbered
from d2dmoe_pl.data.task import Classification
from d2dmoe_pl.errors import ConfigError


def labelled(labels, names=None):
    """A dataset of these labels; with names, they are numbers of a ClassLabel."""
    texts = [f"text {i}" for i in range(len(labels))]
    feature = Features({"text": Value("string"), "label": ClassLabel(names=names)}) if names else None
    return Dataset.from_dict({"text": texts, "label": labels}, features=feature)


def names_of(splits):
    """The labels of each split, as names again."""
    encoded, names = encode_labels(splits, "label")
    return {name: [names[label] for label in split["labels"]] for name, split in encoded.items()}


class TestSplits:
    def test_folders_that_lack_a_class_number_the_others_as_training_does(self):
        splits = {
            "train": labelled([0, 1, 2, 1, 0, 2], ["ant", "bee", "cat"]),
            "test": labelled([0, 1, 1], ["bee", "cat"]),
        }
        assert names_of(splits)["test"] == ["bee", "cat", "cat"]

    @given(st.permutations(["ant", "bee", "cat"]), st.permutations(["ant", "bee", "cat"]))
    def test_the_order_of_a_splits_own_names_does_not_matter(self, train, test):
        animals = ["bee", "ant", "cat", "ant", "bee"]
        splits = {
            name: labelled([order.index(animal) for animal in animals], list(order))
            for name, order in (("train", train), ("test", test))
        }
        assert names_of(splits) == {"train": animals, "test": animals}

    def test_numbers_are_not_read_with_the_names_of_another_split(self):
        splits = {"train": labelled([0, 1, 0], ["ant", "bee"]), "test": labelled([0, 1])}
        with pytest.raises(ConfigError, match="label: the test split has labels unseen in training: 0, 1; allowed are"):
            names_of(splits)

    def test_of_many_unseen_labels_it_says_how_many_more_there_are(self):
        splits = {"train": labelled(["ant", "bee"]), "test": labelled(["cat", "dog", "eel", "fox", "gnu", "hen"])}
        with pytest.raises(ConfigError, match="unseen in training: cat, dog, eel, fox, gnu and 1 more; allowed are"):
            names_of(splits)

    def test_names_of_one_split_and_class_labels_of_another(self):
        splits = {"train": labelled(["bee", "ant", "bee"]), "test": labelled([1, 0], ["ant", "bee"])}
        assert names_of(splits)["test"] == ["bee", "ant"]

    def test_whole_numbers_are_the_same_however_they_are_written(self):
        splits = {"train": labelled(["0.0", "1.0", "0"]), "test": labelled([1, 0])}
        assert names_of(splits) == {"train": ["0", "1", "0"], "test": ["1", "0"]}
        assert places(["0.0", "1"], ["LABEL_0", "LABEL_1"]) == [0, 1]
        assert places(["1", "0"], ["0.0", "1.0"]) == [1, 0]

    def test_blanks_around_names_are_no_new_class(self):
        splits = {"train": labelled(["joy", " joy", "fear ", "fear"]), "test": labelled([" fear", "joy"])}
        assert names_of(splits) == {"train": ["joy", "joy", "fear", "fear"], "test": ["fear", "joy"]}

    def test_numbers_are_ordered_as_numbers_also_where_they_are_texts(self):
        _, names = encode_labels({"train": labelled(["10", "9", "2", "10", "9", "2"])}, "label")
        assert names == ["2", "9", "10"]

    def test_what_is_written_as_no_number_is_a_name(self):
        splits = {"train": labelled(["nan", "some", "inf"]), "test": labelled(["nan", "nan"])}
        assert encode_labels(splits, "label")[1] == ["inf", "nan", "some"]

    def test_whole_numbers_with_a_point_are_whole_numbers(self):
        splits = {"train": labelled([1.0, 2.0, 1.0]), "test": labelled([2, 1])}
        assert names_of(splits) == {"train": ["1", "2", "1"], "test": ["2", "1"]}

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([1, 2, 2.5], "sample 3 of the train split has 2.5, a number with a fractional part.* text-regression"),
            (
                ["1", "0.5", "2"],
                "sample 2 of the train split has 0.5, a number with a fractional part.* text-regression",
            ),
            (list(range(40)), "has 40 different values in 40 samples of the train split, .* text-regression"),
            (["a", None, "b"], "sample 2 of the train split has no label"),
            (["a", "b", " "], "sample 3 of the train split has no label"),
            ([0.0, float("nan")], "sample 2 of the train split has no label"),
            ([["a"], ["b", "c"]], r"sample 1 of the train split has \['a'\]; must be one name or whole number"),
            ([{"x": 1}, {"x": 2}], r"sample 1 of the train split has \{'x': 1\}; must be one name or whole number"),
            (["joy", "joy "], "has one class only, joy; must have two at least"),
        ],
    )
    def test_what_is_no_class_is_refused(self, labels, message):
        with pytest.raises(ConfigError, match=f"label_column='label': {message}"):
            encode_labels({"train": labelled(labels)}, "label")

    def test_a_number_without_a_name(self):
        split = labelled([0, 1], ["ant", "bee"])
        split = Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=split.features)
        with pytest.raises(ConfigError, match="sample 2 of the train split has the number -1, which is none of its 2"):
            encode_labels({"train": split}, "label")

    def test_another_column_of_the_name_that_batches_use_gives_way(self):
        split = labelled(["a", "b"]).add_column("labels", ["x", "y"])
        encoded, names = encode_labels({"train": split}, "label")
        assert (encoded["train"]["labels"][:], names) == ([0, 1], ["a", "b"])
        encoded, names = encode_labels({"train": split}, "labels")
        assert (encoded["train"]["labels"][:], names) == ([0, 1], ["x", "y"])


class TestPlaces:
    @given(st.permutations(["sad", "glad", "so so", "Angry"]))
    def test_names_find_themselves_however_they_are_ordered(self, outputs):
        assert [outputs[i] for i in places(["so so", "sad"], outputs)] == ["so so", "sad"]

    def test_case_blanks_and_hyphens_do_not_matter_unless_they_tell_classes_apart(self):
        assert places(["not_equivalent", "Equivalent "], ["EQUIVALENT", "not equivalent"]) == [1, 0]
        assert places(["us"], ["US", "us"]) == [1]
        assert places(["Us"], ["US", "us"]) is None

    def test_numbers_are_places_unless_outputs_have_numbers_for_names(self):
        assert places(["2", "0"], ["neg", "neu", "pos"]) == [2, 0]
        assert places(["2", "0"], ["2", "1", "0"]) == [0, 2]
        assert places(["3"], ["neg", "neu", "pos"]) is None
        assert places(["1", "2", "3", "4"], [f"{number} stars" for number in range(1, 6)]) is None  # counted from 1
        assert places(["1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]) == [1, 2]
        assert places(["0", "3"], ["1", "2", "3"]) is None

    def test_placeholders_tell_nothing(self):
        assert places(["neg", "pos"], ["LABEL_0", "LABEL_1"]) is None


@pytest.fixture(scope="module")
def data_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    data = TextClassification(source(folder), tiny.tokenizer(folder / "tok", "abcxyz"), batch_size=4)
    data.setup()
    return data


class TestNumbering:
    @pytest.fixture
    def data(self, tmp_path):
        data = TextClassification(source(tmp_path), tiny.tokenizer(tmp_path / "tok", "abcxyz"), batch_size=4)
        data.setup()
        return data

    def labels(self, data):
        return next(iter(data.test_dataloader()))["labels"].tolist()

    @given(order=st.permutations(["anger", "awe", "fear", "joy"]))
    def test_batches_are_numbered_as_the_model_is(self, data_once, order):
        data_once.number_labels_as(order)
        assert data_once.task.label_names == list(order)
        assert [order[i] for i in self.labels(data_once)] == ["joy", "fear", "joy", "anger"]

    def test_back_to_the_datas_own(self, data):
        data.number_labels_as(["joy", "fear", "anger"])
        assert self.labels(data) == [0, 1, 0, 2]
        data.number_labels_as(None)
        assert self.labels(data) == [2, 1, 2, 0]
        assert data.task.label_names == ["anger", "fear", "joy"]

    def test_batches_stay_on_the_cpu_wherever_models_are_made(self, data):
        with torch.device("meta"):  # as Lightning has a GPU be the default while a phase makes its model
            data.number_labels_as(["joy", "fear", "anger"])
        assert self.labels(data) == [0, 1, 0, 2]

    def test_a_class_that_the_model_lacks(self, data):
        with pytest.raises(ConfigError, match="labels: anger, fear, joy are not all among fear, joy"):
            data.number_labels_as(["fear", "joy"])

    def test_probabilities_move_with_their_classes(self):
        mixed = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
        assert renumbered(mixed, torch.tensor([2, 0, 1])).tolist() == [
            pytest.approx([0.2, 0.1, 0.7]),
            pytest.approx([0.5, 0.5, 0.0]),
        ]
        assert renumbered(mixed[:, :2], torch.tensor([2, 0, 1])).tolist() == [
            pytest.approx([0.2, 0.0, 0.7]),
            pytest.approx([0.5, 0.0, 0.0]),
        ]

    @pytest.mark.parametrize("order", [["not_equivalent", "equivalent"], ["equivalent", "not_equivalent"]])
    def test_f1_stays_that_of_its_class(self, order):
        task = Classification(["not_equivalent", "equivalent"], ("f1", "accuracy")).with_label_names(order)
        truth = ["equivalent", "equivalent", "equivalent", "not_equivalent", "not_equivalent"]
        said = ["equivalent", "equivalent", "not_equivalent", "equivalent", "not_equivalent"]
        logits = torch.nn.functional.one_hot(torch.tensor([order.index(name) for name in said]), 2).float()
        metrics = task.metrics()
        metrics.update(logits, {"labels": torch.tensor([order.index(name) for name in truth])})
        assert metrics.compute()["f1"] == pytest.approx(2 / 3)  # 2 right of 3 said and of 3 there are


def test_glue_reads_class_labels_by_their_names(tmp_path):
    swapped = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    for name in ("train", "validation", "test"):
        rows = {"sentence": ["a", "b", "c"], "label": [0, 1, 1]}
        Dataset.from_dict(rows, features=swapped).to_parquet(tmp_path / f"{name}.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "validation", "test")}
    where = type(source(tmp_path))(**files)
    data = GLUE("sst2", tiny.tokenizer(tmp_path / "tok", "abc"), where, batch_size=3)
    data.setup()
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [1, 0, 0]
    assert data.task.label_names == ["negative", "positive"]


class TestNumbers:
    def test_any_column_of_numbers_can_be_learnt(self, tmp_path):
        tables = {
            name: table(label={"joy": 0.5, "fear": -3, "anger": 1e3}.get) for name in ("train", "validation", "test")
        }
        tokenizer = tiny.tokenizer(tmp_path / "tok", "abcxyz")
        data = TextRegression(source(tmp_path, **tables), tokenizer, batch_size=4)
        data.setup()
        assert next(iter(data.test_dataloader()))["labels"].tolist() == [0.5, -3.0, 0.5, 1000.0]
        assert (data.task.head, data.task.label_names) == ("regression", ["label"])

    @pytest.mark.parametrize("value", ["much", "", "nan", "inf"])
    def test_what_is_no_number_is_refused(self, tmp_path, value):
        test = table([*ROWS, ("a", "b", "odd")], label=lambda name: value if name == "odd" else "1.5")
        tables = {name: table(label=lambda _: "1.5") for name in ("train", "validation")}
        data = TextRegression(source(tmp_path, test=test, **tables), tiny.tokenizer(tmp_path / "tok", "abcxyz"))
        with pytest.raises(
            ConfigError, match=f"label_column='label': '{value}' in sample 5 of the test split is no num"
        ):
            data.setup()

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("1e39", r"label_column='label': '1e39' in sample 1 of the train split is too large; must be at most 3.40"),
            ("1.5", "label_column='label': all numbers of the train split are 1.5; must differ"),
        ],
    )
    def test_what_cannot_be_learnt_is_refused(self, tmp_path, value, message):
        tables = {name: table(label=lambda _: value) for name in ("train", "validation", "test")}
        data = TextRegression(source(tmp_path, **tables), tiny.tokenizer(tmp_path / "tok", "abcxyz"))
        with pytest.raises(ConfigError, match=message):
            data.setup()

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_numbers_with_which_nothing_correlates_are_refused(self, tmp_path, split):
        tables = {
            name: table(label={"joy": 0.5, "fear": -3, "anger": 2}.get) for name in ("train", "validation", "test")
        }
        tables[split] = table(label=lambda _: "2")
        data = TextRegression(source(tmp_path, **tables), tiny.tokenizer(tmp_path / "tok", "abcxyz"))
        with pytest.raises(ConfigError, match=f"label_column='label': all numbers of the {split} split are 2; must di"):
            data.setup()


def test_the_order_of_numbers_is_one_even_if_they_are_written_in_several_ways():
    names = ["1", "01", "+1", "2", "007", "7"]
    _, found = encode_labels({"train": labelled(names * 3)}, "label")
    assert found == ["+1", "01", "1", "2", "007", "7"]


def test_one_class_only_whatever_names_there_are():
    splits = {"train": labelled([0] * 9, ["neg", "pos"]), "test": labelled([0], ["neg", "pos"])}
    with pytest.raises(ConfigError, match="label_column='label': has one class only, neg; must have two at least"):
        encode_labels(splits, "label")


def test_texts_in_a_column_that_is_called_as_labels_are_kept(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("labels,mood\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(9)))
    where = DatasetSource(train=str(file), validation=None, test=None, held_out=0.3)
    data = TextClassification(where, "tokenizer", text_columns=["labels"], label_column="mood")
    with pytest.raises(
        ConfigError, match=r"text_columns\[0\]='labels': is what the labels are kept as; must be renamed"
    ):
        data.load()


@pytest.mark.parametrize("odd", ["3_456", "1_0", "nan", "0,5", "inf", None])
def test_what_is_no_number_is_told(odd):
    """Python reads underscores in numbers as if they were not there, and nobody else."""
    splits = {"train": Dataset.from_dict({"score": ["0.5", odd, "0.7"]})}
    with pytest.raises(ConfigError, match=r"^label_column='score': .* in sample 2 of the train split is no number"):
        encode_numbers(splits, "score")
