"""What a student learns from its teacher: MoEBERT (arXiv 2204.07675), section 3.4."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.moe.token_context import real_tokens


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], index: Tensor | None) -> Tensor:
    """Mean squared error between hidden states, summed over embeddings and layers.

    Args:
        student: What the student's embeddings and each of its layers give, ``(B, L, d)``.
        teacher: The teacher's, of the same shapes.
        index: Positions of the real tokens among all ``B * L``; None where every position holds one.

    Returns:
        A scalar.
    """
    losses = [
        F.mse_loss(real_tokens(one.flatten(0, 1), index).float(), real_tokens(other.flatten(0, 1), index).float())
        for one, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).sum()


def share_fixed_(teacher: nn.Module, student: nn.Module) -> None:
    """Let ``teacher`` use the very tensors of ``student`` that training will not change, where they are equal.

    These are buffers, and parameters without gradient. Of what trains, student and teacher part with the first step,
    and neither can do without its own.
    """
    fixed = {name: tensor for name, tensor in _tensors(student).items() if not tensor.requires_grad}
    for name, tensor in _tensors(teacher).items():
        if name in fixed and fixed[name].device == tensor.device and torch.equal(fixed[name], tensor):
            tensor.data = fixed[name].data


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
