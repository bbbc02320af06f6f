"""Artifacts of earlier versions of the package still load and compute what they did."""

from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch

from d2dmoe_pl.artifact import load_model, read_artifact

# written before artifacts had a format version, each with a batch and the logits that its model gave beside it
EARLIER = sorted((Path(__file__).parent / "artifacts").iterdir())


@pytest.mark.parametrize("path", EARLIER, ids=lambda path: path.name)
def test_an_earlier_artifact_loads_and_computes_the_same(path):
    kept = safetensors.torch.load_file(path / "expected.safetensors")
    batch = {key.removeprefix("batch."): value for key, value in kept.items() if key.startswith("batch.")}
    assert read_artifact(path).stage == "routed"
    with torch.no_grad():
        torch.testing.assert_close(tiny.logits(load_model(path), batch), kept["logits"], rtol=1e-4, atol=1e-5)
