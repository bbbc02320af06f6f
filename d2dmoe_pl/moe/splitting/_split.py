"""What every way to split neurons into experts has, and how one is found by name."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from d2dmoe_pl.moe.splitting._firing_statistics import CountedTokens
from d2dmoe_pl.plugins import Plugins


class Split(ABC):
    """A way to split the neurons of an FFN into experts of equal size.

    Attributes:
        needs_activations: Whether :meth:`statistic` is gathered for it, on real data.
    """

    needs_activations: ClassVar[bool] = False

    def statistic(self, activation: Tensor, tokens: CountedTokens) -> Tensor:
        """What a batch adds to the statistic that the split goes by; a sum over batches and processes.

        Args:
            activation: After the activation function, ``(N, d_ff)``, zero where a neuron does not fire; see
                :func:`fired`. Of no tokens too, when the sum begins.
            tokens: The ``N`` tokens.

        Returns:
            A tensor whose shape does not depend on ``N``.
        """
        raise TypeError(f"{type(self).__name__}: needs no activations")

    @abstractmethod
    def __call__(self, weight: Tensor, statistic: Tensor | None, num_experts: int, seed: int) -> Tensor:
        """The expert of each neuron.

        Args:
            weight: What decides whether a neuron fires, ``(d_ff, d_model)``.
            statistic: The sum of what :meth:`statistic` gave, if it was gathered.
            num_experts: ``E``; divides ``d_ff``.
            seed: Of whatever is drawn at random.

        Returns:
            ``(d_ff,)`` integers in ``[0, E)``, each ``d_ff / E`` times.
        """


SPLITS: Plugins[Split] = Plugins(
    "d2dmoe_pl.moe.splitting",
    "SPLIT",
    "an instance of a subclass of d2dmoe_pl.moe.splitting.Split",
    lambda plugin: isinstance(plugin, Split),
)


def register_split(name: str, split: Split) -> None:
    """Make ``split`` known as ``name``, wherever a split can be named; for this process.

    Args:
        name: What configs call it.
        split: Gives each neuron an expert.

    Raises:
        ConfigError: If the name is taken.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.splitting import SPLITS, Split, register_split
        >>> class InTurn(Split):
        ...     def __call__(self, weight, statistic, num_experts, seed):
        ...         return torch.arange(len(weight)) % num_experts
        >>> register_split("in_turn", InTurn())
        >>> SPLITS.find("in_turn", "split")(torch.zeros(6, 2), None, num_experts=3, seed=0)
        tensor([0, 1, 2, 0, 1, 2])
    """
    SPLITS.register(name, split)
