"""The contract of every router, and what each is on its own."""

import copy
import json
import math

import pytest
import tiny
import torch
from ffns import make_ffn
from torch.utils.flop_counter import FlopCounterMode

from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import ExpertsConfig, add_routers_, convert_to_moe_, set_gate_
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.quantization.quantize import quantize_
from d2dmoe_pl.moe.routers import ROUTERS, RouterConfig, make_router, positive_sums
from d2dmoe_pl.structure import describe

KINDS = ROUTERS.names()
UNTRAINED = ["ground_truth", "random", "similarity"]


def make(kind, d_model=10, d_ff=24, num_experts=4, gated=False):
    """A router and the experts it is for."""
    experts = Experts(make_ffn(d_model, d_ff, gated=gated), num_experts)
    return make_router(experts, RouterConfig(6, kind)), experts


def score(router, experts, tokens):
    return router(tokens, experts) if router.reads_experts else router(tokens)


def routed(kind, model_kind="timm_vit"):
    """A model with routers of ``kind`` that run 3 of 8 experts."""
    model = tiny.dense(model_kind)
    convert_to_moe_(model, ExpertsConfig(8))
    add_routers_(model, RouterConfig(6, kind))
    set_gate_(model, GateConfig("topk", k=3))
    return model.eval()


def test_those_of_the_papers_are_there():
    assert KINDS == ["ground_truth", "mlp", "random", "regression", "similarity"]


@pytest.mark.parametrize("kind", KINDS)
class TestContract:
    def test_scores_are_not_negative_and_tokens_do_not_see_each_other(self, kind):
        router, experts = make(kind)
        tokens = torch.randn(9, 10)
        scores = score(router, experts, tokens)
        assert scores.shape == (9, 4)
        assert (scores >= 0).all()
        for row, token in zip(scores, tokens, strict=True):
            torch.testing.assert_close(score(router, experts, token[None])[0], row, rtol=1e-4, atol=1e-4)
        assert score(router, experts, torch.zeros(0, 10)).shape == (0, 4)

    @pytest.mark.parametrize("gated", [False, True])
    def test_flops_are_those_of_the_products_run(self, kind, gated):
        router, experts = make(kind, gated=gated)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            score(router, experts, torch.randn(5, 10))
        assert 5 * router.flops() == counter.get_total_flops()

    def test_an_artifact_keeps_it(self, kind, tmp_path):
        model = routed(kind)
        save_artifact(model, tmp_path / "artifact", [PhaseRecord("ExpertSelection")])
        loaded = load_model(tmp_path / "artifact")
        assert describe(loaded) == describe(model)
        assert {made["router"]["kind"] for made in describe(loaded).values()} == {kind}
        inputs = tiny.batch()
        with torch.no_grad():
            assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))

    def test_a_copy_of_the_model_stands_on_its_own(self, kind):
        model = routed(kind)
        inputs = tiny.batch()
        with torch.no_grad():
            expected = tiny.logits(model, inputs)
            twin = copy.deepcopy(model)
            for parameter in model.parameters():
                parameter.zero_()
            assert torch.equal(tiny.logits(twin, inputs), expected)

    def test_padding_changes_nothing(self, kind):
        model, inputs = routed(kind, "bert"), tiny.batch("bert", size=4)
        with torch.no_grad():
            together = tiny.logits(model, inputs)
            for row, length in enumerate(inputs["attention_mask"].sum(dim=1)):
                alone = {key: value[row : row + 1, :length] for key, value in inputs.items() if key != "labels"}
                torch.testing.assert_close(tiny.logits(model, alone)[0], together[row], rtol=1e-4, atol=1e-5)

    def test_training_lowers_the_loss_or_there_is_nothing_to_train(self, kind):
        router, _ = make(kind)
        assert router.is_trained == (kind not in UNTRAINED)
        tokens = torch.randn(200, 10)
        target = torch.rand(200, 10) @ torch.rand(10, 4) / 10
        if not router.is_trained:
            assert not list(router.parameters())
            with pytest.raises(TypeError, match=f"router {kind}: has nothing to train"):
                router.loss(tokens, target)
            return
        optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
        losses = []
        for _ in range(100):
            loss = router.loss(tokens, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]


def planted_experts(d_model=16, num_experts=4, size=8):
    """Experts that each look for a direction of their own, in an order of neurons that says nothing."""
    ffn = make_ffn(d_model, num_experts * size)
    groups = (torch.arange(num_experts * size) % num_experts)[torch.randperm(num_experts * size)]
    directions = torch.linalg.qr(torch.randn(d_model, d_model)).Q[:num_experts]
    with torch.no_grad():
        ffn.up.weight.copy_(directions[groups] + 0.1 * torch.randn_like(ffn.up.weight))
        ffn.up.bias.zero_()
    return Experts(ffn, num_experts, groups), directions


def share_of_activation(router, experts, tokens, k=1):
    """Of all positive activation, how much the router's ``k`` best experts have."""
    sums = experts.hidden(tokens).clamp(min=0).sum(dim=-1)
    best = score(router, experts, tokens).topk(k, dim=-1).indices
    return (sums.gather(1, best).sum() / sums.sum()).item()


@pytest.mark.parametrize("kind", ["mlp", "regression", "similarity", "ground_truth"])
def test_better_than_random_where_there_is_structure(kind):
    experts, directions = planted_experts()
    tokens = 0.2 * torch.randn(800, 16) + directions[torch.arange(800) % 4]
    router = make_router(experts, RouterConfig(16, kind))
    if router.is_trained:
        sums = experts.hidden(tokens[:600]).clamp(min=0).sum(dim=-1).detach()
        optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            router.loss(tokens[:600], sums / sums.max()).backward()
            optimizer.step()
    found = share_of_activation(router, experts, tokens[600:])
    chance = share_of_activation(make_router(experts, RouterConfig(kind="random")), experts, tokens[600:])
    assert found > chance + 0.3
    oracle = share_of_activation(make_router(experts, RouterConfig(kind="ground_truth")), experts, tokens[600:])
    assert found <= oracle + 1e-6


@pytest.mark.parametrize("gated", [False, True])
def test_ground_truth_equals_a_loop(gated):
    router, experts = make("ground_truth", gated=gated)
    tokens = torch.randn(5, 10)
    deciding = experts.gate_weight if gated else experts.up_weight
    bias = experts.gate_bias if gated else experts.up_bias
    for n, token in enumerate(tokens):
        for expert in range(4):
            total = 0.0
            for neuron in range(6):
                fires = (deciding[expert, neuron] @ token + bias[expert, neuron]).relu()
                if gated:
                    fires = fires * (experts.up_weight[expert, neuron] @ token + experts.up_bias[expert, neuron])
                total += max(fires.item(), 0.0)
            assert router(tokens, experts)[n, expert].item() == pytest.approx(total, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_similarity_equals_a_loop(gated):
    router, experts = make("similarity", gated=gated)
    weight = experts.gate_weight if gated else experts.up_weight
    tokens = torch.randn(5, 10)
    for n, token in enumerate(tokens):
        for expert in range(4):
            mean = sum(weight[expert, neuron] for neuron in range(6)) / 6
            cosine = (token @ mean / token.norm() / mean.norm()).item()
            assert router(tokens)[n, expert].item() == pytest.approx(1 + cosine, abs=1e-5)


@torch.no_grad()
def test_mlp_equals_a_loop_and_its_loss_is_cross_entropy():
    router, _ = make("mlp")
    token, target = torch.randn(10), torch.rand(4)
    inside = [math.tanh(router.up.weight[e] @ token + router.up.bias[e]) for e in range(4)]
    logits = [sum(router.down.weight[e, i] * inside[i] for i in range(4)) + router.down.bias[e] for e in range(4)]
    expected = [1 / (1 + math.exp(-logit)) for logit in logits]
    assert router(token[None])[0].tolist() == pytest.approx(expected, rel=1e-4)
    entropy = [-t * math.log(p) - (1 - t) * math.log(1 - p) for t, p in zip(target.tolist(), expected, strict=True)]
    assert router.loss(token[None], target[None]).item() == pytest.approx(sum(entropy) / 4, rel=1e-4)


def test_random_is_even_seeded_and_of_the_token():
    tokens = torch.randn(4000, 10)
    router, experts = make("random")
    first = router(tokens).argmax(dim=-1)
    assert (torch.bincount(first, minlength=4) / 4000 - 0.25).abs().max() < 0.05
    near = router(tokens * 3.0).argmax(dim=-1)  # of a token's direction alone
    assert (near == first).float().mean() > 0.99
    other = router(tokens + 0.3 * torch.randn(4000, 10)).argmax(dim=-1)
    assert (other == first).float().mean() < 0.4
    torch.manual_seed(1)
    one = make_router(experts, RouterConfig(kind="random"))(tokens)
    torch.manual_seed(1)
    assert torch.equal(make_router(experts, RouterConfig(kind="random"))(tokens), one)
    assert not torch.equal(router(tokens), one)


def test_an_artifact_from_before_there_were_kinds(tmp_path):
    model = tiny.routed()
    save_artifact(model, tmp_path / "artifact", [PhaseRecord("RouterRegression")])
    file = tmp_path / "artifact" / "config.json"
    config = json.loads(file.read_text())
    for made in config["d2dmoe"]["layers"].values():
        del made["router"]["kind"], made["gate"]["k"]
    file.write_text(json.dumps(config))
    assert describe(load_model(tmp_path / "artifact")) == describe(model)


def test_unknown_kind_and_too_many_experts():
    with pytest.raises(ConfigError, match="router='best': allowed are ground_truth, mlp, random, regression, simil"):
        RouterConfig(kind="best")
    model = routed("similarity")
    with pytest.raises(ConfigError, match=r"k=9: must be at most the number of experts, 8 in blocks.0.mlp"):
        set_gate_(model, GateConfig("topk", k=9))
    assert {layer.gate.config.k for layer in moe_layers(model).values()} == {3}


def test_the_oracle_reads_experts_as_the_layer_has_them(tmp_path):
    model = routed("ground_truth")
    layer = next(iter(moe_layers(model).values()))
    tokens = torch.randn(5, layer.sizes.d_model)
    before = layer.score(tokens)
    quantize_(model)
    assert layer.experts.is_quantized
    assert torch.equal(layer.score(tokens), positive_sums(layer.experts.hidden(tokens)))
    assert not torch.equal(layer.score(tokens), before)
    save_artifact(model, tmp_path / "artifact")
    pictures = tiny.batch()["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "artifact")(pictures), model.eval()(pictures))
