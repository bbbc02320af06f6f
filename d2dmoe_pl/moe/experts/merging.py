"""Back from experts to the dense FFNs that they were made from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import FFN, adapter_for, holder_of
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.activations import own_activations, restore_activations_
from d2dmoe_pl.moe.budgets.budget_path import set_budget_path_
from d2dmoe_pl.moe.conversion import select_moe_layers
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.find_layers import LayerFilterFn, check_not_adapted, check_weights_are_here, expert_layers
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.lost_hooks import check_not_hooked
from d2dmoe_pl.moe.projections import mlp_ffn, projection_mlps, two_layers
from d2dmoe_pl.moe.quantization.int8_layers import check_not_quantized


def dense_weights(experts: Experts) -> dict[str, Tensor]:
    """The weights of the dense FFN that ``experts`` are, its neurons in their order.

    Returns:
        ``up.weight`` and ``gate_proj.weight``, ``(d_ff, d_model)``; ``up.bias`` and ``gate_proj.bias``, ``(d_ff,)``;
        ``down.weight``, ``(d_out, d_ff)``; ``down.bias``, ``(d_out,)``: those of them that there are, views where that
        is possible.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from d2dmoe_pl.adapters import FFN
        >>> from d2dmoe_pl.moe.experts.experts import Experts
        >>> from d2dmoe_pl.moe.experts.merging import dense_weights
        >>> ffn = FFN("ffn", nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> torch.equal(dense_weights(Experts(ffn, num_experts=3))["down.weight"], ffn.down.weight)
        True
    """
    down_weight = experts.down_weight.flatten(0, 1).t()  # (E, s, d_out) -> (d_out, d_ff)
    weights = {
        "up.weight": experts.up_weight.flatten(0, 1),  # (E, s, d) -> (d_ff, d)
        "up.bias": None if experts.up_bias is None else experts.up_bias.flatten(),  # (E, s) -> (d_ff,)
        "gate_proj.weight": None if experts.gate_weight is None else experts.gate_weight.flatten(0, 1),
        "gate_proj.bias": None if experts.gate_bias is None else experts.gate_bias.flatten(),
        "down.weight": down_weight,
        "down.bias": experts.down_bias,
    }
    return {name: weight for name, weight in weights.items() if weight is not None}


def merge_to_dense_(model: nn.Module, filter_fn: LayerFilterFn | None = None) -> None:
    """Put dense FFNs back where MoE layers are: the model then computes what it computed with every expert on.

    They are the architecture's own modules, so that the model costs what the dense model costs and can be saved as one.
    Routers and gates are dropped. MLPs in the place of attention projections stay, as dense ones.

    Args:
        model: A model with MoE layers.
        filter_fn: ``(layer, name) -> bool``; which layers to merge, all if not given.

    Raises:
        ConfigError: If there is no MoE layer, as in a model of MoEBERT, whose experts are no dense FFN. The model is
            then as it was.

    Example:
        >>> import torch, transformers
        >>> from d2dmoe_pl import ExpertsConfig, convert_to_moe_, merge_to_dense_
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> model = transformers.GPT2LMHeadModel(config).eval()
        >>> before = model(torch.tensor([[1, 2, 3]])).logits
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> merge_to_dense_(model)
        >>> type(model.transformer.h[0].mlp).__name__
        'GPT2MLP'
        >>> torch.allclose(model(torch.tensor([[1, 2, 3]])).logits, before, atol=1e-6)
        True
    """
    check_not_quantized(model)
    check_weights_are_here(model)
    layers = select_moe_layers(model, filter_fn)
    check_not_adapted({f"{name}.experts": layer.experts for name, layer in layers.items()})
    check_not_hooked(layers)
    adapter = adapter_for(model)
    with torch.device("meta"):
        dense = adapter.rebuild(model)
        restore_activations_(dense, own_activations(model))
    ffns = {ffn.name: ffn for ffn in adapter.ffns(dense)}
    mlps = {f"{name}.mlp" for name in projection_mlps(model)}
    for name in layers:
        check(
            name in ffns or name in mlps,
            f"{name}: no FFN of a {adapter.title} is there; only what convert_to_moe_ made can be merged",
        )
    paths = {id(module): path for path, module in dense.named_modules()}
    merged: dict[str, nn.Module] = {}  # by the path where it is to stand
    for name, layer in layers.items():
        if name in ffns:
            merged |= _merged(ffns[name], dense.get_submodule(name), paths, layer)
        else:
            with torch.device("meta"):
                mlp = two_layers(layer.experts.d_model, layer.experts.dense_dim, layer.experts.d_out)
            merged |= _merged(mlp_ffn(name, mlp), mlp, {}, layer)
    for path, module in merged.items():
        model.set_submodule(path, module)
    for name in ffns.keys() & layers.keys():
        adapter.taken_back_(model, name)
    set_budget_path_(model, None)
    if not expert_layers(model):
        for context in {layer.context for layer in layers.values()}:
            context.remove()


@torch.no_grad()
def _merged(ffn: FFN, module: nn.Module, paths: Mapping[int, str], layer: MoELayer) -> dict[str, nn.Module]:
    """The modules of a dense FFN, with the weights of ``layer``, by the paths where they are to stand.

    Args:
        ffn: The dense FFN, on the meta device.
        module: What stands at its name.
        paths: Of all modules of the dense model, by their ids.
        layer: Stands in its place.
    """
    weights = dense_weights(layer.experts)
    merged = {ffn.name: module}
    filled: list[nn.Parameter] = []
    for part, linear in {"up": ffn.up, "gate_proj": ffn.gate_proj, "down": ffn.down}.items():
        if linear is None:
            continue
        holder = holder_of(linear)
        path = paths.get(id(holder), ffn.name)
        if path != ffn.name and not path.startswith(f"{ffn.name}."):
            merged[path] = holder.train(layer.training)
        if holder.weight.is_meta:  # one module may hold two parts
            holder.to_empty(device=layer.experts.up_weight.device).to(layer.experts.up_weight.dtype)
        for name, tensor in {"weight": linear.weight, "bias": linear.bias}.items():
            value = weights.pop(f"{part}.{name}", None)
            assert (value is None) == (tensor is None), f"{ffn.name}: {part}.{name}"
            if tensor is not None and value is not None:
                tensor.copy_(value)
        filled += holder.parameters()
    assert not weights, f"{ffn.name}: {', '.join(weights)}"
    assert all(any(own is parameter for parameter in filled) for own in module.parameters()), ffn.name
    kept = {id(ffn.activation): layer.experts.activation, id(ffn.output_dropout): layer.output_dropout}
    for path, part_of in list(module.named_modules()):
        if id(part_of) in kept:
            module.set_submodule(path, kept[id(part_of)])
    for parameter in filled:
        parameter.requires_grad_(layer.experts.up_weight.requires_grad)
    module.train(layer.training)
    path = paths.get(id(ffn.activation), ffn.name)
    if path != ffn.name and not path.startswith(f"{ffn.name}."):
        merged[path] = layer.experts.activation
    return merged
