"""Experts whose weights are int8 numbers times a scale an output channel."""

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.experts.experts import WEIGHTS, Experts, Weights
from d2dmoe_pl.moe.quantization.int8_layers import Int8Module


class Int8Experts(Int8Module, Experts):
    """Experts for inference, at a quarter of the memory: what :class:`Experts` computes, but for rounding.

    On the CPU, tokens and activations are rounded too, at run time, with a scale a token, and products are in int8
    where the CPU has AVX-512 VNNI, or, for more than four tokens and experts of 32 neurons and more, AVX2. Otherwise
    nothing is rounded: four tokens and fewer are multiplied with the numbers as they are, and more, or by other
    backends, with the weights multiplied out. Where so much is chosen that all experts are computed at once, they are
    as two linear layers in int8.

    Args:
        experts: To be rounded; keeps its biases.

    Shapes: as of :class:`Experts`, in int8; ``up_scale`` and ``gate_scale`` ``(E, s)``, ``down_scale`` ``(E, d_out)``.
    """

    is_quantized = True

    up_scale: Tensor
    gate_scale: Tensor | None
    down_scale: Tensor

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.num_experts = experts.num_experts
        self.activation, self._kind = experts.activation, experts._kind
        self.hidden_dropout = experts.hidden_dropout
        self.set_backend(experts.backend)
        for name, dim in (("up", 2), ("gate", 2), ("down", 1)):
            bias = getattr(experts, f"{name}_bias")
            self.set_numbers(f"{name}_", getattr(experts, f"{name}_weight"), dim)
            self.register_buffer(f"{name}_bias", None if bias is None else bias.detach())

    @property
    def weights(self) -> Weights:
        own = self._buffers  # which they all are: compiled code looks nowhere else at every call
        return [own[name] for name in (*WEIGHTS, "up_scale", "gate_scale", "down_scale")]

    def weights_in(self, dtype: torch.dtype) -> Weights:
        def multiplied(weight: Tensor | None, scale: Tensor | None, dim: int) -> Tensor | None:
            return None if weight is None or scale is None else (weight * scale.unsqueeze(dim)).to(dtype)

        biases = [None if bias is None else bias.to(dtype) for bias in (self.up_bias, self.gate_bias, self.down_bias)]
        return [
            multiplied(self.up_weight, self.up_scale, 2),
            biases[0],
            multiplied(self.gate_weight, self.gate_scale, 2),
            biases[1],
            multiplied(self.down_weight, self.down_scale, 1),
            biases[2],
        ]
