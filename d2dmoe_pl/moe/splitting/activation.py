"""Split by activation profile: neurons that fire for the same tokens go to the same expert. Not in the papers."""

from torch import Tensor

from d2dmoe_pl.moe.splitting._balanced_kmeans import balanced_kmeans
from d2dmoe_pl.moe.splitting._firing_statistics import CountedTokens, profile
from d2dmoe_pl.moe.splitting._split import Split


class ActivationSplit(Split):
    """Balanced k-means of the L2-normalised profiles: for which tokens a neuron fires."""

    needs_activations = True

    def statistic(self, activation: Tensor, tokens: CountedTokens) -> Tensor:
        return profile(activation, tokens)

    def __call__(self, weight: Tensor, statistic: Tensor | None, num_experts: int, seed: int) -> Tensor:
        assert statistic is not None
        return balanced_kmeans(statistic, num_experts, seed)


SPLIT = ActivationSplit()
