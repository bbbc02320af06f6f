"""The ways that are compared with compute what the plain twin computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.benchmark.alternatives import ALTERNATIVES
from d2dmoe_pl.benchmark.compared_modules import find_way, run_dense
from d2dmoe_pl.benchmark.preset_masks import random_mask
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.quantization.int8_experts import Int8Experts

CPU = torch.device("cpu")


def make_ffn(gated, bias):
    return FFN(
        name="ffn",
        up=nn.Linear(16, 32, bias=bias),
        activation=nn.GELU(),
        down=nn.Linear(32, 16, bias=bias),
        gate_proj=nn.Linear(16, 32, bias=bias) if gated else None,
    )


@pytest.mark.parametrize("name", ALTERNATIVES.names())
@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
@torch.no_grad()
def test_a_way_equals_the_reference(name, gated, bias, share):
    if name == "grouped_mm" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    ffn = make_ffn(gated, bias)
    experts = Experts(ffn, 4)
    tokens, mask = torch.randn(9, 16), random_mask(9, 4, share, CPU)
    torch.testing.assert_close(find_way(name)(experts, tokens, mask), experts(tokens, mask), rtol=1e-5, atol=1e-5)
    if share == 1.0:
        torch.testing.assert_close(run_dense(ffn, tokens), experts(tokens, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALTERNATIVES.names())
@torch.no_grad()
def test_a_way_takes_experts_in_int8(name):
    if name == "grouped_mm" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    experts = Int8Experts(Experts(make_ffn(True, True), 4, backend="reference"))
    tokens, mask = torch.randn(9, 16), random_mask(9, 4, 0.4, CPU)
    torch.testing.assert_close(find_way(name)(experts, tokens, mask), experts(tokens, mask), rtol=1e-5, atol=1e-5)


def test_kernels_can_be_compared_with_too():
    experts = Experts(make_ffn(False, True), 4)
    tokens, mask = torch.randn(5, 16), random_mask(5, 4, 0.5, CPU)
    torch.testing.assert_close(find_way("grouped")(experts, tokens, mask), experts(tokens, mask))


def test_an_unknown_way():
    with pytest.raises(ConfigError, match=r"^compare='abacus': allowed are grouped_mm, loop, .*grouped, reference"):
        find_way("abacus")


def test_a_torch_without_grouped_mm(monkeypatch):
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    with pytest.raises(ConfigError, match=r"^compare='grouped_mm': torch .* has no torch.nn.functional.grouped_mm$"):
        find_way("grouped_mm")(Experts(make_ffn(False, True), 4), torch.randn(5, 16), torch.ones(5, 4).bool())


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_rows_that_grouped_mm_does_not_take():
    experts = Experts(make_ffn(False, True), 16)
    said = r"^compare='grouped_mm': rows of 2 numbers in torch.float32 are 8 bytes; must be a multiple of 16, by "
    with pytest.raises(ConfigError, match=said):
        find_way("grouped_mm")(experts, torch.randn(5, 16), torch.ones(5, 16).bool())


@pytest.mark.parametrize(("share", "pairs"), [(0.0001, 1), (0.25, 10), (0.5, 20), (1.0, 40)])
def test_a_random_mask_has_exactly_its_share(share, pairs):
    mask = random_mask(5, 8, share, CPU)
    assert mask.shape == (5, 8)
    assert int(mask.sum()) == pairs
    if share == 0.5:
        assert not torch.equal(mask, random_mask(5, 8, share, CPU))
