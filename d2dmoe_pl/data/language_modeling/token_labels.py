"""What a language model is to tell of a block of tokens: the next one at each position, or those behind a mask."""

import zlib

import torch
from torch import Tensor

from d2dmoe_pl.data.language_modeling.token_prediction import NOT_PREDICTED


def next_tokens(blocks: Tensor) -> Tensor:
    """Labels of causal language modelling.

    Args:
        blocks: Token ids, ``(B, L)``.

    Returns:
        ``(B, L)``; after a block's last token comes nothing to predict.
    """
    return torch.cat([blocks[:, 1:], torch.full_like(blocks[:, :1], NOT_PREDICTED)], dim=1)


def masked_tokens(
    blocks: Tensor,
    maskable: Tensor,
    share: float,
    mask_id: int,
    num_token_ids: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of masked language modelling: BERT (arXiv 1810.04805), section 3.1.

    Of the tokens that are to be predicted, 80% become the mask, 10% a random token, and 10% stay.

    Args:
        blocks: Token ids, ``(B, L)``.
        maskable: True where a token may be masked, ``(B, L)``.
        share: Of these, how many are, in expectation; at least one a block that has any.
        mask_id: The mask's token id.
        num_token_ids: Random tokens are below this.
        generator: Draws; torch's own if not given.

    Returns:
        Inputs and labels, ``(B, L)`` each.
    """
    draws = torch.rand(3, *blocks.shape, generator=generator).masked_fill(~maskable, 2.0)  # (3, B, L)
    least = draws[0].min(dim=1, keepdim=True).values  # (B, 1)
    chosen = (draws[0] <= least.clamp(min=share)) & maskable
    labels = blocks.masked_fill(~chosen, NOT_PREDICTED)
    inputs = blocks.masked_fill(chosen & (draws[1] < 0.8), mask_id)
    replaced = chosen & (draws[1] >= 0.9)
    random_tokens = (draws[2] * num_token_ids).long()
    return torch.where(replaced, random_tokens, inputs), labels


def generator_of(block: Tensor) -> torch.Generator:
    """Draws that depend on a block's tokens, ``(L,)``, and on nothing else."""
    return torch.Generator().manual_seed(zlib.crc32(block.contiguous().numpy().tobytes()))
