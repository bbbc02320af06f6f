"""Hooks that remove themselves, what they are told, and what stands for a module's own code."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol


class Removable(Protocol):
    """What can be taken away again, such as a ``RemovableHandle`` of torch."""

    def remove(self) -> None: ...


@contextmanager
def hooked(handles: Iterable[Removable]) -> Iterator[None]:
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


def first_given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a module was given first, by place or by name, as a hook is told with ``with_kwargs=True``."""
    return args[0] if args else next(iter(kwargs.values()))


def has_own_forward(module: Any) -> bool:
    """Whether somebody has put a ``forward`` in the place of that of a module's class, other than accelerate.

    Its own is around the class's, or, where accelerate has been there and gone, that of the class itself.
    """
    own = vars(module).get("forward")
    usual: Any = getattr(type(module), "forward", None)
    is_of_class = getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is usual
    return own is not None and not is_of_class and not hasattr(module, "_hf_hook")
