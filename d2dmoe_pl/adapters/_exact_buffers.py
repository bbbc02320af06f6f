"""Buffers that a Hugging Face model has in float32 whatever its type, since they are wrong in a narrow one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_buffers(model: Any) -> Iterator[None]:
    """Let ``model`` be cast in the body, all but buffers that ``from_pretrained`` makes in float32 for any type.

    Such are the frequencies of rotary positions: rounded to bfloat16, they are off by whole turns after some hundred
    tokens.

    Args:
        model: Dense or converted; a ``PreTrainedModel``.
    """
    with torch.device("meta"):
        made = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
    in_any = {name for name, buffer in made.named_buffers(remove_duplicate=False) if buffer.dtype == torch.float32}
    kept = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in in_any}
    yield
    for name, buffer in kept.items():
        parent, _, attribute = name.rpartition(".")
        buffers = model.get_submodule(parent)._buffers
        buffers[attribute] = buffer.to(buffers[attribute].device)
