"""What function an activation module computes, whatever its class: a known one, an elementwise one, or another."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
FAR = (20, 50, 100, 1e3, 7e4)
PARTS = (1.0, 0.6180339887, 0.0917, 0.00731, 0.000523)  # near zero too, and on no grid, for thresholds and steps


def activation_kind(activation: nn.Module) -> str | None:
    """The name in ``KNOWN`` of the function that ``activation`` computes, or ``None`` if it is none of them.

    Libraries have many classes for one function, so it is told by its values (equal to 1e-9 in float64 at points that
    tell the known ones apart, and at some far out, where others are clipped), not by its class. One with parameters or
    buffers of its own is none, as it can become another.
    """
    if [*activation.parameters(), *activation.buffers()]:
        return None
    near = torch.linspace(-12, 12, 193, dtype=torch.float64, device="cpu")
    points = torch.cat([*(near * part for part in PARTS), *(near.new_tensor([-far, far]) for far in FAR)])
    try:
        with torch.no_grad():
            values = activation(points.clone())
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes no such type, or no numbers by themselves
        return None
    for name, function in KNOWN.items():
        if values.shape == points.shape and torch.allclose(values, function(points), rtol=0, atol=1e-9):
            return name
    return None


@torch.no_grad()
def mixes_neurons(activation: nn.Module, d_ff: int) -> bool:
    """Whether what ``activation`` gives for a neuron depends on others, as a softmax or the largest ``k`` do.

    One that takes no such tensor by itself is not known to.

    Args:
        activation: Of an FFN.
        d_ff: Neurons of the FFN.
    """
    tensors = [*activation.parameters(), *activation.buffers()]
    like = tensors[0] if tensors else torch.zeros((), device="cpu")
    if like.is_meta or d_ff < 2:
        return False
    hidden = torch.randn(4, d_ff, generator=torch.Generator().manual_seed(0), device="cpu").to(like.device, like.dtype)
    alone = copy.deepcopy(activation).eval()
    try:
        whole, part = alone(hidden.clone()), alone(hidden[:, ::2].clone())
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    if whole.shape != hidden.shape or part.shape != hidden[:, ::2].shape:
        return True
    return not torch.allclose(whole[:, ::2].float(), part.float(), rtol=1e-3, atol=1e-5, equal_nan=True)
