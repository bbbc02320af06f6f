"""Layers that run several times in a pass, as ALBERT's one layer does: phases learn from every run."""

from functools import partial

import pytest
import tiny
import torch
import transformers
from torch import nn

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.moe.conversion import ExpertsConfig, add_routers_, convert_to_moe_, set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.layer import observed
from d2dmoe_pl.moe.routers import RouterConfig, gram_matrices, output_norms
from d2dmoe_pl.moe.stand_ins.fitting import FittingConfig, fit_stand_ins_
from d2dmoe_pl.phases import RecoveryTuning, RouterRegression
from d2dmoe_pl.phases._router_cache import RouterCache
from d2dmoe_pl.phases._row_cache import RowCache

RUNS = 3
SGD = partial(torch.optim.SGD, lr=0.0)


def albert():
    shape = {**tiny.SHAPE, "num_hidden_layers": RUNS, "hidden_act": "relu"}
    config = transformers.AlbertConfig(
        **shape, embedding_size=12, vocab_size=40, num_labels=len(tiny.LABELS), max_position_embeddings=32
    )
    model = transformers.AlbertForSequenceClassification(config).eval()
    tiny._spread(model)
    model.config.id2label = dict(enumerate(tiny.LABELS))
    convert_to_moe_(model, ExpertsConfig(8, 4))
    return model


def router_losses(model, batch):
    """The loss of the only router in each run of its layer."""
    ((name, layer),) = moe_layers(model).items()
    losses = []

    def learn(_, tokens, hidden):
        losses.append(layer.router.loss(tokens, output_norms(hidden, gram_matrices(layer.experts.down_weight))))

    with observed({name: layer}, learn), torch.no_grad():
        tiny.logits(model, batch)
    return torch.stack(losses)


@pytest.mark.parametrize("kind", ["routers", "recovery"])
def test_routers_learn_from_every_run(trainer, tmp_path, kind):
    torch.manual_seed(0)
    model = albert()
    if kind == "recovery":
        add_routers_(model, RouterConfig(8))
        set_gate_(model, GateConfig("dynk_max", 0.5))
        stage, make = "RouterRegression", partial(RecoveryTuning, 1.0, 1.0, num_held_out=0)
    else:
        stage, make = "ExpertClustering", partial(RouterRegression, 8)
    save_artifact(model, tmp_path / "before", [PhaseRecord(stage)])
    phase = make(init_from=str(tmp_path / "before"), optimizer=SGD)
    trainer().fit(phase, datamodule=tiny.TextData(8))
    batch = tiny.batch("bert")
    phase.model.eval()
    with torch.no_grad():
        if kind == "recovery":
            set_gate_(phase.model, GateConfig("dynk_max", 1.0))
            found = phase._forward(batch, 1.0)[2]
        else:
            set_gate_(phase.model, None)
            found = phase._router_losses(batch)
    expected = router_losses(phase.model, batch)
    assert len(expected) == RUNS
    (loss,) = found.values()
    torch.testing.assert_close(loss, expected.mean())
    assert not torch.allclose(expected[-1], expected.mean(), rtol=1e-3)


def test_the_cache_keeps_the_tokens_of_every_run(tmp_path):
    cache = RouterCache(RowCache(1, 2**20, str(tmp_path)), seed=0)
    given = [(torch.randn(5, 4), torch.rand(5, 2)) for _ in range(RUNS)]
    for tokens, targets in given:
        cache.add("layer", tokens, targets)
    cache.end_batch()
    cache.rows.complete()
    (rows,) = cache.batches(epoch=0)
    tokens, targets = cache.examples(rows)["layer"]
    assert len(rows) == 5 * RUNS
    for found, column in ((tokens, 0), (targets, 1)):
        expected = torch.cat([pair[column] for pair in given])
        torch.testing.assert_close(found.sum(dim=0), expected.sum(dim=0))


class Twice(nn.Module):
    """Runs its layer on both halves of what it is given, one after the other, or on all at once."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.at_once = True

    def forward(self, values):  # (T, 2 N, d)
        if self.at_once:
            return self.layer(values)
        return torch.cat([self.layer(half) for half in values.chunk(2, dim=1)], dim=1)


def test_stand_ins_are_fitted_on_all_runs():
    maps = []
    for at_once in (True, False):
        torch.manual_seed(0)
        layer = next(iter(moe_layers(tiny.routed("bert")).values()))
        model = Twice(layer)
        model.at_once = at_once
        values = torch.randn(64, layer.sizes.d_model)
        values[32:] += 1.0
        config = FittingConfig(rank=4)
        fit_stand_ins_(
            model,
            config,
            run=lambda batch, model=model, config=config: model(batch["values"].view(len(config.taus), 64, -1)),
            batch={"values": values},
        )
        maps.append((layer.stand_in.up[:-1].t() @ layer.stand_in.down).detach())
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-3, atol=1e-5)
    assert maps[0].norm() > 0
