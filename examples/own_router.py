"""A router of your own, which needs no training: registered, compared with what it is to tell, and used.

Run it by python examples/own_router.py; docs/extending.md has a router that is trained.
"""

import timm
import torch
from torch import nn

from d2dmoe_pl import ExpertsConfig, GateConfig, RouterConfig, add_routers_, convert_to_moe_, register_router, set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.routers import Router, gram_matrices, output_norms


class PeekingRouter(Router):
    """Looks at a quarter of each expert's neurons: an expert some of whose neurons fire is likely to matter."""

    def __init__(self, experts, config):
        super().__init__(experts, config)
        self.register_buffer("rows", experts.input_weight.detach()[:, : experts.expert_dim // 4].clone())  # (E, s/4, d)

    def forward(self, tokens):
        peeked = nn.functional.linear(tokens, self.rows.flatten(0, 1))  # (N, E * s/4)
        return peeked.relu().unflatten(1, self.rows.shape[:2]).norm(dim=-1)  # (N, E)

    def flops(self):
        return 2 * self.rows.numel()


register_router("peeking", PeekingRouter)
model = timm.create_model("vit_tiny_patch16_224", depth=2, act_layer=nn.ReLU).eval()
convert_to_moe_(model, ExpertsConfig(num_experts=16))
add_routers_(model, RouterConfig(kind="peeking"))
tokens = torch.randn(512, 192)
for name, layer in moe_layers(model).items():
    norms = output_norms(layer.experts.hidden(tokens), gram_matrices(layer.experts.down_weight))  # (N, E)
    told = torch.corrcoef(torch.stack([layer.router(tokens).flatten(), norms.flatten()]))[0, 1]
    print(f"{name}: scores and the norms of the experts' outputs correlate by {told:.2f}")
set_gate_(model, GateConfig("dynk_max", tau=0.5))
print(model(torch.randn(2, 3, 224, 224)).shape)
