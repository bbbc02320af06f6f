"""Hidden states that a model is to go on giving: what it learnt from far more data than a phase has is kept so."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.token_context import real_tokens, token_index
from d2dmoe_pl.phases._sharding import shares_model
from d2dmoe_pl.phases._teacher import Teacher, on_same_memory

if TYPE_CHECKING:
    from d2dmoe_pl.phases._phase import Phase


class HiddenStateKeeping:
    """The hidden states of a model as it was before a phase, and how far from them it has gone.

    Args:
        weight: Of that in the loss, at least 0; with 0 nothing is kept, and nothing costs time.
    """

    def __init__(self, weight: float) -> None:
        check(weight >= 0, f"hidden_weight={weight}: must not be negative")
        self.weight = weight
        self._before: Teacher | None = None

    def begin(self, model: nn.Module, phase: "Phase") -> None:
        """Take ``model`` as it is now, before ``phase`` changes it, or is given what a checkpoint has.

        Raises:
            ConfigError: If its hidden states cannot be told.
        """
        check_hidden_states(model, self.weight)
        if self.weight > 0:
            # one that is to be parted among processes is read as it is needed, and not written to
            is_read_only = next(model.parameters()).is_meta or shares_model(phase)
            self._before = Teacher(on_same_memory(model) if is_read_only else copy.deepcopy(model))

    def place(self, phase: "Phase") -> None:
        """Have what was taken where the model of ``phase`` is, and parted among processes as that is."""
        if self._before is None:
            return
        self._before.prepare(phase)
        self._before.to(phase.device)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits of ``model``, and the loss of its hidden states by name; no loss where nothing is kept."""
        if self._before is None:
            return adapter_for(model).logits(model, batch), {}
        logits, states = adapter_for(model).logits_and_hidden_states(model, batch)
        _, before = self._before.logits_and_hidden_states(batch)
        return logits, {"hidden_state_loss": hidden_state_error(states, before, batch)}


def check_hidden_states(model: nn.Module, weight: float) -> None:
    """Raise ``ConfigError`` if hidden states count, by their ``weight``, and those of ``model`` cannot be told."""
    adapter = adapter_for(model)
    is_told = adapter.tells_hidden_states and len(adapter.streams(model)) == 1
    check(
        weight == 0 or is_told,
        f"hidden_weight={weight}: must be 0 with {type(model).__name__}, "
        + ("whose layers are not known" if not adapter.tells_hidden_states else "which has more than one stack"),
    )


def logits_and_weighed_states(model: nn.Module, batch: Batch, weight: float) -> tuple[Tensor, Sequence[Tensor]]:
    """The logits of ``model`` and, if they count by their ``weight``, its hidden states; else none."""
    adapter = adapter_for(model)
    return adapter.logits_and_hidden_states(model, batch) if weight > 0 else (adapter.logits(model, batch), ())


def hidden_state_error(states: Sequence[Tensor], wanted: Sequence[Tensor], batch: Batch) -> Tensor:
    """The squared error of hidden states relative to their squared length, mean over real tokens, then over layers.

    Being relative, it weighs a layer whose states are a hundred times larger than another's no more than that one.

    Args:
        states: What the embeddings and each layer give, ``(B, L, d_model)``.
        wanted: What they are to give.
        batch: With the padding mask, if there is padding.

    Returns:
        A scalar.

    Raises:
        ConfigError: If they are not of the same number and width, or not one a token.
    """
    mask = batch.get("attention_mask")
    index = token_index(mask)
    shapes = [[tuple(each.shape) for each in all_states] for all_states in (states, wanted)]
    check(
        shapes[0] == shapes[1],
        f"hidden_weight: the teacher has {len(wanted)} hidden states of width {shapes[1][-1][-1]}; must have "
        f"{len(states)} of width {shapes[0][-1][-1]}, as the model has",
    )
    fits = all(len(shape) == 3 and (mask is None or shape[:2] == mask.shape) for shape in shapes[0])
    check(fits, f"hidden_weight: must be 0, since hidden states of shape {shapes[0][-1]} are not one a token")
    errors = []
    for one, other in zip(states, wanted, strict=True):
        found, meant = (real_tokens(each.flatten(0, 1), index).float() for each in (one, other))  # (N, d_model)
        sizes = meant.square().sum(dim=1)  # (N,)
        least = 1e-3 * sizes.mean() + torch.finfo(sizes.dtype).tiny  # a token that is next to nothing counts for little
        errors.append(((found - meant).square().sum(dim=1) / sizes.clamp(min=least)).mean())
    return torch.stack(errors).mean()
