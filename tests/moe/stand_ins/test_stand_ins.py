"""Stand-ins for skipped experts: exactly none where nothing is skipped, the least squares they promise elsewhere."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from d2dmoe_pl import load_model, merge_to_dense_, quantize_, save_artifact, set_tau_
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import add_stand_ins_, set_gate_
from d2dmoe_pl.moe.execution import cpu
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.stand_ins.fitting import FittingConfig, SkippedSums, fit_stand_ins_, joined
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig, skipped_share

FAMILIES = ["timm_vit", "bert", "gpt2", "llama", "gemma"]


def fitted(kind="timm_vit", batch=None, **config):
    """A routed model with stand-ins, fitted on noise."""
    model = tiny.routed(kind)
    batch = tiny.batch(kind, 8) if batch is None else batch
    fit_stand_ins_(
        model, FittingConfig(**{"rank": 4, **config}), run=lambda each: tiny.logits(model, each), batch=batch
    )
    return model


def stand_in_taken_away(model):
    before = {name: layer.stand_in for name, layer in moe_layers(model).items()}
    add_stand_ins_(model, StandInConfig(0))
    return before


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_with_every_expert_on_nothing_stands_in(kind):
    model, batch = fitted(kind), tiny.batch(kind)
    set_tau_(model, 1.0)
    with_it = tiny.logits(model, batch)
    set_tau_(model, 0.3)
    assert not torch.equal(tiny.logits(model, batch), with_it)
    set_tau_(model, 1.0)
    stand_in_taken_away(model)
    assert torch.equal(tiny.logits(model, batch), with_it)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_is_saved_and_loaded(kind, tmp_path):
    model, batch = fitted(kind), tiny.batch(kind)
    save_artifact(model, tmp_path / "artifact")
    assert torch.equal(tiny.logits(load_model(tmp_path / "artifact"), batch), tiny.logits(model, batch))


@torch.no_grad()
def test_the_parts_and_the_operator_agree_with_padding_and_in_int8(tmp_path):
    assert cpu.compile_failure() is None
    model, batch = fitted("bert"), tiny.batch("bert")
    whole = tiny.logits(model, batch)
    handles = [layer.watch(lambda mask: None) for layer in moe_layers(model).values()]
    torch.testing.assert_close(tiny.logits(model, batch), whole, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    quantize_(model)
    torch.testing.assert_close(tiny.logits(model, batch), whole, rtol=0.1, atol=0.1 * whole.abs().max().item())
    save_artifact(model, tmp_path / "artifact")
    assert torch.equal(tiny.logits(load_model(tmp_path / "artifact"), batch), tiny.logits(model, batch))


@torch.no_grad()
def test_is_traced_whole():
    model, batch = fitted("bert"), tiny.batch("bert")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    exported = torch.export.export(model, (), kwargs=inputs).module()
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def layer_error(model, batch, tau):
    """How far the first layer's outputs are from what it gives with every expert on, mean square."""
    set_tau_(model, tau)
    layer, outputs = next(iter(moe_layers(model).values())), []
    handle = layer.register_forward_hook(lambda _, args, output: outputs.append(output))
    tiny.logits(model, batch)
    set_tau_(model, 1.0)
    tiny.logits(model, batch)
    handle.remove()
    return (outputs[0] - outputs[1]).square().mean().item()


@torch.no_grad()
def test_is_nearer_to_dense_at_every_tau():
    batch = tiny.batch("timm_vit", 64)
    model = fitted(batch=batch, rank=8)
    with_it = [layer_error(model, batch, tau) for tau in (0.0, 0.3, 0.6, 0.8)]
    stand_in_taken_away(model)
    without = [layer_error(model, batch, tau) for tau in (0.0, 0.3, 0.6, 0.8)]
    assert all(a < b for a, b in zip(with_it, without, strict=True)), (with_it, without)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_solves_weighted_least_squares(d_model, d_out, seed):
    torch.manual_seed(seed)
    tokens, share = torch.randn(80, d_model) + 1, torch.rand(80, 1)
    skipped = share * (tokens @ torch.randn(d_model, d_out) + torch.randn(d_out)) + 0.1 * torch.randn(80, d_out)
    sums = SkippedSums(d_model, d_out, torch.device("cpu"))
    for part in (slice(0, 30), slice(30, 80)):  # sums add up
        sums.add(tokens[part], share[part], skipped[part])
    rank = min(d_model, d_out)
    down, up = sums.solve(rank, 1e-9)
    features = torch.cat([tokens * share, share], dim=1).double()
    expected = features @ torch.linalg.lstsq(features, skipped.double()).solution
    got = torch.cat([tokens.double() @ down.t() * share, share], dim=1) @ up
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.float16):  # in which sums of squares would overflow
        narrow = SkippedSums(d_model, d_out, torch.device("cpu"))
        narrow.add(1000 * tokens, share, skipped)
    assert torch.isfinite(narrow.sums).all()
    if rank > 1:  # with less rank, what is left out is what varies least
        down, up = sums.solve(rank - 1, 1e-9)
        less = torch.cat([tokens.double() @ down.t() * share, share], dim=1) @ up
        assert (less - skipped).square().sum() >= (got - skipped).square().sum() - 1e-6


@torch.no_grad()
def test_later_layers_are_fitted_on_what_earlier_ones_give():
    torch.manual_seed(0)
    batch, config = tiny.batch("timm_vit", 16), FittingConfig(rank=3, taus=(0.4,))
    model = tiny.routed()
    reference = tiny.routed()
    reference.load_state_dict(model.state_dict())
    fit_stand_ins_(model, config, run=lambda each: tiny.logits(model, each), batch=batch)
    for name in moe_layers(reference):  # one at a time, those before at work
        set_tau_(reference, 0.4)
        fit_stand_ins_(
            reference,
            config,
            lambda _, candidate, name=name: candidate == name,
            run=lambda each: tiny.logits(reference, each),
            batch=batch,
        )
    for one, other in zip(moe_layers(model).values(), moe_layers(reference).values(), strict=True):
        products = [each.stand_in.down.t() @ each.stand_in.up[:-1] for each in (one, other)]
        torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)  # by another route: rounding adds up


def test_the_share_that_is_skipped():
    scores = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert skipped_share(scores, torch.tensor([[False, True], [True, True]])).tolist() == [[0.25], [0.0]]


def test_nothing_skipped_leaves_zeros():
    model = fitted(taus=(1.0,))
    assert all(not parameter.any() for layer in moe_layers(model).values() for parameter in layer.stand_in.parameters())


def test_padded_texts_become_one_batch():
    batches = [
        tiny.batch("bert", 2),
        {key: value[:, :5] if value.dim() > 1 else value for key, value in tiny.batch("bert").items()},
    ]
    whole = joined(batches)
    assert whole["input_ids"].shape == whole["attention_mask"].shape == (5, 7)
    assert whole["labels"].shape == (5,)
    assert not whole["attention_mask"][2:, 5:].any()


def test_flops_are_counted():
    layer = next(iter(moe_layers(fitted(rank=4)).values()))
    without = layer.flops_beside_experts(3, 1) - 3 * layer.router.flops()
    assert without == 3 * 2 * (4 * 16 + 5 * 16)


def test_flops_are_those_of_its_products():
    layer = next(iter(moe_layers(fitted(rank=4)).values()))
    mask = torch.zeros(5, 8, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        layer.stand_in(torch.randn(5, 16), torch.rand(5, 8), mask)
    assert counter.get_total_flops() == 5 * layer.stand_in.flops()


def test_merged_to_dense_it_is_gone():
    model = fitted()
    merge_to_dense_(model)
    assert not any("stand_in" in name for name, _ in model.named_parameters())


def test_gradients_reach_stand_ins_and_not_routers():
    model = fitted()
    set_tau_(model, 0.3)
    tiny.logits(model, tiny.batch()).sum().backward()
    layer = next(iter(moe_layers(model).values()))
    assert layer.stand_in.up.grad.any()
    assert layer.router.up.weight.grad is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FittingConfig(rank=-1), "rank=-1: must not be negative; 0 is no stand-in"),
        (lambda: FittingConfig(taus=()), "taus=(): must hold at least one value in [0, 1]"),
        (lambda: FittingConfig(taus=(0.5, 1.5)), "taus=1.5: must lie in [0, 1] (1 runs every expert, the dense layer)"),
        (lambda: FittingConfig(ridge=0.0), "ridge=0.0: must be positive"),
        (
            lambda: fitted(rank=17),
            "rank=17: must be at most 16, the width of blocks.0.mlp",
        ),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message


@torch.no_grad()
def test_without_gates_every_expert_runs_and_it_is_saved_so(tmp_path):
    model, inputs = fitted(), tiny.batch()
    set_gate_(model, None)
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
    for each in (model, loaded):
        set_gate_(each, GateConfig(tau=0.3))
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))


def test_a_model_without_a_gate_is_refused():
    model = tiny.routed()
    set_gate_(model, None)
    with pytest.raises(ConfigError, match=r"blocks.0.mlp: has no router or no gate yet; run RouterRegression"):
        fit_stand_ins_(model, FittingConfig(4), run=lambda each: None, batch=tiny.batch())
    assert all(layer.stand_in is None for layer in moe_layers(model).values())
    set_gate_(model, GateConfig())
