"""How far two predictions are apart, a few rows at a time: over a vocabulary, copies of all of them are gigabytes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2**18}  # logits at once: what caches hold
LARGE_CHUNK = 2**25  # elsewhere: enough to be busy with


def symmetric_kl(first_logits: Tensor, second_logits: Tensor) -> Tensor:
    """``(KL(p || q) + KL(q || p)) / 2`` of the softmaxes over the last dimension: MoEBERT (arXiv 2204.07675).

    Args:
        first_logits: ``(..., C)``.
        second_logits: ``(..., C)``.

    Returns:
        ``(...)`` float32.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.data.symmetric_kl import symmetric_kl
        >>> symmetric_kl(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 2))
        tensor([0.0000, 0.3808])
    """
    return _SymmetricKL.apply(first_logits, second_logits)


class _SymmetricKL(torch.autograd.Function):
    """Gradients are computed with the values, while what both need is at hand; nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, first_logits: Tensor, second_logits: Tensor) -> Tensor:
        classes = first_logits.shape[-1]
        firsts, seconds = (logits.reshape(-1, classes) for logits in (first_logits, second_logits))  # (N, C)
        divergences = firsts.new_empty(len(firsts), dtype=torch.float32)  # (N,)
        slopes = [
            torch.empty_like(logits) if is_wanted else None
            for logits, is_wanted in zip((firsts, seconds), ctx.needs_input_grad, strict=True)
        ]
        rows = max(1, CHUNK.get(firsts.device.type, LARGE_CHUNK) // max(1, classes))
        for start in range(0, len(firsts), rows):
            chunk = slice(start, start + rows)
            log_p, log_q = (logits[chunk].float().log_softmax(dim=-1) for logits in (firsts, seconds))
            p, q, gap = log_p.exp(), log_q.exp(), log_p - log_q
            apart = p - q
            # p (log p - log q) + q (log q - log p)
            divergences[chunk] = 0.5 * (apart * gap).sum(dim=-1)
            for slope, prob, sign in zip(slopes, (p, q), (1, -1), strict=True):
                if slope is not None:  # the first divergence's, p (gap - sum p gap), and the second's, p - q
                    mean = (prob * gap).sum(dim=-1, keepdim=True)
                    slope[chunk] = 0.5 * sign * (prob * (gap - mean) + apart)
        ctx.save_for_backward(*slopes)
        return divergences.view(first_logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(
            None
            if slope is None
            else (slope * gradient.reshape(-1, 1).to(slope.dtype)).view(*gradient.shape, slope.shape[-1])
            for slope in ctx.saved_tensors
        )
