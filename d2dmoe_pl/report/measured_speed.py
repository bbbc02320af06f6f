"""How fast a model is at its budgets beside its dense self, on this machine."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.benchmark.timing import Contender, Timing, alternate
from d2dmoe_pl.moe.budgets.budget_path import set_budget_
from d2dmoe_pl.moe.conversion import set_backend_
from d2dmoe_pl.moe.experts.merging import merge_to_dense_

ROUNDS = 9
AT_MOST = 60.0  # seconds, if the model is not too slow for it


def measured_times(
    model: nn.Module, batch: Mapping[str, Tensor], budgets: Sequence[float]
) -> tuple[Timing, dict[float, Timing]]:
    """Seconds that a batch takes, of the dense model and at each budget, measured in turn.

    Args:
        model: With budgets; left at the last of them.
        batch: Of samples.
        budgets: Shares of the dense FFNs' FLOPs.
    """
    device = next(model.parameters()).device
    set_backend_(model, "auto")
    dense = copy.deepcopy(model)
    merge_to_dense_(dense)

    def contender(of: nn.Module, budget: float | None) -> Contender:
        return Contender(partial(adapter_for(of).logits, of, batch), partial(_at, of, budget))

    contenders = {"dense": contender(dense, None)}
    contenders |= {repr(budget): contender(model, budget) for budget in budgets}
    timed = alternate(contenders, ROUNDS, device, AT_MOST)
    return timed.pop("dense"), {float(name): timing for name, timing in timed.items()}


@contextmanager
def _at(model: nn.Module, budget: float | None) -> Iterator[None]:
    if budget is not None:
        set_budget_(model, ffn_flops=budget)
    yield
