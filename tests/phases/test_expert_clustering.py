"""Expert clustering: the same function, as experts."""

import pytest
import tiny
import torch
from digits_models import state

from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moe.splitting import activation as activation_split
from d2dmoe_pl.moe.splitting._firing_statistics import profile
from d2dmoe_pl.phases import ExpertClustering
from d2dmoe_pl.phases._preflight import preflight


class TestExpertClustering:
    @pytest.mark.parametrize("split", ["activation", "coactivation", "parameter", "random"])
    def test_changes_nothing_but_the_order_of_neurons(self, trainer, digits, artifact, split):
        path = artifact("dense")
        phase = ExpertClustering(8, split, num_samples=50, init_from=path)
        trainer(limit_train_batches=1.0).fit(phase, datamodule=digits)
        dense = load_model(path)
        inputs = {"pixel_values": torch.rand(4, 1, 8, 8)}
        torch.testing.assert_close(tiny.logits(phase.model, inputs), tiny.logits(dense, inputs), rtol=1e-5, atol=1e-6)
        for ffn in select_ffns(dense):
            rows = phase.model.get_submodule(ffn.name).experts.up_weight.flatten(0, 1)
            assert sorted(rows.tolist()) == sorted(ffn.up.weight.tolist())

    @pytest.mark.parametrize("batch_size", [7, 50, 64])
    def test_does_not_depend_on_the_batch_size(self, trainer, digits, artifact, batch_size):
        path, results = artifact("dense"), []
        for size in (10, batch_size):
            digits.batch_size = size
            phase = ExpertClustering(8, num_samples=50, init_from=path)
            trainer(limit_train_batches=1.0).fit(phase, datamodule=digits)
            results.append(state(phase.model))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])

    def test_stops_reading_when_it_has_seen_enough(self, trainer, digits, artifact):
        phase = ExpertClustering(8, num_samples=33, init_from=artifact("dense"))
        trainer(limit_train_batches=1.0).fit(phase, datamodule=digits)
        assert phase.seen == 48  # three batches of 16

    def test_width_not_divisible(self, artifact):
        with pytest.raises(ConfigError, match=r"num_experts=7: must divide the FFN width, which is 48 in blocks.0.mlp"):
            preflight([ExpertClustering(7, init_from=artifact("dense"))])

    def test_without_exact_zeros_the_strongest_quarter_fires(self, trainer, digits, artifact, monkeypatch):
        seen = []
        monkeypatch.setattr(
            activation_split, "profile", lambda fired, tokens: seen.append(fired) or profile(fired, tokens)
        )
        phase = ExpertClustering(8, num_samples=16, init_from=artifact("dense", activation=None))
        trainer(limit_train_batches=1.0).fit(phase, datamodule=digits)
        firing = torch.cat([activation for activation in seen if len(activation)])
        assert ((firing > 0).sum(dim=1) == firing.shape[1] // 4).all()
        assert (firing >= 0).all()

    def test_bad_settings(self):
        with pytest.raises(
            ConfigError, match="split='astrology': allowed are activation, coactivation, parameter, random"
        ):
            ExpertClustering(8, "astrology")
        with pytest.raises(ConfigError, match="num_experts=0: must be positive"):
            ExpertClustering(0)
        with pytest.raises(ConfigError, match="num_samples=0: must be positive"):
            ExpertClustering(8, num_samples=0)
