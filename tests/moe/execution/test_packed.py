"""Weights are packed for products that this processor has, and are those at hand, whatever lay in the same memory."""

import copy
import os
import subprocess
import sys

import pytest
import tiny
import torch
from ffns import make_ffn
from torch import nn

from d2dmoe_pl.moe.execution import cpu, reference
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.quantization.quantize import quantize_

IN_TWO_TYPES = """
import copy
import torch
from torch import nn
from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.quantization.int8_experts import Int8Experts

torch.manual_seed(0)
experts = Experts(FFN("ffn", up=nn.Linear(64, 160), activation=nn.ReLU(), down=nn.Linear(160, 640)), 5, None, "cpu")
narrow, int8 = copy.deepcopy(experts).bfloat16(), Int8Experts(experts)
for tokens in (1, 7, 300):
    x, mask = torch.randn(tokens, 64), torch.rand(tokens, 5) < 0.3
    with torch.no_grad():
        for other in (narrow(x.bfloat16(), mask).float(), int8(x, mask)):
            torch.testing.assert_close(other, experts(x, mask), rtol=0, atol=0.05)
"""


def on(memory, shape):
    """A new bf16 parameter on ``memory``, as the last one on it."""
    weight = torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)
    return nn.Parameter(weight, requires_grad=False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["up_weight", "down_weight", "up_bias"])
def test_another_tensor_in_the_same_memory_is_another(name):
    experts = Experts(make_ffn(32, 64), 4).to(torch.bfloat16).eval().requires_grad_(False)
    tokens, mask = torch.randn(9, 32, dtype=torch.bfloat16), torch.rand(9, 4) > 0.3
    values = getattr(experts, name).clone()
    memory = bytearray(values.nbytes)
    alive = []
    for factor in (1, 3):
        alive.append(on(memory, values.shape))
        alive[-1].data.copy_(factor * values)
        setattr(experts, name, alive[-1])
        expected = reference.reference(experts, tokens, mask)
        torch.testing.assert_close(cpu.cpu(experts, tokens, mask), expected, rtol=0.05, atol=0.05)
    assert alive[0].data_ptr() == alive[1].data_ptr()


@torch.no_grad()
def test_a_view_of_another_order_is_another():
    experts = Experts(make_ffn(16, 64), 4).to(torch.bfloat16).eval()  # as wide as experts are high
    tokens, mask = torch.randn(9, 16, dtype=torch.bfloat16), torch.rand(9, 4) > 0.3
    cpu.cpu(experts, tokens, mask)
    experts.up_weight = nn.Parameter(experts.up_weight.detach().transpose(1, 2))
    expected = reference.reference(experts, tokens, mask)
    torch.testing.assert_close(cpu.cpu(experts, tokens, mask), expected, rtol=0.05, atol=0.05)


class WritesBehindTorch(torch.optim.Optimizer):
    """As optimizers do whose kernels are not torch's own."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        WritesBehindTorch,
    ],
    ids=["fused AdamW", "fused SGD", "AdamW", "not torch's own"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_optimizer_changes_is_seen(make, dtype):
    model = tiny.routed().to(dtype)
    images = tiny.batch()["pixel_values"].to(dtype)
    optimizer = make(model.parameters())
    for _ in range(2):
        before = predicted(model, images)
        model(images).square().sum().backward()
        predicted(model, images)  # between the gradients and the step
        optimizer.step()
        after = predicted(model, images)
        assert torch.equal(after, predicted(copy.deepcopy(model), images))
        assert not torch.equal(after, before)
        optimizer.zero_grad()


def through_numpy(weight):
    weight.view(torch.int16).numpy()[...] = (1.5 * weight).view(torch.int16).numpy()


@torch.no_grad()
@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.data.mul_(1.5),
        lambda weight: weight.data.copy_(1.5 * weight),
        lambda weight: weight.data.lerp_(torch.randn_like(weight), 0.1),  # as moving averages are kept
        lambda weight: torch.nn.init.normal_(weight.data),
        through_numpy,
    ],
    ids=["in place", "copied", "averaged", "drawn", "by NumPy"],
)
@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_what_is_written_past_autograd_is_seen(write, tokens):
    model = tiny.routed().bfloat16().eval().requires_grad_(False)
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    x = torch.randn(1, tokens, layer.own_experts.d_model, dtype=torch.bfloat16)
    before = layer(x)
    assert torch.equal(layer(x), before)
    for weight in layer.parameters():
        write(weight)
    after = layer(x)
    assert torch.equal(after, copy.deepcopy(layer)(x))
    assert not torch.equal(after, before)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_so_it_is_in_int8(tokens):
    model = tiny.routed("bert").eval().requires_grad_(False)
    quantize_(model)
    given = {"input_ids": torch.randint(1, 40, (tokens, 8)), "attention_mask": torch.ones(tokens, 8, dtype=torch.int64)}
    before = model(**given).logits
    for tensor in model.buffers():
        if tensor.dtype == torch.int8:
            tensor.data.neg_()
    after = model(**given).logits
    assert torch.equal(after, copy.deepcopy(model)(**given).logits)
    assert not torch.equal(after, before)


@torch.no_grad()
def predicted(model, images):
    return model.eval()(images)


@pytest.mark.thorough
@pytest.mark.parametrize("most", ["AVX512_CORE", "AVX512_CORE_VNNI"])
def test_a_processor_without_bfloat16(most):
    """Of which ATen says that it has products in it, and oneDNN, when called, that it has not."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
    done = subprocess.run(
        [sys.executable, "-c", IN_TWO_TYPES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
