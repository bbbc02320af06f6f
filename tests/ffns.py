"""Random FFNs and experts, shared by tests of what computes them."""

import torch
from hypothesis import strategies as st
from torch import nn

from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.moe.experts.experts import Experts

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def make_ffn(d_model, d_ff, gated=False, bias=True, activation=nn.ReLU, d_out=None):
    return FFN(
        name="ffn",
        up=nn.Linear(d_model, d_ff, bias=bias),
        activation=activation(),
        down=nn.Linear(d_ff, d_out or d_model, bias=bias),
        gate_proj=nn.Linear(d_model, d_ff, bias=bias) if gated else None,
    )


def cases(most_tokens, most_experts, largest_expert, largest_d):
    return st.fixed_dictionaries(
        {
            "tokens": st.integers(0, most_tokens),
            "num_experts": st.integers(1, most_experts),
            "expert_dim": st.integers(1, largest_expert),
            "d_model": st.integers(1, largest_d),
            "d_out": st.none() | st.integers(1, largest_d),
            "gated": st.booleans(),
            "bias": st.booleans(),
            "activation": st.sampled_from(list(ACTIVATIONS)),
            "density": st.sampled_from([0.0, 0.2, 1.0]),
            "seed": st.integers(0, 2**31),  # of weights, tokens and masks, so that a failure can be repeated
        }
    )


def ffn_of(case):
    """The dense FFN of a case."""
    activation = ACTIVATIONS[case["activation"]]
    d_ff = case["num_experts"] * case["expert_dim"]
    return make_ffn(case["d_model"], d_ff, case["gated"], case["bias"], activation, case["d_out"])


def experts_of(case, backend, **kwargs):
    """Experts as the case has them, freshly drawn, and tokens and a mask for them."""
    d_model, num_experts = case["d_model"], case["num_experts"]
    ffn = ffn_of(case)
    mask = torch.rand(case["tokens"], num_experts) < case["density"]
    return Experts(ffn, num_experts, None, backend, **kwargs), torch.randn(case["tokens"], d_model), mask


def in_a_gap(hidden):
    """A cutoff that a good part of activations does not reach, and that none is so near to that rounding decides."""
    magnitudes = hidden.abs().flatten().double().sort().values.clamp(min=1e-6)
    if len(magnitudes) < 2:
        return 0.0
    middle = magnitudes[len(magnitudes) // 4 :]
    widest = int((middle[1:] / middle[:-1]).argmax()) if len(middle) > 1 else 0
    low, high = middle[widest], middle[min(widest + 1, len(middle) - 1)]
    return float((low * high).sqrt()) if high > 1.02 * low else 0.0


def assert_close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
