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
        expected.add(
            lambda: phase.task_loss(tiny.logits(before, batch), batch) * 32,
            lambda name: batch["attention_mask"],
            torch.ones(32, dtype=torch.bool),
        )
        scores = artifact.read_tensors("importance")
        assert set(scores) == set(expected.scores)
        for name, score in scores.items():
            torch.testing.assert_close(score, expected.scores[name], rtol=1e-4, atol=1e-5 * float(score.max()))

    @pytest.mark.parametrize(
        "kind",
        [
            "gpt2-causal-language-modeling",
            "bert-masked-language-modeling",
            "opt-causal-language-modeling",  # which flattens tokens before its FFNs
        ],
    )
    def test_predictions_of_tokens_count_alike_in_any_batch(self, kind, trainer, tmp_path, make_data):
        save_artifact(tiny.dense(kind), tmp_path / "dense", [PhaseRecord("FineTuning")])
        found = []
        for batch_size in (1, 8):
            data = make_data(kind)
            data.batch_size = batch_size
            phase = ImportanceScoring(init_from=str(tmp_path / "dense"))
            trainer(limit_train_batches=1.0, callbacks=[SaveArtifact()]).fit(phase, datamodule=data)
            found.append(read_artifact(tmp_path / "run" / "artifact").read_tensors("importance"))
        for name, score in found[0].items():
            assert score.max() > 0
            torch.testing.assert_close(found[1][name], score, rtol=1e-3, atol=1e-4 * float(score.max()))

    def test_figure(self, trainer, digits, artifact, tmp_path):
        trainer().fit(ImportanceScoring(init_from=artifact("dense")), datamodule=digits)
        events = EventAccumulator(str(tmp_path / "run"))
        events.Reload()
        assert events.Tags()["images"] == ["layers/importance"]
