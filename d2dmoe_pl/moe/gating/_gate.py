"""The gate of a MoE layer: a gating rule, found by name, at a ``tau`` or a ``k``."""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import ConfigError, check, said_of
from d2dmoe_pl.moe.gating._ordered import Order, order_for
from d2dmoe_pl.moe.gating._trial import try_rule
from d2dmoe_pl.plugins import Plugins

Number = TypeVar("Number", int, float)


class GatingRule(Protocol):
    """Which experts run, by their scores. See :mod:`d2dmoe_pl.moe.gating` for what a rule has to hold.

    A rule that can run a given number of experts has a further argument, ``k: int | None = None``, which then counts
    instead of ``tau``. One that sorts may have ``ordered_scores``, see :mod:`d2dmoe_pl.moe.gating._ordered`, so that
    many settings of the same scores take one sort. A :class:`Gate` gives it ``tau`` as a tensor without dimensions, so
    that a compiled model stays good for every ``tau``; tensors' own operations take that as they take a number.
    """

    def __call__(self, scores: Tensor, tau: Tensor | float) -> Tensor:
        """Scores ``(N, E)``, not negative, to a boolean mask ``(N, E)``."""


def _takes_two(plugin: Any) -> bool:
    """Whether it can be called with scores and ``tau``, by place."""
    try:
        inspect.signature(plugin).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


GATING_RULES: Plugins[GatingRule] = Plugins(
    "d2dmoe_pl.moe.gating", "RULE", "a function (scores, tau) that gives a mask", _takes_two
)


def register_gate(name: str, rule: GatingRule) -> None:
    """Make ``rule`` known as ``name``, wherever a gating rule can be named; for this process.

    Args:
        name: What configs and artifacts call it.
        rule: Scores ``(N, E)`` and ``tau`` to a boolean mask ``(N, E)``.

    Raises:
        ConfigError: If the name is taken.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.gating import Gate, GateConfig, register_gate
        >>> def above_mean(scores, tau):
        ...     return scores >= (1 - tau) * scores.mean(dim=-1, keepdim=True)
        >>> register_gate("above_mean", above_mean)
        >>> Gate(GateConfig("above_mean", tau=0.0))(torch.tensor([[1.0, 2.0, 6.0]]))
        tensor([[False, False,  True]])
    """
    GATING_RULES.register(name, rule)


def check_tau(tau: float, argument: str = "tau") -> float:
    """``tau`` as a plain number; ``ConfigError`` unless it is one and lies in [0, 1]."""
    number = plain_number(tau, float)
    if number is None or not 0.0 <= number <= 1.0:
        raise ConfigError(f"{argument}={tau!r}: must lie in [0, 1] (1 runs every expert, the dense layer)")
    return number


def plain_number(value: Any, convert: Callable[[Any], Number]) -> Number | None:
    """What NumPy and torch have numbers in, as a number of Python's, which files can hold; None if it is no number."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        return convert(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises the last, of more than one number
        return None


@dataclass(frozen=True)
class GateConfig:
    """Which experts run.

    Attributes:
        rule: Name of a gating rule, e.g. of a file in ``moe/gating``: ``dynk_max``, ``dynk_cumulative`` or ``topk``.
        tau: In [0, 1]; larger runs more experts, 1 runs all.
        k: Of ``topk``, how many experts each token runs, instead of the share ``tau``.

    Raises:
        ConfigError: For an unknown rule, or one from outside that does not hold what a rule has to, a ``tau`` outside
            [0, 1], a ``k`` below 1, or one for a rule that takes none.

    Example:
        >>> from d2dmoe_pl import GateConfig
        >>> GateConfig("topk", k=4)
        GateConfig(rule='topk', tau=1.0, k=4)
    """

    rule: str = "dynk_max"
    tau: float = 1.0
    k: int | None = None

    def __post_init__(self) -> None:
        rule: Any = GATING_RULES.find(self.rule, "rule")
        if not GATING_RULES.is_own(self.rule):
            try_rule(self.rule, rule)
        object.__setattr__(self, "tau", check_tau(self.tau))
        if self.k is not None:
            check(takes_k(rule), f"k={self.k}: allowed only with rule topk, not {self.rule}")
            k = plain_number(self.k, operator.index)
            if k is None or k < 1:
                raise ConfigError(f"k={self.k}: must be at least 1, the number of experts that each token runs")
            object.__setattr__(self, "k", k)


def takes_k(rule: GatingRule) -> bool:
    """Whether ``rule`` can be told how many experts to run."""
    return "k" in inspect.signature(rule).parameters


class Gate(nn.Module):
    """Scores ``(N, E)`` to a boolean mask ``(N, E)``. Forward hooks on it see every decision, those on padding too.

    Args:
        config: The rule and its setting.

    Attributes:
        tau: ``config.tau`` as a tensor without dimensions.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.gating import Gate, GateConfig
        >>> Gate(GateConfig("dynk_max", tau=0.5))(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
        tensor([[ True, False,  True,  True]])
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self._rule = GATING_RULES.find(config.rule, "rule")
        self._count: dict[str, Any]
        self.config = config
        # no buffer: the type and device of the weights are none of its business
        with torch.inference_mode(False):
            self.tau = torch.tensor(config.tau, dtype=torch.float64, device="cpu")
        self.set_config(config)

    def set_tau(self, tau: float) -> None:
        """Go to another ``tau``, which then counts instead of a ``k``; compiled models see it.

        Raises:
            ConfigError: If it lies outside [0, 1].
        """
        self.set_config(replace(self.config, tau=tau, k=None))

    def set_config(self, config: GateConfig) -> None:
        """Go to another ``tau`` or ``k`` of the same rule."""
        assert config.rule == self.config.rule
        self.config = config
        self._count = {} if config.k is None else {"k": config.k}
        if self.tau.is_inference():  # a copy that was made in inference mode, and may be set outside of it
            with torch.inference_mode(False):
                self.tau = torch.tensor(config.tau, dtype=torch.float64, device="cpu")
        self.tau.fill_(config.tau)

    def admits_all(self, num_experts: int, all_above: float = 1.0) -> bool:
        """Whether every one of ``num_experts`` runs, whatever the scores are; ``all_above`` as in :meth:`forward`."""
        if self.config.k is not None:
            return self.config.k >= num_experts
        return self.config.tau >= 1 or self.config.tau > all_above

    def order(self, scores: Tensor) -> dict[str, Order]:
        """What a call can be given beside these scores, for several calls at one setting after the other."""
        return order_for(self._rule, _at_least_float32(scores))

    def forward(self, scores: Tensor, all_above: float = 1.0, **order: Order) -> Tensor:
        """Scores ``(N, E)`` to the mask ``(N, E)``.

        Args:
            scores: Not negative, ``(N, E)``.
            all_above: The ``tau`` above which every expert runs, in the place of 1.
            order: What :meth:`order` gives of the scores, if anything.

        Raises:
            ConfigError: If the rule gives anything but a boolean mask of that shape.
        """
        scores = _at_least_float32(scores)
        tau = self.tau if all_above >= 1 else torch.where(self.tau > all_above, 1.0, self.tau)
        mask: Any = self._rule(scores, tau, **self._count, **order)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != scores.shape:
            raise ConfigError(  # it would weigh experts, or spread over tokens
                f"rule={self.config.rule!r}: gave {said_of(mask)}; must be torch.bool of shape "
                f"{tuple(scores.shape)}, that of the scores"
            )
        return mask

    def extra_repr(self) -> str:
        how_many = f"tau={self.config.tau}" if self.config.k is None else f"k={self.config.k}"
        return f"rule={self.config.rule}, {how_many}"


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))  # whatever the type of the weights
