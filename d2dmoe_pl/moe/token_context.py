"""What routing needs from the batch, carried from the model's call to its MoE layers."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MASK_ARGUMENT = "attention_mask"
IDS_ARGUMENT = "input_ids"
EMBEDDINGS_ARGUMENT = "inputs_embeds"


class TokenContext:
    """Which positions of the running batch hold real tokens, and which ones. One is owned by each converted model.

    A forward pre-hook on the model fills it from the ``attention_mask`` and ``input_ids`` arguments, if the model's
    forward has them, so that a plain ``model(**batch)`` or ``model.generate()`` leaves padding unrouted. Indices are
    found once a batch, not once a layer.

    Attributes:
        token_index: Of :func:`token_index`.
        token_ids: Of the real tokens, ``(N,)``; None without ``input_ids``.
        sentence: Number of each real token's sentence, ``(N,)``, without gaps; None without ``input_ids``.
    """

    def __init__(self) -> None:
        self.token_index: Tensor | None = None
        self.token_ids: Tensor | None = None
        self.sentence: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def install(self, model: nn.Module) -> None:
        """Hook this context onto ``model``."""
        if MASK_ARGUMENT in inspect.signature(model.forward).parameters:
            self._handles = [
                model.register_forward_pre_hook(self._enter, with_kwargs=True),
                model.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off the model again."""
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        ids = arguments.get(IDS_ARGUMENT)
        inputs = arguments.get(EMBEDDINGS_ARGUMENT) if ids is None else ids
        self.token_index = token_index(arguments.get(MASK_ARGUMENT), None if inputs is None else inputs.shape[1])
        if ids is not None:
            self.token_ids = real_tokens(ids.flatten(), self.token_index)
            self.sentence = sentence_numbers(ids.shape, self.token_index, ids.device)

    def _leave(self, model: nn.Module, args: tuple, output: object) -> None:
        self.token_index = self.token_ids = self.sentence = None


def shared_context_(model: nn.Module) -> TokenContext:
    """The context of ``model``, which gets one if it has none yet."""
    for module in model.modules():
        context = getattr(module, "context", None)
        if isinstance(context, TokenContext):
            return context
    context = TokenContext()
    context.install(model)
    return context


def real_tokens(positions: Tensor, index: Tensor | None) -> Tensor:
    """What is at real tokens: ``(B * L, ...)`` to ``(N, ...)``, given what :func:`token_index` gave."""
    return positions if index is None else positions.index_select(0, index)


def scattered(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """Rows ``(N, ...)`` at their places ``index``, ``(N,)``, among zeros: ``(length, ...)``; undoes a selection.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.token_context import scattered
        >>> scattered(torch.tensor([[1.0], [2.0]]), torch.tensor([2, 0]), 3).flatten()
        tensor([2., 0., 1.])
    """
    return rows.new_zeros(length, *rows.shape[1:]).index_copy(0, index, rows)


def run_on_real_tokens(run: Callable[[Tensor], Tensor], x: Tensor, index: Tensor | None) -> Tensor:
    """Compute what ``run`` computes of tokens, leaving padding out.

    Args:
        run: ``(N, d)`` to ``(N, d_out)``.
        x: ``(..., d)``.
        index: What :func:`token_index` gave.

    Returns:
        ``(..., d_out)``; rows of padding are zeros.
    """
    positions = x.reshape(-1, x.shape[-1])  # (B * L, d)
    output = run(real_tokens(positions, index))  # (N, d_out)
    if index is not None:
        output = scattered(output, index, len(positions))  # (B * L, d_out)
    return output.view(*x.shape[:-1], output.shape[1])


def sentence_numbers(shape: tuple[int, int], index: Tensor | None, device: torch.device) -> Tensor:
    """Which sentence each real token is of; sentences without any are not numbered.

    Args:
        shape: ``(B, L)``.
        index: What :func:`token_index` gave.
        device: Where the numbers go.

    Returns:
        ``(N,)`` int64, ascending.
    """
    batch, length = shape
    rows = real_tokens(torch.arange(batch * length, device=device) // length, index)
    return rows if index is None else rows.unique_consecutive(return_inverse=True)[1]


def token_index(attention_mask: Tensor | None, length: int | None = None) -> Tensor | None:
    """Positions of the real tokens in the flattened batch.

    Args:
        attention_mask: ``(B, L)``, nonzero for real tokens. With a cache of earlier tokens it covers those too, first.
        length: ``L`` of the batch without them; all that the mask covers if not given.

    Returns:
        ``(N,)`` int64, or None where every position holds a token.

    Raises:
        ValueError: If the mask is not two-dimensional, or does not cover the batch.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask of shape {shape}: must be (B, L), which tells padding from tokens; another kind, as "
            "generate makes for a static cache, does not"
        )
    if length is not None:
        if attention_mask.shape[1] < length:
            raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}: must cover the {length} inputs")
        attention_mask = attention_mask[:, attention_mask.shape[1] - length :]
    index = attention_mask.flatten().nonzero().squeeze(1)  # (N,)
    return None if index.numel() == attention_mask.numel() else index.to(torch.int64)
