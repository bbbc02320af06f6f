"""The mean of a model's weights along the way, and which of several weights go on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.data.task import at_least_single
from d2dmoe_pl.sharded_tensors import is_sharded_tensor, sharded_like, whole_on_cpu

State = Mapping[str, Tensor]
WORSE = 5.0


class WeightAverage:
    """The mean over its steps of what training moves in a model.

    Attributes:
        steps: How many it is of.
        mean: By the name in the model, in no narrower type than float32, in which it would stand still; empty before
            the first.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Add the model as it is."""
        self.steps += 1
        for name, value in moving_tensors(model).items():
            if name in self.mean:  # from a checkpoint it comes on the CPU
                self.mean[name] = sharded_like(self.mean[name], value).lerp_(at_least_single(value), 1 / self.steps)
            else:
                self.mean[name] = at_least_single(value.clone())

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers; tensors are whole."""
        mean = {name: whole_on_cpu(value) if is_sharded_tensor(value) else value for name, value in self.mean.items()}
        return {"steps": self.steps, "mean": mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.steps = state["steps"]
        self.mean = {name: at_least_single(value) for name, value in state["mean"].items()}

    def mean_like(self, model: nn.Module) -> dict[str, Tensor]:
        """The mean on the devices that ``model`` is on, and sharded as that is."""
        return {name: sharded_like(self.mean[name], value) for name, value in moving_tensors(model).items()}


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training moves in a model, by name: parameters, and statistics that are saved, such as a batch norm's."""
    statistics = {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set
    }
    return {name: value.detach() for name, value in (*model.named_parameters(), *statistics.items())}


def state_like(model: nn.Module, other: nn.Module) -> dict[str, Tensor]:
    """What training moved in ``other``, by name, on the devices that ``model`` is on, and sharded as that is."""
    own = moving_tensors(model)
    return {name: sharded_like(value, own[name]) for name, value in moving_tensors(other).items()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what training moves in a model, by name."""
    return {name: value.clone() for name, value in moving_tensors(model).items()}


@torch.no_grad()
def put_state_(model: nn.Module, state: State) -> None:
    """Give a model what training moves, by name."""
    for name, value in moving_tensors(model).items():
        value.copy_(sharded_like(state[name], value))


def between(one: State, other: State, part: float) -> dict[str, Tensor]:
    """What lies ``part`` of the way from one state to another, whatever the types of the two."""
    return {
        name: at_least_single(value).lerp(at_least_single(sharded_like(other[name], value)), part)
        for name, value in one.items()
    }


def put_best_(
    model: nn.Module, states: Mapping[str, Callable[[], State]], losses: Callable[[], Sequence[float]]
) -> tuple[str, dict[str, float]]:
    """Give a model those of several weights whose losses are least over a whole range of settings.

    Each loss is judged beside that of the first state at the same setting, so that what is small counts as much as what
    is large; what is worse than the first anywhere counts ``WORSE`` times.

    Args:
        model: Is given one state after another.
        states: What makes each, by a name for people; one is there at a time. The first is the one to be better than.
        losses: Of the model as it is, at each setting; positive.

    Returns:
        Name of the state that the model has, and each one's score: 1 for the first, less is better.
    """
    found: dict[str, float] = {}
    first: Tensor | None = None
    for name, state in states.items():
        put_state_(model, state())
        measured = torch.tensor(losses(), dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
        if first is None:
            first = measured
        ratios = measured / first
        found[name] = float(ratios.mean() + WORSE * (ratios.max() - 1).clamp(min=0))
    best = min(found, key=lambda name: found[name])
    put_state_(model, states[best]())
    return best, found
