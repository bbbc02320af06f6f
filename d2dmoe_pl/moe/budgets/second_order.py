"""What a layer's setting would add to the divergence, from one gradient: no setting is run through the whole model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from d2dmoe_pl.hooks import first_given, hooked
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import Gate
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.stand_ins.stand_in import skipped_share
from d2dmoe_pl.moe.token_context import real_tokens

CHUNK = 2048  # tokens whose activations of all experts are held at once


class SecondOrder:
    """Sums, over tokens, of what settings of single layers would add to the divergence from the dense model.

    A divergence is zero and flat where nothing is skipped, so that to the second order it is half of the change's
    square under the Fisher information, ``E[(g . change)^2] / 2`` with ``g`` the gradient of a log-likelihood with
    respect to a token's output (as in Optimal Brain Damage, LeCun et al., 1990). The labels' likelihood stands for the
    model's own, and tokens count as independent. Of a squared error, ``g`` is that of a sum with random signs.

    Args:
        model: Whose MoE layers have gates.
        grids: Settings of each layer, the dense one first.

    Attributes:
        divergences: By layer and setting, ``(layers, steps)`` float64, not yet over the number of predictions.
        work: What experts do, in executed pairs, likewise.
        beside: FLOPs of choosing experts and standing in for others, likewise.
        tokens: That each layer saw, ``(layers,)``.
    """

    def __init__(self, model: nn.Module, grids: Sequence[Sequence[float]]) -> None:
        self.model = model
        self.layers = list(moe_layers(model).values())
        self.grids = grids
        steps = max(map(len, grids))
        self.divergences = torch.zeros(len(grids), steps, dtype=torch.float64)
        self.work = torch.zeros(len(grids), steps, dtype=torch.float64)
        self.beside = torch.zeros(len(grids), steps, dtype=torch.float64)
        self.tokens = torch.zeros(len(grids), dtype=torch.float64)

    def add(self, run: Callable[[], object], loss: Callable[[], Tensor]) -> None:
        """Add a batch.

        Args:
            run: Calls the model on the batch.
            loss: The same, and gives the negative log-likelihood of the labels, summed over predictions, or what else
                has gradients for ``g``.
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
        """Add what every setting of one layer would change in its output, ``(..., d_out)``, for what it is given.

        What is wanted of a change is its product with the gradient. That is a sum over experts, so that a further
        setting costs its mask and no product with weights.
        """
        layer, gate = self.layers[index], self.layers[index].get_gate()
        real = layer.context.token_index
        rows = real_tokens(x.reshape(-1, x.shape[-1]), real).to(layer.own_experts.up_weight.dtype)  # (N, d_model)
        slopes = real_tokens(gradient.reshape(-1, gradient.shape[-1]), real)  # (N, d_out)
        # what little a step changes would drown in the rounding of narrow types
        with torch.autocast(x.device.type, enabled=False):
            for tokens, slope in zip(rows.split(CHUNK), slopes.split(CHUNK), strict=True):
                self._add_chunk(index, layer, gate, tokens, slope)
        self.tokens[index] += len(rows)
        gate.set_tau(1.0)

    def _add_chunk(self, index: int, layer: MoELayer, gate: Gate, tokens: Tensor, slopes: Tensor) -> None:
        experts, scores = layer.own_experts, layer.get_router()(tokens)
        down = layer.with_experts(lambda used, given: used.weights_in(given.dtype)[4].float(), tokens)  # (E, s, d_out)
        along = (slopes @ down.flatten(0, 1).t()).unflatten(1, (experts.num_experts, -1))  # (N, E, s)
        in_full: Tensor | None = None  # what stands in for all experts, along the gradient
        if layer.stand_in is not None:
            none = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            in_full = (layer.stand_in(tokens, scores, none).float() * slopes).sum(dim=1)  # (N,)
        of_strength: dict[float, tuple[Tensor, Tensor | None]] = {}  # by how much of the cutoffs counts
        dense: Tensor | None = None
        order = gate.order(scores)
        for step, tau in enumerate(self.grids[index]):
            gate.set_tau(tau)
            self.beside[index, step] += layer.flops_beside_experts(len(tokens), 1)
            strength = 0.0 if layer.cutoffs is None else float(layer.cutoffs.strength(gate, experts.num_experts))
            if strength not in of_strength:
                hidden, work = layer.hidden_at(gate, tokens)
                of_strength[strength] = (hidden.float() * along).sum(dim=2), work  # (N, E)
            (worth, work), mask = of_strength[strength], layer.choose(scores, gate, **order)
            output = (worth * mask).sum(dim=1)  # along the gradient
            if in_full is not None:
                output = output + in_full * skipped_share(scores, mask).squeeze(1)
            dense = output if dense is None else dense
            self.divergences[index, step] += 0.5 * (output - dense).double().square().sum().cpu()
            self.work[index, step] += float((mask if work is None else work * mask).sum(dtype=torch.float64))


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
