"""Gradients at the outputs of a model's MoE layers, every expert on, and what is looked at beside them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import first_given, hooked
from d2dmoe_pl.moe.gradient_types import without_float16
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.token_context import real_tokens

See = Callable[[int, Tensor, Tensor], None]
"""Called with the index of a layer, its real tokens ``(N, d_model)``, and gradients at its outputs ``(N, d_out)``."""


def output_gradients(
    model: nn.Module, layers: Sequence[MoELayer], run: Callable[[], object], loss: Callable[[], Tensor], see: See
) -> None:
    """Run a batch, and once more while each layer is seen with what it is given and the gradient at what it gave.

    Layers are seen inside a call of the model, where weights that are sharded or adapted are as they are multiplied,
    with every expert on and without autocast: what little a change of a layer does would drown in narrow types.

    Args:
        model: Whose parameters are given no gradients.
        layers: With gates, which are left at ``tau`` 1. A layer that is called twice is seen twice.
        run: Calls the model on the batch.
        loss: The same, and gives what has the gradients.
        see: Sees a layer.

    Raises:
        ConfigError: If a gradient is not finite.
    """
    for layer in layers:
        layer.get_gate().set_tau(1.0)
    outputs: list[list[Tensor]] = [[] for _ in layers]

    def keep(index: int, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        outputs[index].append(output if output.requires_grad else output.detach().requires_grad_())
        return outputs[index][-1].clone()  # some add to it in place

    device_type = layers[0].own_experts.up_weight.device.type
    with torch.enable_grad(), _frozen(model), without_float16(device_type):
        with _after_each(layers, keep):
            total = loss()
        kept = [output for called in outputs for output in called]
        found = torch.autograd.grad(total, kept, allow_unused=True)  # what the loss does not hang on has none
    gradients = iter(torch.zeros_like(one) if each is None else each for one, each in zip(kept, found, strict=True))
    of_calls = [[next(gradients).float() for _ in called] for called in outputs]
    outputs.clear()
    for index, called in enumerate(of_calls):
        check(
            all(bool(each.isfinite().all()) for each in called),
            f"gradients at MoE layer {index + 1} of {len(layers)}: are not all finite, so that nothing can be told by "
            "them; must be, and precision=32-true or bf16-mixed has larger ones than 16-mixed",
        )

    def show(index: int, _: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x, gradient = first_given(args, kwargs), of_calls[index].pop(0)
        real, dtype = layers[index].context.token_index, layers[index].own_experts.up_weight.dtype
        tokens = real_tokens(x.reshape(-1, x.shape[-1]), real).to(dtype)  # (N, d_model)
        slopes = real_tokens(gradient.reshape(-1, gradient.shape[-1]), real)  # (N, d_out)
        with torch.autocast(x.device.type, enabled=False):
            see(index, tokens, slopes)
        layers[index].get_gate().set_tau(1.0)

    with torch.no_grad(), _after_each(layers, show):
        run()


def along_gradients(layer: MoELayer, tokens: Tensor, slopes: Tensor) -> Tensor:
    """What a unit of each neuron's activation moves the layer's output along the gradient, ``(N, E, s)``.

    What a change of activations does along the gradient is then a sum of products, without one more with weights.

    Args:
        layer: The layer.
        tokens: ``(N, d_model)``, for the type that its weights are multiplied in.
        slopes: Gradients at its outputs, ``(N, d_out)``.
    """
    down = layer.with_experts(lambda used, given: used.weights_in(given.dtype)[4].float(), tokens)  # (E, s, d_out)
    return (slopes @ down.flatten(0, 1).t()).unflatten(1, (layer.own_experts.num_experts, -1))


def _after_each(layers: Sequence[MoELayer], hook: Callable[..., Tensor | None]) -> Any:
    return hooked(
        layer.register_forward_hook(partial(hook, index), with_kwargs=True) for index, layer in enumerate(layers)
    )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Keep no gradients of parameters, nor what they would be computed from."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
