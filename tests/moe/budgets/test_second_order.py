"""What settings would add to the divergence, from one gradient: as by hand, and near what is measured."""

from functools import partial

import pytest
import tiny
import torch

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.budgets.second_order import SecondOrder
from d2dmoe_pl.moe.conversion import set_gate_, set_tau_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.cutoffs.fitting import fit_cutoffs_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.stand_ins.fitting import FittingConfig, fit_stand_ins_

GRID = [1.0, 0.8, 0.4, 0.0]


def loss_of(model, batch):
    return torch.nn.functional.cross_entropy(tiny.logits(model, batch), batch["labels"], reduction="sum")


def by_hand(model, layer, batch, tau):
    """One layer at ``tau``: its outputs before and after, and the gradient at those before."""
    seen = []
    handle = layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    set_tau_(model, 1.0)
    loss = loss_of(model, batch)
    (gradient,) = torch.autograd.grad(loss, seen[0][1])
    layer.gate.set_tau(tau)
    with torch.no_grad():
        tiny.logits(model, batch)  # layers before it are as they were
    handle.remove()
    return 0.5 * (gradient * (seen[1][1] - seen[0][1])).sum(-1).square().sum()


@pytest.mark.parametrize("around", [None, "stand_ins", "cutoffs"])
def test_sums_are_those_by_hand_padding_out(around):
    model = tiny.routed("bert").eval()
    set_gate_(model, GateConfig("dynk_cumulative"))
    layers, batch = moe_layers(model), tiny.batch("bert")
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    if around == "stand_ins":
        fit_stand_ins_(model, FittingConfig(rank=4), run=partial(tiny.logits, model), batch=batch)
    if around == "cutoffs":
        fit_cutoffs_(model, CutoffConfig(full_tau=0.7), run=partial(tiny.logits, model, batch))
    found = SecondOrder(model, [GRID] * len(layers))
    found.add(partial(tiny.logits, model, batch), partial(loss_of, model, batch))
    assert found.tokens.tolist() == [int(batch["attention_mask"].sum())] * len(layers)
    assert (found.divergences[:, 0] == 0).all()
    assert (found.work.diff(dim=1) < 0).all()
    for index, layer in enumerate(layers.values()):
        for step, tau in enumerate(GRID):
            torch.testing.assert_close(
                found.divergences[index, step].float(), by_hand(model, layer, batch, tau), rtol=1e-3, atol=1e-9
            )


def estimated(model, batch):
    found = SecondOrder(model, [GRID] * len(moe_layers(model)))
    found.add(partial(tiny.logits, model, batch), partial(loss_of, model, batch))
    return found.divergences


def test_what_a_step_changes_does_not_drown_in_the_rounding_of_mixed_precision():
    layer = moe_layers(tiny.routed())["blocks.0.mlp"]
    x, signs = torch.randn(20, 16), torch.randint(2, (20, 16)) * 2.0 - 1  # a gradient that any type holds
    found = [SecondOrder(torch.nn.ModuleList([layer]), [GRID]) for _ in range(2)]
    for sums, narrow in zip(found, (False, True), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            sums.add(partial(layer, x), lambda: (layer(x) * signs).sum())
    exact, narrowed = found
    assert (exact.divergences[0, 1:] > 0).all()
    assert narrowed.divergences.equal(exact.divergences)
    assert narrowed.work.equal(exact.work)


def test_gradients_that_are_no_numbers_are_told():
    model, batch = tiny.routed("bert").eval(), tiny.batch("bert")
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.inf
    with pytest.raises(
        ConfigError, match=r"^gradients at MoE layer 1 of 2: are not all finite, so that nothing can be"
    ):
        estimated(model, batch)


def test_only_what_is_needed_has_gradients():
    model, batch = tiny.routed("bert").eval(), tiny.batch("bert")
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    model.classifier.bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    during = []
    model.register_forward_hook(lambda *_: during.append([each.requires_grad for each in model.parameters()]))
    estimated(model, batch)
    assert not any(during[0])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert sum(before.values()) == len(before) - 1


def test_a_layer_may_be_called_by_keyword():
    model, batch = tiny.routed("timm_vit").eval(), tiny.batch("timm_vit")
    expected = estimated(model, batch)
    for block in model.blocks:
        block.mlp = ByKeyword(block.mlp)
    assert estimated(model, batch).equal(expected)


class ByKeyword(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x=x)


def test_small_gradients_in_float16():
    torch.manual_seed(0)
    layer = next(iter(moe_layers(tiny.routed("bert")).values()))
    x, found = torch.randn(2, 5, 24), []
    for dtype in (None, torch.float16):
        found.append(SecondOrder(layer, [GRID]))
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found[-1].add(lambda: layer(x), lambda: 1e-9 * layer(x).square().sum())
    assert (found[1].divergences[0, 1:] > 0).all()
    torch.testing.assert_close(found[1].divergences, found[0].divergences, rtol=0.05, atol=0)


class Sum(torch.nn.Module):
    """Adds to what its first layer gives in place; its last layer is not read."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        y = self.layers[0](x)
        y += x
        z = self.layers[1](y)
        self.layers[2](z)
        return y + z


def test_outputs_that_are_changed_in_place_or_lead_nowhere():
    torch.manual_seed(0)
    layers = [next(iter(moe_layers(tiny.routed("bert")).values())) for _ in range(3)]
    model, x = Sum(layers).requires_grad_(False), torch.randn(2, 5, 24)
    found = SecondOrder(model, [GRID] * 3)
    found.add(lambda: model(x), lambda: model(x).square().sum())
    assert (found.divergences[:2, 1:] > 0).all()
    assert (found.divergences[2] == 0).all()  # nothing hangs on it
