"""What a layer's setting would add to the divergence, from one gradient: no setting is run through the whole model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.budgets.output_gradients import along_gradients, output_gradients
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.stand_ins.stand_in import skipped_share

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
        output_gradients(self.model, self.layers, run, loss, self._add_steps)

    def _add_steps(self, index: int, tokens: Tensor, slopes: Tensor) -> None:
        """Add what every setting of one layer would change in its output for what it is given.

        What is wanted of a change is its product with the gradient. That is a sum over experts, so that a further
        setting costs its mask and no product with weights.
        """
        for some, slopes_of_some in zip(tokens.split(CHUNK), slopes.split(CHUNK), strict=True):
            self._add_chunk(index, self.layers[index], some, slopes_of_some)
        self.tokens[index] += len(tokens)

    def _add_chunk(self, index: int, layer: MoELayer, tokens: Tensor, slopes: Tensor) -> None:
        experts, gate, scores = layer.own_experts, layer.get_gate(), layer.score(tokens)
        along = along_gradients(layer, tokens, slopes)  # (N, E, s)
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
