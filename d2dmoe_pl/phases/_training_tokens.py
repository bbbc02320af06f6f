"""What phases share that set something up from some training tokens, looked at in one pass."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from d2dmoe_pl.data.epoch_order import check_shares
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import first_given, hooked
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases._calibration import Calibration
from d2dmoe_pl.phases._held_out import moved


class TrainingTokens(Calibration):
    """A calibration on training samples, as many as have so many tokens.

    Args:
        num_tokens: Without padding; so many, or some more, are gathered over all processes.
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.

    Raises:
        ConfigError: If the number is not positive.
    """

    def __init__(self, num_tokens: int, init_from: str | None) -> None:
        super().__init__(init_from)
        check(num_tokens > 0, f"num_tokens={num_tokens}: must be positive")
        self.num_tokens = num_tokens
        self._tokens_a_sample: int | None = None

    def on_fit_start(self) -> None:
        check_shares(self.num_training_samples, "train")
        super().on_fit_start()

    def gathered(self) -> Sequence[Mapping[str, Tensor]]:
        """This process's batches with its share of the tokens, where the model is."""
        batches: list[Mapping[str, Tensor]] = []
        tokens = 0
        with self.data.in_order():
            for batch in self.data.drawn_loader("train") or self.data.training_loader():
                batches.append(moved(self, batch))
                tokens += self._num_tokens(batches[-1])
                if tokens * self.trainer.world_size >= self.num_tokens:
                    break
        return batches

    def _num_tokens(self, batch: Mapping[str, Tensor]) -> int:
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
                self.run_layers({key: value[:1] for key, value in batch.items()})
            self._tokens_a_sample = seen[0]
        return self._tokens_a_sample * len(batch["labels"])
