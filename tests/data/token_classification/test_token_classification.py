"""A label for each word: where it stands, what is counted, and what is refused."""

import datasets
import pytest
import tiny
import torch

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.callbacks.prediction_file import PredictionFile
from d2dmoe_pl.data import DatasetSource, TokenClassification, TokenTagging
from d2dmoe_pl.data.token_classification.token_tagging import EntityF1
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import FineTuning

TAGS = ["O", "B-PER", "I-PER", "B-LOC"]
WORDS = ["anna", "berlin", "lives", "in", "müller"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SENTENCES = [
    (["anna", "lives", "in", "berlin"], ["B-PER", "O", "O", "B-LOC"]),
    (["anna", "müller", "lives"], ["B-PER", "I-PER", "O"]),
]


def write(folder, samples=SENTENCES, kind="list"):
    """Three splits of these samples, as lists of names, numbers of classes, or texts."""
    words, labels = ([sample[i] for sample in samples] for i in (0, 1))
    if kind == "text":
        words, labels = ([" ".join(each) for each in column] for column in (words, labels))
    if kind == "list as text":
        words, labels = ([str(each) for each in column] for column in (words, labels))
    dataset = datasets.Dataset.from_dict({"tokens": words, "ner_tags": labels})
    if kind == "classes":
        numbers = [[TAGS.index(label) for label in sample] for sample in labels]
        features = datasets.Features(
            {
                "tokens": datasets.List(datasets.Value("string")),
                "ner_tags": datasets.List(datasets.ClassLabel(names=TAGS)),
            }
        )
        dataset = datasets.Dataset.from_dict({"tokens": words, "ner_tags": numbers}, features)
    datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), dataset)).save_to_disk(folder / "data")
    return str(folder / "data")


def data_of(folder, samples=SENTENCES, kind="list", **kwargs):
    path = write(folder, samples, kind)
    tokenizer = tiny.tokenizer(folder / "tokenizer", WORDS, SPECIAL)
    return TokenClassification(DatasetSource(path), tokenizer, **kwargs)


@pytest.mark.parametrize("kind", ["list", "classes", "text", "list as text"])
def test_labels_stand_at_first_tokens(kind, tmp_path):
    data = data_of(tmp_path, kind=kind)
    data.setup()
    names = data.task.label_names
    assert names == (TAGS if kind == "classes" else sorted(TAGS))
    batch = next(iter(data.test_dataloader()))
    numbers = [[names.index(tag) for tag in tags] for _, tags in SENTENCES]
    assert batch["labels"].tolist() == [[-100, *numbers[0], -100], [-100, *numbers[1], -100, -100]]
    assert batch["input_ids"].shape == batch["labels"].shape


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        (["B-PER", "", "O", "O"], r"has the label '', which is none; must be there for each"),
        (["B-PER", " ", "O", "O"], r"has the label '', which is none; must be there for each"),
        ("B-PER, O, O, B-LOC", r"has the label 'B-PER,'; must be parted from the next by blanks alone"),
        ("B-PER; O; O; B-LOC", r"has the label 'B-PER;'; must be parted from the next by blanks alone"),
    ],
)
def test_labels_that_are_none(tags, said, tmp_path):
    words = " ".join(SENTENCES[0][0]) if isinstance(tags, str) else SENTENCES[0][0]
    dataset = datasets.Dataset.from_dict({"tokens": [words] * 2, "ner_tags": [tags] * 2})
    datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), dataset)).save_to_disk(tmp_path / "data")
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", WORDS, SPECIAL)
    with pytest.raises(ConfigError, match=rf"labels_column='ner_tags': sample 1 of the train split {said}"):
        TokenClassification(DatasetSource(str(tmp_path / "data")), tokenizer).setup()


@pytest.mark.parametrize("words", ['("anna" berlin)', "( anna )", "('anna', 'berlin')"])
def test_words_in_brackets(words, tmp_path):
    number = 2 if words.startswith("('") else len(words.split())
    dataset = datasets.Dataset.from_dict({"tokens": [words] * 2, "ner_tags": [["O", "B-PER", "O"][:number]] * 2})
    datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), dataset)).save_to_disk(tmp_path / "data")
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", WORDS, SPECIAL)
    TokenClassification(DatasetSource(str(tmp_path / "data")), tokenizer).setup()


def test_punctuation_is_a_label_of_its_own(tmp_path):
    data = data_of(tmp_path, [(["anna", "berlin"], ["NNP", ","])], kind="text")
    data.setup()
    assert data.task.label_names == [",", "NNP"]


def test_entities_are_marked_by_what_the_model_calls_the_numbers():
    task = TokenTagging(["0", "1", "2", "3"])
    assert (task.main_metric, list(task.scores())) == ("accuracy", ["accuracy"])
    named = task.with_label_names(TAGS)
    assert (named.main_metric, list(named.scores()), named.label_names) == ("f1", ["f1", "accuracy"], TAGS)
    assert task.main_metric == "accuracy"


def test_words_that_a_tokenizer_makes_nothing_of_have_labels_too(tmp_path):
    samples = [(["anna", "", "berlin"], ["B-PER", "O", "B-LOC"]), ([""], ["O"])]
    data = data_of(tmp_path, samples)
    data.setup()
    labels = next(iter(data.test_dataloader()))["labels"]
    assert [[data.task.label_names[label] for label in row if label != -100] for row in labels] == [
        tags for _, tags in samples
    ]


def test_words_that_are_cut_off_are_not_counted(tmp_path):
    data = data_of(tmp_path, max_length=4)  # two words between [CLS] and [SEP]
    data.setup()
    assert (next(iter(data.test_dataloader()))["labels"] != -100).sum() == 4


def test_entities_count_whole():
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    labels = torch.tensor([[1, 2, 0, 3, -100]])
    for guess, expected in (([1, 2, 0, 3, 1], 1.0), ([1, 0, 0, 3, 0], 0.5), ([0, 0, 0, 0, 0], 0.0)):
        f1 = EntityF1(names)
        f1.update(torch.eye(4)[torch.tensor([guess])], {"labels": labels})
        assert float(f1.compute()) == pytest.approx(expected)


def test_labels_without_entities_have_accuracy_alone():
    assert TokenTagging(["NOUN", "VERB"]).main_metric == "accuracy"
    assert set(TokenTagging(["NOUN", "VERB"]).scores()) == {"accuracy"}
    assert set(TokenTagging(TAGS).scores()) == {"f1", "accuracy"}


def test_learnt_and_numbered_as_the_model_has_learnt_it(tmp_path, trainer):
    config = tiny.bert_config()
    phase = FineTuning(source=HuggingFaceModel("token-classification", config=config))
    trainer(callbacks=[SaveArtifact()], max_epochs=30).fit(phase, datamodule=data_of(tmp_path))
    artifact = str(tmp_path / "run" / "artifact")
    other = data_of(tmp_path / "other", kind="classes")  # the same labels in another order
    [found] = trainer().test(FineTuning(init_from=artifact), datamodule=other)
    [known] = trainer().test(FineTuning(init_from=artifact), datamodule=data_of(tmp_path / "same"))
    assert found == pytest.approx(known)
    file = PredictionFile(str(tmp_path / "labels.csv"))
    trainer(callbacks=[file]).predict(FineTuning(init_from=artifact), datamodule=other)
    assert [row["label"] for row in file.rows] == [" ".join(tags) for _, tags in SENTENCES]
    assert all(len(row["prediction"].split()) == len(row["label"].split()) for row in file.rows)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([*SENTENCES, (["anna"], ["B-PER", "O"])], "sample 3 of the .* split has 2 labels for 1 words; must have one"),
        ([*SENTENCES, ([], [])], "words_column='tokens': sample 3 of the .* split has no words"),
        ([(["anna"], ["O"])] * 2, "labels_column='ner_tags': has one label only, O; must have two$"),
        ([*SENTENCES, (["anna"], [None])], "sample 3 of the .* split has the label None, which is none; must be there"),
        ([*SENTENCES, ([None], ["O"])], "words_column='tokens': sample 3 of the .* split has a word that is missing"),
    ],
)
def test_samples_that_cannot_be_used(samples, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        data_of(tmp_path, samples).setup()


@pytest.mark.parametrize("number", [-1, -100])
def test_numbers_that_are_no_labels(number, tmp_path):
    samples = [(["anna", "in"], [0, 1]), (["anna", "in"], [1, number])]
    with pytest.raises(ConfigError, match=f"sample 2 of the .* split has the label {number}, which is none; must be"):
        data_of(tmp_path, samples).setup()


def test_brackets_may_be_words(tmp_path):
    samples = [(["[", "anna", "]"], ["O", "B-PER", "O"]), (["[CLS]", "in", "[SEP]"], ["O", "O", "O"])]
    data = data_of(tmp_path, samples, "text")
    assert data._words(data.source.load()["train"], "train") == [words for words, _ in samples]


def test_words_that_are_numbers_stay_as_they_are(tmp_path):
    data = data_of(tmp_path, [(["anna", "3.0"], ["O", "O"]), (["anna", "in"], ["B-PER", "O"])])
    assert data._words(data.source.load()["train"], "train")[0] == ["anna", "3.0"]


def test_a_label_that_training_has_not(tmp_path):
    path = write(tmp_path)
    splits = datasets.load_from_disk(path)
    splits["test"] = datasets.Dataset.from_dict({"tokens": [["in"]], "ner_tags": [["B-ORG"]]})
    splits.save_to_disk(tmp_path / "more")
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", WORDS, SPECIAL)
    message = "sample 1 of the test split has the label B-ORG, unseen in training; allowed are B-LOC, B-PER, I-PER, O"
    with pytest.raises(ConfigError, match=message):
        TokenClassification(DatasetSource(str(tmp_path / "more")), tokenizer).setup()
