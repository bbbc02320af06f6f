"""One dense computation and all that is to replace it, timed in turn: what a benchmark is made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from d2dmoe_pl.benchmark.result_rows import BenchmarkRow
from d2dmoe_pl.benchmark.runtimes import RUNTIMES
from d2dmoe_pl.benchmark.scoring import Scoring
from d2dmoe_pl.benchmark.timing import Contender, Timing, alternate, peak_memory

Scope = Literal["layer", "model", "decode"]
MIB = 2**20
# seconds after which threads of other runtimes sleep; those of ONNX Runtime wait for work for some 30 ms behind a call,
# and double the time of whoever runs on the same cores meanwhile
SETTLING = 0.1


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
        optimize: Whether models with experts are compiled; or that it is done ahead of time.
        scored_samples: Test samples that predictions are judged on, at most; 0 for none.
        budgets: Shares of the dense FFNs' FLOPs that a whole model is set to, instead of a ``tau``.
        decode: Tokens that a whole model writes behind each text; 0 to have it read them alone.
        around: Type of what is no int8 number in a model in int8.
        gguf: File that llama.cpp writes from, beside the models that write; None for none.
    """

    scope: list[Scope]
    dtype: list[torch.dtype]
    batch_size: list[int]
    backend: str
    compare: list[str]
    rounds: int
    device: torch.device
    optimize: bool | Literal["ahead_of_time"] = False
    scored_samples: int = 0
    budgets: Sequence[float] = ()
    decode: int = 0
    around: torch.dtype = torch.float32
    gguf: str | None = None

    def floating(self, dtype: torch.dtype) -> torch.dtype:
        """The type of what a model in ``dtype`` is given, and of what is no int8 number in it."""
        return dtype if dtype.is_floating_point else self.around

    @property
    def dense_dtype(self) -> torch.dtype:
        """Of the whole dense model that all are timed against: the one type asked for, or float32."""
        has_rivals = any(name in RUNTIMES for name in self.compare)
        alone = len(self.dtype) == 1 and self.dtype[0].is_floating_point and not has_rivals and self.gguf is None
        return self.dtype[0] if alone else torch.float32


@dataclass(frozen=True)
class Way:
    """One way to compute what the dense computation does: with experts, or the dense model on another runtime.

    Attributes:
        name: Of its backend.
        router: Whether routers and gates run as well.
        tau: The gates' setting; None for preset masks and budgets.
        share: Executed share of all (token, expert) pairs.
        cost: Its FLOPs, those of routers among them where there are any, over the dense FFNs' FLOPs.
        contender: To be timed.
        dtype: Of weights; the comparison's if not given.
        is_dense: Whether it has no experts.
        score: Of its predictions, where they are judged.
        budget: Share of the dense FFNs' FLOPs that the gates are set to, instead of a ``tau``.
        bytes_share: Of the bytes of weights that the dense model reads to write a token; None where none is written.
        agreement: Of the tokens that the dense model writes, those that this way would have written, in percent.
        around: Type of what is no int8 number, where weights are in int8.
        type_name: Of weights, where that is no type of PyTorch's.
    """

    name: str
    router: bool
    tau: float | None
    share: float
    cost: float
    contender: Contender
    dtype: torch.dtype | None = None
    is_dense: bool = False
    score: float | None = None
    budget: float | None = None
    bytes_share: float | None = None
    agreement: float | None = None
    around: torch.dtype = torch.float32
    type_name: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What is timed in turn.

    Attributes:
        scope: ``layer``, ``model`` or ``decode``.
        name: Of the layer or model.
        dtype: Of weights and inputs.
        num_experts: ``E``.
        batch_size: Samples a call; None where it is tokens that are called with.
        tokens: That each FFN gets in one call, without padding.
        dense: The dense computation.
        ways: To replace it.
        rest: The same model with its FFNs left out; None for a layer, which is nothing but one, and if compiled.
        scoring: By what predictions are judged; None if they are not.
        dense_score: Of the dense model's predictions.
        new_tokens: That are written behind each text; None where none are.
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
    scoring: Scoring | None = None
    dense_score: float | None = None
    new_tokens: int | None = None


def measure(comparison: Comparison, rounds: int, device: torch.device) -> list[BenchmarkRow]:
    """Time the comparison: one row for each of its ways."""
    contenders = {"dense": comparison.dense} | {str(i): way.contender for i, way in enumerate(comparison.ways)}
    if comparison.rest is not None:
        contenders["rest"] = comparison.rest
    has_others = torch.get_num_threads() > 1 and any(way.name in RUNTIMES for way in comparison.ways)
    timings = alternate(contenders, rounds, device, pause=SETTLING if has_others else 0.0)
    dense, rest = timings["dense"], timings.get("rest")
    writes = comparison.new_tokens is not None  # as many calls as tokens, which no profiler holds

    def memory(contender: Contender) -> float:
        return math.nan if writes else peak_memory(contender, device) / MIB

    dense_memory = memory(comparison.dense)
    items = comparison.batch_size or comparison.tokens
    is_unknown = rest is None and comparison.scope == "model"  # what cannot become less
    scoring, dense_score = comparison.scoring, comparison.dense_score or 0.0
    rows = []
    for i, way in enumerate(comparison.ways):
        timing = timings[str(i)]
        rows.append(
            BenchmarkRow(
                scope=comparison.scope,
                name=comparison.name,
                backend=way.name,
                router=way.router,
                dtype=_type_name(way, comparison),
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
                ideal=_ideal(dense, rest, way, is_unknown),
                rest_percent=None if rest is None else 100 * rest.median / dense.median,
                dense_memory_mib=dense_memory,
                moe_memory_mib=memory(way.contender),
                noisy=dense.is_noisy,
                dense_dtype=str(comparison.dtype).removeprefix("torch."),
                is_dense=way.is_dense,
                score=way.score,
                budget=way.budget,
                dense_score=comparison.dense_score,
                new_tokens=comparison.new_tokens,
                bytes_percent=None if way.bytes_share is None else 100 * way.bytes_share,
                agreement=way.agreement,
                score_loss=None if way.score is None or scoring is None else scoring.loss(way.score, dense_score),
            )
        )
    return rows


def _type_name(way: Way, comparison: Comparison) -> str:
    if way.type_name is not None:
        return way.type_name
    dtype = way.dtype or comparison.dtype
    both = [dtype] if dtype.is_floating_point or way.around == torch.float32 else [dtype, way.around]
    return " in ".join(str(each).removeprefix("torch.") for each in both)


def _ideal(dense: Timing, rest: Timing | None, way: Way, is_unknown: bool) -> float:
    if way.bytes_share is not None:
        return 1 / way.bytes_share
    return math.nan if is_unknown else ideal_speed_up(dense, rest, way.cost)


def ideal_speed_up(dense: Timing, rest: Timing | None, cost: float) -> float:
    """What the speed-up would be if an FFN's time were in proportion to its FLOPs, and the rest took as long as before.

    Args:
        dense: The dense computation.
        rest: The same without its FFNs; None where there is nothing else.
        cost: FLOPs of experts and routers over those of the dense FFNs.
    """
    outside = 0.0 if rest is None else min(rest.median, dense.median)
    return dense.median / (outside + (dense.median - outside) * cost)
