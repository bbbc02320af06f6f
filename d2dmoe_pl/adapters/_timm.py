"""What timm's Transformers for pictures share; each family's own file says what it is told by."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm import is_model, model_entrypoint
from timm.layers import GluMlp, Mlp, SwiGLU, get_act_layer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters._adapter import Adapter, check_of_library, module_at, place_meta_buffers_
from d2dmoe_pl.adapters._ffn import FFN, LinearRows
from d2dmoe_pl.adapters._timm_model import create_timm_model
from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing
from d2dmoe_pl.data.output_names import placeholders
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.hooks import hooked

FFN_CLASSES = (Mlp, GluMlp, SwiGLU)


class TimmAdapter(Adapter):
    """``mlp`` is replaced; what it had of dropout inside goes into the replacement, the rest of the block stays.

    Attributes:
        model_classes: The classes of the models.
        takes_activation: Whether timm makes a model with the activation that its ``act_layer`` names.
    """

    tasks = ("image-classification",)
    model_classes: ClassVar[tuple[type[nn.Module], ...]]
    takes_activation: ClassVar[bool] = True

    def matches(self, model: Any) -> bool:
        return isinstance(model, self.model_classes)

    def ffns(self, model: Any) -> list[FFN]:
        found: dict[str, Any] = {name: mlp for name, mlp in model.named_modules() if isinstance(mlp, FFN_CLASSES)}
        for name, mlp in found.items():
            check(
                isinstance(mlp.fc2, nn.Linear) and isinstance(mlp.norm, nn.Identity),
                f"{name}: an FFN of convolutions, or with a norm between its products, cannot be split into experts",
            )
        return [
            FFN(name, **_products(mlp), hidden_dropout=mlp.drop1, output_dropout=mlp.drop2)
            for name, mlp in found.items()
        ]

    def put_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        parent, attribute = module_at(model, ffn.name)
        setattr(parent, attribute, module)

    def set_activation_(self, model: Any, ffns: Sequence[FFN], name: str, is_all: bool) -> None:
        try:
            activation = get_act_layer(name)
        except KeyError:
            raise ConfigError(f"activation={name!r}: timm knows no such activation; allowed is e.g. relu") from None
        self._put_activation_(model, ffns, activation)
        if is_all:
            model.model_args = {**self._model_args(model), "act_layer": name}

    def _put_activation_(self, model: Any, ffns: Sequence[FFN], activation: Any) -> None:
        for ffn in ffns:
            model.get_submodule(ffn.name).act = activation()

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["pixel_values"])

    def logits_and_hidden_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        states: list[Tensor] = []

        def handles() -> Iterator[RemovableHandle]:
            yield model.blocks[0].register_forward_pre_hook(lambda block, args: states.append(args[0]))
            for block in model.blocks:
                yield block.register_forward_hook(lambda block, args, output: states.append(output))

        with hooked(handles()):
            logits = self.logits(model, batch)
        return logits, tuple(states)

    def random_inputs(self, model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(batch_size, *self.input_shape(model))}

    def input_shape(self, model: Any) -> tuple[int, int, int]:
        embedding = model.patch_embed
        height, width = embedding.img_size
        first = next(module for module in embedding.modules() if isinstance(module, nn.Conv2d))  # in hybrids, a stem's
        return first.in_channels, height, width

    def set_preprocessing_(self, model: Any, preprocessing: ImagePreprocessing) -> None:
        model.pretrained_cfg = {**model.pretrained_cfg, **preprocessing.pretrained_cfg()}

    def head(self, model: Any) -> Head:
        return "classification"

    def num_outputs(self, model: Any) -> int:
        return model.num_classes

    def label_names(self, model: Any) -> list[str] | None:
        return getattr(model, "label_names", None) or placeholders(model.num_classes)

    def config(self, model: Any) -> dict[str, Any]:
        check_of_library(model, self._is_made_by_timm(model))
        return self._described(model)

    @staticmethod
    def _is_made_by_timm(model: Any) -> bool:
        described, place = getattr(model, "pretrained_cfg", None), type(model).__module__
        if not isinstance(described, dict):
            return False
        name = described.get("architecture", "")
        # or by what has been registered with timm, where that is
        return place.startswith("timm.") or (is_model(name) and model_entrypoint(name).__module__ == place)

    def _described(self, model: Any) -> dict[str, Any]:
        preprocessing = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        described = {key: model.pretrained_cfg[key] for key in preprocessing if key in model.pretrained_cfg}
        return {
            "architecture": model.pretrained_cfg["architecture"],
            "num_classes": model.num_classes,
            "model_args": self._model_args(model),
            "label_names": getattr(model, "label_names", None),
            # a model may be made for another size than its architecture is described with
            "pretrained_cfg": {"input_size": list(self.input_shape(model)), **described},
        }

    def build(self, folder: Path) -> nn.Module:
        return self._create(json.loads((folder / "config.json").read_text()))

    def rebuild(self, model: Any) -> nn.Module:
        return self._create(self._described(model))

    def fill_buffers_(self, model: Any) -> None:
        module: Any
        for module in place_meta_buffers_(model):
            module.init_non_persistent_buffers()
            cast_as_weights_(model, module)

    def _create(self, config: dict[str, Any]) -> nn.Module:
        args = dict(config["model_args"])
        own = None if self.takes_activation else args.pop("act_layer", None)
        model: Any = create_timm_model(config["architecture"], config["num_classes"], args, config["label_names"])
        if own is not None:
            self._put_activation_(model, self.ffns(model), get_act_layer(own))
            model.model_args["act_layer"] = own  # timm refuses such a file, which it could only misread
        return model

    @staticmethod
    def _model_args(model: Any) -> dict[str, Any]:
        given = recorded_args(model)
        check(
            given is not None and _is_json(given),
            f"{type(model).__name__}: set model.model_args to the keyword arguments given to timm.create_model, in "
            "names and numbers (an empty dict if there were none), so that the model can be rebuilt",
        )
        return {name: value for name, value in (given or {}).items() if name != "num_classes"}


def cast_as_weights_(model: nn.Module, module: nn.Module) -> None:
    """Give the buffers of ``module`` that no file holds the type of its weights, as timm casts them with these."""
    weights = (*module.parameters(), *model.parameters())
    dtype = next(weight.dtype for weight in weights if weight.is_floating_point())
    computed = {id(module._buffers[name]) for name in module._non_persistent_buffers_set}
    module._apply(lambda tensor: tensor.to(dtype) if id(tensor) in computed and tensor.is_floating_point() else tensor)


def _products(mlp: Any) -> dict[str, Any]:
    """An FFN's linear maps and what comes between them, under their names in :class:`FFN`."""
    if isinstance(mlp, SwiGLU):
        return {"up": mlp.fc1_x, "gate_proj": mlp.fc1_g, "activation": mlp.act, "down": mlp.fc2}
    if isinstance(mlp, Mlp):
        return {"up": mlp.fc1, "activation": mlp.act, "down": mlp.fc2}
    half = mlp.fc1.out_features // 2
    halves = [LinearRows(mlp.fc1, slice(half)), LinearRows(mlp.fc1, slice(half, None))]
    gate, up = reversed(halves) if mlp.gate_last else halves
    return {"up": up, "gate_proj": gate, "activation": mlp.act, "down": mlp.fc2}


def recorded_args(model: Any) -> dict[str, Any] | None:
    """How a model was made: as is said, or as timm has recorded, which it does from 1.0.31 on; None if nobody did."""
    given: dict[str, Any] | None = getattr(model, "model_args", None)
    return getattr(model, "_model_args", None) if given is None else given


def _is_json(values: Any) -> bool:
    try:
        json.dumps(values)
    except TypeError:
        return False
    return True
