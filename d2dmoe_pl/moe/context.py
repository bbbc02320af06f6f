"""What routing needs from the batch, carried from the model's call to its MoE layers."""

import inspect

import torch
from torch import Tensor, nn

MASK_ARGUMENT = "attention_mask"


class TokenContext:
    """Which positions of the running batch hold real tokens. One is owned by each converted model.

    A forward pre-hook on the model fills it from the ``attention_mask`` argument, if the model's forward has one, so
    that a plain ``model(**batch)`` leaves padding unrouted. Indices are found once a batch, not once a layer.
    """

    def __init__(self) -> None:
        self.token_index: Tensor | None = None

    def install(self, model: nn.Module) -> None:
        """Hook this context onto ``model``."""
        if MASK_ARGUMENT in inspect.signature(model.forward).parameters:
            model.register_forward_pre_hook(self._enter, with_kwargs=True)
            model.register_forward_hook(self._leave, always_call=True)

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
        self.token_index = token_index(bound.arguments.get(MASK_ARGUMENT))

    def _leave(self, model: nn.Module, args: tuple, output: object) -> None:
        self.token_index = None


def token_index(attention_mask: Tensor | None) -> Tensor | None:
    """Positions of the real tokens in the flattened batch.

    Args:
        attention_mask: ``(B, L)``, nonzero for real tokens.

    Returns:
        ``(N,)`` int64, or None where every position holds a token.

    Raises:
        ValueError: If the mask is not two-dimensional.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}: must be (B, L)")
    index = attention_mask.flatten().nonzero().squeeze(1)  # (N,)
    return None if index.numel() == attention_mask.numel() else index.to(torch.int64)
