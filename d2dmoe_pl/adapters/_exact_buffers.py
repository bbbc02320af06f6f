"""Another floating type for a Hugging Face model, without what is wrong in a narrow one."""

import copy
from typing import Any

import torch


def cast_but_exact_buffers_(model: Any, dtype: torch.dtype) -> None:
    """Give ``model`` another floating type, all but buffers that ``from_pretrained`` makes in their own for any.

    Such are the frequencies of rotary positions: rounded to bfloat16, they are off by whole turns after some hundred
    tokens.

    Args:
        model: Dense or converted; a ``PreTrainedModel``.
        dtype: Of its parameters, and of all other buffers that are floating.
    """
    with torch.device("meta"):
        made = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    types = {name: buffer.dtype for name, buffer in made.named_buffers(remove_duplicate=False)}
    exact = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.is_floating_point() and types.get(name, dtype) != dtype
    }
    model.to(dtype)
    for name, buffer in exact.items():
        parent, _, attribute = name.rpartition(".")
        model.get_submodule(parent)._buffers[attribute] = buffer.to(types[name])
