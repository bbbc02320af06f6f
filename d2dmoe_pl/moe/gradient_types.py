"""The type that gradients come back in, where none is scaled for float16."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_float16(device_type: str) -> AbstractContextManager[object]:
    """Compute in the body in the type of the weights where autocast would in float16, which small gradients end in.

    A training scales its loss to keep them above zero; gradients that are read as they are would be zeros. To be around
    both passes, since autocast counts in the backward pass too.

    Args:
        device_type: Where it is computed, such as ``cuda``.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.gradient_types import without_float16
        >>> with torch.autocast("cpu", torch.bfloat16), without_float16("cpu"):  # has the range of float32
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """
    is_half = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    return torch.autocast(device_type, enabled=False) if is_half else nullcontext()
