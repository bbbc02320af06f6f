"""Any other model of timm: its FFNs are found by tracing."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._structural import StructuralAdapter
from d2dmoe_pl.adapters._timm import TimmAdapter, recorded_args


class AnyTimmAdapter(StructuralAdapter, TimmAdapter):
    """See :class:`StructuralAdapter`."""

    family = "any_timm"
    title = "any other of timm"
    takes_activation = False

    def matches(self, model: Any) -> bool:
        return type(model).__module__.startswith("timm.") and hasattr(model, "pretrained_cfg")

    def examples(self, model: Any) -> Sequence[Mapping[str, Tensor]]:
        return [self.random_inputs(model, size, 0) for size in (2, 3)]

    def input_shape(self, model: Any) -> tuple[int, int, int]:
        channels, *usual = model.pretrained_cfg["input_size"]
        own = getattr(getattr(model, "patch_embed", None), "img_size", None)
        args = recorded_args(model) or {}  # which are needed to save it, not to see it run
        size = args.get("img_size") or own or usual
        height, width = (size, size) if isinstance(size, int) else size
        return args.get("in_chans", channels), height, width

    def logits_and_hidden_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :meth:`Adapter.logits_and_hidden_states`; there are none."""
        return self.logits(model, batch), ()

    def _put_activation_(self, model: Any, ffns: Sequence[FFN], activation: Any) -> None:
        for ffn in ffns:
            self.put_activation_(model, ffn, activation())

    def fill_buffers_(self, model: Any) -> None:
        made: Any = None
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:  # not every architecture has a way of its own to compute them
                made = self.rebuild(model) if made is None else made
                parent, _, attribute = name.rpartition(".")
                module: nn.Module = model.get_submodule(parent)
                module._buffers[attribute] = torch.empty_like(buffer, device="cpu").copy_(made.get_buffer(name))


ADAPTER = AnyTimmAdapter()
