"""Importance scoring: exact sums, whatever the batch size."""

import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moebert.importance import Importance
from d2dmoe_pl.phases import ImportanceScoring

pytestmark = pytest.mark.drawn


class TestImportanceScoring:
    @pytest.mark.parametrize("batch_size", [1, 5])
    def test_leaves_the_model_as_it_was_and_scores_beside_it(self, trainer, tmp_path, batch_size):
        save_artifact(tiny.dense("bert"), tmp_path / "dense", [PhaseRecord("FineTuning")])
        phase = ImportanceScoring(init_from=str(tmp_path / "dense"))
        trainer(limit_train_batches=1.0, callbacks=[SaveArtifact()]).fit(phase, datamodule=tiny.TextData(batch_size))
        artifact = read_artifact(tmp_path / "run" / "artifact")
        assert (artifact.stage, artifact.tensors) == ("dense", ["importance"])
        before, after = load_model(tmp_path / "dense"), load_model(artifact.path)
        assert all(torch.equal(before.state_dict()[name], value) for name, value in after.state_dict().items())
        data = tiny.TextData(32)
        data.setup()
        data.ordered = True
        batch = next(iter(data.train_dataloader()))  # all 32 samples
        expected = Importance(select_ffns(before), torch.device("cpu"))
        expected.add(lambda: phase.task_loss(tiny.logits(before, batch), batch) * 32, batch["attention_mask"])
        scores = artifact.read_tensors("importance")
        assert set(scores) == set(expected.scores)
        for name, score in scores.items():
            torch.testing.assert_close(score, expected.scores[name], rtol=1e-4, atol=1e-5 * float(score.max()))

    def test_figure(self, trainer, digits, artifact, tmp_path):
        trainer().fit(ImportanceScoring(init_from=artifact("dense")), datamodule=digits)
        events = EventAccumulator(str(tmp_path / "run"))
        events.Reload()
        assert events.Tags()["images"] == ["layers/importance"]
