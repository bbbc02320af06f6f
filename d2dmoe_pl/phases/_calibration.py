"""What phases share that set something up from a small part of the data, at once, and train nothing."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases._ordered_pass import OrderedPass


class Calibration(OrderedPass):
    """A phase whose fit is one calculation, before which nothing and after which validation runs.

    It goes from a routed model to a routed one. Broken off, it begins anew.
    """

    starts_from: ClassVar[str] = "routed"
    ends_at: ClassVar[str] = "routed"

    @abstractmethod
    def calibrate_(self) -> None:
        """Set the model up; called on every process."""

    def curvature_loss(self, batch: Batch, number: int) -> Tensor:
        """What gradients are wanted of to tell what settings do, of the batch of a number, summed over predictions."""
        return self.task.weight(batch) * self.task.curvature_loss(self.logits(batch), batch, number)

    def transform_(self, model: nn.Module) -> None:
        layers = moe_layers(model)
        name = type(self).__name__
        check(bool(layers), f"{type(model).__name__}: has no MoE layer with a router; {name} needs some")
        for layer_name, layer in layers.items():
            check(
                layer.gate is not None, f"{layer_name}: has no gate; {name} needs a model as RouterRegression left it"
            )

    def on_train_start(self) -> None:
        self.model.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self.calibrate_()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._limit = self.trainer.limit_train_batches
        self.trainer.limit_train_batches = 1  # an epoch of none would have no validation at its end

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self.trainer.limit_train_batches = self._limit

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing to do."""
