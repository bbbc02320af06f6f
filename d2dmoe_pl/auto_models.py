"""What the ``Auto`` classes of Hugging Face transformers make of a converted model's artifact."""

from pkgutil import resolve_name
from typing import Any

import transformers

from d2dmoe_pl.auto_classes import MODEL_TYPE


class D2DMoEConfig(transformers.PreTrainedConfig):
    """The config of a converted model; what it says is for :func:`d2dmoe_pl.load_model`."""

    model_type = MODEL_TYPE


class ConvertedModel:
    """What one of transformers' ``Auto`` classes makes of the artifact of a converted model: the model itself.

    Attributes:
        auto: The class of transformers.
        config_class: By which it knows converted models.
    """

    auto: Any
    config_class = D2DMoEConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> Any:
        """The model in a folder or on the hub, as :func:`d2dmoe_pl.load_model` gives it.

        Args:
            pretrained_model_name_or_path: The folder, or a name on the hub.
            kwargs: ``dtype`` and ``revision``, as transformers takes them; others make no difference.

        Raises:
            ValueError: If the model has another head than the ``Auto`` class asks for.
        """
        load_model = resolve_name("d2dmoe_pl.artifact:load_model")  # all of it is imported for a model only
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        model: Any = load_model(
            pretrained_model_name_or_path,
            revision=kwargs.get("revision"),
            dtype=None if dtype == "auto" else dtype,
        )
        heads = cls.auto._model_mapping.get(type(model.config), ())
        if cls.auto.__name__ == "AutoModel":
            model = resolve_name("d2dmoe_pl.moe.base_model:without_head")(model)
        elif not isinstance(model, heads):
            raise ValueError(f"{pretrained_model_name_or_path}: is a {type(model).__name__}, no {cls.auto.__name__}")
        return model


def register() -> None:
    """Make converted models known to transformers' ``Auto`` classes."""
    transformers.AutoConfig.register(MODEL_TYPE, D2DMoEConfig, exist_ok=True)
    for name in dir(transformers):
        if name == "AutoModel" or name.startswith("AutoModelFor"):
            auto = getattr(transformers, name)
            of_auto = type(f"D2DMoE{name}", (ConvertedModel,), {"auto": auto, "__doc__": ConvertedModel.__doc__})
            auto.register(D2DMoEConfig, of_auto, exist_ok=True)
