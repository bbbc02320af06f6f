"""Hooks that remove themselves."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks while the body runs, and remove them afterwards, however it ends.

    Args:
        handles: What ``register_forward_hook`` and its relatives give; a generator registers them on entry.

    Example:
        >>> from torch import nn
        >>> from d2dmoe_pl.hooks import hooked
        >>> layer, seen = nn.Identity(), []
        >>> with hooked([layer.register_forward_hook(lambda module, args, output: seen.append(output))]):
        ...     layer(1)
        1
        >>> layer(2), seen
        (2, [1])
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
