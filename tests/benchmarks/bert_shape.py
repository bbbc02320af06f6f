"""Six layers of BERT-base's shape with random weights, 15% of their experts run, as docs/speed.md says.

    python tests/benchmarks/bert_shape.py --dtype bfloat16,int8 --batch_size 1,8 --threads 1 --optimize true \
      --compare onnxruntime-int8,openvino,openvino-int8

The arguments are those of ``main.py benchmark``. Texts are noise of 128 tokens.
"""

import sys
import tempfile

import torch
import transformers

from d2dmoe_pl import (
    ExpertsConfig,
    GateConfig,
    RouterConfig,
    add_routers_,
    convert_to_moe_,
    save_artifact,
    set_gate_,
    set_tau_,
)
from d2dmoe_pl.cli import main
from d2dmoe_pl.moe.find_layers import moe_layers

SHARE = 0.15


@torch.inference_mode()
def share_run(model, ids, tau):
    """The share of (token, expert) pairs that run at ``tau``."""
    masks = []
    handles = [layer.watch(masks.append) for layer in moe_layers(model).values()]
    set_tau_(model, tau)
    model(ids)
    for handle in handles:
        handle.remove()
    return torch.cat(masks).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=6, hidden_act="relu"))
    convert_to_moe_(model.eval(), ExpertsConfig(96))
    add_routers_(model, RouterConfig(64))
    set_gate_(model, GateConfig("dynk_max", 0.5))
    ids = torch.randint(model.config.vocab_size, (8, 128))
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if share_run(model, ids, middle) < SHARE else (low, middle)
    with tempfile.TemporaryDirectory() as folder:
        save_artifact(model, f"{folder}/artifact")
        own = ["--artifact", f"{folder}/artifact", "--length", "128", "--tau", f"{high:.4f}"]
        main(["benchmark", *own, *sys.argv[1:]])
