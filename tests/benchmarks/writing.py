"""Milliseconds a token that a small Llama of random weights writes, dense and with experts, as docs/speed.md says.

    python tests/benchmarks/writing.py --dtype float32,int8 --batch_size 1 --tau 0.2 --optimize true

The arguments are those of ``main.py benchmark``.
"""

import sys
import tempfile

import torch
import transformers

from d2dmoe_pl import ExpertsConfig, GateConfig, RouterConfig, add_routers_, convert_to_moe_, save_artifact, set_gate_
from d2dmoe_pl.cli import main

if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 2000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    convert_to_moe_(model, ExpertsConfig(64))
    add_routers_(model, RouterConfig(8))
    set_gate_(model, GateConfig("dynk_max", 0.5))
    with tempfile.TemporaryDirectory() as folder:
        save_artifact(model, f"{folder}/artifact")
        main(["benchmark", "--artifact", f"{folder}/artifact", "--decode", "32", "--threads", "1", *sys.argv[1:]])
