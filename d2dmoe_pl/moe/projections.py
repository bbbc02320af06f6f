"""2-layer MLPs in the place of attention projections, which are then FFNs like the model's own.

D2DMoE (arXiv 2310.04361), section 3.5: a linear map has no activations that could be sparse; an MLP of its cost has.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from d2dmoe_pl.adapters import FFN, Projection, adapter_for, put_projection_
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.lost_hooks import check_not_hooked
from d2dmoe_pl.moe.quantization.int8_layers import check_not_quantized
from d2dmoe_pl.typed_settings import check_types_


@dataclass(frozen=True)
class ProjectionConfig:
    """The MLP in the place of a projection.

    Attributes:
        width: Hidden neurons; if not given, as many as make its two products cost no more than the projection's one,
            ``d_in * d_out / (d_in + d_out)``, rounded down to a ``multiple_of``.
        multiple_of: What the width is rounded to, so that it can be split into so many experts.
        residual: Whether the MLP's input is added to its output, where they are of one width.

    Raises:
        ConfigError: If ``width`` or ``multiple_of`` is not positive.
    """

    width: int | None = None
    multiple_of: int = 8
    residual: bool = False

    def __post_init__(self) -> None:
        check_types_(self)
        check(self.width is None or self.width > 0, f"width={self.width}: an MLP needs at least one hidden neuron")
        check(self.multiple_of > 0, f"multiple_of={self.multiple_of}: must be positive")

    def width_for(self, projection: Projection) -> int:
        """Hidden neurons of the MLP for ``projection``.

        Raises:
            ConfigError: If equal cost leaves not even ``multiple_of`` neurons.
        """
        if self.width is not None:
            return self.width
        equal = projection.d_in * projection.d_out // (projection.d_in + projection.d_out)
        check(
            equal >= self.multiple_of,
            f"multiple_of={self.multiple_of}: must be at most {equal}, the width of an MLP that costs what "
            f"{projection.name} costs",
        )
        return equal // self.multiple_of * self.multiple_of


class ProjectionMLP(nn.Module):
    """``down(relu(up(x)))``, or ``x`` more than that, in the place of a projection.

    Args:
        d_in: Width of what it takes.
        width: Hidden neurons.
        d_out: Width of what it gives.
        residual: Whether ``x`` is added; ``d_in`` and ``d_out`` are then the same.

    Attributes:
        mlp: The two layers; after the conversion, the MoE layer made of them.
    """

    def __init__(self, d_in: int, width: int, d_out: int, residual: bool) -> None:
        super().__init__()
        self.width = width
        self.residual = residual
        self.mlp: nn.Module = two_layers(d_in, width, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_in)`` to ``(..., d_out)``."""
        return x + self.mlp(x) if self.residual else self.mlp(x)


def two_layers(d_in: int, width: int, d_out: int) -> nn.Sequential:
    """``down(relu(up(x)))``, freshly initialised."""
    layers = {"up": nn.Linear(d_in, width), "activation": nn.ReLU(), "down": nn.Linear(width, d_out)}
    return nn.Sequential(OrderedDict(layers))


def mlp_ffn(name: str, mlp: nn.Sequential) -> FFN:
    """What :func:`two_layers` gives as an FFN, called ``name``."""
    up, activation, down = mlp
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    return FFN(name, up, activation, down, is_projection=True)


def select_projections(
    model: nn.Module, filter_fn: Callable[[Projection, str], bool] | None = None
) -> list[Projection]:
    """The linear attention projections of ``model`` that pass ``filter_fn(projection, name)``, first to last.

    Raises:
        ConfigError: If there are none, or the architecture's cannot be found or taken apart.
    """
    check_not_quantized(model)
    found = [
        projection
        for projection in adapter_for(model).projections(model)
        if filter_fn is None or filter_fn(projection, projection.name)
    ]
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no linear attention projection found"
            + (" that the filter admits" if filter_fn else "")
        )
    return found


def replace_projections_(
    model: nn.Module,
    config: ProjectionConfig,
    filter_fn: Callable[[Projection, str], bool] | None = None,
) -> None:
    """Put freshly initialised MLPs in the place of attention projections, as further FFNs ``<projection>.mlp``.

    Args:
        model: A model whose adapter names its projections.
        config: The MLPs.
        filter_fn: ``(projection, name) -> bool``; which projections to replace, all if not given.

    Raises:
        ConfigError: If there are none, a fused one cannot be taken apart, or a width is too small for the config. The
            model is then as it was.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl import ProjectionConfig, replace_projections_
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> of_outputs = lambda projection, name: projection.role == "output"
        >>> replace_projections_(model, ProjectionConfig(multiple_of=4), of_outputs)
        >>> type(model.transformer.h[0].attn.c_proj).__name__
        'ProjectionMLP'
    """
    projections = select_projections(model, filter_fn)
    widths = [config.width_for(projection) for projection in projections]
    check_not_hooked({each.place: model.get_submodule(each.place) for each in projections})
    for projection, width in zip(projections, widths, strict=True):
        residual = config.residual and projection.d_in == projection.d_out
        mlp = ProjectionMLP(projection.d_in, width, projection.d_out, residual)
        weight = projection.weight
        put_projection_(model, projection, mlp.to(weight.device, weight.dtype).train(model.training))
    adapter_for(model).mark_converted_(model)


def projection_mlps(model: nn.Module) -> dict[str, ProjectionMLP]:
    """What stands in the place of the projections of ``model``, by their names, split into experts or not."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ProjectionMLP)}


def projection_ffns(model: nn.Module) -> list[FFN]:
    """The MLPs in the place of projections that are not split into experts yet, as FFNs, first to last."""
    return [
        mlp_ffn(f"{name}.mlp", module.mlp)
        for name, module in projection_mlps(model).items()
        if isinstance(module.mlp, nn.Sequential)
    ]


def describe_projections(model: nn.Module) -> dict[str, dict]:
    """What stands in the place of which projections, as plain JSON; :func:`restore_projections_` is its inverse."""
    return {
        name: {"width": module.width, "residual": module.residual} for name, module in projection_mlps(model).items()
    }


def restore_projections_(model: nn.Module, made: Mapping[str, Mapping]) -> None:
    """Give a dense model the structure that :func:`describe_projections` recorded."""
    for name, kwargs in made.items():
        replace_projections_(model, ProjectionConfig(**kwargs), _named({name}))


def _named(names: Collection[str]) -> Callable[[Projection, str], bool]:
    return lambda projection, name: name in names
