"""Which output of a model stands for which of the data's labels: by name, in the model's own order."""

from collections.abc import Sequence

from torch import nn

from d2dmoe_pl.adapters import ModelSource, adapter_for
from d2dmoe_pl.artifact import check_can_be_saved
from d2dmoe_pl.data.head import LABELLED_HEADS
from d2dmoe_pl.data.output_names import are_placeholders, places, plain_name
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import check, some_of
from d2dmoe_pl.notices import notice

OFTEN_CUT = 0.1  # share of samples, from which on it is said
KNOWN = 0.9  # of the letters and digits of texts, at least, or it is said


def build_for(data: TaskData, source: ModelSource, makes_head: bool) -> nn.Module:
    """The model of ``source`` for ``data``, whose labels are numbered as the model does that has been trained on them.

    Args:
        data: Set up.
        source: Of the model.
        makes_head: Whether the model is to get a new head where its own is for other labels.

    Raises:
        ConfigError: If a trained head is for other labels, or there is none, unless one is to be made; or if the model
            has parts that no artifact could keep.
    """
    data.number_labels_as(None)
    assert data.task is not None
    own = data.class_names
    outputs = source.output_names() if data.task.head in LABELLED_HEADS else None
    if outputs is not None and _agree(own, outputs, makes_head):
        data.number_labels_as(named_outputs(own, outputs))
    elif outputs is not None:
        check(makes_head, unlike(own, outputs, "label_names of the source says it"))
    model = source.build(data.task.label_names)
    if source.new_head is not None:
        labels = f" for {some_of(own)}" if data.task.head in LABELLED_HEADS else ""
        check(
            makes_head,
            f"source: the model's file has no weights for its head ({source.new_head}); FineTuning trains one",
        )
        notice(f"{type(model).__name__} gets a new head{labels}: {source.new_head} begin anew.")
    if isinstance(data, TokenizedData):
        _tell_what_is_unknown(data)
        _tell_what_is_cut(data)
    answer_as_model(data, model)
    check_can_be_saved(model)
    return model


def _tell_what_is_unknown(data: TokenizedData) -> None:
    there, kept = data.letters
    if kept < KNOWN * there:
        notice(
            f"tokenizer={data.tokenizer_name!r}: of the {there} letters and digits looked at in the training split, "
            f"{kept} are in its tokens; it does not know the others, and no model can learn from them."
        )


def _tell_what_is_cut(data: TokenizedData) -> None:
    for (argument, title), share in data.filled_shares().items():
        if share > OFTEN_CUT:
            notice(
                f"{argument}={getattr(data, argument)}: {100 * share:.0f}% of the training {title} have as many tokens "
                "or more, and what is behind them is left out."
            )


def number_as_model(data: TaskData, model: nn.Module) -> None:
    """Number the labels of ``data`` as ``model`` does, a classifier that has been trained; begin its answers likewise.

    Raises:
        ConfigError: If it has been trained on other labels, or ends answers otherwise than the data does.
    """
    answer_as_model(data, model)
    outputs = adapter_for(model).label_names(model)
    if outputs is None:
        return
    own = data.class_names
    check(_agree(own, outputs, False), unlike(own, outputs, "id2label or label_names in its config.json say it"))
    data.number_labels_as(named_outputs(own, outputs))


def answer_as_model(data: TaskData, model: nn.Module) -> None:
    """Begin the answers of ``data`` as ``model`` does, where they are texts."""
    found = adapter_for(model).answer_tokens(model)
    if data.answer_end is None or found is None:
        return
    data.answer_start, end = found
    check(
        end == data.answer_end,
        f"eos_token_id={end} of {type(model).__name__}: must be {data.answer_end}, by which the tokenizer ends texts",
    )


def check_same_head(teacher: nn.Module, student: nn.Module, where: str) -> None:
    """Raise ``ConfigError`` unless two models predict things of one kind; arguments as in what follows."""
    has, wanted = (adapter_for(model).head(model) for model in (teacher, student))
    check(has == wanted, f"{where}: has the head {has!r}; must have {wanted!r}, as the student has")


def check_same_outputs(teacher: nn.Module, student: nn.Module, where: str) -> None:
    """Raise ``ConfigError`` unless the outputs of two models stand for the same, as far as they have names.

    Args:
        teacher: To be compared with ``student``.
        student: The data's labels are numbered as its outputs are.
        where: What the user calls the teacher.
    """
    check_same_head(teacher, student, where)
    outputs, wanted = (adapter_for(model).label_names(model) or [] for model in (teacher, student))
    unnamed = are_placeholders(outputs) or are_placeholders(wanted)
    same = len(outputs) == len(wanted) if unnamed else places(wanted, outputs) == list(range(len(outputs)))
    check(same, f"{where}: has the outputs {some_of(outputs)}; must have {some_of(wanted)}, in this order")


def named_outputs(own: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """The names of a model's outputs; those of the data where the model has but placeholders."""
    if not are_placeholders(outputs):
        return list(outputs)
    found = places(own, outputs)
    assert found is not None
    names = dict(zip(found, own, strict=True))
    return [names.get(index, output) for index, output in enumerate(outputs)]


def unlike(own: Sequence[str], outputs: Sequence[str], where: str) -> str:
    """What to say of labels that are not those that a model has been trained on."""
    if are_placeholders(outputs):
        return (
            f"labels: which of the model's {len(outputs)} outputs, which have no names, is which of the data's "
            f"{some_of(own)} is not known; {where}"
        )
    zero = [name for name in own if plain_name(name) == "0"]  # numbers count from it only where it is one of them
    unknown = [name for name in own if places([name], outputs) is None and places([*zero, name], outputs) is None]
    return (
        f"labels: the data's {some_of(unknown or own, 5)} are none of the model's, which has been trained on "
        f"{some_of(outputs)}; FineTuning of a source makes a new head"
    )


def _agree(own: Sequence[str], outputs: Sequence[str], makes_head: bool) -> bool:
    """Whether a head with these outputs is one for the data's labels; to train one, it must have no others."""
    return places(own, outputs) is not None and not (makes_head and len(own) != len(outputs))
