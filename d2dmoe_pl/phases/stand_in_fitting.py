"""A phase of ours: stand-ins for the experts that tokens skip, fitted in closed form. Trains nothing."""

from functools import partial

from torch import nn

from d2dmoe_pl.moe.conversion import add_stand_ins_
from d2dmoe_pl.moe.stand_ins.fitting import FittingConfig, fit_stand_ins_, joined
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig
from d2dmoe_pl.phases._held_out import summed
from d2dmoe_pl.phases._training_tokens import TrainingTokens

TAUS = [0.2, 0.5, 0.7, 0.85]


class StandInFitting(TrainingTokens):
    """Give each MoE layer a map of low rank that predicts what a token's skipped experts would have given.

    It is scaled by the share of predicted norms that is skipped, so that it fades as ``tau`` grows, and with every
    expert on the model stays the dense one. Fitted by least squares on training samples, one layer after the other, in
    one pass.

    Args:
        rank: Of each map; 16 costs 1% of an FFN of 384 x 1,536. 0 takes stand-ins away.
        num_tokens: Of training samples, without padding; so many, or some more, are gathered over all processes. Of an
            encoder-decoder, the encoder's are counted.
        taus: Settings that are fitted together; the model holds ``num_tokens`` for each of them at once.
        ridge: Weight of the penalty on the maps, in units of their inputs' mean variance.
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.

    Raises:
        ConfigError: For a negative rank or one wider than a layer, a ``tau`` outside [0, 1], or numbers that are not
            positive.
    """

    def __init__(
        self,
        rank: int = 16,
        num_tokens: int = 12288,
        taus: list[float] = TAUS,
        ridge: float = 1e-2,
        init_from: str | None = None,
    ) -> None:
        super().__init__(num_tokens, init_from)
        self.config = FittingConfig(rank, tuple(taus), ridge)

    def transform_(self, model: nn.Module) -> None:
        super().transform_(model)
        add_stand_ins_(model, StandInConfig(self.config.rank))

    def calibrate_(self) -> None:
        batch = joined(self.gathered())
        fit_stand_ins_(self.model, self.config, run=self.run_layers, batch=batch, reduce=partial(summed, self))
