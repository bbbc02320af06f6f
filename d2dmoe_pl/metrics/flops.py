"""FLOPs as pure arithmetic: a multiply-add is 2, as in ``torch.utils.flop_counter``.

The published figures of D2DMoE and MoEfication count a multiply-add as 1. Only matrix products count; padding does not.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.moe.convert import gated, moe_layers
from d2dmoe_pl.moe.experts import Experts
from d2dmoe_pl.moe.layer import MoELayer


def pair_flops(experts: Experts) -> int:
    """FLOPs of one executed (token, expert) pair."""
    return 2 * experts.d_model * experts.expert_dim * (3 if experts.is_gated else 2)


def dense_ffn_flops(experts: Experts) -> int:
    """FLOPs of the dense FFN for one token."""
    return pair_flops(experts) * experts.num_experts


def router_flops(layer: MoELayer) -> int:
    """FLOPs of the router for one token; 0 where there is none."""
    if layer.router is None:
        return 0
    return 2 * layer.router.config.width * (layer.experts.d_model + layer.experts.num_experts)


def sample_lengths(batch: Mapping[str, Tensor]) -> list[int] | None:
    """Real tokens of each sample, ``B`` integers; None for data without padding, where all samples are alike."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.sum(dim=1).tolist()


def sample_inputs(batch: Mapping[str, Tensor], length: int | None) -> dict[str, Tensor]:
    """The shapes of one unpadded sample of ``length`` tokens, on the meta device."""
    mask = batch.get("attention_mask")

    def cut(value: Tensor) -> Tensor:
        one = value[:1]  # (1, ...)
        padded = mask is not None and value.dim() >= 2 and value.shape[1] == mask.shape[1]
        return (one[:, :length] if padded else one).to("meta")

    # a mask that masks nothing is left out: models look into it, and meta tensors have nothing to look at
    return {key: cut(value) for key, value in batch.items() if value is not mask}


def flops_outside_ffns(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of one call of a converted model, its MoE layers left out: embeddings, attention, head.

    Counted on the meta device by ``torch.utils.flop_counter``: shapes alone, no arithmetic.

    Args:
        model: A model with MoE layers.
        inputs: A batch on the meta device, as :func:`sample_inputs` makes it.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    tokens_run = []
    # what the layers contribute is subtracted again, from the shapes they really saw
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: tokens_run.append((layer, args[0].shape[:-1].numel())))
        for layer in moe_layers(model).values()
    ]
    counter = FlopCounterMode(display=False)
    try:
        with gated(model, None), counter, torch.no_grad():
            adapter_for(model).logits(_Functional(model, meta), inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops() - sum(count * dense_ffn_flops(layer.experts) for layer, count in tokens_run)


class _Functional:
    """A model called with other parameters than its own."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.model = model
        self.tensors = tensors

    def __call__(self, *args: object, **kwargs: object) -> object:
        return functional_call(self.model, self.tensors, args, kwargs)
