"""What experts in int8 compute, in plain PyTorch, shared by tests of what computes them."""

import pytest
import torch
from torch import nn

CHUNK = 128  # neurons of an expert that are rounded together


def rounded(values, steps):
    """Each row as whole numbers of at most ``steps`` times its scale, multiplied out again."""
    scale = values.abs().amax(dim=-1, keepdim=True) / steps
    scale = torch.where(scale > 0, scale, 1.0)
    return (values / scale).round() * scale


def twin(experts, tokens, mask):
    """What the kernel computes where it runs one expert and chunk at a time."""
    up, up_bias, gate, gate_bias, down, down_bias = in_double(experts)
    is_rounded = HAS_VNNI or (len(tokens) > FEW and down.shape[1] >= SMALL)
    round_to = rounded if is_rounded else lambda values, steps: values
    tokens = round_to(tokens, 127).double()
    output = torch.zeros(len(tokens), down.shape[2], dtype=torch.float64)
    for e in range(experts.num_experts):
        hidden = tokens @ up[e].t() + (0 if up_bias is None else up_bias[e])
        if gate is None:
            hidden = experts.activation(hidden)
        else:
            hidden = experts.activation(tokens @ gate[e].t() + (0 if gate_bias is None else gate_bias[e])) * hidden
        steps = 255 if gate is None and isinstance(experts.activation, nn.ReLU) else 127
        for chunk, weight in zip(hidden.split(CHUNK, 1), down[e].split(CHUNK), strict=True):
            output += mask[:, e : e + 1] * (round_to(chunk, steps) @ weight)
    return output + (0 if down_bias is None else down_bias)


def twin_at_once(experts, tokens, mask):
    """What it computes where all experts are one FFN: a scale for all of a token's activations, and one a column."""
    up, up_bias, gate, gate_bias, down, down_bias = in_double(experts)
    tokens = rounded(tokens, 127).double()

    def product(weight, bias):
        return torch.einsum("nd,esd->nes", tokens, weight) + (0 if bias is None else bias)  # (N, E, s)

    hidden = experts.activation(product(up, up_bias) if gate is None else product(gate, gate_bias))
    hidden = (hidden if gate is None else hidden * product(up, up_bias)) * mask.unsqueeze(-1)
    columns = rounded(down.flatten(0, 1).t(), 127).t()  # (E * s, d_out)
    return rounded(hidden.flatten(1), 127) @ columns + (0 if down_bias is None else down_bias)


def in_double(experts):
    return [None if weight is None else weight.double() for weight in experts.weights_in(torch.float32)]


def nearest_twin(experts, tokens, mask, got):
    """That of the two ways of which the kernel seems to have taken one."""
    twins = [way(experts, tokens, mask) for way in (twin, twin_at_once)]
    return min(twins, key=lambda expected: (got - expected).norm())


FEW, SMALL = 4, 32  # tokens that are not rounded without VNNI, and neurons from which on experts round theirs
HAS_VNNI = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_vnni_supported()
ROUNDS = HAS_VNNI or torch.backends.cpu.get_cpu_capability() == "AVX2"
needs_int8 = pytest.mark.skipif(not ROUNDS, reason="without AVX2 or AVX-512 VNNI activations are not rounded")
