"""Another activation function in the FFNs of a model, and which FFNs have one that its own config does not say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from d2dmoe_pl.adapters import FFN, adapter_for
from d2dmoe_pl.errors import check_kind
from d2dmoe_pl.moe.find_layers import FilterFn, expert_layers, select_ffns
from d2dmoe_pl.moe.projections import projection_mlps
from d2dmoe_pl.typed_settings import check_types_

ATTRIBUTE = "_d2dmoe_activations"  # of a model


@dataclass(frozen=True)
class ActivationConfig:
    """The activation function to put into every FFN.

    Attributes:
        name: As ``transformers`` and ``timm`` both spell it, e.g. ``relu``.

    Raises:
        ConfigError: If it is no text.
    """

    name: str = "relu"

    def __post_init__(self) -> None:
        check_types_(self)


def swap_activation_(model: nn.Module, config: ActivationConfig, filter_fn: FilterFn | None = None) -> None:
    """Replace the activation function of every FFN ("relufication", D2DMoE section 4).

    The model's own config says so then. It has one activation for all, so that where only some FFNs get another, the
    config stays as it was, and an artifact of the model says which they are.

    Args:
        model: A model that an adapter knows.
        config: The activation.
        filter_fn: ``(ffn, name) -> bool``; which FFNs get it, all if not given.

    Raises:
        ConfigError: If the architecture does not know the activation, or no FFN is found. The model is then as it was.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl import ActivationConfig, swap_activation_
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> swap_activation_(model, ActivationConfig("relu"))
        >>> model.transformer.h[0].mlp.act
        ReLU()
    """
    check_kind(config, ActivationConfig)
    adapter = adapter_for(model)
    # MLPs in the place of projections have theirs from the start
    of_projections = {f"{name}.mlp" for name in projection_mlps(model)}
    ffns = select_ffns(model, lambda ffn, name: not ffn.is_projection and (filter_fn is None or filter_fn(ffn, name)))
    if len(ffns) < len(adapter.ffns(model)) or expert_layers(model).keys() - of_projections:
        _set_some_(model, ffns, config.name)
    else:
        adapter.set_activation_(model, ffns, config.name, is_all=True)
        model.__dict__.pop(ATTRIBUTE, None)


def own_activations(model: nn.Module) -> dict[str, str]:
    """The activations by FFN that the model's own config does not say; :func:`restore_activations_` is its inverse."""
    found: dict[str, str] = getattr(model, ATTRIBUTE, {})
    return found


def restore_activations_(model: nn.Module, made: Mapping[str, str]) -> None:
    """Give the FFNs of a dense model the activations that :func:`own_activations` told."""
    for activation in sorted(set(made.values())):
        _set_some_(model, [ffn for ffn in select_ffns(model) if made.get(ffn.name) == activation], activation)


def _set_some_(model: nn.Module, ffns: Sequence[FFN], name: str) -> None:
    adapter = adapter_for(model)
    adapter.set_activation_(model, ffns, name, is_all=False)
    setattr(model, ATTRIBUTE, {**own_activations(model), **{ffn.name: name for ffn in ffns}})
    adapter.mark_converted_(model)
