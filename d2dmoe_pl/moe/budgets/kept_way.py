"""A way down along which a model has been trained, as tensors, for the calibration that follows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from d2dmoe_pl.moe.budgets.allocation import Measured
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath

TRAINED = "trained_budgets"  # name of the tensor file


def way_tensors(path: BudgetPath) -> dict[str, Tensor]:
    """The points of ``P`` settings of ``L`` layers: ``taus`` ``(P, L)``, ``ffn_flops`` and ``divergence`` ``(P,)``.

    Example:
        >>> from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint
        >>> from d2dmoe_pl.moe.budgets.kept_way import way_from_tensors, way_tensors
        >>> points = (BudgetPoint((1.0,), 1.0, 1.0, 0.0, 90.0), BudgetPoint((0.25,), 0.5, 0.75, 0.5, 80.0))
        >>> path = BudgetPath(("blocks.0.mlp",), "dynk_max", "accuracy", True, True, samples=100, points=points)
        >>> way_from_tensors(way_tensors(path))[1]
        Measured(taus=(0.25,), divergence=0.5, cost=0.5)
    """
    return {
        "taus": torch.tensor([point.taus for point in path.points], dtype=torch.float64),
        "ffn_flops": torch.tensor([point.ffn_flops for point in path.points], dtype=torch.float64),
        "divergence": torch.tensor([point.divergence for point in path.points], dtype=torch.float64),
    }


def way_from_tensors(tensors: Mapping[str, Tensor]) -> list[Measured]:
    """The points of :func:`way_tensors`, the dense one first, with the costs and divergences of before."""
    parts = (tensors[name].tolist() for name in ("taus", "divergence", "ffn_flops"))
    return [Measured(tuple(taus), divergence, cost) for taus, divergence, cost in zip(*parts, strict=True)]
