"""Every check on one model that is converted."""

import copy

import torch

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.moe.conversion import ExpertsConfig, add_routers_, convert_to_moe_, set_gate_
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig


def converts_exactly(model, inputs, folder=None, num_experts=8):
    """Every check on one model: experts on is dense, off is not, saved is the same, merged is dense again."""
    adapter = adapter_for(model)
    dense = adapter.logits(model, inputs)
    converted = copy.deepcopy(model)
    convert_to_moe_(converted, ExpertsConfig(num_experts))
    torch.testing.assert_close(adapter.logits(converted, inputs), dense, rtol=1e-4, atol=1e-4)
    assert torch.equal(adapter.logits(model, inputs), dense)  # the original is as it was
    add_routers_(converted, RouterConfig(4))
    set_gate_(converted, GateConfig("dynk_max", 0.6))
    low = adapter.logits(converted, inputs)
    assert not torch.allclose(low, dense)
    if folder is not None:
        save_artifact(converted, folder)
        loaded = load_model(folder)
        assert torch.equal(adapter.logits(loaded, inputs), low)
        merge_to_dense_(loaded)
        torch.testing.assert_close(adapter.logits(loaded, inputs), dense, rtol=1e-4, atol=1e-4)
    return converted
