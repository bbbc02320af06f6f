"""Load an artifact, choose tau, and run the model as fast as it goes.

    python examples/serve_at_a_tau.py runs/digits_vit/router_regression/artifact 0.8

Without a folder it makes a tiny model, whose routers have learnt nothing.
"""

import sys
import tempfile

import timm
import torch

import d2dmoe_pl as moe
from d2dmoe_pl.adapters import adapter_for


def tiny_artifact() -> str:
    """The folder of a small random Vision Transformer with experts."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    model.model_args = shape  # what the model is rebuilt from; timm 1.0.30 and later note it themselves
    moe.convert_to_moe_(model, moe.ExpertsConfig(num_experts=16))
    moe.add_routers_(model, moe.RouterConfig(width=16))
    moe.set_gate_(model, moe.GateConfig("dynk_max", tau=0.9))
    folder = f"{tempfile.mkdtemp()}/artifact"
    moe.save_artifact(model, folder)
    return folder


model = moe.load_model(sys.argv[1] if len(sys.argv) > 1 else tiny_artifact())
moe.set_tau_(model, float(sys.argv[2]) if len(sys.argv) > 2 else 0.8)
batch = adapter_for(model).random_inputs(model, batch_size=4, length=16)  # noise, in the place of your data
with torch.inference_mode():  # without gradients a compiled kernel runs the experts
    print(adapter_for(model).logits(model, batch))
