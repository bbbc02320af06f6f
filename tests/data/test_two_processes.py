"""Metrics from two processes, with batches that do not come out even, are those from one: nothing is repeated."""

import math
import multiprocessing
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import DDPStrategy
from squad_files import SPECIAL, WORDS, squad
from test_glue import glue, rows

from d2dmoe_pl.data import DatasetSource, LanguageModeling, task_data
from d2dmoe_pl.data.epoch_order import even_batch_size
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases._sharding import FullyShardedStrategy

GLUE_WORDS = "abcdefgh"


def logits(task, batch):
    """What a model of few words would say, the same in any batch."""
    if "language-modeling" in task.head:
        return torch.sin(batch["input_ids"].unsqueeze(2) * torch.arange(float(task.num_outputs)))  # (B, L, V)
    waves = torch.sin(batch["input_ids"].unsqueeze(1) * torch.tensor([[[1.3], [0.7], [2.1]]]))  # (B, 3, L)
    if task.head == "question-answering":
        return waves[:, :2] + 0.01 * torch.arange(waves.shape[-1])
    places = 1 + 0.1 * torch.arange(waves.shape[-1])
    return (waves * batch["attention_mask"].unsqueeze(1) * places).sum(dim=-1)[:, : task.num_outputs]


def evaluated(data):
    """Every metric of every test split."""
    data.setup()
    loaders = data.test_dataloader()
    results, seen = {}, []
    for split, loader in zip(
        data.split_names("test"), loaders if isinstance(loaders, list) else [loaders], strict=True
    ):
        metrics = data.task.metrics()
        for batch in loader:
            metrics.update(logits(data.task, batch), batch)
            seen.append(len(batch["labels"]))
        results |= {f"{split}/{name}": float(value) for name, value in metrics.compute().items()}
    return results, seen


def process(rank, data, folder, queue):
    torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    queue.put((rank, *evaluated(data)))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["squad", "masked", "mnli", "stsb"])
def test_two_processes_measure_what_one_does(tmp_path, kind):
    if kind == "squad":
        tokenizer = tiny.tokenizer(tmp_path / "tok", WORDS, SPECIAL)
        data = squad(tmp_path, tokenizer, 2, batch_size=3)
    elif kind == "masked":
        tokenizer = tiny.tokenizer(tmp_path / "tok", GLUE_WORDS, (*SPECIAL, "[MASK]"))
        (tmp_path / "a.txt").write_text("\n\n".join("a b c d e f g h"[: 1 + i % 15] for i in range(140)))
        data = LanguageModeling(
            DatasetSource(train=str(tmp_path / "a.txt"), validation=None, test=None), tokenizer, kind, 9
        )
        data.batch_size = 3
    else:
        tokenizer = tiny.tokenizer(tmp_path / "tok", GLUE_WORDS, SPECIAL)
        more = {"validation_mismatched": rows(kind, 9)} if kind == "mnli" else {}
        data = glue(tmp_path, tokenizer, kind, **more)
    expected, seen = evaluated(data)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=process, args=(rank, data, tmp_path, queue)) for rank in range(2)]
    for one in processes:
        one.start()
    got = sorted(queue.get(timeout=60) for _ in processes)
    for one in processes:
        one.join()
    assert sum(sum(part) for _, _, part in got) == sum(seen)
    assert sum(got[0][2]) > sum(got[1][2]) or kind in ("squad", "masked")
    for _, results, _ in got:
        assert results == pytest.approx(expected, rel=1e-5)


def alike(rank, data, folder, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    data.predict_for(["one"])
    said = []
    for call in (lambda: data.setup("fit"), data.val_dataloader, data.test_dataloader, data.predict_dataloader):
        try:
            call()
        except ConfigError as error:
            said.append(str(error))
    data.setup()  # e.g. to test, where nothing is validated
    said.append(len(list(data.drawn_loader("train", 3))))
    queue.put((rank, said))
    torch.distributed.destroy_process_group()


def test_a_split_with_too_few_samples_is_told_in_every_process(tmp_path):
    """One that had none would die alone, and the others wait for it."""
    data = glue(tmp_path, tiny.tokenizer(tmp_path / "tok", GLUE_WORDS, SPECIAL), "mnli")
    data.setup()
    data._splits = {**data._splits, "validation_b": data._splits["validation"].select([0])}
    data._splits["test_b"] = data._splits["validation_b"]
    data.setup("fit")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=alike, args=(rank, data, tmp_path, queue)) for rank in range(2)]
    for one in processes:
        one.start()
    got = sorted(queue.get(timeout=60) for _ in processes)
    for one in processes:
        one.join()
    told = [
        f"{name}: 1 samples for 2 processes; must be at least one for each"
        for name in ("validation_b", "validation_b", "test_b", "predict")
    ]
    assert got == [(0, [*told, 1]), (1, [*told, 1])]


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_processes_have_equally_many_batches(processes, batch_size):
    """A model that is shared among processes runs in all of them or not at all."""
    for samples in (*range(processes, 70), 999, 1025):
        shares = [
            UnrepeatedDistributedSampler(range(samples), num_replicas=processes, rank=rank) for rank in range(processes)
        ]
        (size,) = {even_batch_size(share, batch_size, FullyShardedStrategy()) for share in shares}
        assert len({math.ceil(len(share) / size) for share in shares}) == 1
        assert even_batch_size(shares[0], batch_size, DDPStrategy()) == batch_size
    assert even_batch_size(None, batch_size, FullyShardedStrategy()) == batch_size


@pytest.mark.parametrize(("strategy", "size"), [(DDPStrategy, 1), (FullyShardedStrategy, 3)])
def test_a_batch_size_is_the_users_where_each_process_has_the_model(tmp_path, monkeypatch, strategy, size):
    data = glue(tmp_path, tiny.tokenizer(tmp_path / "tok", GLUE_WORDS, SPECIAL), "mnli")
    data.setup()
    data._splits = {name: split.select(range(5)) for name, split in data._splits.items()}
    data.batch_size, data.trainer = 1, SimpleNamespace(strategy=strategy())
    alone = partial(UnrepeatedDistributedSampler, num_replicas=2, rank=0, shuffle=False)
    monkeypatch.setattr(task_data, "ordered_sampler", lambda dataset, repeat: alone(dataset))
    assert data.val_dataloader().batch_size == data.drawn_loader("validation", 5).batch_size == size
