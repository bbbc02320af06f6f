"""Stand-ins by least squares: in closed form, from one pass over some calibration samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.conversion import add_stand_ins_, check_chosen, select_moe_layers
from d2dmoe_pl.moe.find_layers import LayerFilterFn
from d2dmoe_pl.moe.gating import Gate
from d2dmoe_pl.moe.gating._gate import check_tau
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.stand_ins.stand_in import StandIn, StandInConfig, skipped_share
from d2dmoe_pl.moe.token_context import run_on_real_tokens
from d2dmoe_pl.typed_settings import check_types_

CHUNK = 2048  # tokens whose activations of all experts are held at once


@dataclass(frozen=True)
class FittingConfig:
    """How stand-ins are fitted.

    Attributes:
        rank: Of each stand-in; 0 takes those away that there are.
        taus: Settings of the gate whose skipped experts are fitted together, so that one fit is good for all.
        ridge: Weight of the penalty on the map, in units of its inputs' mean variance.

    Raises:
        ConfigError: If there is no ``tau``, one outside [0, 1], or ``ridge`` is not positive.
    """

    rank: int = 16
    taus: tuple[float, ...] = (0.2, 0.5, 0.7, 0.85)
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        check_types_(self)
        StandInConfig(self.rank)
        check(len(self.taus) > 0, "taus=(): must hold at least one value in [0, 1]")
        for tau in self.taus:
            check_tau(tau, "taus")
        check(self.ridge > 0, f"ridge={self.ridge}: must be positive")


class SkippedSums:
    """Sums over tokens from which a stand-in is fitted; they add up over chunks and processes.

    Args:
        d_model: Width of the tokens.
        d_out: Width of what experts give.
        device: Of the sums, which are in float64.
    """

    def __init__(self, d_model: int, d_out: int, device: torch.device) -> None:
        # a, a x, a^2 and so on, where a is the share that is skipped
        self.sums = torch.zeros(d_model + 1, d_model + 1 + d_out, dtype=torch.float64, device=device)

    def add(self, tokens: Tensor, share: Tensor, skipped: Tensor) -> None:
        """Add tokens ``(N, d_model)`` with the share that each skips, ``(N, 1)``, and what was lost, ``(N, d_out)``."""
        share = share.float()
        features = torch.cat([tokens.float() * share, share], dim=1)  # (N, d + 1)
        with torch.autocast(tokens.device.type, enabled=False):  # which would sum squares in the narrow type
            products = features.t() @ torch.cat([features, skipped.float()], dim=1)  # (d + 1, d + 1 + d_out)
        self.sums += products.double()

    def solve(self, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
        """The map of rank ``R`` that predicts best what is skipped: ``(R, d_model)`` and ``(R + 1, d_out)``.

        Ridge regression on centred inputs, projected on the directions in which its predictions vary most.
        """
        d_model = self.sums.shape[0] - 1
        squares, products = self.sums[:, : d_model + 1], self.sums[:, d_model + 1 :]
        weight = squares[-1, -1]  # sum of a^2
        if weight == 0:  # nothing was skipped
            zeros = partial(torch.zeros, dtype=torch.float64, device=self.sums.device)
            return zeros(rank, d_model), zeros(rank + 1, products.shape[1])
        mean_in, mean_out = squares[-1, :-1] / weight, products[-1] / weight
        gram = squares[:-1, :-1] - weight * mean_in.outer(mean_in)  # (d, d)
        cross = products[:-1] - weight * mean_in.outer(mean_out)  # (d, d_out)
        scale = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        damped = gram + ridge * scale * torch.eye(d_model, dtype=gram.dtype, device=gram.device)
        full = torch.linalg.solve(damped, cross)  # (d, d_out)
        _, directions = torch.linalg.eigh(full.t() @ gram @ full)  # by how much predictions vary, ascending
        best = directions[:, -rank:]  # (d_out, R)
        down = (full @ best).t()  # (R, d)
        return down, torch.cat([best.t(), (mean_out - (mean_in @ full) @ best @ best.t()).unsqueeze(0)])


@torch.no_grad()
def fit_stand_ins_(
    model: nn.Module,
    config: FittingConfig,
    filter_fn: LayerFilterFn | None = None,
    *,
    run: Callable[[Mapping[str, Tensor]], object],
    batch: Mapping[str, Tensor],
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> None:
    """Give every MoE layer a stand-in for the experts that are skipped, fitted on the tokens of ``batch``.

    The batch is run once, at all of the settings side by side. Each layer is fitted when the pass comes to it, and
    goes on with its stand-in on, so that the next is fitted on inputs as they will be.

    Args:
        model: With routers and gates; in evaluation mode.
        config: Rank, settings, ridge.
        filter_fn: ``(layer, name) -> bool``; which layers to fit, all if not given.
        run: Calls the model on a batch.
        batch: Tensors whose first dimension is that of the samples; 10,000 to 20,000 tokens are enough.
        reduce: Sums a tensor over processes.

    Raises:
        ConfigError: If there is no MoE layer, one without a router or a gate, or one narrower than the rank.
    """
    layers = select_moe_layers(model, filter_fn)
    if config.rank > 0:
        check_chosen(layers)
    add_stand_ins_(model, StandInConfig(config.rank), filter_fn)
    if config.rank == 0:
        return
    times = len(config.taus)
    repeated = {key: value.repeat(times, *[1] * (value.dim() - 1)) for key, value in batch.items()}  # (T * B, ...)
    with _fitted_when_run(layers, config, reduce):
        run(repeated)


@contextmanager
def _fitted_when_run(
    layers: Mapping[str, MoELayer], config: FittingConfig, reduce: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    sums = {
        layer: SkippedSums(layer.sizes.d_model, layer.sizes.d_out, next(layer.parameters()).device)
        for layer in layers.values()
    }

    def forward(layer: MoELayer, x: Tensor) -> Tensor:
        fit = partial(_fit_and_run_, layer, sums[layer], config, reduce)
        flat = run_on_real_tokens(fit, x.reshape(-1, x.shape[-1]), layer.context.token_index)  # (P, d_out)
        return layer.output_dropout(flat.view(*x.shape[:-1], flat.shape[-1]))

    for layer in layers.values():
        layer.forward = partial(forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _fit_and_run_(
    layer: MoELayer, sums: SkippedSums, config: FittingConfig, reduce: Callable[[Tensor], Tensor], tokens: Tensor
) -> Tensor:
    """Fit a layer on tokens ``(T * N, d)``, those of each setting after one another; what it then gives.

    ``sums`` are those of its runs so far, of all processes: a layer may run several times in a pass.
    """
    gate = layer.get_gate()
    gates = [Gate(replace(gate.config, tau=tau, k=None)) for tau in config.taus]
    stand_in = layer.stand_in
    assert isinstance(stand_in, StandIn)
    own = SkippedSums(layer.sizes.d_model, layer.sizes.d_out, tokens.device)
    ran: list[Tensor] = []
    chosen: list[tuple[Tensor, Tensor, Tensor]] = []
    for each, at_tau in zip(gates, tokens.chunk(len(gates)), strict=True):
        for chunk in at_tau.split(CHUNK):
            scores = layer.score(chunk)
            mask = layer.choose(scores, each)  # (n, E)
            hidden = layer.hidden_at(each, chunk)[0] * mask.unsqueeze(-1)  # (n, E, s)
            output = layer.with_experts(lambda experts, given: experts.combine(given), hidden)  # (n, d_out)
            own.add(chunk, skipped_share(scores, mask), layer.experts(chunk) - output)
            ran.append(output)
            chosen.append((chunk, scores, mask))
    sums.sums += reduce(own.sums)
    for parameter, value in zip(
        (stand_in.down, stand_in.up), sums.solve(stand_in.config.rank, config.ridge), strict=True
    ):
        parameter.copy_(value)
    return torch.cat([output + stand_in(*choice) for output, choice in zip(ran, chosen, strict=True)])


def joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of all samples of several, those of shorter texts padded to the longest.

    Args:
        batches: With the same keys; what is shorter than in another batch is padded with zeros.
    """

    def padded(value: Tensor, longest: int) -> Tensor:
        return nn.functional.pad(value, [0, 0] * (value.dim() - 2) + [0, longest - value.shape[1]])

    def together(values: Sequence[Tensor]) -> Tensor:
        if values[0].dim() > 1:
            longest = max(value.shape[1] for value in values)
            values = [padded(value, longest) for value in values]
        return torch.cat(list(values))

    return {key: together([batch[key] for batch in batches]) for key in batches[0]}
