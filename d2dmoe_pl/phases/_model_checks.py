"""Whether a model and the data that it is to work on fit together."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.data.audio_classification import AudioClassification
from d2dmoe_pl.data.head import VOCABULARY_HEADS, Head
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import check, some_of


def change_in_place(change: Callable[[nn.Module], object], model: nn.Module) -> None:
    """Have a phase's method change a model; raises ``ConfigError`` for one that gives another, which would be lost."""
    given = change(model)
    name = getattr(change, "__qualname__", type(change).__name__)
    check(
        given is None or given is model,
        f"{name}: gives a {type(given).__name__}; must change the model that it is given, in place, and give nothing",
    )


def check_fits(model: nn.Module, data: TaskData) -> None:
    """Raise ``ConfigError`` unless ``model``, whose head is the one, takes what ``data``, which is set up, gives."""
    assert data.task is not None
    check_outputs(model, data.task)
    check_inputs(model, data)


def check_inputs(model: nn.Module, data: TaskData) -> None:
    """Raise ``ConfigError`` unless ``model`` takes the texts, sounds or pictures of ``data``, which is set up."""
    check_token_ids(model, data.num_token_ids)
    check_length(model, data.sample_length)
    check_lengths(model, data.longest_samples())
    check_pictures(model, data.preprocessing)
    check_recordings(model, data)
    if isinstance(data, TokenizedData):
        check_text_ends(model, data)


def check_head(model: nn.Module, head: Head) -> None:
    """Raise ``ConfigError`` unless ``model`` has the head that the data needs."""
    has = adapter_for(model).head(model)
    check(
        has == head,
        f"head={has!r} of {type(model).__name__}: the data needs a model with head {head!r} "
        "(the source decides it, e.g. HuggingFaceModel by its task)",
    )


def check_outputs(model: nn.Module, task: Task) -> None:
    """Raise ``ConfigError`` unless ``model`` has an output for each label of the task, or each token id at least."""
    has, needed = adapter_for(model).num_outputs(model), task.num_outputs
    name = type(model).__name__
    if task.head in VOCABULARY_HEADS:  # many a model's is rounded up
        check(has >= needed, f"vocabulary={has} of {name}: must be at least {needed}, which the data's tokenizer has")
        return
    check(
        has == needed,
        f"outputs={has} of {name}: must be {needed}, since the data has the labels {some_of(task.label_names)}",
    )


def check_token_ids(model: nn.Module, num_token_ids: int | None) -> None:
    """Raise ``ConfigError`` unless ``model`` has an embedding for each token id of the data."""
    has = adapter_for(model).vocabulary_size(model)
    check(
        num_token_ids is None or has is None or num_token_ids <= has,
        f"tokenizer: gives {num_token_ids} token ids; must be at most the {has} that {type(model).__name__} embeds",
    )


def check_text_ends(model: nn.Module, data: TokenizedData) -> None:
    """Raise ``ConfigError`` unless every text has the ends that the head looks for, as many as any other."""
    end = adapter_for(model).text_end(model)
    if end is None:
        return
    counts = data.ends_of_texts(end)
    expected = max(1, min(map(min, counts.values())))
    for split, found in counts.items():
        for row, count in enumerate(found):
            check(
                count == expected,
                f"row {row} of the {split} split: its text has the token {end} {count} times; must have it "
                f"{expected} times, since {type(model).__name__} finds by it where a text ends (the tokenizer puts it "
                "there, the text must not have it)",
            )


def check_pictures(model: nn.Module, preprocessing: ImagePreprocessing | None) -> None:
    """Raise ``ConfigError`` unless ``model`` takes pictures of the channels and size that the data gives."""
    takes = adapter_for(model).input_shape(model)
    if takes is None or preprocessing is None:
        return
    gives = (preprocessing.channels, preprocessing.size, preprocessing.size)
    check(
        gives == takes,
        f"pixel_values: the data gives {' x '.join(map(str, gives))} (channels x height x width); must be "
        f"{' x '.join(map(str, takes))}, which {type(model).__name__} takes",
    )


def check_recordings(model: nn.Module, data: TaskData) -> None:
    """Raise ``ConfigError`` unless ``model`` takes what the feature extractor of ``data``, which is loaded, makes."""
    if not isinstance(data, AudioClassification):
        return
    name, silent = next(iter(data.silence().items()))
    with torch.random.fork_rng(devices=[]):  # what is drawn is none of a training's
        (takes, shortest), (_, longer) = (
            next(iter(adapter_for(model).random_inputs(model, 1, length).items())) for length in (1, 2)
        )
    gives, least = tuple(silent.shape[1:]), tuple(shortest.shape[1:])
    is_free = [one != other for one, other in zip(least, longer.shape[1:], strict=True)]
    fits = len(gives) == len(least) and all(
        given >= needed if free else given == needed for given, needed, free in zip(gives, least, is_free, strict=True)
    )
    wanted = (f"at least {size}" if free else str(size) for size, free in zip(least, is_free, strict=True))
    check(
        name == takes and fits,
        f"processor={data.processor_name!r}: makes {name} of {' x '.join(map(str, gives))} of a recording; must make "
        f"{takes} of {' x '.join(wanted)}, which {type(model).__name__} takes",
    )


def check_lengths(model: nn.Module, longest: Mapping[tuple[str, str], int]) -> None:
    """Raise ``ConfigError`` unless ``model`` has a position for each token of the longest sample of every split.

    Args:
        model: Of texts, or of anything else.
        longest: Tokens of the longest text, by the setting that limits it and what it is of which split.
    """
    has = adapter_for(model).num_positions(model)
    for (argument, title), length in longest.items():
        check(
            has is None or length <= has,
            f"{argument}={length}: the longest {title} has so many tokens; must be at most {has}, the positions that "
            f"{type(model).__name__} has",
        )


def check_length(model: nn.Module, length: int | None) -> None:
    """Raise ``ConfigError`` unless ``model`` has a position for each of the ``length`` tokens of a sample."""
    has = adapter_for(model).num_positions(model)
    check(
        length is None or has is None or length <= has,
        f"length={length}: must be at most {has}, the positions that {type(model).__name__} has",
    )
