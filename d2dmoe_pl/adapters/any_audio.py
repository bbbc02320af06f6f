"""Any other Hugging Face model of recordings, such as Wav2Vec2, HuBERT or AST: its FFNs are found by tracing."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from d2dmoe_pl.adapters._adapter import MASK, NO_MASK
from d2dmoe_pl.adapters._of_recordings import OfRecordings
from d2dmoe_pl.adapters.any_transformer import AnyTransformerAdapter
from d2dmoe_pl.errors import check

RECORDED = "recorded"  # in a batch, (B, samples): 1 where a recording is, 0 where it is filled up


class AnyAudioAdapter(OfRecordings, AnyTransformerAdapter):
    """See :class:`AnyTransformerAdapter`. Takes waves, ``(B, samples)``, or spectrograms, ``(B, frames, bins)``.

    What fills a recording up is routed, run and counted as sound is.
    """

    family = "any_audio"
    title = "any other of Hugging Face (recordings)"
    tasks = ("audio-classification",)
    kinds: ClassVar[Mapping[str, str]] = {"input_values": "recordings"}
    inputs = ("input_values",)

    def matches(self, model: Any) -> bool:
        return isinstance(model, transformers.PreTrainedModel) and model.main_input_name == "input_values"

    def masks(self, model: Any) -> Mapping[str, str]:
        return {"": NO_MASK}

    def reads_padding(self, model: Any) -> bool:
        """False: there is none to be told."""
        return False

    def random_inputs(self, model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
        config = model.config
        shape: tuple[int, ...]
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
            shape = (config.max_length, config.num_mel_bins)
        else:
            check(
                hasattr(config, "conv_kernel") and hasattr(config, "conv_stride"),
                f"{type(model).__name__}: no adapter knows it, and its config has neither num_mel_bins and max_length "
                "nor conv_kernel and conv_stride, which say what recordings it takes",
            )
            samples = length  # of what the last convolution gives, back to the waves
            for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
                samples = (samples - 1) * stride + kernel
            shape = (samples,)
        return {"input_values": torch.randn(batch_size, *shape)}

    def _call(self, model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
        mask = {MASK: batch[RECORDED]} if RECORDED in batch else {}
        return super()._call(model, batch, **mask, **kwargs)


ADAPTER = AnyAudioAdapter()
