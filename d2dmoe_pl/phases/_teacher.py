"""A model to learn from."""

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.data.task import Batch


class Teacher:
    """A model that runs without gradients, in evaluation mode, and is no part of the module that holds it.

    Being no module itself, it is neither among that module's parameters nor in its checkpoints, and is not moved along.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """As :meth:`d2dmoe_pl.adapters.Adapter.logits`."""
        return adapter_for(self.model).logits(self.model, batch)

    @torch.no_grad()
    def logits_and_hidden_states(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As :meth:`d2dmoe_pl.adapters.Adapter.logits_and_hidden_states`."""
        return adapter_for(self.model).logits_and_hidden_states(self.model, batch)
