"""Models of every kind can be sharded by block, are trained so, and saved as what they were."""

import copy
import importlib.util

import pytest
import tiny
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, StrategyRegistry

from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.metrics.flops import flops_outside_ffns
from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.find_layers import expert_layers
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RouterRegression, StandInFitting
from d2dmoe_pl.phases._sharding import FSDP2, FullyShardedStrategy, check_strategy, shard_over_
from d2dmoe_pl.sharded_tensors import is_sharded, is_sharded_tensor, sharded_like, whole_on_cpu

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

KINDS = ["bert", "gpt2-causal-language-modeling", "llama-causal-language-modeling", "t5", "timm_vit", "vit"]


@pytest.fixture
def mesh(tmp_path):
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [tiny.dense, tiny.routed])
def test_it_computes_and_saves_the_same(mesh, tmp_path, kind, make):
    model = make(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, name = tiny.batch(kind), type(model).__name__
    expected = tiny.logits(model, inputs)
    shard_over_(model, mesh)
    assert type(model).__name__ == name
    for _ in range(2):
        assert all(map(is_sharded_tensor, model.parameters()))
        logits = tiny.logits(model, inputs)
        torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert all(map(is_sharded_tensor, model.parameters()))
    assert any(
        parameter.grad is not None and bool(whole_on_cpu(parameter.grad).any()) for parameter in model.parameters()
    )
    save_artifact(model, tmp_path / "artifact", max_shard_size=4000)
    read = load_model(tmp_path / "artifact", mapped=True)
    assert type(read).__name__ == name
    torch.testing.assert_close(read.state_dict(), before, rtol=0, atol=0)


def test_blocks_are_cast_as_they_become_whole(mesh):
    kind = "llama-causal-language-modeling"
    model, inputs, seen = tiny.dense(kind), tiny.batch(kind), []
    expected = tiny.logits(model, inputs)
    shard_over_(model, mesh, torch.bfloat16)
    block = model.model.layers[1]
    block.mlp.register_forward_pre_hook(lambda mlp, args: seen.append((mlp.up_proj.weight.dtype, args[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = tiny.logits(model, inputs)
    logits.float().sum().backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert block.mlp.up_proj.weight.dtype == block.mlp.up_proj.weight.grad.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(("autocast", "tau"), [(False, 0.5), (True, 1.0)])
@torch.no_grad()
def test_kernels_see_changes_between_passes(mesh, autocast, tau):
    """Blocks become whole in the same memory each time, without a sign that autograd would know."""
    kind, dtype = "gpt2-causal-language-modeling", torch.float32 if autocast else torch.bfloat16
    model, inputs = tiny.routed(kind).to(dtype), tiny.batch(kind)
    set_tau_(model, tau)
    twin = copy.deepcopy(model)
    shard_over_(model, mesh, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(3):
            expected = tiny.logits(twin, inputs)
            torch.testing.assert_close(tiny.logits(model, inputs), expected, rtol=0.05, atol=0.05)
            for layers in (expert_layers(model), expert_layers(twin)):
                for layer in layers.values():
                    layer.experts.down_weight.mul_(-2)
                    layer.router.down.weight.copy_(layer.router.down.weight.flip(0))


def test_flops_are_those_of_the_whole_model(mesh):
    inputs = {"input_ids": torch.zeros(1, 7, dtype=torch.int64, device="meta")}
    model = tiny.routed("llama-causal-language-modeling")
    expected = flops_outside_ffns(model, inputs)
    shard_over_(model, mesh)
    assert flops_outside_ffns(model, inputs) == expected
    tiny.logits(model, tiny.batch("llama-causal-language-modeling"))  # its parameters are gathered as before


def test_values_become_sharded_and_whole(mesh):
    model = torch.nn.Linear(3, 4)
    value = torch.arange(12.0).reshape(4, 3)
    assert sharded_like(value, model.weight) is value
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    assert is_sharded(model)
    sharded = sharded_like(value, model.weight)
    assert sharded.placements == model.weight.placements
    assert torch.equal(whole_on_cpu(sharded), value)
    assert whole_on_cpu(sharded, wanted=False) is None


def test_strategies():
    deepspeed = {stage: DeepSpeedStrategy.__new__(DeepSpeedStrategy) for stage in (2, 3)}  # it need not be installed
    for stage, strategy in deepspeed.items():
        strategy.config = {"zero_optimization": {"stage": stage}}
    tuning, fitting = FineTuning(init_from="x"), StandInFitting(init_from="x")
    for strategy in (FullyShardedStrategy(), deepspeed[2], DDPStrategy()):
        check_strategy(tuning, strategy)
    check_strategy(fitting, DDPStrategy())
    for strategy in (FullyShardedStrategy(), FSDPStrategy(), *deepspeed.values()):
        with pytest.raises(ConfigError, match=r"strategy=\w+: StandInFitting needs the model whole in every process"):
            check_strategy(fitting, strategy)
    for phase in (ExpertClustering(4, init_from="x"), RouterRegression(init_from="x")):
        for strategy in (FullyShardedStrategy(), DDPStrategy()):
            check_strategy(phase, strategy)
        with pytest.raises(ConfigError, match=rf"{type(phase).__name__} has no gradients of the model to share; must"):
            check_strategy(phase, deepspeed[2])
    with pytest.raises(ConfigError, match=r"strategy=fsdp: must be fsdp2, which parts a model as phases can save it"):
        check_strategy(tuning, FSDPStrategy())
    half = FullyShardedStrategy()
    half.precision_plugin = MixedPrecision("16-mixed", "cuda", scaler=None)
    with pytest.raises(ConfigError, match=r"precision=16-mixed: must be one of 32-true, bf16-mixed, bf16-true with"):
        check_strategy(tuning, half)
    with pytest.raises(ConfigError, match=r"strategy=deepspeed: must be of stage 1 or 2, or fsdp2"):
        check_strategy(tuning, deepspeed[3])


def test_a_name_that_another_has_taken_is_ours(monkeypatch):
    """The module can be loaded again, or after a library that calls a strategy of its own the same."""
    registered = dict(StrategyRegistry)  # whose ``get``, by which monkeypatch takes what was there, makes a strategy
    monkeypatch.setattr(StrategyRegistry, "get", registered.get, raising=False)
    monkeypatch.setitem(StrategyRegistry, FSDP2, {**StrategyRegistry[FSDP2], "strategy": DDPStrategy})
    spec = importlib.util.find_spec(FullyShardedStrategy.__module__)
    module = importlib.util.module_from_spec(spec)  # another than the one that is loaded, which stays
    spec.loader.exec_module(module)
    assert StrategyRegistry[FSDP2]["strategy"] is module.FullyShardedStrategy
