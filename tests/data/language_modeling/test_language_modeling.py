"""Packing, labels, perplexity, and the data of language models against naive twins; and what is wrong with it."""

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from d2dmoe_pl.data import DatasetSource, DocstringText, LanguageModeling
from d2dmoe_pl.data.language_modeling.packing import Packer
from d2dmoe_pl.data.language_modeling.token_labels import generator_of, masked_tokens, next_tokens
from d2dmoe_pl.data.language_modeling.token_prediction import TokenPrediction
from d2dmoe_pl.data.symmetric_kl import symmetric_kl
from d2dmoe_pl.errors import ConfigError

WORDS = "abcdefghijklmnopqrstuvwxyz"
CAUSAL = ("[PAD]", "[UNK]", "<eos>")
MASKED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        kind: tiny.tokenizer(folder / kind, WORDS, special)
        for kind, special in (("causal", CAUSAL), ("masked", MASKED))
    }


def write(folder, texts, name="train"):
    (folder / f"{name}.txt").write_text("\n\n".join(texts) + "\n")
    return str(folder / f"{name}.txt")


def letters(i, length):
    return " ".join(WORDS[(i + j * 7) % 26] for j in range(length))


@pytest.fixture
def source(tmp_path):
    texts = [letters(i, 3 + i % 11) for i in range(60)]
    parts = {"train": texts[:40], "validation": texts[40:50], "test": texts[50:]}
    return DatasetSource(**{name: write(tmp_path, part, name) for name, part in parts.items()})


def data_of(source, tokenizers, objective="causal", **kwargs):
    data = LanguageModeling(source, tokenizers[objective], objective, **{"length": 8, "batch_size": 4, **kwargs})
    data.setup()
    return data


class TestPacker:
    def test_a_tokenizer_that_has_no_letters(self):
        core = Tokenizer(models.BPE({letter: i for i, letter in enumerate("ACGT")}, []))  # what else there is, it drops
        bases = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
        assert list(Packer(bases, 3).blocks([["AC", "GT"]])) == [[0, 1, 4], [2, 3, 4]]

    @settings(deadline=None, max_examples=30)
    @given(lengths=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5), length=st.integers(2, 11))
    def test_blocks_are_the_documents_one_after_the_other(self, tokenizers, lengths, length):
        tokenizer = AutoTokenizer.from_pretrained(tokenizers["masked"])
        documents = [[letters(size, size) for size in batch] for batch in lengths]
        blocks = list(Packer(tokenizer, length).blocks(documents))
        stream = []
        for text in (text for batch in documents for text in batch if text):
            stream += [*tokenizer.convert_tokens_to_ids(text.split()), tokenizer.sep_token_id]
        assert all(len(block) == length and block[0] == tokenizer.cls_token_id for block in blocks)
        packed = [token for block in blocks for token in block[1:]]
        assert packed == stream[: len(packed)]
        assert len(stream) - len(packed) < length - 1

    def test_a_decoders_blocks_begin_with_text(self, tokenizers):
        tokenizer = AutoTokenizer.from_pretrained(tokenizers["causal"])
        assert [
            tokenizer.convert_ids_to_tokens(block) for block in Packer(tokenizer, 3).blocks([["a b", "c d e"]])
        ] == [
            ["a", "b", "<eos>"],
            ["c", "d", "e"],
        ]


class TestLabels:
    def test_next_tokens(self):
        assert next_tokens(torch.tensor([[5, 6, 7], [8, 9, 5]])).tolist() == [[6, 7, -100], [9, 5, -100]]

    def test_nothing_is_cut(self, source, tokenizers):
        assert data_of(source, tokenizers).filled_shares() == {}

    def test_masked_shares(self):
        blocks = torch.randint(5, 40, (200, 100))
        maskable = blocks != 7
        inputs, labels = masked_tokens(blocks, maskable, 0.15, 4, 40)
        chosen = labels != -100
        assert not (chosen & ~maskable).any()
        assert torch.equal(labels[chosen], blocks[chosen])
        assert torch.equal(inputs[~chosen], blocks[~chosen])
        assert chosen.float().sum() / maskable.float().sum() == pytest.approx(0.15, abs=0.01)
        masked = (inputs == 4)[chosen].float().mean()
        kept = (inputs == blocks)[chosen].float().mean()
        assert masked == pytest.approx(0.8 + 0.1 / 40, abs=0.02)
        assert kept == pytest.approx(0.1 + 0.1 / 40, abs=0.02)
        assert int(inputs.max()) < 40

    def test_each_block_has_something_to_predict(self):
        maskable = torch.zeros(50, 9, dtype=torch.bool)
        maskable[:, 3] = True
        _, labels = masked_tokens(torch.full((50, 9), 6), maskable, 0.01, 4, 40)
        assert (labels != -100).sum(dim=1).tolist() == [1] * 50

    def test_draws_of_a_block(self):
        one, other = torch.arange(8), torch.arange(1, 9)
        draws = [torch.rand(5, generator=generator_of(block)) for block in (one, one.clone(), other)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


class TestTask:
    task = TokenPrediction("masked-language-modeling", list("abcde"))

    def test_perplexity_weighs_tokens_not_batches(self):
        logits, labels = torch.randn(6, 4, 7), torch.randint(0, 5, (6, 4))
        labels[torch.rand(6, 4) < 0.5] = -100
        labels[0] = 1
        metrics = self.task.metrics()
        for part in (slice(0, 1), slice(1, 6)):
            metrics.update(logits[part], {"labels": labels[part]})
        losses = [
            -float(logits[i, j].log_softmax(-1)[labels[i, j]]) for i in range(6) for j in range(4) if labels[i, j] >= 0
        ]
        mean = sum(losses) / len(losses)
        values = {name: float(value) for name, value in metrics.compute().items()}
        assert values == pytest.approx({"loss": mean, "perplexity": math.exp(mean)}, rel=1e-5)

    def test_a_batch_in_which_nothing_is_to_be_told(self):
        logits, batch = torch.randn(2, 3, 5, requires_grad=True), {"labels": torch.full((2, 3), -100)}
        losses = self.task.loss(logits, batch), self.task.prediction_loss(logits, torch.randn(2, 3, 5), batch)
        assert losses == (0, 0)
        sum(losses).backward()
        assert logits.grad.eq(0).all()

    def test_losses_and_predictions(self):
        logits, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
        labels = torch.tensor([[1, -100, 2], [-100, -100, 0]])
        kept = labels >= 0
        torch.testing.assert_close(
            self.task.loss(logits, {"labels": labels}), F.cross_entropy(logits[kept], labels[kept])
        )
        torch.testing.assert_close(
            self.task.prediction_loss(logits, teacher, {"labels": labels}),
            symmetric_kl(logits[kept], teacher[kept]).mean(),
        )
        assert self.task.predictions(logits, {})["predictions"].shape == (2, 3)
        assert not self.task.higher_is_better
        assert not self.task.in_percent


class TestLanguageModeling:
    def test_causal_batches(self, source, tokenizers):
        data = data_of(source, tokenizers)
        batch = next(iter(data.test_dataloader()))
        assert batch.keys() == {"input_ids", "labels"}
        assert batch["input_ids"].shape == (4, 8)
        assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
        assert batch["labels"][:, -1].tolist() == [-100] * 4
        assert data.task.num_outputs == data.num_token_ids == 29
        assert data.head == data.task.head == "causal-language-modeling"

    def test_masks_are_drawn_anew_to_train_and_fixed_to_evaluate(self, source, tokenizers):
        data = data_of(source, tokenizers, "masked", batch_size=3)
        other = data_of(source, tokenizers, "masked", batch_size=5)
        epochs = [torch.cat([batch["labels"] for batch in each.test_dataloader()]) for each in (data, data, other)]
        assert torch.equal(epochs[0], epochs[1])
        assert torch.equal(epochs[0], epochs[2])
        samples = [data._splits["train"][i] for i in range(8)]
        assert not torch.equal(*(data.collate(samples, augment=True)["labels"] for _ in range(2)))
        assert torch.equal(*(data.collate(samples, augment=False)["labels"] for _ in range(2)))
        batch = data.collate(samples, augment=False)
        assert batch["input_ids"][:, 0].tolist() == [2] * 8  # [CLS]
        assert not (batch["labels"] == 2).any()

    def test_tokenised_once(self, source, tokenizers, monkeypatch):
        before = data_of(source, tokenizers)
        monkeypatch.setattr(Packer, "blocks", None)
        after = data_of(source, tokenizers)
        assert torch.equal(before._splits["train"]["input_ids"][:], after._splits["train"]["input_ids"][:])

    def test_columns_of_any_name(self, tmp_path, tokenizers):
        (tmp_path / "a.jsonl").write_text('{"words": "a b c d e f", "n": 1}\n' * 20)
        source = DatasetSource(train=str(tmp_path / "*.jsonl"), validation=None, test=None)
        data = data_of(source, tokenizers, text_column="words")
        assert set(data._splits["train"].column_names) == {"input_ids"}
        with pytest.raises(
            ConfigError, match="text_column='text': not a column of the train split, which has words, n"
        ):
            data_of(source, tokenizers)

        with pytest.raises(ConfigError, match=r"text_column='n': has .*int64.* in the train split; must be texts"):
            data_of(source, tokenizers, text_column="n")

    def test_a_corpus_shorter_than_a_block(self, tmp_path, tokenizers):
        source = DatasetSource(train=write(tmp_path, [letters(3, 5)] * 30), validation=write(tmp_path, ["a b c"], "v"))
        source.test = source.validation
        message = (
            r"^length=8: the validation split has 4 tokens; must be at most 4, to pack one block, or the split longer$"
        )
        with pytest.raises(ConfigError, match=message):
            data_of(source, tokenizers)

    def test_a_corpus_of_empty_texts(self, tmp_path, tokenizers):
        empty = tmp_path / "v.jsonl"
        empty.write_text('{"text": ""}\n' * 2)
        source = DatasetSource(train=write(tmp_path, [letters(3, 5)] * 30), validation=str(empty))
        source.test = source.train
        with pytest.raises(ConfigError, match=r"^the validation split: has no texts; must have one at least$"):
            data_of(source, tokenizers)

    def test_tokenizers_that_lack_a_token(self, source, tokenizers, tmp_path):
        with pytest.raises(ConfigError, match="has no mask token; allowed with objective='causal' only"):
            LanguageModeling(source, tokenizers["causal"], "masked").load_processor()
        bare = tiny.tokenizer(tmp_path / "bare", WORDS)
        with pytest.raises(ConfigError, match="has neither a token that ends a text nor one that parts two"):
            LanguageModeling(source, bare).load_processor()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"length": 1}, "length=1: must be at least 2"),
            ({"mask_share": 1.0}, r"mask_share=1.0: must lie in \(0, 1\)"),
            ({"objective": "sideways"}, "objective='sideways': allowed are causal and masked"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            LanguageModeling(DatasetSource(), "nowhere", **arguments)


def test_docstring_text():
    data = DocstringText(["datasets"], num_sentences=64, vocabulary_size=300, length=16, batch_size=4)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 16)
    assert (batch["input_ids"][:, 0] == data.tokenizer.cls_token_id).all()
    assert (batch["input_ids"] == data.tokenizer.sep_token_id).any()
    assert data.num_token_ids <= 300
