"""timm Vision Transformers as the start of a run."""

import difflib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg, load_checkpoint, load_state_dict
from torch import nn

from d2dmoe_pl.adapters._adapter import ModelSource
from d2dmoe_pl.data.output_names import placeholders
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.free_memory import check_fits

# of timm.create_model, what says where weights or the description of another model come from
ELSEWHERE = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def create_timm_model(
    architecture: str, num_classes: int, model_args: dict[str, Any], label_names: Sequence[str] | None, **kwargs: Any
) -> nn.Module:
    """A timm model that remembers how it was made: ``model_args`` and ``label_names`` are its attributes.

    Raises:
        ConfigError: Unless ``architecture`` is one of timm's own, and ``model_args`` say what it is like, and no more.
    """
    check(timm.is_model(architecture), f"architecture={architecture!r}: timm has no such model")
    others = sorted(set(ELSEWHERE) & model_args.keys())
    check(not others, f"model_args={', '.join(others)}: allowed is only what the model is like, not where it is from")
    model: Any = timm.create_model(architecture, num_classes=num_classes, **model_args, **kwargs)
    model.model_args = dict(model_args)
    model.label_names = None if label_names is None else list(label_names)
    return model


class TimmModel(ModelSource):
    """A timm model, pretrained or from scratch. Arguments left out keep the architecture's own value.

    Args:
        architecture: As in ``timm.list_models()``, e.g. ``vit_base_patch16_224`` or ``deit_small_patch16_224``.
        pretrained: Download the architecture's pretrained weights.
        checkpoint_path: Local file with pretrained weights. A head for another number of classes is left out of it, and
            initialised anew, which ``FineTuning`` trains.
        label_names: What the outputs of the pretrained model stand for, by index, for phases that keep its head.
        img_size: Height and width of the input, pixels.
        patch_size: Height and width of a patch, pixels.
        in_chans: Channels of the input.
        embed_dim: ``d_model``.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: ``d_ff / d_model``.
        drop_path_rate: Stochastic depth.
        proj_drop_rate: Dropout after projections and inside FFNs.

    Raises:
        ConfigError: If timm has no such architecture, or ``pretrained`` is given with ``checkpoint_path``; to build, if
            the file cannot be read, or has not the weights of the model, or the model is larger than the memory that
            is free.
    """

    def __init__(
        self,
        architecture: str,
        pretrained: bool = False,
        checkpoint_path: str = "",
        img_size: int | None = None,
        patch_size: int | None = None,
        in_chans: int | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        drop_path_rate: float | None = None,
        proj_drop_rate: float | None = None,
        label_names: list[str] | None = None,
    ) -> None:
        if not timm.is_model(architecture):
            near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), cutoff=0.1))
            raise ConfigError(f"architecture={architecture!r}: timm has no such model; allowed are e.g. {near}")
        check(
            not (pretrained and checkpoint_path),
            f"checkpoint_path={checkpoint_path!r}: allowed only without pretrained, since both say where the weights "
            "come from",
        )
        self.label_names = label_names
        self.architecture = architecture
        self.pretrained = pretrained
        self.checkpoint_path = checkpoint_path
        given = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "drop_path_rate": drop_path_rate,
            "proj_drop_rate": proj_drop_rate,
        }
        self.model_args = {key: value for key, value in given.items() if value is not None}

    def output_names(self) -> list[str] | None:
        if not (self.pretrained or self.checkpoint_path):
            return None
        return self.label_names or placeholders(self._num_pretrained_classes())

    def build(self, label_names: Sequence[str]) -> nn.Module:
        check_fits(self.build_structure(label_names), f"architecture={self.architecture!r}")
        model: Any = create_timm_model(
            self.architecture, len(label_names), self.model_args, label_names, pretrained=self.pretrained
        )
        if self.checkpoint_path:
            self.new_head = load_checkpoint_(model, self.checkpoint_path)
        elif self.pretrained and self._num_pretrained_classes() != len(label_names):  # timm has left it out
            self.new_head = f"{model.pretrained_cfg['classifier']}.weight"
        return model

    def _num_pretrained_classes(self) -> int:
        described: Any = get_pretrained_cfg(self.architecture)
        if not self.checkpoint_path or _is_numpy(self.checkpoint_path):
            return described.num_classes
        return len(_read_checkpoint(self.checkpoint_path).get(f"{_heads(described.classifier)[0]}.bias", ()))

    def build_structure(self, label_names: Sequence[str]) -> nn.Module:
        with torch.device("meta"):
            return create_timm_model(self.architecture, len(label_names), self.model_args, label_names)


def load_checkpoint_(model: Any, path: str) -> str | None:
    """Give a timm model the weights in a file, all but those of a head for another number of classes.

    Args:
        model: The model.
        path: As ``timm.models.load_checkpoint`` takes it.

    Returns:
        Names of the parameters of a head that is left out; None if there is none.

    Raises:
        ConfigError: If the file cannot be read, or its weights are not the model's.
    """
    check(Path(path).is_file(), f"checkpoint_path={path!r}: no such file")
    if _is_numpy(path):  # Google's own files, which timm reads in a way of its own
        load_checkpoint(model, path)
        return None
    read = _read_checkpoint(path)
    adapt = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)  # each architecture's own
    adapted = read if adapt is None else adapt(read, model)
    own = model.state_dict()
    heads = _heads(model.pretrained_cfg["classifier"])
    fitting = {name: value for name, value in adapted.items() if name in own and value.shape == own[name].shape}
    absent = sorted(own.keys() - fitting.keys())
    backbone = [name for name in absent if name.rpartition(".")[0] not in heads]
    check(
        not backbone,
        f"checkpoint_path={path!r}: has no weights that fit for {len(backbone)} of the {len(own)} tensors of "
        f"{type(model).__name__}, e.g. {backbone[0] if backbone else ''}; they would be random",
    )
    model.load_state_dict(fitting, strict=False)
    return ", ".join(absent) or None


def _heads(classifier: str | tuple[str, ...]) -> tuple[str, ...]:
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _is_numpy(path: str) -> bool:
    return path.lower().endswith((".npz", ".npy"))


def _read_checkpoint(path: str) -> dict[str, Any]:
    check(Path(path).is_file(), f"checkpoint_path={path!r}: no such file")
    try:
        return load_state_dict(path)
    except (OSError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"checkpoint_path={path!r}: cannot be read: {reason}") from error
