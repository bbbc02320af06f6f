"""Turn a trained dense Transformer into a Mixture-of-Experts with less compute per token."""

from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.moe.convert import set_backend_, set_gate_, set_tau_

__all__ = ["load_model", "save_artifact", "set_backend_", "set_gate_", "set_tau_"]
