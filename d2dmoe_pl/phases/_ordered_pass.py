"""What phases share that train nothing and walk through the training split once, in order."""

import torch
from torch import Tensor

from d2dmoe_pl.phases._phase import Phase


class OrderedPass(Phase):
    """A phase that gathers statistics of the model at rest over ordered, unaugmented training samples, in one epoch.

    Attributes:
        seen: Samples that this process has been given so far; subclasses :meth:`advance` it.
    """

    seen: int = 0

    def setup(self, stage: str) -> None:
        self.automatic_optimization = False
        self.data.ordered = True
        self.trainer.fit_loop.max_epochs = 1

    def teardown(self, stage: str) -> None:
        self.data.ordered = False

    def configure_optimizers(self) -> None:
        """Nothing is trained."""

    def on_fit_start(self) -> None:
        self.model.eval()
        self.seen = 0

    @property
    def num_training_samples(self) -> int:
        return self.data.num_training_samples

    def sample_numbers(self, size: int) -> Tensor:
        """Which samples of the split the next ``size`` ones of this process are: ``(size,)`` int64, on the CPU.

        A distributed sampler deals samples out in turn, and repeats some at the end so that all processes get equally
        many; repeated ones have numbers from :attr:`num_training_samples` on.
        """
        return (self.seen + torch.arange(size)) * self.trainer.world_size + self.trainer.global_rank

    def advance(self, size: int) -> None:
        """Go on to the next batch, after one of ``size`` samples."""
        self.seen += size
