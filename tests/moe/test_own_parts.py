"""Gates, routers, routings and assignments of one's own that do not give what they must are told, not used."""

import pytest
import tiny
import torch
from torch import nn

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import ExpertsConfig, add_routers_, convert_to_moe_, set_backend_, set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moe.gating import GATING_RULES, GateConfig, register_gate
from d2dmoe_pl.moe.routers import ROUTERS, Router, RouterConfig, register_router
from d2dmoe_pl.moebert.routing import ROUTINGS, Decision, Routing, register_routing

BACKENDS = ["auto", "reference", "grouped"]


@pytest.fixture(autouse=True)
def registries_as_they_were(monkeypatch):
    for registry in (GATING_RULES, ROUTERS, ROUTINGS):
        monkeypatch.setattr(registry, "_registered", {})


RULES = {
    "numbers": lambda scores, tau: scores / scores.amax(dim=-1, keepdim=True),
    "zeros and ones": lambda scores, tau: (scores > 0).long(),
    "of all tokens": lambda scores, tau: scores.mean(dim=0) > 0,
    "of all experts": lambda scores, tau: scores.amax(dim=-1, keepdim=True) > 0,
    "nothing": lambda scores, tau: None,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", list(RULES))
def test_a_rule_that_gives_no_mask(kind, backend):
    register_gate("own", RULES[kind])
    model = tiny.routed("timm_vit")
    set_gate_(model, GateConfig("own", tau=0.5))
    set_backend_(model, backend)
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"^rule='own': gave .*; must be torch.bool of shape \(15, 8\)"),
    ):
        model(tiny.batch()["pixel_values"])


@pytest.mark.parametrize("rule", [lambda scores: scores > 0, lambda scores, *, tau: scores > tau, 3])
def test_a_rule_that_cannot_be_called(rule):
    with pytest.raises(ConfigError, match=r"must be a function \(scores, tau\) that gives a mask"):
        register_gate("own", rule)


class OwnRouter(Router):
    def __init__(self, experts, config):
        super().__init__(experts, config)
        self.linear = nn.Linear(experts.d_model, experts.num_experts)

    def flops(self):
        return 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["one a token", "of all tokens", "nothing"])
def test_a_router_that_gives_no_scores(kind, backend):
    def forward(self, tokens):
        scores = self.linear(tokens).abs()
        return {"one a token": scores[:, :1], "of all tokens": scores[:1], "nothing": None}[kind]

    register_router("own", type("Own", (OwnRouter,), {"forward": forward}))
    model = tiny.routed("timm_vit")
    set_gate_(model, None)
    add_routers_(model, RouterConfig(kind="own"))
    set_gate_(model, GateConfig(tau=0.5))
    set_backend_(model, backend)
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"^router='own': gave .*; must be scores of shape \(15, 8\)"),
    ):
        model(tiny.batch()["pixel_values"])


@pytest.mark.parametrize(
    ("decide", "said"),
    [
        (lambda tokens: Decision(torch.zeros(3, dtype=torch.long)), r"torch.int64 of shape \(3,\).*must be a Decision"),
        (lambda tokens: Decision(torch.zeros(len(tokens))), r"torch.float32 .*must be a Decision"),
        (lambda tokens: torch.zeros(len(tokens), dtype=torch.long), r"NoneType; must be a Decision"),
        (lambda tokens: Decision(torch.zeros(len(tokens), dtype=torch.long), 0.5), r"the scale float; must be"),
    ],
)
def test_a_routing_that_does_not_decide_for_each_token(decide, said):
    class Own(Routing):
        def forward(self, tokens, context):
            return decide(tokens)

        def flops(self, tokens, sentences):
            return 0

    register_routing("own", Own)
    with torch.no_grad(), pytest.raises(ConfigError, match=r"^routing='own': gave " + said):
        tiny.moebert("own")(**tiny.batch("bert"))


@pytest.mark.parametrize(
    "change", [lambda given: given.float(), lambda given: given - 1, lambda given: given.tolist(), lambda given: None]
)
def test_assignments_that_are_none(change):
    model = tiny.dense("timm_vit")
    given = {ffn.name: change(torch.arange(tiny.WIDTH) % 8) for ffn in select_ffns(model)}
    with pytest.raises(ConfigError, match=r"^assignment of blocks.0.mlp: must give each of the 8 experts exactly 6"):
        convert_to_moe_(model, ExpertsConfig(8), assignments=given)


def test_assignments_for_other_ffns():
    with pytest.raises(ConfigError, match=r"^assignments: have none for blocks.0.mlp; are for mlp$"):
        convert_to_moe_(tiny.dense("timm_vit"), ExpertsConfig(8), assignments={"mlp": torch.arange(48) % 8})


CONTRACT = {
    "in the other order": (lambda tau, scores: scores >= (1 - tau) * scores, "ran all random scores at tau=0 as at"),
    "the wrong way round": (
        lambda scores, tau: scores <= (1 - tau) * scores.amax(1, True),
        "ran 0 of 128 random scores",
    ),
    "the paper's threshold": (lambda scores, tau: scores >= tau * scores.amax(1, True), "ran 16 of 128"),
    "above": (lambda scores, tau: (scores > (1 - tau) * scores.amax(1, True)) | (tau == 1), "left a token without an"),
    "less for more": (
        lambda scores, tau: scores >= (tau if 0 < tau < 1 else 1 - tau) * scores.amax(1, True),
        "left out an expert at a larger tau",
    ),
    "of the batch": (
        lambda scores, tau: (scores >= (1 - tau) * scores.max()) | (scores == scores.amax(1, True)),
        "decided otherwise for a token alone",
    ),
}


@pytest.mark.parametrize("kind", list(CONTRACT))
def test_a_rule_that_does_not_hold_what_a_rule_must(kind):
    rule, said = CONTRACT[kind]
    register_gate("own", rule)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"^rule='own': {said}"):
            GateConfig("own", tau=0.5)


def test_a_rule_is_tried_once_and_draws_nothing():
    seen = []

    def rule(scores, tau):
        seen.append(len(scores))
        torch.rand(1)
        return scores >= (1 - tau) * scores.amax(dim=-1, keepdim=True)

    register_gate("own", rule)
    state = torch.get_rng_state()
    GateConfig("own", tau=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    number = len(seen)
    GateConfig("own", tau=0.7)
    assert len(seen) == number


def test_a_rule_for_one_number_of_experts_is_left_to_the_model():
    weights = torch.linspace(0.5, 1, 32)
    register_gate("own", lambda scores, tau: weights * scores >= (1 - tau) * (weights * scores).amax(1, True))
    assert GateConfig("own", tau=0.5).rule == "own"  # and nothing is raised


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scores: scores, r"scored a random token -[\d.]+; must not be negative, but for rules that take k$"),
        (lambda scores: scores.log(), "scored random tokens NaN; must be numbers$"),
    ],
)
def test_a_router_whose_scores_no_gate_can_go_by(change, said):
    register_router("own", type("Own", (OwnRouter,), {"forward": lambda self, tokens: change(self.linear(tokens))}))
    model = tiny.routed("timm_vit")
    set_gate_(model, None)
    add_routers_(model, RouterConfig(kind="own"))
    state = torch.get_rng_state()
    for rule in ("dynk_max", "dynk_cumulative"):
        with pytest.raises(ConfigError, match=r"^router='own': " + said):
            set_gate_(model, GateConfig(rule, tau=0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.gate is None for layer in moe_layers(model).values())
    model.to("meta")
    set_gate_(model, GateConfig(tau=0.5))  # without weights nothing can be told


def test_the_order_of_negative_scores_is_enough_for_topk():
    register_router("own", type("Own", (OwnRouter,), {"forward": lambda self, tokens: self.linear(tokens)}))
    model = tiny.routed("timm_vit")
    set_gate_(model, None)
    add_routers_(model, RouterConfig(kind="own"))
    set_gate_(model, GateConfig("topk", k=2))
    with torch.no_grad():
        assert model(tiny.batch()["pixel_values"]).isfinite().all()
