"""FFNs of a shape, and the model that is made of them, with exactly the share of experts that is asked for."""

import pytest
import torch

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.benchmark.comparison import Settings, measure
from d2dmoe_pl.benchmark.shape_comparisons import Shape, random_model, shape_comparisons
from d2dmoe_pl.errors import ConfigError

SHAPE = {
    "d_model": 24,
    "d_ff": 100,
    "num_experts": [4, 10],
    "gated": False,
    "activation": "gelu",
    "router_width": 8,
    "tokens": [1, 20],
    "share": [0.2, 1.0],
    "architecture": "vit_tiny_patch16_224",
    "layers": 2,
}
SETTINGS = Settings(
    scope=["layer", "model"],
    dtype=[torch.float32, torch.bfloat16],
    batch_size=[1],
    backend="grouped",
    compare=["loop"],
    rounds=2,
    device=torch.device("cpu"),
)


def comparisons(settings=SETTINGS, **changes):
    return list(shape_comparisons(Shape(**{**SHAPE, **changes}), settings))


def settings(**changes):
    return Settings(**{**vars(SETTINGS), **changes})


def test_every_combination_is_there():
    layers = comparisons(settings(scope=["layer"]))
    assert [(str(r.dtype), r.num_experts, r.tokens) for r in layers] == [
        (dtype, experts, tokens)
        for dtype in ("torch.float32", "torch.bfloat16")
        for experts in (4, 10)
        for tokens in (1, 20)
    ]
    assert {r.dense.call().dtype for r in layers if r.dtype is torch.bfloat16} == {torch.bfloat16}
    ways = [(way.name, way.router, round(way.share, 2)) for way in layers[1].ways]
    plain = [("grouped", False, 0.2), ("grouped", False, 1.0)]
    routed = [("grouped", True, 0.25), ("grouped", True, 1.0)]  # whole experts a token
    assert ways == [*plain, *routed, ("loop", False, 0.2), ("loop", False, 1.0)]
    assert {way.router for r in comparisons(settings(scope=["layer"]), router_width=0) for way in r.ways} == {False}


def test_costs_are_the_share_and_the_routers():
    comparison = comparisons(settings(scope=["layer"]), num_experts=[10])[1]
    router = 8 * (24 + 10) / (2 * 24 * 100)
    # where all run there is nothing to score
    assert [way.cost for way in comparison.ways[:4]] == pytest.approx([0.2, 1.0, 0.2 + router, 1.0])


@pytest.mark.parametrize("gated", [False, True])
def test_all_experts_forced_give_the_dense_layer(gated):
    comparison = comparisons(settings(scope=["layer"], dtype=[torch.float32]), gated=gated, num_experts=[10])[1]
    for way in comparison.ways:
        with way.contender.setting():
            output = way.contender.call()
        same = torch.allclose(output, comparison.dense.call(), rtol=1e-4, atol=1e-5)
        assert same == (way.share == 1.0)


@torch.no_grad()
def test_whole_models():
    comparison = comparisons(settings(scope=["model"], dtype=[torch.float32]), num_experts=[10], tokens=[7])[0]
    assert (comparison.scope, comparison.batch_size, comparison.tokens) == ("model", 1, 197)
    expected = comparison.dense.call()
    for way in comparison.ways:
        with way.contender.setting():
            output = way.contender.call()
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4) == (way.share == 1.0)
        assert way.share == pytest.approx(0.2, abs=1e-3) or way.share == 1.0
    with comparison.rest.setting():
        rest = comparison.rest.call()
    assert rest.shape == expected.shape
    assert not torch.allclose(rest, expected, atol=1e-4)


def test_measured_rows_add_up():
    comparison = comparisons(settings(scope=["model"], dtype=[torch.float32]), num_experts=[10])[0]
    rows = measure(comparison, 3, torch.device("cpu"))
    assert [row.way for row in rows] == ["grouped", "grouped", "grouped + router", "grouped + router"]
    for row in rows:
        assert row.speed_up == pytest.approx(row.dense_ms / row.moe_ms)
        assert row.dense_throughput == pytest.approx(1000 / row.dense_ms)
        assert row.moe_throughput == pytest.approx(1000 / row.moe_ms)
        assert row.rest_percent > 0
        assert row.dense_memory_mib > 197 * 100 * 4 / 2**20  # an FFN's activations at least
        assert row.moe_memory_mib > 0
    assert rows[0].ideal >= rows[2].ideal  # routers cost, unless what noise measures of the FFNs is nothing
    assert len({row.dense_ms for row in rows}) == 1


@pytest.mark.parametrize(("d_model", "d_ff"), [(24, 100), (100, 33), (128, 512)])
def test_the_model_has_the_widths_asked_for(d_model, d_ff):
    model = random_model(Shape(**{**SHAPE, "d_model": d_model, "d_ff": d_ff, "num_experts": [1]}))
    ffns = adapter_for(model).ffns(model)
    assert [(ffn.d_model, ffn.d_ff) for ffn in ffns] == [(d_model, d_ff)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model=0: must be positive"),
        ({"layers": -1}, "layers=-1: must be positive"),
        ({"num_experts": [10, 3]}, "num_experts=3: must divide the FFN width, which is 100"),
        ({"num_experts": [0]}, "num_experts=0: must divide the FFN width, which is 100"),
        ({"activation": "softplus"}, "activation='softplus': allowed are relu, gelu, silu, tanh"),
        ({"router_width": -1}, "router_width=-1: must be positive, or 0 for no router"),
        ({"tokens": [0]}, "tokens=0: must be positive"),
        ({"share": [0.0]}, "share=0.0: must lie in (0, 1], a share of the experts"),
        ({"share": [1.5]}, "share=1.5: must lie in (0, 1], a share of the experts"),
        ({"gated": True}, "gated=True: the whole model's FFNs cannot be gated; must be False, or --scope layer"),
    ],
)
def test_impossible_shapes(changes, message):
    with pytest.raises(ConfigError) as error:
        comparisons(**changes)
    assert str(error.value) == message


@torch.no_grad()
def test_int8_beside_other_types():
    whole = settings(scope=["layer", "model"], dtype=[torch.bfloat16, torch.int8], compare=[], backend="auto")
    *layers, model = comparisons(whole, num_experts=[10], tokens=[20], d_model=64)
    assert [str(layer.dtype) for layer in layers] == ["torch.bfloat16", "torch.float32"]
    assert {str(way.dtype) for way in model.ways} == {"torch.bfloat16", "torch.int8"}
    for comparison in (*layers, model):
        expected = comparison.dense.call().float()
        for way in comparison.ways:
            with way.contender.setting():
                got = way.contender.call().float()
            if way.share == 1.0:
                assert (got - expected).norm() < 0.05 * expected.norm()
