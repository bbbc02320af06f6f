"""What a phase says in TensorBoard can be looked over: curves over steps, one picture for all layers, few tags."""

import pytest
import tiny
from digits_models import DIGIT_LABELS, digits_source
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.callbacks import TauSweep
from d2dmoe_pl.data import Digits
from d2dmoe_pl.phases import ExpertClustering, RecoveryTuning, RouterRegression, SparsityEnforcement

pytestmark = pytest.mark.drawn


def tags_of(trainer, phase, folder, **kwargs):
    logger = TensorBoardLogger(folder, name="run", version="")
    run = trainer(log_every_n_steps=1, max_epochs=1, logger=logger, **kwargs)
    run.fit(phase, datamodule=Digits(16))
    run.test(phase, datamodule=Digits(16), verbose=False)
    found = EventAccumulator(run.log_dir).Reload().Tags()
    return found, found["scalars"] + found["images"] + found["histograms"] + found["tensors"]


@pytest.mark.thorough
def test_a_deep_model_has_no_more_tags_than_a_shallow_one(trainer, tmp_path):
    tags = []
    for depth in (1, 4):
        source = digits_source(depth=depth)
        model = tiny.route_(source.build(DIGIT_LABELS))
        save_artifact(model, tmp_path / f"routed{depth}", [PhaseRecord("RouterRegression")])
        experts = tiny.route_(source.build(DIGIT_LABELS))
        for module in experts.modules():
            if hasattr(module, "router"):
                module.router = module.gate = None
        save_artifact(experts, tmp_path / f"experts{depth}", [PhaseRecord("ExpertClustering")])
        for make in (
            lambda source=source: SparsityEnforcement(source=source, displacement=0.0),
            lambda source=source: ExpertClustering(8, split="parameter", source=source),
            lambda depth=depth: RouterRegression(8, init_from=str(tmp_path / f"experts{depth}")),
            lambda depth=depth: RecoveryTuning(init_from=str(tmp_path / f"routed{depth}")),
        ):
            phase = make()
            callbacks = [TauSweep([0.2, 0.4, 0.6, 0.8, 1.0])] if phase.ends_at == "routed" else []
            found, every = tags_of(trainer, phase, tmp_path / str(len(tags)), callbacks=callbacks)
            tags.append(sorted(every))
            if isinstance(phase, (RouterRegression, RecoveryTuning)):
                assert "layers/router_loss" in found["images"]
                assert {"tau_sweep/validation", "tau_sweep/validation_layers"} <= set(found["images"])
            if isinstance(phase, SparsityEnforcement):
                assert {"layers/sparsity_zeros", "layers/sparsity_below_0.1"} <= set(found["images"])
                assert "sparsity/zeros" in found["scalars"]
    assert tags[:4] == tags[4:]
    assert all(len(each) < 30 for each in tags)
