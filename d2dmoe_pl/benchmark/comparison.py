"""One dense computation and all that is to replace it, timed in turn: what a benchmark is made of."""

from dataclasses import dataclass
from typing import Literal

import torch

from d2dmoe_pl.benchmark.result_rows import BenchmarkRow
from d2dmoe_pl.benchmark.timing import Contender, Timing, alternate, peak_memory

Scope = Literal["layer", "model"]
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What every benchmark is told.

    Attributes:
        scope: ``layer`` for FFNs alone, ``model`` for whole models.
        dtype: Of weights and inputs.
        batch_size: Samples of a whole model's batch.
        backend: Name of a file in ``moe/execution``.
        compare: Names of files in ``benchmark/alternatives`` or ``moe/execution``: what else to run the experts with.
        rounds: Samples of each time.
        device: Where it runs.
    """

    scope: list[Scope]
    dtype: list[torch.dtype]
    batch_size: list[int]
    backend: str
    compare: list[str]
    rounds: int
    device: torch.device


@dataclass(frozen=True)
class Way:
    """One way to compute with experts what the dense computation does.

    Attributes:
        name: Of its backend.
        router: Whether routers and gates run as well.
        tau: The gates' setting; None for preset masks.
        share: Executed share of all (token, expert) pairs.
        cost: Its FLOPs, those of routers among them where there are any, over the dense FFNs' FLOPs.
        contender: To be timed.
    """

    name: str
    router: bool
    tau: float | None
    share: float
    cost: float
    contender: Contender


@dataclass(frozen=True)
class Comparison:
    """What is timed in turn.

    Attributes:
        scope: ``layer`` or ``model``.
        name: Of the layer or model.
        dtype: Of weights and inputs.
        num_experts: ``E``.
        batch_size: Samples a call; None where it is tokens that are called with.
        tokens: That each FFN gets in one call, without padding.
        dense: The dense computation.
        ways: To replace it.
        rest: The same model with its FFNs left out; None for a layer, which is nothing but one.
    """

    scope: Scope
    name: str
    dtype: torch.dtype
    num_experts: int
    batch_size: int | None
    tokens: int
    dense: Contender
    ways: list[Way]
    rest: Contender | None = None


def measure(comparison: Comparison, rounds: int, device: torch.device) -> list[BenchmarkRow]:
    """Time the comparison: one row for each of its ways."""
    contenders = {"dense": comparison.dense} | {str(i): way.contender for i, way in enumerate(comparison.ways)}
    if comparison.rest is not None:
        contenders["rest"] = comparison.rest
    timings = alternate(contenders, rounds, device)
    dense, rest = timings["dense"], timings.get("rest")
    dense_memory = peak_memory(comparison.dense, device)
    items = comparison.batch_size or comparison.tokens
    rows = []
    for i, way in enumerate(comparison.ways):
        timing = timings[str(i)]
        rows.append(
            BenchmarkRow(
                scope=comparison.scope,
                name=comparison.name,
                backend=way.name,
                router=way.router,
                dtype=str(comparison.dtype).removeprefix("torch."),
                num_experts=comparison.num_experts,
                batch_size=comparison.batch_size,
                tokens=comparison.tokens,
                tau=way.tau,
                share_percent=100 * way.share,
                dense_ms=1000 * dense.median,
                dense_spread_ms=1000 * dense.spread,
                moe_ms=1000 * timing.median,
                moe_spread_ms=1000 * timing.spread,
                dense_throughput=items / dense.median,
                moe_throughput=items / timing.median,
                speed_up=dense.median / timing.median,
                ideal=ideal_speed_up(dense, rest, way.cost),
                rest_percent=None if rest is None else 100 * rest.median / dense.median,
                dense_memory_mib=dense_memory / MIB,
                moe_memory_mib=peak_memory(way.contender, device) / MIB,
                noisy=dense.is_noisy,
            )
        )
    return rows


def ideal_speed_up(dense: Timing, rest: Timing | None, cost: float) -> float:
    """What the speed-up would be if an FFN's time were in proportion to its FLOPs, and the rest took as long as before.

    Args:
        dense: The dense computation.
        rest: The same without its FFNs; None where there is nothing else.
        cost: FLOPs of experts and routers over those of the dense FFNs.
    """
    outside = 0.0 if rest is None else min(rest.median, dense.median)
    return dense.median / (outside + (dense.median - outside) * cost)
