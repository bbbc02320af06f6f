"""Small values are left out of the products of experts that run: TEAL's sparsity (arXiv 2408.14690), inside them."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.expert_layer import ExpertSizes
from d2dmoe_pl.moe.gating import Gate
from d2dmoe_pl.typed_settings import check_types_


@dataclass(frozen=True)
class CutoffConfig:
    """What the experts of a MoE layer leave out of their products.

    Attributes:
        inputs: Share of tokens' values that experts read, the largest, in (0, 1]; 1 for all.
        hidden: Share of neurons' activations that reach the second product, the largest, in (0, 1]; 1 for all.
        full_tau: The ``tau`` up to which so much is left out, in [0, 1). Above, every expert runs and leaves out less,
            and nothing at 1, where the layer stays the dense one.

    Raises:
        ConfigError: If one of them lies outside its range.

    Example:
        >>> from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
        >>> CutoffConfig(inputs=0.8)
        CutoffConfig(inputs=0.8, hidden=0.4, full_tau=0.95)
    """

    inputs: float = 0.7
    hidden: float = 0.4
    full_tau: float = 0.95

    def __post_init__(self) -> None:
        check_types_(self)
        for name in ("inputs", "hidden"):
            value = getattr(self, name)
            check(0 < value <= 1, f"{name}={value}: must lie in (0, 1], the share of values that are not left out")
        check(0 <= self.full_tau < 1, f"full_tau={self.full_tau}: must lie in [0, 1); at tau=1 nothing is left out")

    @property
    def leaves_out_nothing(self) -> bool:
        return self.inputs == self.hidden == 1


def cut(values: Tensor, cutoff: Tensor | float) -> Tensor:
    """``values`` with zeros in the place of those whose magnitude is below ``cutoff``; NaN stays.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.cutoffs.cutoffs import cut
        >>> cut(torch.tensor([0.5, -3.0, 1.0]), 1.0)
        tensor([ 0., -3.,  1.])
    """
    return values * _is_kept(values, cutoff)  # a fill takes four times as long


def work_of_pairs(sizes: ExpertSizes, tokens: Tensor, hidden: Tensor, cutoffs: tuple[Tensor, Tensor]) -> Tensor:
    """The share of its products that is left of each (token, expert) pair, if it runs.

    Args:
        sizes: Of the experts.
        tokens: ``(N, d_model)``, before anything is left out.
        hidden: The activations of all experts, the same, ``(N, E, s)``.
        cutoffs: Of tokens' values and of activations.

    Returns:
        ``(N, E)`` float32.
    """
    into = 2 if sizes.is_gated else 1
    read = _is_kept(tokens, cutoffs[0]).sum(dim=1, keepdim=True)  # (N, 1)
    added = _is_kept(hidden, cutoffs[1]).view(torch.uint8).sum(dim=2, dtype=torch.int32)  # (N, E)
    products = into * sizes.expert_dim * read + sizes.d_out * added
    return products.float() / (sizes.expert_dim * (into * sizes.d_model + sizes.d_out))


def _is_kept(values: Tensor, cutoff: Tensor | float) -> Tensor:
    return ~(values.abs() < cutoff)


class Cutoffs(nn.Module):
    """The magnitudes below which values are left out, by a gate's setting; none until they are fitted.

    :func:`d2dmoe_pl.moe.cutoffs.fitting.fit_cutoffs_` fits them.

    Args:
        config: What they leave out.

    Attributes:
        values: Those of tokens' values and of neurons' activations where as much is left out as may be, ``(2,)``.
    """

    values: Tensor

    def __init__(self, config: CutoffConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("values", torch.zeros(2))

    def strength(self, gate: Gate, num_experts: int) -> Tensor:
        """The share of the cutoffs that counts at a gate's setting, a number without dimensions: 0 at the dense layer.

        Where a gate goes by the number of experts, they count in full, but for all experts.
        """
        if gate.config.k is not None:
            return gate.tau.new_tensor(float(gate.config.k < num_experts))
        return ((1 - gate.tau) / (1 - self.config.full_tau)).clamp(max=1.0)

    def forward(self, gate: Gate, num_experts: int) -> tuple[Tensor, Tensor]:
        """The cutoffs of tokens' values and of neurons' activations at a gate's setting, without dimensions."""
        strength = self.strength(gate, num_experts).to(self.values.device, torch.float32)
        inputs, hidden = (self.values.float() * strength).unbind()
        return inputs, hidden

    def work_share(self, tau: float, is_gated: bool) -> float:
        """About what share of an executed expert's FLOPs is left, by the shares that the cutoffs were fitted to."""
        into = 2 if is_gated else 1
        in_full = (into * self.config.inputs + self.config.hidden) / (into + 1)
        strength = min(1.0, (1 - tau) / (1 - self.config.full_tau))
        return 1 - strength * (1 - in_full)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in asdict(self.config).items())
