"""A fused optimizer in mixed precision: it trains, but its gradients cannot be clipped."""

import pytest
import tiny
import torch

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import FineTuning


def fused(parameters):
    return torch.optim.AdamW(parameters, fused=True)


@pytest.mark.parametrize(
    ("optimizer", "precision", "clipped"),
    [(fused, "bf16-mixed", None), (fused, "32-true", 1.0), (torch.optim.AdamW, "bf16-mixed", 1.0)],
)
def test_trains(trainer, optimizer, precision, clipped):
    run = trainer(precision=precision, gradient_clip_val=clipped)
    run.fit(FineTuning(source=tiny.SOURCES["bert"](), optimizer=optimizer), datamodule=tiny.TextData(8))
    assert run.global_step == 4


def test_clipped_in_mixed_precision(trainer):
    run = trainer(precision="bf16-mixed", gradient_clip_val=1.0)
    message = "gradient_clip_val=1.0: must be null with fused=True in mixed precision, or fused false"
    with pytest.raises(ConfigError, match=message):
        run.fit(FineTuning(source=tiny.SOURCES["bert"](), optimizer=fused), datamodule=tiny.TextData(8))
