"""A model in int8, in place: experts, routers, and the linear layers and embeddings around them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from d2dmoe_pl.adapters import Adapter, adapter_for
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.evaluation_mode import evaluating
from d2dmoe_pl.finite_weights import check_finite
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.find_layers import check_not_adapted, check_weights_are_here, expert_layers, moe_layers
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.quantization.int8_experts import Int8Experts
from d2dmoe_pl.moe.quantization.int8_layers import Int8Embedding, Int8Linear, Int8Module, check_not_quantized
from d2dmoe_pl.moe.quantization.trial import Trial, why_left
from d2dmoe_pl.moe.routers._router import RouterLinear
from d2dmoe_pl.notices import notice
from d2dmoe_pl.typed_settings import check_types_

DTYPES = ("int8",)
WIDEST = 133_000  # inputs of a linear layer, of which sums of 127 * 127 stay below 2 ** 31


@dataclass(frozen=True)
class QuantizationConfig:
    """What weights become.

    Attributes:
        dtype: ``int8``: numbers with a scale for each output channel, or each row of an embedding.
        embeddings: Whether embeddings are among them, which are half of a small model.

    Raises:
        ConfigError: For another type.
    """

    dtype: str = "int8"
    embeddings: bool = True

    def __post_init__(self) -> None:
        check_types_(self)
        check(self.dtype in DTYPES, f"dtype={self.dtype!r}: allowed are {', '.join(DTYPES)}")


def quantize_(
    model: nn.Module,
    config: QuantizationConfig | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Have the weights of ``model`` in int8, for inference: experts, routers, linear layers and embeddings.

    Activations are rounded when the model runs, with a scale a token, so that nothing has to be calibrated. Norms,
    convolutions and biases stay as they are. ``tau`` can still be set; nothing can be trained any more.

    Args:
        model: A model at any stage; a converted one keeps its routers and gates.
        config: What weights become; int8 with embeddings if not given.
        filter_fn: ``(module, name) -> bool``; which modules to take, all if not given. Asked of experts, linear layers
            and embeddings.

    Raises:
        ConfigError: If there is nothing to take, the model is in int8 already, or it has experts of another method. The
            model is then as it was.
        NonFiniteWeightsError: If a parameter holds a NaN or an infinity.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl import ExpertsConfig, convert_to_moe_, quantize_
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> model = transformers.GPT2LMHeadModel(config).eval()
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> quantize_(model)
        >>> model.transformer.h[0].mlp.experts.up_weight.dtype, model.transformer.h[0].attn.c_proj
        (torch.int8, Int8Linear(in_features=8, out_features=8, bias=True))
    """
    config = config or QuantizationConfig()
    check_not_quantized(model)
    check_weights_are_here(model)
    check_not_adapted(dict(model.named_modules()))
    for name, layer in expert_layers(model).items():
        check(
            isinstance(layer, MoELayer),
            f"{name}: {type(layer).__name__} has experts that quantize_ cannot take; must be what convert_to_moe_ made",
        )
    adapter = adapter_for(model)
    candidates = dict(_candidates(model, adapter, config.embeddings))
    wanted = {name: each for name, each in candidates.items() if filter_fn is None or filter_fn(each, name)}
    left = {name: reason for name, each in wanted.items() if (reason := _why_left(each, adapter)) is not None}
    called, trial = _tried(model, adapter, candidates)
    # what stands beside them for the same weight, as one that encoder and decoder share, would keep it as it is
    tied = {id(weight) for module in called if (weight := module._parameters.get("weight")) is not None}
    found = {}
    for name, module in wanted.items():
        weight = module._parameters.get("weight")
        if name in left or not (module in called or id(weight) in tied):
            continue
        if id(weight) in trial.read:
            left[name] = "has a weight that other code computes with"
        elif module in trial.unlike:
            left[name] = "gives something else than the product with its weight"
        else:
            found[name] = module
    kept = {id(candidates[name]._parameters.get("weight")) for name in left} - {id(None)}
    for name in [name for name, module in found.items() if id(module._parameters.get("weight")) in kept]:
        del found[name]
        left[name] = "shares its weight with one that is left as it is"
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no experts, linear layers or embeddings found"
            + (" that the filter admits" if filter_fn else "")
        )
    check_finite(model.named_parameters(), "the weights", "nothing is in int8")
    _put_in_int8_(model, found, adapter)
    if left:
        name, reason = next(iter(left.items()))
        notice(f"{type(model).__name__}: {len(left)} modules are not put in int8, the first {name}, which {reason}.")


def _put_in_int8_(model: nn.Module, found: Mapping[str, nn.Module], adapter: Adapter) -> None:
    made: dict[int, Int8Module] = {}  # by the module, and by the parameter that is its weight
    for name, module in found.items():
        if id(module) not in made:
            int8 = made[id(module)] = _in_int8(module, adapter).train(module.training)
            weight = module._parameters.get("weight")  # a parametrization's is new at each look, and no other's
            if id(weight) in made:  # tied weights stay so
                int8.weight, int8.scale = made[id(weight)].weight, made[id(weight)].scale
            elif weight is not None:
                made[id(weight)] = int8
        model.set_submodule(name, made[id(module)])
    adapter.mark_converted_(model)


def quantize_layer_(layer: MoELayer) -> None:
    """Have a MoE layer alone in int8, with its router."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, Experts):
            layer.set_submodule(name, Int8Experts(module).train(module.training))
        elif isinstance(module, nn.Linear | RouterLinear):
            layer.set_submodule(name, Int8Linear(module.weight, module.bias).train(module.training))


def restore_quantized_(model: nn.Module, names: Collection[str]) -> None:
    """Have the modules called ``names`` in int8, as ``quantized_names`` recorded them."""
    adapter = adapter_for(model)
    candidates = _candidates(model, adapter, embeddings=True)
    _put_in_int8_(model, {name: module for name, module in candidates if name in names}, adapter)


@torch.no_grad()
def _tried(model: nn.Module, adapter: Adapter, candidates: Mapping[str, nn.Module]) -> tuple[set[nn.Module], Trial]:
    """The modules that run when ``model`` does, and what else a call of it has shown.

    Those of layers with experts all are, since which of them run depends on the tokens, but for what routers only read.
    """
    of_experts = {part for layer in expert_layers(model).values() for part in layer.modules()}
    fused = {
        part for layer in model.modules() if isinstance(layer, nn.TransformerEncoderLayer) for part in layer.modules()
    }
    trial = Trial(model, candidates)
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    inputs = {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in adapter.random_inputs(model, 1, 2).items()
    }
    with evaluating(model):
        with trial.watching():
            adapter.logits(model, inputs)
        for layer in moe_layers(model).values():
            if layer.router is not None:
                of_experts -= _only_read(layer, layer.router)
    # torch has a kernel for all of such a layer, but not where there are hooks
    return trial.called - fused | of_experts, trial


def _only_read(layer: MoELayer, router: nn.Module) -> set[nn.Module]:
    """The parts of a layer's router that it does not call, but takes weights from."""
    called: set[nn.Module] = set()
    tokens = torch.rand(1, layer.sizes.d_model, generator=torch.Generator().manual_seed(0), device="cpu")
    handles = [part.register_forward_pre_hook(lambda module, args: called.add(module)) for part in router.modules()]
    with hooked(handles), torch.random.fork_rng(devices=[]):
        try:
            router(tokens.to(layer.experts.up_weight))
        except Exception:  # whatever it raises: it may need more tokens, or a kernel that is for another device
            return set()
    return set(router.modules()) - called


def _candidates(model: nn.Module, adapter: Adapter, embeddings: bool) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):
        is_taken = isinstance(module, Experts | RouterLinear) or adapter.as_linear(module) is not None
        if is_taken or (embeddings and adapter.embedding_scale(module) is not None):
            yield name, module


def _why_left(module: nn.Module, adapter: Adapter) -> str | None:
    linear = adapter.as_linear(module)
    if linear is not None and linear.weight.shape[1] > WIDEST:
        return f"has more than {WIDEST} inputs"
    return why_left(module)


def _in_int8(module: nn.Module, adapter: Adapter) -> Int8Module:
    if isinstance(module, Experts):
        return Int8Experts(module)
    if isinstance(module, nn.Embedding):
        scale = adapter.embedding_scale(module)
        assert scale is not None
        return Int8Embedding(module, scale)
    linear: Any = module if isinstance(module, RouterLinear) else adapter.as_linear(module)
    assert linear is not None
    return Int8Linear(linear.weight, linear.bias)
