"""Small values are left out of the products of experts that run: TEAL's sparsity (arXiv 2408.14690), inside them.

So are neurons of small gates, as in CATS (arXiv 2404.08763).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.expert_layer import ExpertSizes
from d2dmoe_pl.moe.gating import Gate
from d2dmoe_pl.typed_settings import check_types_

CutoffTensors = tuple[Tensor, Tensor, Tensor | None]
"""Below which tokens' values, activations and, where there are cutoffs of them, gates are left out; no dimensions."""


@dataclass(frozen=True)
class CutoffConfig:
    """What the experts of a MoE layer leave out of their products.

    Attributes:
        inputs: Share of tokens' values that experts read, the largest, in (0, 1]; 1 for all.
        hidden: Share of neurons' activations that reach the second product, the largest, in (0, 1]; 1 for all.
        gate_proj: Share of a gated FFN's neurons that are computed beyond the activation of their gate, those where
            that is largest, in (0, 1]; 1 for all, as where there are no such gates.
        full_tau: The ``tau`` up to which so much is left out, in [0, 1). Above, every expert runs and leaves out less,
            and nothing at 1, where the layer stays the dense one.

    Raises:
        ConfigError: If one of them lies outside its range.

    Example:
        >>> from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
        >>> CutoffConfig(inputs=0.8)
        CutoffConfig(inputs=0.8, hidden=0.4, full_tau=0.95, gate_proj=1.0)
    """

    inputs: float = 0.7
    hidden: float = 0.4
    full_tau: float = 0.95
    gate_proj: float = 1.0

    def __post_init__(self) -> None:
        check_types_(self)
        for name in ("inputs", "hidden", "gate_proj"):
            value = getattr(self, name)
            check(0 < value <= 1, f"{name}={value}: must lie in (0, 1], the share of values that are not left out")
        check(0 <= self.full_tau < 1, f"full_tau={self.full_tau}: must lie in [0, 1); at tau=1 nothing is left out")

    @property
    def leaves_out_nothing(self) -> bool:
        return self.inputs == self.hidden == self.gate_proj == 1

    @property
    def shares(self) -> tuple[float, ...]:
        """Of what is kept, one for each cutoff: tokens' values, activations, and gates where these have one."""
        return (self.inputs, self.hidden) if self.gate_proj == 1 else (self.inputs, self.hidden, self.gate_proj)

    def work_share(self, is_gated: bool) -> float:
        """About what share of an expert's FLOPs is left."""
        if not is_gated:
            return (self.inputs + self.hidden) / 2
        return (self.inputs + self.inputs * self.gate_proj + self.hidden) / 3

    def described(self) -> dict[str, float]:
        """The settings that an artifact keeps, by name: as before there were cutoffs of gates where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "gate_proj" or value != 1}


CutoffConfigs = CutoffConfig | Mapping[str, CutoffConfig]
"""One for all layers, or each layer's own, by its name."""


def cut(values: Tensor, cutoff: Tensor | float) -> Tensor:
    """``values`` with zeros in the place of those whose magnitude is below ``cutoff``; NaN stays.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.cutoffs.cutoffs import cut
        >>> cut(torch.tensor([0.5, -3.0, 1.0]), 1.0)
        tensor([ 0., -3.,  1.])
    """
    return values * _is_kept(values, cutoff)  # a fill takes four times as long


def work_of_pairs(sizes: ExpertSizes, tokens: Tensor, hidden: Tensor, cutoffs: CutoffTensors) -> Tensor:
    """The share of its products that is left of each (token, expert) pair, if it runs.

    Args:
        sizes: Of the experts.
        tokens: ``(N, d_model)``, before anything is left out.
        hidden: The activations of all experts, the same, ``(N, E, s)``, but 0 where a gate is too small.
        cutoffs: What :class:`Cutoffs` gives.

    Returns:
        ``(N, E)`` float32.
    """
    into = 2 if sizes.is_gated else 1
    of_inputs, of_hidden, of_gates = cutoffs
    read = _is_kept(tokens, of_inputs).sum(dim=1, keepdim=True)  # (N, 1)
    kept = _is_kept(hidden, of_hidden)
    rows: Tensor | int = into * sizes.expert_dim  # of weights that tokens are multiplied with
    if of_gates is not None and sizes.is_gated:
        passed = (hidden != 0) | (of_gates <= 0)
        kept = kept & passed
        rows = sizes.expert_dim + _count(passed)  # (N, E)
    products = rows * read + sizes.d_out * _count(kept)
    return products.float() / (sizes.expert_dim * (into * sizes.d_model + sizes.d_out))


def _count(kept: Tensor) -> Tensor:
    return kept.view(torch.uint8).sum(dim=2, dtype=torch.int32)  # (N, E)


def _is_kept(values: Tensor, cutoff: Tensor | float) -> Tensor:
    return ~(values.abs() < cutoff)


class Cutoffs(nn.Module):
    """The magnitudes below which values are left out, by a gate's setting; none until they are fitted.

    :func:`d2dmoe_pl.moe.cutoffs.fitting.fit_cutoffs_` fits them.

    Args:
        config: What they leave out.

    Attributes:
        values: Those of tokens' values, of neurons' activations, and of gates if some are to be left out, where as much
            is left out as may be: ``(2,)`` or ``(3,)``.
    """

    values: Tensor

    def __init__(self, config: CutoffConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("values", torch.zeros(len(config.shares)))

    def strength(self, gate: Gate, num_experts: int) -> Tensor:
        """The share of the cutoffs that counts at a gate's setting, a number without dimensions: 0 at the dense layer.

        Where a gate goes by the number of experts, they count in full, but for all experts.
        """
        if gate.config.k is not None:
            return gate.tau.new_tensor(float(gate.config.k < num_experts))
        return ((1 - gate.tau) / (1 - self.config.full_tau)).clamp(max=1.0)

    def forward(self, gate: Gate, num_experts: int) -> CutoffTensors:
        """The cutoffs at a gate's setting."""
        strength = self.strength(gate, num_experts).to(self.values.device, torch.float32)
        inputs, hidden, *gates = (self.values.float() * strength).unbind()
        return inputs, hidden, gates[0] if gates else None

    def work_share(self, tau: float, is_gated: bool) -> float:
        """About what share of an executed expert's FLOPs is left, by the shares that the cutoffs were fitted to."""
        strength = min(1.0, (1 - tau) / (1 - self.config.full_tau))
        return 1 - strength * (1 - self.config.work_share(is_gated))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self.config.described().items())
