"""Watching the activations of a dense model as it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from d2dmoe_pl.adapters import FFN

Tap = Callable[[str, Tensor, Tensor], None]


@contextmanager
def tapped(ffns: Sequence[FFN], tap: Tap) -> Iterator[None]:
    """Call ``tap(name, pre, post)`` for every FFN that runs in the body.

    Args:
        ffns: The FFNs to watch.
        tap: Gets the FFN's name, and what its activation function takes and gives, both ``(..., d_ff)``.
    """

    def hook(name: str) -> Callable:
        def forward_hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            tap(name, args[0], output)

        return forward_hook

    handles = [ffn.activation.register_forward_hook(hook(ffn.name)) for ffn in ffns]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
