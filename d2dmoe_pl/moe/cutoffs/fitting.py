"""Cutoffs from the magnitudes that some calibration samples have, with every expert on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.conversion import add_cutoffs_, check_chosen, select_moe_layers
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig, CutoffConfigs
from d2dmoe_pl.moe.find_layers import LayerFilterFn
from d2dmoe_pl.moe.layer import observed

BINS = 2**15


class Magnitudes:
    """How often magnitudes occur, to the seven bits that bfloat16 keeps; counts add up over batches and processes.

    Args:
        device: Of the counts.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.cutoffs.fitting import Magnitudes
        >>> seen = Magnitudes(torch.device("cpu"))
        >>> seen.add(torch.tensor([1.0, -2.0, 3.0, 4.0]))
        >>> seen.exceeded_by(0.5)
        3.0
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        """Add values of any shape."""
        bits = values.detach().float().abs().flatten().view(torch.int32) >> 16  # in the order of the magnitudes
        self.counts += torch.bincount(bits, minlength=BINS)

    def exceeded_by(self, share: float) -> float:
        """A magnitude that ``share`` of the values reach, or some more that are about the same; 0 for all or none."""
        wanted = share * float(self.counts.sum())
        reached = self.counts.flip(0).cumsum(0).flip(0)  # (BINS,): how many are in a bin or above
        bits = int((reached >= wanted).nonzero().amax()) << 16 if share < 1 and wanted > 0 else 0
        return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


@torch.no_grad()
def fit_cutoffs_(
    model: nn.Module,
    config: CutoffConfigs,
    filter_fn: LayerFilterFn | None = None,
    *,
    run: Callable[[], object],
    reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> None:
    """Give every MoE layer cutoffs that leave the shares of ``config`` of what it is given with every expert on.

    Args:
        model: With routers and gates; in evaluation mode. A layer that no token comes to leaves nothing out.
        config: The shares.
        filter_fn: ``(layer, name) -> bool``; which layers to fit, all if not given.
        run: Calls the model on calibration samples; a few thousand tokens are enough.
        reduce: Sums a tensor over processes.

    Raises:
        ConfigError: If there is no MoE layer, or one without a router or a gate.
    """
    layers = select_moe_layers(model, filter_fn)
    own = {name: config if isinstance(config, CutoffConfig) else config[name] for name in layers}
    check_chosen({name: layer for name, layer in layers.items() if not own[name].leaves_out_nothing})
    add_cutoffs_(model, own, filter_fn)
    cutoffs = {name: layer.cutoffs for name, layer in layers.items() if layer.cutoffs is not None}
    seen = {
        name: [Magnitudes(layers[name].own_experts.down_weight.device) for _ in each.config.shares[0]]
        for name, each in cutoffs.items()
    }

    def see(name: str, tokens: Tensor, hidden: Tensor) -> None:
        if name not in seen:
            return
        of_inputs, of_hidden, *of_gates = seen[name]
        of_inputs.add(tokens)
        of_hidden.add(hidden)
        for each in of_gates:
            each.add(layers[name].own_experts.gates(tokens))  # inside their call, in which weights are adapted already

    if not cutoffs:
        return
    settings = {name: layer.get_gate().config for name, layer in layers.items()}
    for layer in layers.values():
        layer.get_gate().set_tau(1.0)
    try:
        with observed(layers, see):
            run()
    finally:
        for name, layer in layers.items():
            layer.get_gate().set_config(settings[name])
    for name, fitted in cutoffs.items():
        for magnitudes in seen[name]:
            magnitudes.counts = reduce(magnitudes.counts)
        for row, shares in zip(fitted.values.view(-1, len(seen[name])), fitted.config.shares, strict=True):
            for place, (magnitudes, share) in enumerate(zip(seen[name], shares, strict=True)):
                row[place] = magnitudes.exceeded_by(share)
