"""A phase of ours: small values are left out of the products of the experts that run. Trains nothing."""

from functools import partial
from typing import Any

from torch import nn

from d2dmoe_pl.moe.conversion import add_cutoffs_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.cutoffs.fitting import fit_cutoffs_
from d2dmoe_pl.moe.cutoffs.found_shares import CutoffSearch, find_cutoff_shares
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases._held_out import summed
from d2dmoe_pl.phases._training_tokens import TrainingTokens

FOUND = "cutoffs"  # key in checkpoints


class CutoffFitting(TrainingTokens):
    """Let the experts that run leave out values that are too small to count, as TEAL (arXiv 2408.14690) does for all.

    Of a token, its small values are not read by the first products; of an expert's activations, small ones do not reach
    the second. Where FFNs are gated, a neuron whose gate is small is not computed any further, as in CATS (arXiv
    2404.08763). What is small is a magnitude a layer, that of training samples with every expert on. Up to ``full_tau``
    experts are chosen and cutoffs count in full; above, every expert runs and they fade, down to the dense model at 1.

    How much each layer is to leave out is found for a budget, by one gradient: the mix of fewer experts and larger
    cutoffs that adds the least divergence. A share that is given is that of all layers.

    Fewer FLOPs are not less time in all places: on the CPU, and for up to four tokens in bf16 or int8, as when text is
    written, weights of activations and neurons that are left out are not read; else they are multiplied with zeros.

    Args:
        inputs: Share of tokens' values that experts read, the largest; 1 for all. With all shares at 1, cutoffs are
            taken away. If not given, each layer's own is found.
        hidden: Share of all activations that reach the second product, the largest; 1 for all. Of experts that run,
            which are those with large ones, it is more. If not given, each layer's own is found.
        full_tau: The ``tau`` up to which so much is left out.
        gate_proj: Share of a gated FFN's neurons, those with the largest gates, that are computed further; 1 for all.
            If not given, each layer's own is found; but all are where both of the others are given.
        num_tokens: Of training samples, without padding; so many, or some more, are looked at over all processes. Of an
            encoder-decoder, the encoder's are counted.
        ffn_flops: The budget that shares are found for, of the dense FFNs' FLOPs. What is found serves others as well:
            better below the budgets that are to be used than above.
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.

    Raises:
        ConfigError: For shares outside (0, 1], a ``full_tau`` outside [0, 1), a budget outside (0, 1), or a number that
            is not positive.
    """

    def __init__(
        self,
        inputs: float | None = None,
        hidden: float | None = None,
        full_tau: float = 0.95,
        gate_proj: float | None = None,
        num_tokens: int = 8192,
        ffn_flops: float = 0.375,
        init_from: str | None = None,
    ) -> None:
        super().__init__(num_tokens, init_from)
        if inputs is not None and hidden is not None and gate_proj is None:
            gate_proj = 1.0
        self.search = CutoffSearch(ffn_flops, inputs, hidden, full_tau, gate_proj)
        self._found: dict[str, CutoffConfig] = {}  # by layer, once they are

    def transform_(self, model: nn.Module) -> None:
        super().transform_(model)
        add_cutoffs_(model, self.search.start)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[FOUND] = {name: config.described() for name, config in self._found.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._found = {name: CutoffConfig(**described) for name, described in checkpoint.get(FOUND, {}).items()}
        if self._found:
            add_cutoffs_(self.model, self._found)  # their values are loaded next

    def calibrate_(self) -> None:
        batches = self.gathered()

        def run() -> None:
            for batch in batches:
                self.run_layers(batch)

        reduce = partial(summed, self)
        given = self.search.start
        if any(self.search.free(layer.own_experts.is_gated) for layer in moe_layers(self.model).values()):
            calls = [
                (partial(self.run_layers, batch), partial(self.curvature_loss, batch, n))
                for n, batch in enumerate(batches)
            ]
            self._found = find_cutoff_shares(self.model, self.search, batches=calls, reduce=reduce)
        fit_cutoffs_(self.model, self._found or given, run=run, reduce=reduce)
