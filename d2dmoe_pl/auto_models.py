"""What the ``Auto`` classes of Hugging Face transformers make of a converted model's artifact."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import transformers

from d2dmoe_pl.auto_classes import MODEL_TYPE
from d2dmoe_pl.hub_folders import local_folder

# what a config says of a call, not of the model
OF_A_CALL = ("output_attentions", "output_hidden_states", "return_dict", "use_cache")
# what says where files come from
OF_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# what says how they are read, or is taken care of
OF_FILES = (
    *OF_HUB,
    *("adapter_kwargs", "code_revision", "commit_hash", "config", "dtype", "low_cpu_mem_usage", "proxies", "subfolder"),
    *("torch_dtype", "trust_remote_code", "use_safetensors", "weights_only", "_commit_hash", "_from_auto"),
)


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
            kwargs: ``dtype``, ``attn_implementation``, ``device_map`` of one device, what says where files are, such as
                ``revision``, ``token``, ``cache_dir`` and ``subfolder``, and what a config says of a call, such as
                ``output_attentions``, as transformers takes them.

        Raises:
            ValueError: If the model has another head than the ``Auto`` class asks for, or something is asked of it that
                a converted model cannot be loaded with, such as other labels, or weights that bitsandbytes makes.
        """
        load_model = resolve_name("d2dmoe_pl.artifact:load_model")  # all of it is imported for a model only
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        of_hub = {key: kwargs[key] for key in OF_HUB if kwargs.get(key) is not None}
        folder = local_folder(pretrained_model_name_or_path, **of_hub) / (kwargs.get("subfolder") or "")
        wanted = _wanted(folder, kwargs)
        attention, device = wanted.pop("attn_implementation", None), _device(wanted.pop("device_map", None))
        for key, value in wanted.items():
            if key not in OF_A_CALL:
                raise ValueError(f"{key}={value!r}: a converted model is loaded as it was saved; must be left out")
        model: Any = load_model(folder, dtype=None if dtype == "auto" else dtype)
        heads = cls.auto._model_mapping.get(type(model.config), ())
        is_bare = cls.auto.__name__ == "AutoModel"
        if is_bare:
            model = resolve_name("d2dmoe_pl.moe.base_model:without_head")(model)
        has_head = "For" in type(model).__name__  # as transformers names them; some have no part without it
        if not isinstance(model, heads) and (has_head or not is_bare):
            raise ValueError(f"{pretrained_model_name_or_path}: is a {type(model).__name__}, no {cls.auto.__name__}")
        if attention is not None:
            model.set_attn_implementation(attention)
        for key, value in wanted.items():
            setattr(model.config, key, value)
        return model if device is None else model.to(device)


def _wanted(folder: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the model beyond what is saved; transformers has put some of it into the config."""
    saved: Any = D2DMoEConfig.from_pretrained(folder)
    config = kwargs.get("config") or saved
    before = saved.to_dict()
    found = {key: value for key, value in config.to_dict().items() if before.get(key) != value and key[0] != "_"}
    found |= {key: value for key, value in kwargs.items() if value not in (None, "")}
    found.setdefault("attn_implementation", config._attn_implementation)
    return {key: value for key, value in found.items() if key not in OF_FILES}


def _device(device_map: Any) -> Any:
    """The one device of a ``device_map``, on which the whole model goes; None for where it is."""
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if isinstance(device_map, dict):
        if len(set(map(str, device_map.values()))) != 1:
            raise ValueError(f"device_map={device_map}: must be of one device")
        return next(iter(device_map.values()))
    return device_map


def register() -> None:
    """Make converted models known to transformers' ``Auto`` classes."""
    transformers.AutoConfig.register(MODEL_TYPE, D2DMoEConfig, exist_ok=True)
    for name in dir(transformers):
        if name == "AutoModel" or name.startswith("AutoModelFor"):
            auto = getattr(transformers, name)
            of_auto = type(f"D2DMoE{name}", (ConvertedModel,), {"auto": auto, "__doc__": ConvertedModel.__doc__})
            auto.register(D2DMoEConfig, of_auto, exist_ok=True)
