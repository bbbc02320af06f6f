"""Choices that scores can learn from: hard forward, soft backward."""

import torch
from torch import Tensor


def straight_through(scores: Tensor, mask: Tensor, softness: float) -> Tensor:
    """The mask as numbers, whose gradient is that of a sigmoid around the token's threshold (Bengio et al., 2013).

    An expert's number gets the gradient of what the expert would add to the layer's output. The nearer its score is to
    the least one that runs, the more of that reaches the score. How near is in shares of that least score, or of the
    token's mean where that is larger: where all experts run, the least is next to nothing, and its few neighbours would
    outweigh all other gradients.

    Args:
        scores: Not negative, ``(N, E)``.
        mask: Which experts run, boolean ``(N, E)``; one a token at least.
        softness: How far from the threshold gradients reach, as a share of it, or of the token's mean score.

    Returns:
        Zeros and ones, ``(N, E)`` float32.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.gating._straight_through import straight_through
        >>> scores = torch.tensor([[4.0, 1.0, 2.0]], requires_grad=True)
        >>> chosen = straight_through(scores, torch.tensor([[True, False, True]]), softness=0.1)
        >>> chosen
        tensor([[1., 0., 1.]], grad_fn=<AddBackward0>)
        >>> chosen.sum().backward()
        >>> scores.grad.argmax().item()  # that at the threshold
        2
    """
    scores = scores.float()
    least = scores.detach().masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)  # (N, 1)
    mean = scores.detach().mean(dim=1, keepdim=True)  # (N, 1)
    unit = (softness * torch.maximum(least, mean)).clamp(min=torch.finfo(scores.dtype).tiny)
    soft = torch.where(mean > 0, torch.sigmoid((scores - least) / unit), 0.5)  # (N, E); no scale, nothing to learn
    return mask + (soft - soft.detach())
