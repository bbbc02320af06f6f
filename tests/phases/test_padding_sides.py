"""On which side a tokenizer pads its texts makes no difference to what phases see inside of a model."""

from functools import partial

import pytest
import tiny
import torch

from d2dmoe_pl.artifact import PhaseRecord, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import AttentionDistillation, ExpertClustering, ImportanceScoring, SparsityEnforcement

STILL = partial(torch.optim.SGD, lr=0.0)


class PaddedInFront(tiny.TextData):
    """The same texts, as decoders generate from them."""

    def collate(self, samples, augment):
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        batch = super().collate(samples, augment)
        ids = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": pad(ids),
            "attention_mask": pad([torch.ones_like(each) for each in ids]),
            "labels": batch["labels"],
        }


def fitted(make, trainer, data, path):
    """The phase after an epoch of all samples, and everything that it logged."""
    torch.manual_seed(0)  # of dropout
    phase, logged = make(init_from=path), {}

    def log(values, **_):
        logged.update({key: torch.as_tensor(value).item() for key, value in values.items()})

    phase.log_dict = log
    trainer(limit_train_batches=1.0, limit_val_batches=1.0, callbacks=[SaveArtifact()]).fit(phase, datamodule=data)
    return phase, logged


@pytest.fixture(params=["bert", "gpt2", "llama"])
def both(request, trainer, tmp_path):
    """What a phase has fitted, and logged, of texts that are padded behind, and in front."""
    save_artifact(tiny.dense(request.param), tmp_path / "dense", [PhaseRecord("FineTuning")])

    def run(make):
        for data in (tiny.TextData(8), PaddedInFront(8)):
            yield fitted(make, trainer, data, str(tmp_path / "dense"))

    return run


@pytest.mark.parametrize(
    "make", [partial(SparsityEnforcement, optimizer=STILL), partial(AttentionDistillation, optimizer=STILL)]
)
def test_penalties_and_errors(make, both):
    (_, behind), (_, in_front) = both(make)
    assert behind["train/penalty"] > 0
    assert {key: in_front[key] for key in behind} == pytest.approx(behind, rel=1e-4)


def test_shares_of_neurons_that_fire(both):
    shares = [phase.trainer.callback_metrics for phase, _ in both(partial(SparsityEnforcement, optimizer=STILL))]
    kinds = [key for key in shares[0] if key.startswith("sparsity/")]
    assert len(kinds) == 4
    for kind in kinds:
        torch.testing.assert_close(shares[1][kind], shares[0][kind])


def test_clusters(both):
    first, second = (moe_layers(phase.model) for phase, _ in both(partial(ExpertClustering, 4, split="coactivation")))
    for name, layer in first.items():
        assert torch.equal(layer.experts.up_weight, second[name].experts.up_weight)


@pytest.mark.parametrize("both", ["bert", "gpt2"], indirect=True)
def test_importance(both, tmp_path):
    scores = []
    for _ in both(ImportanceScoring):
        scores.append(read_artifact(tmp_path / "run" / "artifact").read_tensors("importance"))
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score, rtol=1e-3, atol=1e-4 * float(score.max()))
