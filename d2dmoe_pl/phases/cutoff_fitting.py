"""A phase of ours: small values are left out of the products of the experts that run. Trains nothing."""

from functools import partial

from torch import nn

from d2dmoe_pl.moe.conversion import add_cutoffs_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.cutoffs.fitting import fit_cutoffs_
from d2dmoe_pl.phases._held_out import summed
from d2dmoe_pl.phases._training_tokens import TrainingTokens


class CutoffFitting(TrainingTokens):
    """Let the experts that run leave out values that are too small to count, as TEAL (arXiv 2408.14690) does for all.

    Of a token, its small values are not read by the first products; of an expert's activations, small ones do not reach
    the second. Where FFNs are gated, a neuron whose gate is small is not computed any further, as in CATS (arXiv
    2404.08763). What is small is a magnitude a layer, that of training samples with every expert on. Up to ``full_tau``
    experts are chosen and cutoffs count in full; above, every expert runs and they fade, down to the dense model at 1.

    Fewer FLOPs are not less time in all places: on the CPU, and for up to four tokens in bf16 or int8, as when text is
    written, weights of activations and neurons that are left out are not read; else they are multiplied with zeros.

    Args:
        inputs: Share of tokens' values that experts read, the largest; 1 for all. With all shares at 1, cutoffs are
            taken away.
        hidden: Share of all activations that reach the second product, the largest; 1 for all. Of experts that run,
            which are those with large ones, it is more.
        full_tau: The ``tau`` up to which so much is left out.
        gate_proj: Share of a gated FFN's neurons, those with the largest gates, that are computed further; 1 for all.
        num_tokens: Of training samples, without padding; so many, or some more, are looked at over all processes.
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.

    Raises:
        ConfigError: For shares outside (0, 1], a ``full_tau`` outside [0, 1), or a number that is not positive.
    """

    def __init__(
        self,
        inputs: float = 0.7,
        hidden: float = 0.4,
        full_tau: float = 0.95,
        gate_proj: float = 1.0,
        num_tokens: int = 8192,
        init_from: str | None = None,
    ) -> None:
        super().__init__(num_tokens, init_from)
        self.config = CutoffConfig(inputs, hidden, full_tau, gate_proj)

    def transform_(self, model: nn.Module) -> None:
        super().transform_(model)
        add_cutoffs_(model, self.config)

    def calibrate_(self) -> None:
        batches = self.gathered()

        def run() -> None:
            for batch in batches:
                self.run_layers(batch)

        fit_cutoffs_(self.model, self.config, run=run, reduce=partial(summed, self))
