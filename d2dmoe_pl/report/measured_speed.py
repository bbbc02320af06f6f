"""How fast a model is at its budgets beside its dense self, on this machine."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from d2dmoe_pl.benchmark.compared_modules import predict_by
from d2dmoe_pl.benchmark.comparison import SETTLING
from d2dmoe_pl.benchmark.runtimes import RUNTIMES
from d2dmoe_pl.benchmark.scoring import Predict
from d2dmoe_pl.benchmark.timing import Contender, Timing, alternate
from d2dmoe_pl.data import TaskData
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.moe.budgets.budget_path import set_budget_
from d2dmoe_pl.moe.conversion import set_backend_
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.optimization import optimize_
from d2dmoe_pl.phases._labels import answer_as_model

ROUNDS = 15
AT_MOST = 60.0  # seconds, if the model is not too slow for it
ATTEMPTS = 3  # at a time when nothing else runs
FEWEST_SAMPLES = 8  # of which times are taken, where batches are smaller: texts differ in length


@dataclass(frozen=True)
class Running:
    """How a model is to run, and what else its time is told beside.

    Attributes:
        dtype: That it was made to run in; None for as it was trained.
        optimize: Whether it is compiled, by :func:`d2dmoe_pl.optimize_`.
        against: What runs the dense model, by its name in ``benchmark --compare``; PyTorch as it is if None.
        batch_size: Samples of a batch.
    """

    dtype: str | None = None
    optimize: bool = False
    against: str | None = None
    batch_size: int = FEWEST_SAMPLES

    @property
    def rival(self) -> str:
        """What times are told beside, in words."""
        return "dense" if self.against is None else f"dense in {self.against}"

    @property
    def options(self) -> str:
        """Those of ``benchmark`` that measure the same."""
        given = {"dtype": self.dtype, "optimize": "true" if self.optimize else None, "compare": self.against}
        return "".join(f" --{name} {value}" for name, value in given.items() if value is not None)

    def said_of(self, batches: Sequence[Batch]) -> str:
        """What the times of a model are of, in words."""
        size, threads = len(next(iter(batches[0].values()))), torch.get_num_threads()
        dtype = "as it is saved" if self.dtype is None else f"in {self.dtype}"
        compiled = ", compiled" if self.optimize else ""
        return f"a batch of {size}, {threads} thread{'s' if threads > 1 else ''}, {dtype}{compiled}"


def dense_twin(model: nn.Module) -> nn.Module:
    """The dense model of the same weights, on its own."""
    dense = copy.deepcopy(model)
    merge_to_dense_(dense)
    return dense


def timed_batches(model: nn.Module, data: TaskData, batch_size: int) -> list[Batch]:
    """Batches of drawn test samples for a model, without labels; none where there is no test split."""
    data.setup()
    answer_as_model(data, model)
    of_training, data.batch_size = data.batch_size, batch_size
    try:
        loader: Any = data.drawn_loader("test", max(batch_size, FEWEST_SAMPLES))
        drawn = list(islice(loader or (), max(1, FEWEST_SAMPLES // batch_size)))
    finally:
        data.batch_size = of_training
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in drawn]


def measured_times(
    model: nn.Module, dense: nn.Module, batches: Sequence[Batch], budgets: Sequence[float], running: Running
) -> tuple[Timing, dict[float, Timing]]:
    """Seconds that a batch takes, of the dense model and at each budget, measured in turn; again if it was too noisy.

    Args:
        model: With budgets, in the type that it is to run in; left at the last of them.
        dense: That it was made from.
        batches: Of samples.
        budgets: Shares of the dense FFNs' FLOPs.
        running: Says what runs each of them.
    """
    device = next(model.parameters()).device
    set_backend_(model, "auto")
    if running.optimize:
        model = copy.deepcopy(model)
        optimize_(model)
    rival = predict_by(dense) if running.against is None else RUNTIMES[running.against](dense, batches)

    def contender(predict: Predict, budget: float | None) -> Contender:
        return Contender(partial(_all, predict, batches), partial(_at, model, budget), len(batches))

    contenders = {"dense": contender(rival, None)}
    contenders |= {repr(budget): contender(predict_by(model), budget) for budget in budgets}
    has_others = running.against is not None and torch.get_num_threads() > 1
    for _ in range(ATTEMPTS):
        times = alternate(contenders, ROUNDS, device, AT_MOST, SETTLING if has_others else 0.0)
        if not times["dense"].is_noisy:
            break
    return times.pop("dense"), {float(name): timing for name, timing in times.items()}


def _all(predict: Callable[[Batch], object], batches: Sequence[Batch]) -> None:
    for batch in batches:
        predict(batch)


@contextmanager
def _at(model: nn.Module, budget: float | None) -> Iterator[None]:
    if budget is not None:
        set_budget_(model, ffn_flops=budget)
    yield
