"""Texts padded on the left, as decoders generate from them, given to a model as it has learnt them: padded behind."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids")


def padded_behind(batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Callable[[Tensor, int], Tensor]]:
    """Put padding behind each text, so that positions begin with its first token.

    Positions, and heads that look at the first token or the last, then do not depend on the side of the padding.

    Args:
        batch: With ``input_ids`` ``(B, L)`` and, perhaps, ``attention_mask`` ``(B, L)``, 0 for padding.

    Returns:
        The batch; and what puts a tensor's values by token, along the dimension ``L`` that it is told, back to where
        the tokens were. Both leave as it is what has no padding in front.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.adapters._padding import padded_behind
        >>> batch = {"input_ids": torch.tensor([[0, 0, 7, 8]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
        >>> behind, back = padded_behind(batch)
        >>> behind["input_ids"]
        tensor([[7, 8, 0, 0]])
        >>> back(behind["input_ids"], 1)
        tensor([[0, 0, 7, 8]])
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool((mask[:, 0] != 0).all()):
        return batch, lambda values, dim: values
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)  # (B, L), tokens first
    moved = {key: value.gather(1, order) if key in BY_TOKEN else value for key, value in batch.items()}
    place = order.argsort(dim=1)  # (B, L)

    def back(values: Tensor, dim: int) -> Tensor:
        shape = [1] * values.dim()
        shape[0], shape[dim] = place.shape
        return values.gather(dim, place.view(shape).expand_as(values))

    return moved, back
