"""What stands in a model for parts of an FFN that is computed elsewhere."""

import threading

import torch
from torch import Tensor, nn


class HandedOver(nn.Module):
    """Stands for the first products of an FFN that is computed where its last one was: gives zeros, and hands over.

    Args:
        width: Of the zeros.
        dtype: Of the weights that it stands for, by which some cast what they give it.
    """

    weight: Tensor

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)
        self._given: dict[int, Tensor] = {}  # by thread

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_model)`` to zeros ``(..., width)``."""
        self._given[threading.get_ident()] = x
        return x.new_zeros(*x.shape[:-1], self.width)

    def hand_over(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """A forward pre-hook of what computes the FFN: gives it the FFN's input."""
        return (self._given.pop(threading.get_ident()),)


class Silent(nn.Module):
    """Gives zeros of the width of an FFN's output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)
