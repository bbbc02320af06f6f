"""A phase of ours: stand-ins for the experts that tokens skip, fitted in closed form. Trains nothing."""

from collections.abc import Sequence
from functools import partial

from torch import nn

from d2dmoe_pl.data.epoch_order import check_shares
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import first_given, hooked
from d2dmoe_pl.moe.conversion import add_stand_ins_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.stand_ins.fitting import FittingConfig, fit_stand_ins_, joined
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig
from d2dmoe_pl.phases._calibration import Calibration
from d2dmoe_pl.phases._held_out import moved, summed

TAUS = [0.2, 0.5, 0.7, 0.85]


class StandInFitting(Calibration):
    """Give each MoE layer a map of low rank that predicts what a token's skipped experts would have given.

    It is scaled by the share of predicted norms that is skipped, so that it fades as ``tau`` grows, and with every
    expert on the model stays the dense one. Fitted by least squares on training samples, one layer after the other, in
    one pass.

    Args:
        rank: Of each map; 16 costs 1% of an FFN of 384 x 1,536. 0 takes stand-ins away.
        num_tokens: Of training samples, without padding; so many, or some more, are gathered over all processes.
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
        super().__init__(init_from)
        self.config = FittingConfig(rank, tuple(taus), ridge)
        check(num_tokens > 0, f"num_tokens={num_tokens}: must be positive")
        self.num_tokens = num_tokens
        self._tokens_a_sample: int | None = None

    def transform_(self, model: nn.Module) -> None:
        super().transform_(model)
        add_stand_ins_(model, StandInConfig(self.config.rank))

    def on_fit_start(self) -> None:
        check_shares(self.num_training_samples, "train")
        super().on_fit_start()

    def calibrate_(self) -> None:
        batch = moved(self, joined(self._gathered()))
        fit_stand_ins_(self.model, self.config, run=self.run_layers, batch=batch, reduce=partial(summed, self))

    def _gathered(self) -> Sequence[Batch]:
        """This process's batches with its share of the tokens."""
        batches: list[Batch] = []
        tokens = 0
        with self.data.in_order():
            for batch in self.data.drawn_loader("train") or self.data.training_loader():
                batches.append(batch)
                tokens += self._num_tokens(batch)
                if tokens * self.trainer.world_size >= self.num_tokens:
                    break
        return batches

    def _num_tokens(self, batch: Batch) -> int:
        """Tokens of a batch, padding out; of pictures, by running one."""
        mask = batch.get("attention_mask")
        if mask is not None:
            return int(mask.sum())
        if self._tokens_a_sample is None:
            seen: list[int] = []
            layer = next(iter(moe_layers(self.model).values()))

            def see(layer: nn.Module, args: tuple, kwargs: dict) -> None:
                seen.append(first_given(args, kwargs).shape[:-1].numel())

            with hooked([layer.register_forward_pre_hook(see, with_kwargs=True)]):
                self.run_layers(moved(self, {key: value[:1] for key, value in batch.items()}))
            self._tokens_a_sample = seen[0]
        return self._tokens_a_sample * len(batch["labels"])
