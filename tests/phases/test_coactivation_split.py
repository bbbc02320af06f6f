"""The co-activation graph is gathered from real batches, the same however they come."""

import pytest
import tiny
import torch

from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moe.splitting import _firing_statistics as firing
from d2dmoe_pl.moe.splitting._graph_partition import balanced_partition
from d2dmoe_pl.phases import ExpertClustering

SAMPLES = 20


@pytest.fixture
def dense(tmp_path):
    """The artifact of a dense ReLU BERT."""
    save_artifact(tiny.dense("bert"), tmp_path / "dense", [PhaseRecord("FineTuning")])
    return str(tmp_path / "dense")


def naive_graphs(path):
    """The graphs from one sample at a time, without padding."""
    model = load_model(path)
    ffns = select_ffns(model)
    graphs = {ffn.name: torch.zeros(ffn.d_ff, ffn.d_ff) for ffn in ffns}
    data = tiny.TextData(1)
    data.setup()
    data.ordered = True

    def tap(name, pre, post):
        graphs[name] += firing.coactivation(post[0], None)

    with torch.no_grad(), watched_activations(ffns, tap):
        for batch in list(data.train_dataloader())[:SAMPLES]:
            tiny.logits(model, batch)
    return graphs


@pytest.mark.parametrize(
    ("batch_size", "precision"), [(1, "32-true"), (3, "32-true"), (32, "32-true"), (5, "bf16-mixed")]
)
def test_experts_are_parts_of_the_graph_of_the_first_samples(trainer, dense, batch_size, precision):
    phase = ExpertClustering(8, "coactivation", SAMPLES, init_from=dense)
    run = trainer(limit_train_batches=1.0, precision=precision)
    run.fit(phase, datamodule=tiny.TextData(batch_size))
    graphs = naive_graphs(dense)
    before = load_model(dense)
    for ffn in select_ffns(before):
        graph = phase._sums[ffn.name]
        assert torch.equal(graph, graph.round())
        if precision == "32-true":
            assert torch.equal(graph, graphs[ffn.name])
        order = balanced_partition(graph, 8, seed=0).argsort(stable=True)
        rows = phase.model.get_submodule(ffn.name).experts.up_weight.flatten(0, 1)
        assert torch.equal(rows, ffn.up.weight[order])


def test_on_a_model_that_is_not_sparse(trainer, tmp_path):
    save_artifact(tiny.dense("bert", "gelu"), tmp_path / "gelu", [PhaseRecord("FineTuning")])
    phase = ExpertClustering(8, "coactivation", init_from=str(tmp_path / "gelu"))
    trainer(limit_train_batches=1.0).fit(phase, datamodule=tiny.TextData(4))
    quarter = next(iter(select_ffns(load_model(tmp_path / "gelu")))).d_ff // 4
    for graph in phase._sums.values():
        pairs = (graph > 0).sum()
        assert quarter**2 <= pairs < graph.numel()  # neurons of the same token's quarter, and no others
