"""Any other Hugging Face Transformer: its FFNs are found by tracing."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from d2dmoe_pl.adapters._adapter import MASK, NO_MASK, TaskName
from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._ffn_sites import Site
from d2dmoe_pl.adapters._ffn_tracing import Trace
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter, text_config
from d2dmoe_pl.adapters._padding_read import reads_padding
from d2dmoe_pl.adapters._structural import LENGTH, StructuralAdapter, fitting
from d2dmoe_pl.errors import check

# what configs call the activation of FFNs
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation", "act_fn", "dense_act_fn")
READS_PADDING = "d2dmoe_reads_padding"  # in a model's config, once it has experts, and attribute of one that has not
TRACEABLE = ("eager", "sdpa")  # implementations of attention; others' operators may say nothing of what they do
ANY_SIZE = 224  # pixels, of models that take pictures of any


class AnyTransformerAdapter(StructuralAdapter, HuggingFaceAdapter):
    """See :class:`StructuralAdapter`. Of texts it gives a model what its ``forward`` takes.

    Attributes:
        kinds: What models may take first, and what that is.
    """

    family = "any_transformer"
    title = "any other of Hugging Face"
    tasks: ClassVar[tuple[TaskName, ...]] = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
        "masked-language-modeling",
        "embeddings",
        "image-classification",
    )
    kinds: ClassVar[Mapping[str, str]] = {"input_ids": "texts", "pixel_values": "pictures"}
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", MASK, "token_type_ids", "pixel_values")
    takes_other_positions = True

    def matches(self, model: Any) -> bool:
        is_of_recordings = getattr(model, "main_input_name", None) == "input_values"  # there is one for these
        return (
            isinstance(model, transformers.PreTrainedModel)
            and not model.config.is_encoder_decoder
            and not is_of_recordings
        )

    def examples(self, model: Any) -> Sequence[Mapping[str, Tensor]]:
        check(
            model.main_input_name in self.kinds,
            f"{type(model).__name__}: no adapter knows it, and it takes {model.main_input_name}; what is taken of "
            f"others are {' and '.join(self.kinds.values())}",
        )
        return [self.example(model, *shape) for shape in ((2, LENGTH), (3, LENGTH - 1))]

    def example(self, model: Any, size: int, length: int) -> Mapping[str, Tensor]:
        """A batch of noise, ``size`` texts or pictures."""
        return self.random_inputs(model, size, length)

    def masked(self, model: Any, texts: Mapping[str, Tensor], mask: Tensor) -> Mapping[str, Tensor]:
        """Texts as of :meth:`example`, of which ``mask``, ``(B, L)``, says what is no padding."""
        return {**texts, MASK: mask}

    def backbone_config(self, config: Any) -> Any:
        return config if hasattr(config, "image_size") else getattr(config, "vision_config", config)

    def input_shape(self, model: Any) -> tuple[int, int, int] | None:
        config = self.backbone_config(model.config)
        if model.main_input_name != "pixel_values" or hasattr(config, "image_size"):
            return super().input_shape(model)
        of_timm = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
        return tuple(of_timm) if of_timm else (getattr(config, "num_channels", 3), ANY_SIZE, ANY_SIZE)

    def streams(self, model: Any) -> Mapping[str, str]:
        """See :meth:`Adapter.streams`; where padding is read as text, nothing is told to be padding."""
        masks = self.masks(model)
        is_taken = any(name in inspect.signature(model.forward).parameters for name in masks.values())
        return masks if is_taken and not self.reads_padding(model) else dict.fromkeys(masks, NO_MASK)

    def masks(self, model: Any) -> Mapping[str, str]:
        """What :meth:`streams` gives where padding is not read."""
        return {"": MASK}

    def reads_padding(self, model: Any) -> bool:
        """Whether padding changes what comes of a text, so that experts must run for it as the dense FFN did."""
        known = getattr(model.config, READS_PADDING, None)  # what has experts cannot be asked
        known = model.__dict__.get(READS_PADDING) if known is None else known
        if known is None and not any(parameter.is_meta for parameter in model.parameters()):
            model.__dict__[READS_PADDING] = False  # what finds it out asks for the FFNs again
            try:
                known = self._is_padding_read(model)
            finally:
                model.__dict__[READS_PADDING] = known
        return bool(known)

    def _sites(self, model: Any) -> list[Site]:
        sites = super()._sites(model)
        self.reads_padding(model)  # now, and not within a call that somebody watches, since it takes calls to know
        return sites

    def _trace_as(self, twin: Any, names: Iterable[str]) -> Trace:
        own = twin.config._attn_implementation
        if own in TRACEABLE:
            return super()._trace_as(twin, names)
        twin.set_attn_implementation(TRACEABLE[0])  # FFNs are the same, however attention is computed
        try:
            return super()._trace_as(twin, names)
        finally:
            twin.set_attn_implementation(own)

    def _is_padding_read(self, model: Any) -> bool:
        sites = self._sites(model)
        has_mask = self.input_shape(model) is None and MASK in inspect.signature(model.forward).parameters
        if not has_mask or len(self.ffns(model)) < len(sites):
            return False
        texts = fitting(self.examples(model)[0], model)
        say = resolve_name("d2dmoe_pl.notices:notice")  # which brings Lightning, for what is said seldom
        seen, given = tuple(sites[0].shape[:-1]), tuple(texts["input_ids"].shape)
        if self.takes_other_positions and seen != given:
            say(
                f"{type(model).__name__}: gives its FFNs other positions than a text has, {seen} for {given}, so that "
                "padding is routed, run and counted as text is."
            )
            return True
        is_read = reads_padding(self, model, sites, texts, torch.ones_like(texts["input_ids"]), self.masks(model))
        if is_read:
            say(
                f"{type(model).__name__}: reads padding as text, whatever its attention_mask says, so that padding is "
                "routed, run and counted as text is."
            )
        return is_read

    def put_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        if self.reads_padding(model):
            setattr(model.config, READS_PADDING, True)
        super().put_(model, ffn, module)

    def _record_activation_(self, config: Any, name: str) -> None:
        parts = [
            config,
            *(value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig)),
        ]
        for part in parts:
            for key in ACTIVATION_KEYS:
                if isinstance(getattr(part, key, None), str):
                    setattr(part, key, name)
            if isinstance(getattr(part, "feed_forward_proj", None), str):
                part.feed_forward_proj = f"gated-{name}" if part.is_gated_act else name

    def put_activation_(self, model: Any, ffn: Any, activation: nn.Module) -> None:
        StructuralAdapter.put_activation_(self, model, ffn, activation)

    def _call(self, model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
        taken = inspect.signature(model.forward).parameters
        given = {key: value for key, value in batch.items() if key in taken}
        mask, pad = given.get(MASK), getattr(text_config(model.config), "pad_token_id", None)
        if getattr(model.config, "type_vocab_size", 2) < 2:
            given.pop("token_type_ids", None)
        if mask is not None and pad is not None and "input_ids" in given:
            # by padding's id some find the last token, or count positions
            given["input_ids"] = torch.where(mask == 0, pad, given["input_ids"])
        if "use_cache" in taken:
            kwargs["use_cache"] = False
        return super()._call(model, given, **kwargs)


ADAPTER = AnyTransformerAdapter()
