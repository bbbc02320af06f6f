"""What Hugging Face families of causal Transformers share."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter
from d2dmoe_pl.data.head import Head
from d2dmoe_pl.errors import check


class CausalAdapter(HuggingFaceAdapter):
    """Each token sees those before it; a head for whole texts reads the last token, which it finds by padding's id."""

    # no token_type_ids: what these models make of them, if anything, is not what tokenizers mean by them
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def head(self, model: Any) -> Head:
        head = super().head(model)
        check(
            head not in ("classification", "regression") or model.config.pad_token_id is not None,
            f"pad_token_id=None in the config of {type(model).__name__}: must be set, a {head} head finds the last "
            "token by it",
        )
        return head

    def _call(self, model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
        mask = batch.get("attention_mask")
        if mask is not None and model.config.pad_token_id is not None:
            # whatever id the tokenizer pads with
            ids = batch["input_ids"].masked_fill(mask == 0, model.config.pad_token_id)
            batch = {**batch, "input_ids": ids}
        return super()._call(model, batch, use_cache=False, **kwargs)


class DecoderAdapter(CausalAdapter, FFNModuleAdapter):
    """See :class:`CausalAdapter` and :class:`FFNModuleAdapter`."""
