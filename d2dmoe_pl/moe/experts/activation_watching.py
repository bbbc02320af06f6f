"""Watching the activations of a dense model as it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.hooks import Removable, hooked

Watcher = Callable[[str, Tensor, Tensor], object]


def watched_activations(ffns: Sequence[FFN], watcher: Watcher) -> AbstractContextManager[None]:
    """Call ``watcher(name, pre, post)`` for every FFN that runs in the body.

    Args:
        ffns: The FFNs to watch.
        watcher: Gets the FFN's name, and what its activation function takes and gives, both ``(..., d_ff)``.
    """

    def register(ffn: FFN) -> Iterator[Removable]:
        given: list[Tensor] = []  # of one that changes it in place

        def keep(module: nn.Module, args: tuple[Tensor]) -> None:
            given[:] = [args[0].clone()] if getattr(module, "inplace", False) else []

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            watcher(ffn.name, given.pop() if given else args[0], output)

        yield from ffn.called()
        yield ffn.activation.register_forward_pre_hook(keep)
        yield ffn.activation.register_forward_hook(hook)

    return hooked(handle for ffn in ffns for handle in register(ffn))
