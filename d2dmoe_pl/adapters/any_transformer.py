"""Any other Hugging Face Transformer: its FFNs are found by tracing."""

import inspect
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from d2dmoe_pl.adapters._adapter import MASK, TaskName
from d2dmoe_pl.adapters._ffn_sites import Site
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter, text_config
from d2dmoe_pl.adapters._structural import LENGTH, StructuralAdapter
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.hooks import hooked

# what configs call the activation of FFNs
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation", "act_fn", "dense_act_fn")
ANY_SIZE = 224  # pixels, of models that take pictures of any


class AnyTransformerAdapter(StructuralAdapter, HuggingFaceAdapter):
    """See :class:`StructuralAdapter`. Of texts it gives a model what its ``forward`` takes."""

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
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", MASK, "token_type_ids", "pixel_values")

    def matches(self, model: Any) -> bool:
        return isinstance(model, transformers.PreTrainedModel) and not model.config.is_encoder_decoder

    def examples(self, model: Any) -> Sequence[Mapping[str, Tensor]]:
        if model.main_input_name not in ("input_ids", "pixel_values"):
            raise ConfigError(
                f"{type(model).__name__}: no adapter knows it, and it takes {model.main_input_name}; what is taken of "
                "others are texts and pictures"
            )
        return [self.example(model, *shape) for shape in ((2, LENGTH), (3, LENGTH - 1))]

    def example(self, model: Any, size: int, length: int) -> Mapping[str, Tensor]:
        """A batch of noise, ``size`` texts or pictures."""
        return self.random_inputs(model, size, length)

    def backbone_config(self, config: Any) -> Any:
        return config if hasattr(config, "image_size") else getattr(config, "vision_config", config)

    def input_shape(self, model: Any) -> tuple[int, int, int] | None:
        config = self.backbone_config(model.config)
        if model.main_input_name != "pixel_values" or hasattr(config, "image_size"):
            return super().input_shape(model)
        return getattr(config, "num_channels", 3), ANY_SIZE, ANY_SIZE

    def _prove(self, model: Any, sites: Sequence[Site], examples: Sequence[Mapping[str, Tensor]]) -> None:
        super()._prove(model, sites, examples)
        inputs = examples[0]
        takes_mask = MASK in inspect.signature(model.forward).parameters
        if self.input_shape(model) is None and takes_mask and not model.config.is_encoder_decoder:
            ids = inputs["input_ids"].to(next(model.parameters()).device)
            mask = torch.ones_like(ids)
            mask[:, : LENGTH // 2] = 0
            if self._reads_padding(model, sites, {**inputs, "input_ids": ids, MASK: mask}):
                say = resolve_name("d2dmoe_pl.notices:notice")  # which brings Lightning, for what is said seldom
                say(f"{type(model).__name__}: reads padding before a text as text, and experts give none; pad behind.")

    @torch.no_grad()
    def _reads_padding(self, model: Any, sites: Sequence[Site], batch: Mapping[str, Tensor]) -> bool:
        """Whether what FFNs give for the padding of ``batch``, before its texts, reaches the last token's logits."""

        def silence(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * batch[MASK].view(*output.shape[:-1], 1)

        modules = dict(model.named_modules())
        ends = [modules[site.name if site.form == "module" else site.down] for site in sites]
        expected = self.traced_logits(model, batch)
        if expected.dim() < 3:  # of the first token
            return False
        with hooked(module.register_forward_hook(silence) for module in ends):
            got = self.traced_logits(model, batch)
        off = (got - expected).select(self._token_dim(expected), -1).abs().max()
        return bool(off > 1e-2 * expected.abs().max())

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
