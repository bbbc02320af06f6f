"""What a layer's setting would add to the divergence, from one gradient: no setting is run through the whole model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from d2dmoe_pl.hooks import first_given, hooked
from d2dmoe_pl.moe.find_layers import moe_layers


class SecondOrder:
    """Sums, over tokens, of what settings of single layers would add to the divergence from the dense model.

    A divergence is zero and flat where nothing is skipped, so that to the second order it is half of the change's
    square under the Fisher information, ``E[(g . change)^2] / 2`` with ``g`` the gradient of a log-likelihood with
    respect to a token's output (as in Optimal Brain Damage, LeCun et al., 1990). The labels' likelihood stands for the
    model's own, and tokens count as independent.

    Args:
        model: Whose MoE layers have gates.
        grids: Settings of each layer, the dense one first.

    Attributes:
        divergences: By layer and setting, ``(layers, steps)`` float64, not yet over the number of predictions.
        pairs: (token, expert) pairs that run, likewise.
        tokens: That each layer saw, ``(layers,)``.
    """

    def __init__(self, model: nn.Module, grids: Sequence[Sequence[float]]) -> None:
        self.model = model
        self.layers = list(moe_layers(model).values())
        self.grids = grids
        steps = max(map(len, grids))
        self.divergences = torch.zeros(len(grids), steps, dtype=torch.float64)
        self.pairs = torch.zeros(len(grids), steps, dtype=torch.float64)
        self.tokens = torch.zeros(len(grids), dtype=torch.float64)

    def add(self, run: Callable[[], object], loss: Callable[[], Tensor]) -> None:
        """Add a batch.

        Args:
            run: Calls the model on the batch.
            loss: The same, and gives the negative log-likelihood of the labels, summed over predictions.
        """
        for layer in self.layers:
            layer.get_gate().set_tau(1.0)
        outputs: list[list[Tensor]] = [[] for _ in self.layers]

        def keep(index: int, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            outputs[index].append(output if output.requires_grad else output.requires_grad_())

        with torch.enable_grad(), _frozen(self.model), self._after_each(keep):
            total = loss()
        gradients = iter(torch.autograd.grad(total, [output for called in outputs for output in called]))
        of_calls = [[next(gradients).float() for _ in called] for called in outputs]
        outputs.clear()

        def measure(index: int, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            self._add_steps(index, first_given(args, kwargs), of_calls[index].pop(0))

        with torch.no_grad(), self._after_each(measure):
            run()

    def _after_each(self, hook: Callable[[int, nn.Module, tuple, dict, Tensor], None]) -> AbstractContextManager[None]:
        return hooked(
            layer.register_forward_hook(partial(hook, index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        )

    def _add_steps(self, index: int, x: Tensor, gradient: Tensor) -> None:
        """Add what every setting of one layer would change in its output, ``(..., d_out)``, for what it is given."""
        layer = self.layers[index]
        given = x.to(layer.own_experts.up_weight.dtype)
        ran: list[Tensor] = []
        dense: Tensor | None = None
        # what little a step changes would drown in the rounding of narrow types
        with hooked([layer.watch(ran.append)]), torch.autocast(x.device.type, enabled=False):
            for step, tau in enumerate(self.grids[index]):
                layer.get_gate().set_tau(tau)
                output = layer.forward(given).float()
                dense = output if dense is None else dense
                change = (gradient * (output - dense)).sum(dim=-1)
                self.divergences[index, step] += 0.5 * change.double().square().sum().cpu()
                self.pairs[index, step] += int(ran[-1].sum())
        self.tokens[index] += len(ran[-1])
        layer.get_gate().set_tau(1.0)


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
