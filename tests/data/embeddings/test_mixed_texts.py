"""New texts from those that there are: of their beginnings and ends, and with the vectors that they themselves have."""

import datasets
import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from d2dmoe_pl.data import DatasetSource, TextEmbeddings
from d2dmoe_pl.data.embeddings.mixed_texts import mixed_texts
from d2dmoe_pl.errors import ConfigError

WORDS = ["red", "green", "blue", "name", "the", "colour"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@given(st.lists(st.text(min_size=1), min_size=1, max_size=8), st.integers(0, 2**32))
def test_each_has_the_beginning_of_one_and_the_end_of_another(texts, seed):
    texts = [*texts, "x"]  # one at least that is not blank
    mixed = mixed_texts(texts, 12, seed)
    assert mixed == mixed_texts(texts, 12, seed)
    assert len(mixed) == 12
    for text in mixed:
        assert text.strip() == text != ""
        cuts = range(len(text) + 1)
        assert any(any(text[:at] in each for each in texts) and any(text[at:] in each for each in texts) for at in cuts)


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), min_size=2, max_size=5))
def test_words_stay_whole(texts):
    joined = [" ".join(words) for words in texts]
    assert {word for text in mixed_texts(joined, 30) for word in text.split()} <= set(WORDS)


def test_texts_without_blanks_are_mixed_too():
    mixed = mixed_texts(["今日はとても良い天気ですね", "彼は昨日東京へ行きました"], 30)
    assert len(set(mixed)) > 10


def test_they_are_as_long_as_those_that_there_are():
    texts = ["red " * 10, "blue " * 30]
    lengths = torch.tensor([len(text.split()) for text in mixed_texts(texts, 2000)]).double()
    assert float(lengths.mean()) == pytest.approx(20, abs=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = transformers.BertModel(tiny.bert_config())
    tiny._spread(model)
    model.save_pretrained(folder / "model")
    tiny.tokenizer(folder / "model", WORDS, SPECIAL)
    texts = [" ".join(WORDS[(3 * i + i // 7) % 6] for i in range(start, start + 4)) for start in range(20)]
    split = datasets.Dataset.from_dict({"text": texts})
    parts = {"train": split.select(range(10)), "validation": split.select(range(10, 15))}
    datasets.DatasetDict({**parts, "test": split.select(range(15, 20))}).save_to_disk(folder / "data")
    return folder, texts


def test_they_are_training_texts_with_their_own_vectors(folder):
    place, texts = folder
    data = TextEmbeddings(DatasetSource(str(place / "data")), str(place / "model"), batch_size=7, mixed_texts=3)
    data.setup()
    assert [len(data._splits[name]) for name in ("train", "validation", "test")] == [40, 5, 5]
    data.ordered = True
    words, vectors = [], []
    for batch in data.train_dataloader():
        words += [data.tokenizer.decode(row, skip_special_tokens=True) for row in batch["input_ids"]]
        vectors.append(batch["labels"])
    assert words == [*texts[:10], *mixed_texts(texts[:10], 30)]
    model = transformers.AutoModel.from_pretrained(place / "model").eval()
    for text, vector in zip(words, torch.cat(vectors), strict=True):
        encoded = data.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            alone = model(encoded["input_ids"], encoded["attention_mask"]).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, alone, atol=1e-5)


def test_there_cannot_be_less_than_none(folder):
    place, _ = folder
    with pytest.raises(ConfigError, match="mixed_texts=-1: must not be negative"):
        TextEmbeddings(DatasetSource(str(place / "data")), str(place / "model"), mixed_texts=-1)
