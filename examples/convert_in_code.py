"""A dense model to experts, routers and a gate in code; then saved, loaded, and run at two values of tau.

    python examples/convert_in_code.py

The model is tiny and random, so that this takes seconds; a pretrained one goes the same way.
"""

import tempfile

import torch
import transformers

import d2dmoe_pl as moe

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
)
model = transformers.BertForSequenceClassification(config).eval()
ids = torch.randint(100, (4, 16))

with torch.inference_mode():
    moe.swap_activation_(model, moe.ActivationConfig("relu"))  # a trained model is fine-tuned after this
    dense = model(ids).logits
    moe.convert_to_moe_(model, moe.ExpertsConfig(num_experts=16))
    print(f"as experts it differs by at most {(model(ids).logits - dense).abs().max():.1e}")

    moe.add_routers_(model, moe.RouterConfig(width=8))  # untrained; the phase RouterRegression trains them
    moe.set_gate_(model, moe.GateConfig("dynk_max", tau=0.5))
    folder = f"{tempfile.mkdtemp()}/artifact"
    moe.save_artifact(model, folder)
    loaded = moe.load_model(folder)
    print(f"at tau 0.5 it differs by at most {(loaded(ids).logits - dense).abs().max():.1e}")
    moe.set_tau_(loaded, 1.0)
    print(f"at tau 1 it differs by at most {(loaded(ids).logits - dense).abs().max():.1e}")
