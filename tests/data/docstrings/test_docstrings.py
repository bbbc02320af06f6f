"""Sentences of docstrings: what is taken, fixed and disjoint splits, the trained tokenizer, and what is wrong."""

import random
import sys

import pytest
import tiny
from transformers import AutoTokenizer

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.data import Docstrings
from d2dmoe_pl.data.docstrings.docstring_sentences import collect, deal, docstrings_in, sentences_in, source_files
from d2dmoe_pl.data.docstrings.trained_tokenizer import train_tokenizer
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import FineTuning

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]


def make_package(root, name, first_word, num_files=12, sentences_per_file=4, shared=""):
    """A package of files whose functions have docstrings of one sentence."""
    folder = root / name
    folder.mkdir(parents=True)
    draw = random.Random(name)
    for file in range(num_files):
        sentences = [
            f"{first_word} {' '.join(draw.choices(WORDS, k=8))} number {draw.randrange(10**6)}."
            for _ in range(sentences_per_file)
        ]
        functions = [
            f'def f{i}():\n    """{sentence}\n\n    {shared}\n    """\n' for i, sentence in enumerate(sentences)
        ]
        (folder / f"m{file}.py").write_text("\n".join(functions))
    (folder / "__init__.py").touch()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    shared = "This very sentence stands in both of them."
    make_package(tmp_path, "docs_one", "Take", shared=shared)
    make_package(tmp_path, "docs_two", "Give", shared=shared)
    return ["docs_one", "docs_two"]


def test_every_docstring_is_found_and_broken_files_are_passed_over():
    source = '''"""Module."""
class A:
    """Class."""
    async def f(self):
        """Method."""
    x = "no docstring"
'''
    assert sorted(docstrings_in(source)) == ["Class.", "Method.", "Module."]
    assert list(docstrings_in("def broken(:")) == []
    assert list(docstrings_in("null \0 byte")) == []


def test_only_sentences_are_taken():
    docstring = """Return the sum of all the values here. too short.

    This one goes over
    two lines of the paragraph. starts small and so it is left out here.

    Parameters
    ----------
    x : int
    >>> f(x)[0] == g(y)[1] + h(z)[2] / 3 * 4.

    One without an end at the end
    """
    assert list(sentences_in(docstring)) == [
        "Return the sum of all the values here.",
        "This one goes over two lines of the paragraph.",
    ]


def test_tests_are_no_prose(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    make_package(tmp_path, "docs_tested", "Take", num_files=2)
    make_package(tmp_path, "docs_tested/tests", "Check", num_files=2)
    assert [file.name for file in source_files("docs_tested")] == ["__init__.py", "m0.py", "m1.py"]
    assert "docs_tested" not in sys.modules


def test_shared_sentences_are_dropped_and_the_rest_kept_once(packages):
    rows = list(collect(packages, 32))
    texts = [row["text"] for row in rows]
    assert len(texts) == len(set(texts)) == 64
    assert not any("both of them" in text for text in texts)
    for row in rows:
        assert row["text"].startswith("Take" if row["labels"] == 0 else "Give")


def test_no_file_is_in_two_splits():
    files = [[f"{file}.{i}" for i in range(5)] for file in range(20)]
    splits = deal(files, 40, "p")
    assert {name: len(split) for name, split in splits.items()} == {"test": 5, "validation": 4, "train": 31}
    of_file = [{sentence.split(".")[0] for sentence in split} for split in splits.values()]
    assert sum(len(part) for part in of_file) == len(set.union(*of_file))


def test_splits_are_fixed(packages):
    one, other = (Docstrings(packages, num_sentences=32, max_length=16, batch_size=4) for _ in range(2))
    one.setup()
    other.setup()
    for name in ("train", "validation", "test"):
        assert one._splits[name]["input_ids"] == other._splits[name]["input_ids"]
    assert {name: len(split) for name, split in one._splits.items()} == {"train": 50, "validation": 6, "test": 8}
    assert one.task.label_names == packages


def test_batches_are_padded_with_zeros(packages):
    data = Docstrings(packages, num_sentences=32, max_length=16, batch_size=8)
    data.setup()
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert batch["labels"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert int(batch["input_ids"].max()) < data.num_token_ids <= data.vocabulary_size


def test_another_version_of_a_package_is_collected_anew(packages, tmp_path):
    before = Docstrings(packages, num_sentences=32)
    before.setup()
    (tmp_path / "docs_one" / "m0.py").write_text('"""Take another sentence that was never there before now."""')
    after = Docstrings(packages, num_sentences=32)
    after.setup()
    assert before._splits["train"]["input_ids"] != after._splits["train"]["input_ids"]


def test_the_tokenizer_does_not_depend_on_the_order_of_texts_and_survives_saving(tmp_path):
    texts = [" ".join(random.Random(i).choices(WORDS, k=5)) + "." for i in range(200)]
    one, other = train_tokenizer(texts, 300), train_tokenizer(texts[::-1], 300)
    assert one.get_vocab() == other.get_vocab()
    one.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    encoded = loaded("Alpha unheard", "beta")["input_ids"]
    assert encoded == one("Alpha unheard", "beta")["input_ids"]
    assert (encoded[0], encoded[-1]) == (one.cls_token_id, one.sep_token_id)
    assert one.pad_token_id == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"packages": ["docs_one"]}, r"packages=\['docs_one'\]: must be two or more, each once"),
        ({"packages": ["docs_one", "docs_one"]}, "must be two or more, each once"),
        ({"num_sentences": 3}, "num_sentences=3: must be at least 16"),
        ({"vocabulary_size": 3}, "vocabulary_size=3: must be at least 256"),
        ({"max_length": 0}, "max_length=0: must be positive"),
    ],
)
def test_bad_arguments(packages, arguments, message):
    with pytest.raises(ConfigError, match=message):
        Docstrings(**{"packages": packages, **arguments})


def test_packages_that_are_missing_or_too_small(packages):
    with pytest.raises(ConfigError, match="packages='no_such_thing': is not an installed package"):
        Docstrings([*packages, "no_such_thing"]).setup()
    with pytest.raises(ConfigError, match="num_sentences=4000: 'docs_one' has only 48, too few"):
        list(collect(packages, 4000))


def test_a_model_that_embeds_fewer_tokens(trainer, packages, tmp_path):
    model = HuggingFaceModel("text-classification", config=tiny.bert_config(vocab_size=40)).build(packages)
    save_artifact(model, tmp_path / "artifact", [PhaseRecord("FineTuning")])
    data = Docstrings(packages, num_sentences=32, max_length=8)
    with pytest.raises(
        ConfigError, match=r"tokenizer: gives \d+ token ids; must be at most the 40 that BertForSequenc"
    ):
        trainer().test(FineTuning(init_from=str(tmp_path / "artifact")), datamodule=data)
