"""How much each neuron of an FFN matters to the loss: MoEBERT (arXiv 2204.07675), section 3.1."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.gradient_types import without_float16


def weight_contributions(inner: Tensor, gradient: Tensor, counted: Tensor | None) -> Tensor:
    """``w_j · dL/dw_j`` of every neuron ``j``, sample by sample, without any per-sample gradient.

    The gradient of a weight is a sum over tokens of what the weight is multiplied by, times what comes back; its inner
    product with the weight is then the sum over tokens of the product, times what comes back. That is known as it is.

    Args:
        inner: What the weights contribute to the forward pass, ``(B, L, d_ff)``.
        gradient: Of the loss, summed over samples, by ``inner``; ``(B, L, d_ff)``.
        counted: Which positions hold real tokens, ``(B, L)``; all if not given.

    Returns:
        ``(B, d_ff)`` float32.
    """
    product = inner.float() * gradient.float()
    if counted is not None:
        product = product * counted.unsqueeze(-1)
    return product.sum(dim=1)  # (B, L, d_ff) -> (B, d_ff)


def check_scorable(ffns: Sequence[FFN]) -> None:
    """Raise ``ConfigError`` for an FFN that is gated, or stands in the place of an attention projection."""
    for ffn in ffns:
        check(
            not ffn.is_projection,
            f"{ffn.name}: stands in the place of an attention projection; importance scores are defined for the "
            "architecture's own FFNs",
        )
        check(ffn.gate_proj is None, f"{ffn.name}: a gated FFN; importance scores are defined for FFNs without a gate")


class Importance:
    """Scores ``sum over samples of |w1_j · dL/dw1_j + w2_j · dL/dw2_j|`` of neurons, from one backward pass a batch.

    ``w1_j`` is row ``j`` of the first weight matrix and ``w2_j`` column ``j`` of the second; biases are left out. With
    ``z`` the pre-activation and ``a`` the activation, the two products are ``sum_t (z_tj - b1_j) · dL/dz_tj`` and
    ``sum_t a_tj · dL/da_tj`` over the sample's tokens ``t``. Where a sample has several predictions, as of words or of
    the next token, ``L`` is the sum over them.

    Args:
        ffns: The FFNs to score; without inner dropout, or in evaluation mode.
        device: Where the scores are summed.
    """

    def __init__(self, ffns: Sequence[FFN], device: torch.device) -> None:
        check_scorable(ffns)
        self._ffns = {ffn.name: ffn for ffn in ffns}
        self.scores = {ffn.name: torch.zeros(ffn.d_ff, dtype=torch.float64, device=device) for ffn in ffns}

    def add(self, loss: Callable[[], Tensor], mask: Callable[[str], Tensor | None], samples: Tensor) -> None:
        """Add the samples of one batch.

        Args:
            loss: Runs the model and gives the loss summed over all that it predicts; called once, with gradients on.
            mask: Of the tokens that the FFN of a name sees: ``(B, L)``, nonzero for real ones; None where all are.
            samples: Boolean ``(B,)``, the samples that count.
        """
        watched: list[Tensor] = []
        found: dict[str, Tensor] = {}  # (B, d_ff), of both weights and of all times that an FFN runs

        def meet(name: str, inner: Tensor, gradient: Tensor) -> None:
            shape = (len(samples), -1, inner.shape[-1])  # some flatten tokens before FFNs, or have rows and columns
            real = mask(name)
            counted = None if real is None else real != 0
            contributions = weight_contributions(inner.reshape(shape), gradient.reshape(shape), counted)
            found[name] = found[name] + contributions if name in found else contributions

        def meet_pre(name: str, pre: Tensor, gradient: Tensor) -> None:
            bias = self._ffns[name].up.bias
            meet(name, pre if bias is None else pre - bias.detach(), gradient)

        def watch(name: str, pre: Tensor, post: Tensor) -> None:
            pre.register_hook(partial(meet_pre, name, pre.detach()))
            post.register_hook(partial(meet, name, post.detach()))
            watched.append(pre)

        with torch.enable_grad(), without_float16(samples.device.type):
            with watched_activations(list(self._ffns.values()), watch):
                total = loss()
            # of activations alone: no gradient of a weight is computed; what ran for nothing has none
            torch.autograd.grad(total, watched, allow_unused=True)
        for name, contributions in found.items():
            self.scores[name] += contributions.abs()[samples].double().sum(dim=0)
