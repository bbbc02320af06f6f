"""Layers that run several times in one pass of a model, as ALBERT's one layer does: each run counts."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def mean_over_runs(values: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The mean of scalars of each layer, one for every time that it ran."""
    return {name: torch.stack(list(each)).mean() for name, each in values.items()}
