"""Small values are left out of the products of experts that run: TEAL's sparsity (arXiv 2408.14690), inside them.

So are neurons of small gates, as in CATS (arXiv 2404.08763).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

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
        halfway: The shares of ``inputs``, ``hidden`` and ``gate_proj`` between these ends, where half of it counts. If
            not given, cutoffs are half as large there.

    Raises:
        ConfigError: If one of them lies outside its range.

    Example:
        >>> from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
        >>> CutoffConfig(inputs=0.8)
        CutoffConfig(inputs=0.8, hidden=0.4, full_tau=0.95, gate_proj=1.0, halfway=None)
    """

    inputs: float = 0.7
    hidden: float = 0.4
    full_tau: float = 0.95
    gate_proj: float = 1.0
    halfway: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.halfway, list):  # as files have it
            object.__setattr__(self, "halfway", tuple(self.halfway))
        check_types_(self)
        for name in ("inputs", "hidden", "gate_proj"):
            value = getattr(self, name)
            check(0 < value <= 1, f"{name}={value}: must lie in (0, 1], the share of values that are not left out")
        if self.halfway is not None:
            full, half = (self.inputs, self.hidden, self.gate_proj), self.halfway
            check(len(half) == 3, f"halfway={half}: must be three shares, of inputs, hidden and gate_proj")
            between = all(least <= share <= 1 for least, share in zip(full, half, strict=True))
            check(between, f"halfway={half}: must lie between {full}, the shares in full, and 1")
        check(0 <= self.full_tau < 1, f"full_tau={self.full_tau}: must lie in [0, 1); at tau=1 nothing is left out")

    @property
    def leaves_out_nothing(self) -> bool:
        return self.inputs == self.hidden == self.gate_proj == 1

    @property
    def shares(self) -> list[tuple[float, ...]]:
        """Of what is kept of tokens' values, activations, and gates that have a cutoff; halfway first, if told."""
        full = (self.inputs, self.hidden, self.gate_proj)
        number = 2 if self.gate_proj == 1 else 3
        return [each[:number] for each in (self.halfway, full) if each is not None]

    def without_gates(self) -> "CutoffConfig":
        """The same for FFNs that have none."""
        return replace(self, gate_proj=1.0, halfway=self.halfway and (*self.halfway[:2], 1.0))

    def work_share(self, is_gated: bool) -> float:
        """About what share of an expert's FLOPs is left."""
        if not is_gated:
            return (self.inputs + self.hidden) / 2
        return (self.inputs + self.inputs * self.gate_proj + self.hidden) / 3

    def described(self) -> dict[str, Any]:
        """The settings that an artifact keeps, by name: as before there were others where these are as they were."""
        added = {"gate_proj": 1.0, "halfway": None}  # later than the others
        return {name: value for name, value in asdict(self).items() if name not in added or value != added[name]}


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
            is left out as may be: ``(2,)`` or ``(3,)``; ``(2, 2)`` or ``(2, 3)`` with those halfway before them.
    """

    values: Tensor

    def __init__(self, config: CutoffConfig) -> None:
        super().__init__()
        self.config = config
        shares = torch.zeros(len(config.shares), len(config.shares[0]))
        self.register_buffer("values", shares if config.halfway else shares[0])

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
        values = self.values.float()
        if values.dim() == 1:
            now = values * strength
        else:  # up to halfway, and from there
            now = values[0] * (2 * strength).clamp(max=1) + (values[1] - values[0]) * (2 * strength - 1).clamp(min=0)
        inputs, hidden, *gates = now.unbind()
        return inputs, hidden, gates[0] if gates else None

    def work_share(self, tau: float, is_gated: bool) -> float:
        """About what share of an executed expert's FLOPs is left, by the shares that the cutoffs were fitted to."""
        strength, full = min(1.0, (1 - tau) / (1 - self.config.full_tau)), self.config.work_share(is_gated)
        if self.config.halfway is None:
            return 1 - strength * (1 - full)
        half = CutoffConfig(*self.config.halfway[:2], gate_proj=self.config.halfway[2]).work_share(is_gated)
        return 1 - min(2 * strength, 1) * (1 - half) - max(2 * strength - 1, 0) * (half - full)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.described().items())
