"""What routing needs from the batch, carried from the model's call to its MoE layers."""

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MASK_ARGUMENT, IDS_ARGUMENT, EMBEDDINGS_ARGUMENT = "attention_mask", "input_ids", "inputs_embeds"
CACHE_ARGUMENTS = ("past_key_values", "cache")  # of earlier tokens, as releases of transformers call it
# what transformers and torch call that which runs a module now and once more in the backward pass
CHECKPOINTING = ("_gradient_checkpointing_func", "checkpoint_fn")


class TokenBatch:
    """The tokens of one call of a model.

    Attributes:
        real: Of :func:`real_positions`.
        ids: ``(B, L)``; None without ``input_ids``.
        around: What ran when the call began, and does again when it ends.
    """

    def __init__(self, real: Tensor | None, ids: Tensor | None, around: "Mapping[int, TokenBatch]") -> None:
        self.real = real
        self.ids = ids
        self.around = around
        self._index: Tensor | None = None
        self._sentence: Tensor | None = None

    def index(self) -> Tensor | None:
        """Where ``real`` is true, ``(N,)`` int64, found once; None where every position holds a token."""
        if self._index is None and self.real is not None:
            self._index = self.real.nonzero().squeeze(1)  # (N,)
        return self._index

    def sentence(self) -> Tensor | None:
        """Number of each real token's sentence, found once."""
        if self._sentence is None and self.ids is not None:
            self._sentence = sentence_numbers(self.ids.shape, self.index(), self.ids.device)
        return self._sentence


# ``calls``: by the id of the context of each model that runs in this thread; a new mapping at each change. It has no
# value of the class's, which compiled code would read instead of the thread's
_RUNNING = threading.local()


def _running() -> "Mapping[int, TokenBatch]":
    return getattr(_RUNNING, "calls", {})


class TokenContext:
    """Which positions of the running batch hold real tokens, and which ones. A converted model owns one, or more.

    More, where parts of it see tokens of their own, as encoder and decoder do: each is then a model here.

    A forward pre-hook on the model takes it from the ``attention_mask`` and ``input_ids`` arguments, if the model's
    forward has them, so that a plain ``model(**batch)`` or ``model.generate()`` leaves padding unrouted. It is found
    once a batch, not once a layer. What is kept is kept for the call and its thread alone, so that threads, replicas
    and nested calls each see their own; gradient checkpointing sees it again in the backward pass. ``torch.compile``
    and ``torch.export`` trace it with the model, whose shapes it leaves as they are.
    """

    def __init__(self) -> None:
        self._was_padded = False
        self._handles: list[RemovableHandle] = []
        self._parameters: list[str] = []  # of the model's forward

    def __getstate__(self) -> dict[str, Any]:
        """Without the hooks on a model that is gone, which can be neither copied nor loaded again."""
        return self.__dict__ | {"_handles": [each for each in self._handles if each.hooks_dict_ref() is not None]}

    def _batch(self) -> TokenBatch | None:
        """The call that runs.

        Raises:
            RuntimeError: In a backward pass that runs layers again by means that are not known.
        """
        running = _running().get(id(self))
        is_lost = running is None and self._was_padded and not torch.compiler.is_compiling()
        if is_lost and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a MoE layer is run again in a backward pass, and which tokens are padding is not known there; must be "
                "by model.gradient_checkpointing_enable(), or torch's checkpoint_wrapper"
            )
        return running

    @property
    def real(self) -> Tensor | None:
        """What :func:`real_positions` gave, ``(B * L,)`` boolean; None where every position holds a token."""
        running = self._batch()
        return None if running is None else running.real

    @property
    def token_index(self) -> Tensor | None:
        """Positions of the real tokens in the flattened batch, ``(N,)``; None where every position holds a token."""
        running = self._batch()
        return None if running is None else running.index()

    @property
    def token_ids(self) -> Tensor | None:
        """Of the real tokens, ``(N,)``; None without ``input_ids``."""
        running = self._batch()
        return None if running is None or running.ids is None else real_tokens(running.ids.flatten(), running.index())

    @property
    def sentence(self) -> Tensor | None:
        """Number of each real token's sentence, ``(N,)``, without gaps; None without ``input_ids``."""
        running = self._batch()
        return None if running is None else running.sentence()

    def install(self, model: nn.Module) -> None:
        """Hook this context onto ``model``."""
        _RUNNING.calls = _running()  # there from the first call on, which is else compiled for its absence
        self._parameters = list(inspect.signature(model.forward).parameters)
        if MASK_ARGUMENT in self._parameters:
            self._handles = [
                model.register_forward_pre_hook(self._enter, with_kwargs=True),
                model.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off the model again."""
        while self._handles:
            self._handles.pop().remove()

    def move(self, model: nn.Module, part: nn.Module) -> None:
        """Be on ``part``, which goes on without ``model``; a context that is on a part of that already stays there."""
        if any(handle.id in model._forward_pre_hooks for handle in self._handles):
            self.remove()
            self.install(part)

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        def given(name: str) -> Tensor | None:
            if name in kwargs or name not in self._parameters:
                return kwargs.get(name)
            place = self._parameters.index(name)
            return args[place] if place < len(args) else None

        ids, mask = given(IDS_ARGUMENT), given(MASK_ARGUMENT)
        if isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.dim() == 3 and mask.shape == ids.shape:
            ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)  # of multiple choice, (B, C, L): each choice is a text
        inputs = given(EMBEDDINGS_ARGUMENT) if ids is None else ids
        around = _running()
        running = TokenBatch(None, ids, around)
        _RUNNING.calls = {**around, id(self): running}  # first, since the call ends even where the mask is refused
        cache: Any = next((found for name in CACHE_ARGUMENTS if (found := given(name)) is not None), None)
        past = cache.get_seq_length() if mask is not None and hasattr(cache, "get_seq_length") else None
        running.real = real_positions(mask, None if inputs is None else inputs.shape[1], past)
        if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._was_padded |= running.real is not None
            _carry_into_backward(model)

    def _leave(self, model: nn.Module, args: tuple, output: object) -> None:
        running = _running().get(id(self))
        if running is not None:
            _RUNNING.calls = running.around


class _Carried:
    """Runs a part of a model as ``checkpoint`` does, each time with the tokens of the call that it is a part of."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(partial(_within, _running(), run), *args, **kwargs)


def _within(running: Mapping[int, TokenBatch], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = _running()
    _RUNNING.calls = running
    try:
        return run(*args, **kwargs)
    finally:
        _RUNNING.calls = before


def _carry_into_backward(model: nn.Module) -> None:
    """Let parts of ``model`` that are run again in the backward pass know its tokens there too."""
    for module in model.modules():
        for name in CHECKPOINTING:
            checkpoint = module.__dict__.get(name)
            if checkpoint is not None and not isinstance(checkpoint, _Carried):
                setattr(module, name, _Carried(checkpoint))


def is_recorded() -> bool:
    """Whether the call is compiled, exported or traced, and will be run again for other values than it has now."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


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
        output = scattered(output, index, positions.shape[0])  # (B * L, d_out); len() would be fixed in an export
    return output.view(*x.shape[:-1], output.shape[1])


def sentence_numbers(shape: Sequence[int], index: Tensor | None, device: torch.device) -> Tensor:
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
    if index is None:
        return rows
    has_any = torch.zeros(batch, dtype=torch.int64, device=device).index_fill(0, rows, 1)  # (B,)
    return (has_any.cumsum(0) - 1)[rows]


def token_index(attention_mask: Tensor | None, length: int | None = None) -> Tensor | None:
    """Positions of the real tokens in the flattened batch, ``(N,)`` int64; see :func:`real_positions`."""
    return TokenBatch(real_positions(attention_mask, length), None, {}).index()


def real_positions(
    attention_mask: Tensor | None, length: int | None = None, past: "int | Tensor | None" = None
) -> Tensor | None:
    """Which positions of the flattened batch hold real tokens.

    Args:
        attention_mask: ``(B, L)``, nonzero for real tokens. With a cache of earlier tokens it covers those too, first;
            with one of a fixed size, it may also cover the places behind, which are still empty.
        length: ``L`` of the batch without them; all that the mask covers if not given.
        past: How many tokens are in the cache, where that is known; else the mask is taken to end with the batch.

    Returns:
        ``(B * L,)`` boolean, or None where every position is known to hold a token: without looking at the values
        where that would break a graph or wait for a GPU.

    Raises:
        ValueError: If the mask is not two-dimensional, or does not cover the batch.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.token_context import real_positions
        >>> real_positions(torch.tensor([[1, 1, 1], [1, 0, 0]]), length=2)
        tensor([ True,  True, False, False])
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask of shape {shape}: must be (B, L), which tells padding from tokens; another kind does not"
        )
    if length is not None:
        if attention_mask.shape[1] < length:
            raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}: must cover the {length} inputs")
        start = attention_mask.shape[1] - length
        if isinstance(past, Tensor) and start > 0:  # of a cache of fixed size: its value is not looked at
            first = past.to(attention_mask.device).clamp(max=start)
            attention_mask = attention_mask.index_select(1, first + torch.arange(length, device=first.device))
        else:
            start = start if past is None or isinstance(past, Tensor) else min(past, start)
            attention_mask = attention_mask[:, start : start + length]
    real = (attention_mask != 0).flatten()  # (B * L,)
    can_look = real.device.type == "cpu" and not is_recorded()
    return None if can_look and bool(real.all()) else real
