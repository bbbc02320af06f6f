"""The recipe for a model and data that are known by what people call them."""

import json
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse import ArgumentParser, Namespace
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor

from d2dmoe_pl import data as data_classes
from d2dmoe_pl.adapters import HEADS, KEY, HuggingFaceModel, ModelSource, TimmModel
from d2dmoe_pl.artifact import CONFIG, build_structure, read_artifact
from d2dmoe_pl.chain import default_recipe
from d2dmoe_pl.compress_arguments import compress_parser
from d2dmoe_pl.compression.chosen_recipe import Sizes, chosen_phases, sizes_of
from d2dmoe_pl.compression.language_recipe import language_phases, language_trainer
from d2dmoe_pl.compression.own_data import data_config
from d2dmoe_pl.compression.target import Target
from d2dmoe_pl.data.gguf_files import ENDING, folder_and_file
from d2dmoe_pl.data.head import LABELLED_HEADS, VOCABULARY_HEADS, Head
from d2dmoe_pl.data.language_modeling.language_modeling import LanguageModeling
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.output_names import are_placeholders, places
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.errors import ConfigError, check, some_of
from d2dmoe_pl.parser_line import parser_line
from d2dmoe_pl.phases._labels import unlike
from d2dmoe_pl.phases._slow_types import bfloat16_slowdown
from d2dmoe_pl.phases.budget_calibration import check_enough
from d2dmoe_pl.recipe import read_recipe

# options that say what is read of files
OF_FILES = ("text_columns", "label_column", "image_column", "audio_column", "tokenizer")
FASTER = 0.8  # of float32's time, at which what is around products does not eat up what bfloat16 saves
PROCESSORS = {"image-classification": AutoImageProcessor, "audio-classification": AutoFeatureExtractor}


def recipe_for(given: Namespace, target: Target) -> dict[str, Any]:
    """The recipe that is run.

    Raises:
        ConfigError: As :func:`compress`.
    """
    if given.model is None and given.data is None:
        _check_unread(given, ("task", *OF_FILES), "neither model nor data is given")
        return read_recipe(default_recipe()) | {"seed": given.seed}
    check(given.model is not None, "model=None: must be given with data")
    check(given.data is not None, "data=None: must be given with model")
    is_timm = not Path(given.model).exists() and timm.is_model(given.model.removeprefix("timm/"))
    if not is_timm and not _is_artifact(given.model):  # else it would be missed as the data's tokenizer or processor
        load_pretrained(AutoConfig, given.model, "model")
    own, task = _data(given, None if is_timm else given.model)
    if isinstance(given.data, str) and own["init_args"].get("processor") == given.model:  # nobody has named a processor
        load_pretrained(PROCESSORS[task], given.model, "model")
    source, start = _start(given.model, task, is_timm)
    loaded = _loaded(own)
    if source is None:
        structure, outputs = build_structure(read_artifact(given.model, "model")), None
    else:
        structure = source.build_structure(loaded.class_names)
        outputs = source.output_names() if loaded.head in LABELLED_HEADS else None
    known = () if outputs is None else outputs
    is_other = outputs is not None and places(loaded.class_names, outputs) is None
    lacks_head = _lacks_head(source, loaded.head, outputs or loaded.class_names)
    needs_head = is_other or lacks_head
    if given.effort == "minutes" and needs_head:
        is_unnamed = is_other and not lacks_head and are_placeholders(known) and len(known) == len(loaded.class_names)
        check(not is_unnamed, unlike(loaded.class_names, known, "id2label or label_names in its config.json say it"))
        learnt = () if lacks_head else known
        unknown = [name for name in loaded.class_names if places([name], learnt) is None] or loaded.class_names
        has = "" if not learnt or not is_other or are_placeholders(learnt) else f" (but for {some_of(learnt, 5)})"
        told = "" if given.task else f"; task={task!r} is what the columns tell, and can be given"
        raise ConfigError(
            f"effort='minutes': {given.model} has no head for {some_of(unknown, 5)}{has}, and minutes trains none; "
            f"must be hours, or a model that has been trained on these labels{told}"
        )
    writes = task == "causal-language-modeling" and target.kind != "speed"  # by the clock of batches that are read
    sizes = sizes_of(structure, is_narrow=writes)
    _check_reachable(target, sizes)
    if loaded.head not in (*VOCABULARY_HEADS, "token-classification"):  # whose samples are many predictions each
        check_enough(loaded.num_validation_samples, sizes.num_layers, "data")
    samples, batch_size = loaded.num_training_samples, loaded.batch_size
    if isinstance(loaded, LanguageModeling):
        phases = language_phases(sizes, start, given.effort, writes, loaded.length, samples, batch_size)
    else:
        phases = chosen_phases(sizes, start, given.effort, needs_head, task, samples)
    logged_every = min(50, max(1, loaded.num_training_samples // loaded.batch_size))  # once an epoch at least
    trainer: dict[str, Any] = {"log_every_n_steps": logged_every, "enable_model_summary": False}
    if isinstance(loaded, LanguageModeling):
        trainer |= language_trainer(batch_size)
    if torch.cuda.is_available() or bfloat16_slowdown() < FASTER:
        trainer["precision"] = "bf16-mixed"
    return {"seed": given.seed, "shared": {"data": own, "trainer": trainer}, "phases": phases}


def _data(given: Namespace, place: str | None) -> tuple[dict[str, Any], str]:
    if not isinstance(given.data, str):
        check(given.task is not None, "task=None: must be given with data that is no name")
        check("class_path" in given.data, f"data={given.data!r}: must say its class_path, as a recipe does")
        check(given.task in HEADS, f"task={given.task!r}: allowed are {', '.join(HEADS)}")
        _check_unread(given, OF_FILES, "data says its own, in its init_args")
        return dict(given.data), given.task
    columns = {name: given[name] for name in ("text_columns", "label_column", "image_column", "audio_column")}
    picture: dict[str, Any] = {}
    if place is None:
        described: Any = timm.models.get_pretrained_cfg(given.model.removeprefix("timm/"))
        found = timm.data.resolve_data_config({}, pretrained_cfg=described.to_dict())
        picture = {name: list(found[name]) for name in ("mean", "std")}
        picture |= {"image_size": found["input_size"][-1], "crop_pct": found["crop_pct"]}
        picture |= {"interpolation": found["interpolation"], "keeps_ratio": found["crop_mode"] != "squash"}
    return data_config(given.data, given.task, place, given.tokenizer, columns, picture, given.batch_size)


def _check_unread(given: Namespace, options: Sequence[str], reason: str) -> None:
    """Raise ``ConfigError`` for one of ``options`` that is given where nothing would read it."""
    usual = compress_parser().get_defaults()
    for name in options:
        check(given[name] == usual[name], f"{name}={given[name]!r}: must be left out, since {reason}")


def _start(model: str, task: str, is_timm: bool) -> tuple[ModelSource | None, dict[str, Any]]:
    """The source of a model, None for an artifact; and what its first phase says of it."""
    if is_timm:
        arguments: dict[str, Any] = {"architecture": model.removeprefix("timm/"), "pretrained": True}
        return TimmModel(**arguments), {"source": {"class_path": "TimmModel", "init_args": arguments}}
    if _is_artifact(model):
        stage = read_artifact(model, "model").stage
        check(stage == "dense", f"model={model!r}: is at stage {stage!r}; must be a dense model")
        return None, {"init_from": model}
    folder, file = folder_and_file(model) if model.endswith(ENDING) else (model, None)
    named: dict[str, Any] = {"task": task, "name": folder} | ({} if file is None else {"gguf_file": file})
    return HuggingFaceModel(**named), {"source": {"class_path": "HuggingFaceModel", "init_args": named}}


def _is_artifact(model: str) -> bool:
    config = Path(model) / CONFIG
    return config.is_file() and KEY in json.loads(config.read_text())


def _lacks_head(source: ModelSource | None, head: Head, label_names: Sequence[str]) -> bool:
    """Whether a model's file has no weights for the head that the data needs, which is known once it is loaded."""
    if source is None or head in (*VOCABULARY_HEADS, "embedding"):  # an artifact has its own
        return False
    source.build(label_names)
    return source.new_head is not None


def _loaded(config: Mapping[str, Any]) -> TaskData:
    """The data of a recipe, set up."""
    for name in dir(data_classes):  # classes that have been imported are found by their bare names
        getattr(data_classes, name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TaskData, "data", required=True)
    try:
        made: TaskData = parser.instantiate(parser.parse_object({"data": dict(config)})).data
    except ArgumentError as error:
        raise ConfigError(parser_line(str(error))) from error
    made.setup()
    return made


def _check_reachable(target: Target, sizes: Sizes) -> None:
    """Raise ``ConfigError`` for FLOPs that this model cannot get down to."""
    least = {"ffn_flops": sizes.least_ffn_flops, "flops": sizes.least_flops}.get(target.kind, 0.0)
    check(
        target.value >= least,
        f"target='{target}': cannot be reached; {100 * least:.1f}% is the least of this model, with one expert of each "
        "layer on",
    )
