"""A model is read, converted and saved in little more memory than it has itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from d2dmoe_pl.artifact import save_artifact

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")

SHAPE = {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 4}
MEASURED = """
import gc, sys
from pathlib import Path
from d2dmoe_pl import ExpertsConfig, convert_to_moe_, load_model, save_artifact

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

def run(folder):
    model = load_model(folder)
    yield model
    convert_to_moe_(model, ExpertsConfig(num_experts=8))
    yield model
    save_artifact(model, folder + "_as_experts")
    yield model
    del model
    gc.collect()  # a converted model and its save_pretrained know each other
    yield load_model(folder + "_as_experts")

small, large = sys.argv[1:]
for model in run(small):  # so that all is imported
    pass
before = memory("VmRSS")
for model in run(large):
    size = sum(parameter.nbytes for parameter in model.parameters())
    print((memory("VmHWM") - before) / size)
    del model
"""


def saved(folder, **shape):
    config = transformers.LlamaConfig(vocab_size=1000, dtype="bfloat16", **{**SHAPE, **shape})
    save_artifact(transformers.LlamaForCausalLM(config).to(torch.bfloat16), folder)
    return str(folder)


@pytest.mark.thorough
def test_the_peak_is_a_third_above_the_model(tmp_path):
    folders = [saved(tmp_path / "small", num_hidden_layers=1, intermediate_size=64), saved(tmp_path / "large")]
    # each tensor on pages of its own, which go back with it
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, *folders]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    peaks = dict(zip(["read", "converted", "saved", "read again"], map(float, result.stdout.split()), strict=True))
    assert all(peak < 1.3 for peak in peaks.values()), peaks
