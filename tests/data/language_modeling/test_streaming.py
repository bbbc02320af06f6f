"""Streams: everything is read once, by whomever; resuming goes on where it was; and what is wrong with a stream."""

import gzip
import json
import re
from itertools import chain

import datasets
import lightning as L
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2dmoe_pl.data import DatasetSource, StreamedLanguageModeling
from d2dmoe_pl.data.language_modeling.streaming import PackedStream, deal, documents, head
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import ExpertClustering, FineTuning

WORDS = "abcdefghijklmnopqrstuvwxyz"
DOCUMENTS = [[f"{WORDS[i % 26]} {WORDS[shard]} " + "x y " * (i % 5) for i in range(30)] for shard in range(3)]


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.tokenizer(tmp_path / "tok", WORDS, ("[PAD]", "[UNK]", "<eos>"))


@pytest.fixture
def source(tmp_path):
    """Three compressed shards."""
    for shard, texts in enumerate(DOCUMENTS):
        with gzip.open(tmp_path / f"shard-{shard}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text, "url": ""}) + "\n" for text in texts)
    return DatasetSource(train=str(tmp_path / "shard-*.jsonl.gz"), validation=None, test=None)


def data_of(source, tokenizer, **kwargs):
    settings = {"epoch_blocks": 8, "evaluation_documents": 5, "length": 6, "batch_size": 2, **kwargs}
    return StreamedLanguageModeling(source, tokenizer, **settings)


def blocks(loader):
    return torch.cat([batch["input_ids"] for batch in loader])


@given(num_shards=st.integers(1, 9), num_readers=st.integers(1, 9))
def test_every_document_is_dealt_to_one_reader(num_shards, num_readers):
    dealt = [deal(num_shards, reader, num_readers) for reader in range(num_readers)]
    seen = [(shard, i) for shards, part, parts in dealt for shard in shards for i in range(36)[part::parts]]
    assert len(seen) == len(set(seen)) == 36 * num_shards or any(36 % parts for _, _, parts in dealt)
    assert {shard for shard, _ in seen} == set(range(num_shards))
    assert len(seen) == len(set(seen)) == 36 * num_shards
    if num_shards >= num_readers:
        assert all(parts == 1 for _, _, parts in dealt)


@pytest.mark.parametrize("num_readers", [1, 2, 3, 5])
def test_readers_share_the_documents(source, num_readers):
    stream = source.stream()["train"]
    assert stream.num_shards == 3
    read = [chain.from_iterable(documents(stream, "text", 7, reader, num_readers)) for reader in range(num_readers)]
    assert sorted(chain.from_iterable(read)) == sorted([*DOCUMENTS[0][7:], *DOCUMENTS[1], *DOCUMENTS[2]])


def test_evaluation_is_on_the_head(source, tokenizer):
    data = data_of(source, tokenizer)
    data.setup()
    assert head(source.stream()["train"], "text", 5) == DOCUMENTS[0][:5]
    for name, texts in (("validation", DOCUMENTS[0][:5]), ("test", DOCUMENTS[0][5:10])):
        expected = list(data.packer.blocks([texts]))
        assert data._splits[name]["input_ids"][:].tolist() == expected
    first = next(iter(data.train_dataloader()))["input_ids"][0]
    assert first.tolist() == next(data.packer.blocks([DOCUMENTS[0][10:]]))


def test_a_split_of_its_own_is_evaluated_on(source, tokenizer, tmp_path):
    (tmp_path / "validation.txt").write_text("\n\n".join(["q r s t u v"] * 9))
    source.validation = str(tmp_path / "validation.txt")
    data = data_of(source, tokenizer, evaluation_documents=3)
    data.setup()
    assert len(data._splits["validation"]) == 3 * 7 // 6
    assert data._splits["test"]["input_ids"][:].tolist() == list(data.packer.blocks([DOCUMENTS[0][:3]]))


def test_all_files_of_a_split_of_its_own_are_evaluated_on(source, tokenizer, tmp_path):
    for number in range(3):
        (tmp_path / f"held_{number}.txt").write_text("\n\n".join(["q r s t u v"] * 3))
    source.validation = str(tmp_path / "held_*.txt")
    data = data_of(source, tokenizer, evaluation_documents=8)
    data.setup()
    assert len(data._splits["validation"]) == 8 * 7 // 6


def test_epochs_go_on_where_the_last_ended(source, tokenizer):
    one, other = data_of(source, tokenizer), data_of(source, tokenizer, epoch_blocks=16)
    one.setup()
    other.setup()
    loader, whole = one.train_dataloader(), other.train_dataloader()
    assert (len(loader), len(whole)) == (4, 8)
    assert torch.equal(torch.cat([blocks(loader), blocks(loader)]), blocks(whole))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming(source, tokenizer, num_workers):
    data = data_of(source, tokenizer, num_workers=num_workers)
    data.setup()
    expected = blocks(data.train_dataloader())
    begun = data.train_dataloader()
    batches = iter(begun)
    first = [next(batches)["input_ids"] for _ in range(3)]
    resumed = data.train_dataloader()
    resumed.load_state_dict(begun.state_dict())
    rest = next(iter(resumed))["input_ids"]
    assert torch.equal(torch.cat([*first, rest]), expected)


@pytest.mark.thorough
def test_workers_read_each_document_once(source, tokenizer):
    data = data_of(source, tokenizer, length=2, batch_size=1)
    data.setup()
    stream = PackedStream(source.stream()["train"], "text", 0, data.packer, 0, 1, seed=0)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    read = sorted(tuple(sample["input_ids"].tolist()) for sample, _ in loader)
    # two readers have shards 0 and 2, and shard 1
    parts = [[[*DOCUMENTS[0], *DOCUMENTS[2]]], [DOCUMENTS[1]]]
    assert read == sorted(tuple(block) for part in parts for block in data.packer.blocks(part))


@pytest.mark.thorough
def test_another_number_of_processes_cannot_resume(source, tokenizer):
    data = data_of(source, tokenizer)
    data.setup()
    state = {**data.train_dataloader().state_dict(), "processes": 2}
    with pytest.raises(
        ConfigError, match="processes=1: a stream can be resumed only as it was begun, with processes=2"
    ):
        data.train_dataloader().load_state_dict(state)


class Recorded(FineTuning):
    """Keeps the blocks that it is trained on."""

    def on_train_start(self):
        self.blocks = []

    def training_step(self, batch, batch_idx):
        self.blocks.append(batch["input_ids"])
        return super().training_step(batch, batch_idx)


class TestTraining:
    source = staticmethod(tiny.SOURCES["gpt2-causal-language-modeling"])

    def trainer(self, tmp_path, **kwargs):
        settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
        return L.Trainer(**{**settings, "enable_model_summary": False, "default_root_dir": tmp_path, **kwargs})

    def test_resumed_in_the_middle_of_an_epoch_it_sees_what_it_would_have_seen(self, source, tokenizer, tmp_path):
        whole, begun, resumed = (Recorded(source=self.source()) for _ in range(3))
        self.trainer(tmp_path, max_steps=6, enable_checkpointing=False).fit(
            whole, datamodule=data_of(source, tokenizer)
        )
        first = self.trainer(tmp_path, max_steps=3, enable_checkpointing=False)
        first.fit(begun, datamodule=data_of(source, tokenizer))
        first.save_checkpoint(tmp_path / "middle.ckpt")
        second = self.trainer(tmp_path, max_steps=6, enable_checkpointing=False)
        second.fit(
            resumed, datamodule=data_of(source, tokenizer), ckpt_path=tmp_path / "middle.ckpt", weights_only=False
        )
        assert len(whole.blocks) == 6
        assert torch.equal(torch.cat([*begun.blocks, *resumed.blocks]), torch.cat(whole.blocks))

    def test_the_schedule_has_a_length(self, source, tokenizer, tmp_path):
        for limits, steps in (({"max_epochs": 3}, 12), ({"max_steps": 5}, 5)):
            trainer = self.trainer(tmp_path, enable_checkpointing=False, **limits)
            trainer.fit(FineTuning(source=self.source()), datamodule=data_of(source, tokenizer))
            assert trainer.global_step == trainer.estimated_stepping_batches == steps

    def test_a_stream_that_ends_early(self, source, tokenizer, tmp_path):
        trainer = self.trainer(tmp_path, max_steps=1000, enable_checkpointing=False)
        message = (
            r"^source: the training stream ended after \d+ batches in this process, with \d of the epoch's 4 to come; "
            r"must be longer, or read for less \(trainer.max_steps, trainer.max_epochs, epoch_blocks\)$"
        )
        with pytest.raises(ConfigError) as error:
            trainer.fit(FineTuning(source=self.source()), datamodule=data_of(source, tokenizer))
        assert re.match(message, str(error.value))

    def test_statistics_of_a_stream(self, source, tokenizer, tmp_path):
        phase = ExpertClustering(8, "activation", num_samples=5, source=self.source())
        phase.source.config.activation_function = "relu"
        self.trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(
            phase, datamodule=data_of(source, tokenizer)
        )
        assert phase.seen == 6


def test_what_is_wrong_with_a_stream(source, tokenizer):
    with pytest.raises(
        ConfigError, match="the first shard of the training stream has only 30 documents; must have more "
    ):
        data_of(source, tokenizer, evaluation_documents=15).setup()
    with pytest.raises(ConfigError, match="text_column='body': not a column of the train split, which has text, url"):
        data_of(source, tokenizer, text_column="body").setup()
    with pytest.raises(ConfigError, match="epoch_blocks=1: must be at least batch_size=2"):
        data_of(source, tokenizer, epoch_blocks=1)
    source.train = "nowhere-*.parquet"
    with pytest.raises(ConfigError, match=r"train='nowhere-\*.parquet': no such file or folder"):
        data_of(source, tokenizer).setup()


def test_parquet_shards(tmp_path, tokenizer):
    for shard, texts in enumerate(DOCUMENTS):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"{shard}.parquet")
    data = data_of(DatasetSource(train=str(tmp_path / "*.parquet"), validation=None, test=None), tokenizer)
    data.setup()
    assert blocks(data.train_dataloader()).shape == (8, 6)
