"""Experts made from a dense FFN's most important neurons: MoEBERT (arXiv 2204.07675), section 3.2."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.token_context import scattered


def check_expert_sizes(num_experts: int, expert_dim: int, num_shared: int, d_ff: int, name: str) -> None:
    """Raise ``ConfigError`` unless an FFN of ``d_ff`` neurons, called ``name``, has enough of them for such experts."""
    needed = num_shared + num_experts * (expert_dim - num_shared)
    check(
        needed <= d_ff,
        f"num_experts={num_experts}, expert_dim={expert_dim}, num_shared={num_shared}: need {needed} neurons "
        f"(num_shared + num_experts * (expert_dim - num_shared)), but {name} has {d_ff}",
    )


def expert_neurons(importance: Tensor, num_experts: int, expert_dim: int, num_shared: int) -> Tensor:
    """Which neurons each expert gets.

    By descending importance, the first ``num_shared`` go to every expert and the rest are dealt out in turn; each
    expert keeps its first ``expert_dim``.

    Args:
        importance: ``(d_ff,)``.
        num_experts: ``E``.
        expert_dim: ``s``, neurons of an expert.
        num_shared: How many of them every expert has; at most ``expert_dim``.

    Returns:
        ``(E, s)`` int64, most important first.
    """
    order = importance.argsort(descending=True, stable=True)
    shared, rest = order.tensor_split([num_shared])
    dealt = rest[: num_experts * (expert_dim - num_shared)].view(-1, num_experts).t()  # (E, s - num_shared)
    return torch.cat([shared.expand(num_experts, -1), dealt], dim=1)


class ImportanceExperts(nn.Module):
    """``E`` FFNs of ``s`` neurons that replace a dense FFN and the LayerNorm after its residual; one runs for a token.

    Args:
        ffn: The dense FFN, with a ``residual_norm``, to take weights and activation from.
        neurons: Neurons of each expert, ``(E, s)``.
        dropout: On each expert's output.

    Shapes: ``up_weight`` and ``down_weight`` are ``(E, s, d_model)``, ``up_bias`` ``(E, s)``; ``down_bias``,
    ``norm_weight`` and ``norm_bias`` ``(E, d_model)``, an expert's own.

    Attributes:
        dense_dim: Neurons of the dense FFN.
    """

    is_gated = False

    def __init__(self, ffn: FFN, neurons: Tensor, dropout: float) -> None:
        super().__init__()
        neurons = neurons.to(ffn.up.weight.device)
        self.num_experts = neurons.shape[0]
        self.dense_dim = ffn.d_ff
        norm, up_bias = ffn.residual_norm, ffn.up.bias
        assert norm is not None
        assert up_bias is not None
        assert ffn.down.bias is not None
        self.norm_eps = norm.eps

        def own(vector: Tensor) -> nn.Parameter:
            return nn.Parameter(vector.detach().repeat(self.num_experts, 1))  # (d,) -> (E, d)

        self.up_weight = nn.Parameter(ffn.up.weight.detach()[neurons])  # (h, d) -> (E, s, d)
        self.up_bias = nn.Parameter(up_bias.detach()[neurons])
        self.down_weight = nn.Parameter(ffn.down.weight.detach().t()[neurons])
        self.down_bias = own(ffn.down.bias)
        self.norm_weight = own(norm.weight)
        self.norm_bias = own(norm.bias)
        self.activation = ffn.activation
        self.dropout = nn.Dropout(dropout)

    @property
    def expert_dim(self) -> int:
        """``s``, the neurons of one expert."""
        return self.up_weight.shape[1]

    @property
    def d_model(self) -> int:
        return self.up_weight.shape[2]

    @property
    def d_out(self) -> int:
        return self.d_model

    def forward(self, tokens: Tensor, expert: Tensor, scale: Tensor | None = None) -> Tensor:
        """Run each token's expert, and no other.

        Args:
            tokens: ``(N, d_model)``.
            expert: ``(N,)`` integers in ``[0, E)``.
            scale: What the expert's output is multiplied by before residual and norm, as in the paper's equation 2,
                ``(N, 1)``; 1 if not given. (The published code scales what comes after them, which takes a student
                further from its dense start.)

        Returns:
            ``norm_e(x + dropout(scale * FFN_e(x)))`` of each token, ``(N, d_model)``.
        """
        # unbound once, so that the backward pass puts each gradient together once
        parameters = (self.up_weight, self.up_bias, self.down_weight, self.down_bias, self.norm_weight, self.norm_bias)
        experts = list(zip(*(parameter.unbind() for parameter in parameters), strict=True))
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # where numbers of tokens would be the example's
            output = self._run(tokens, scale, *experts[0])
            for index, weights in enumerate(experts[1:], 1):
                output = torch.where((expert == index).unsqueeze(1), self._run(tokens, scale, *weights), output)
            return output
        order = expert.argsort(stable=True)  # (N,): tokens, expert by expert
        sizes = torch.bincount(expert, minlength=self.num_experts).tolist()
        rows = tokens.index_select(0, order).split(sizes)  # E tensors (n_e, d)
        scales = [None] * self.num_experts if scale is None else scale.index_select(0, order).split(sizes)
        outputs = [self._run(*inputs, *expert) for *inputs, expert in zip(rows, scales, experts, strict=True)]
        return scattered(torch.cat(outputs), order, len(tokens))

    def _run(
        self,
        tokens: Tensor,
        scale: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor,
        down_weight: Tensor,
        down_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
    ) -> Tensor:
        """One expert on its tokens, ``(n_e, d)`` to the same shape."""
        hidden = self.activation(F.linear(tokens, up_weight, up_bias))  # (n_e, s)
        output = F.linear(hidden, down_weight.t(), down_bias)
        output = self.dropout(output if scale is None else scale * output)
        return F.layer_norm(tokens + output, norm_weight.shape, norm_weight, norm_bias, self.norm_eps)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, expert_dim={self.expert_dim}, d_model={self.d_model}"
