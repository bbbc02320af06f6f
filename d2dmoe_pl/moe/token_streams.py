"""Which padding mask the tokens have that a part of a model sees: one for all of it, or one for each of its stacks."""

from collections.abc import Mapping

from torch import Tensor, nn

from d2dmoe_pl.adapters import NO_MASK, adapter_for, stream_of
from d2dmoe_pl.moe.token_context import TokenContext, token_index


def shared_context_(model: nn.Module, name: str) -> TokenContext:
    """The context of the part of ``model`` that the module ``name`` is in; the part gets one if it has none yet."""
    path, mask = stream_of(adapter_for(model).streams(model), name)
    part = model.get_submodule(path)
    for module in part.modules():
        context = getattr(module, "context", None)
        if isinstance(context, TokenContext):
            return context
    context = TokenContext()
    if mask != NO_MASK:
        context.install(part)
    return context


class TokenIndices:
    """Where the tokens of a batch are that are no padding, by the name of a module that sees them.

    On whichever side the batch is padded, these are places in what modules see, where padding comes last.

    Args:
        model: The model.
        batch: With the masks.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self._streams = adapter_for(model).streams(model)
        self._batch, _ = adapter_for(model).in_order(batch)  # as the model is given it
        self._found: dict[str, Tensor | None] = {}

    def __call__(self, name: str) -> Tensor | None:
        """What :func:`token_index` gives of the mask for the module ``name``, found once a mask."""
        _, mask = stream_of(self._streams, name)
        if mask not in self._found:
            self._found[mask] = token_index(self._batch.get(mask))
        return self._found[mask]
