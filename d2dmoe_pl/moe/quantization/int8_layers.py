"""Linear layers and embeddings whose weights are int8 numbers times a scale an output channel, or a row."""

from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.execution._eligibility import needs_gradients
from d2dmoe_pl.moe.execution.auto import warn_once
from d2dmoe_pl.moe.execution.cpu import TYPES, compile_failure
from d2dmoe_pl.moe.experts.experts import leave_inference_mode_

LARGEST = 127  # of an int8 that has its negative


def quantized(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``weight`` as int8 numbers times scales, rounded to nearest.

    Args:
        weight: Of any shape.
        dim: What a scale is shared along: the inputs of an output channel.

    Returns:
        The numbers, in [-127, 127], of the same shape; the scales in float32, of the shape without ``dim``.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.quantization.int8_layers import quantized
        >>> numbers, scale = quantized(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]), dim=1)
        >>> numbers
        tensor([[  64, -127,   32],
                [   0,    0,    0]], dtype=torch.int8)
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=dim, keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale.squeeze(dim)


class Int8Module(nn.Module):
    """A module with int8 numbers among its buffers, whose scales stay in float32 whatever type it is cast to."""

    def set_numbers(self, name: str, weight: Tensor | None, dim: int) -> None:
        """Have ``weight`` as the buffers ``<name>weight``, in int8, and ``<name>scale``; None for a weight is kept."""
        numbers, scale = (None, None) if weight is None else quantized(weight, dim)
        self.register_buffer(f"{name}weight", numbers)
        self.register_buffer(f"{name}scale", scale)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        for name, buffer in self._buffers.items():
            given = state_dict.get(f"{prefix}{name}")
            if buffer is not None and buffer.dtype == torch.int8 and given is not None and given.dtype != torch.int8:
                errors.append(f"{prefix}{name}: is {given.dtype}, and the model is in int8; load it before quantize_")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        exact = {name: scale for name, scale in self._buffers.items() if name.endswith("scale") and scale is not None}
        super()._apply(fn, recurse)
        for name, scale in exact.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != scale.dtype:
                self._buffers[name] = scale.to(moved.device)
        return self


class Int8Linear(Int8Module):
    """What a linear layer computes, but for rounding, at a quarter of the memory.

    On the CPU its inputs are rounded too, at run time, with a scale a row, and the product is in int8, by AMX, VNNI or
    AVX2. Without AMX and VNNI up to four rows, as when text is written, are multiplied with the numbers as they are and
    not rounded; without AVX2 no rows are, and more are multiplied with a copy of the numbers in float32.

    Args:
        weight: ``(d_out, d_in)``.
        bias: ``(d_out,)``, or None.

    Attributes:
        weight: ``(d_out, d_in)`` int8.
        scale: ``(d_out,)`` float32.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from d2dmoe_pl.moe.quantization.int8_layers import Int8Linear
        >>> linear = nn.Linear(8, 3)
        >>> int8, x = Int8Linear(linear.weight, linear.bias), torch.randn(5, 8)
        >>> with torch.no_grad():
        ...     torch.allclose(int8(x), linear(x), atol=0.05)
        True
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.set_numbers("", weight, dim=1)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_in)`` to ``(..., d_out)``.

        Raises:
            ConfigError: For whole numbers, to which a model has cast what it gives.
        """
        own: Any = self._buffers  # past nn.Module's lookup, each step of which compiled code goes through at every call
        weight, scale, bias = own["weight"], own["scale"], own["bias"]
        d_out, d_in = weight.shape
        if not x.is_floating_point():
            raise ConfigError(
                f"in int8: a linear layer of {d_in} inputs is given {x.dtype}, as its model casts them to the type of "
                "the weights; must be left as it is by filter_fn of quantize_"
            )
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        if _runs_in_int8(x):
            if not torch.compiler.is_compiling() and weight.is_inference():
                leave_inference_mode_(self)
                weight, scale, bias = own["weight"], own["scale"], own["bias"]
            rows = x.reshape(-1, d_in)  # (M, d_in)
            output = torch.ops.d2dmoe_pl.int8_linear_cpu.default(rows, weight, scale, bias)
            return output.view(*x.shape[:-1], d_out)
        multiplied = (weight * scale.unsqueeze(1)).to(x.dtype)
        return nn.functional.linear(x, multiplied, None if bias is None else bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(Int8Module):
    """What an embedding looks up, but for rounding, at a quarter of the memory.

    Args:
        embedding: To be rounded.
        factor: What it multiplies the rows that it looks up by.

    Attributes:
        weight: ``(num_embeddings, embedding_dim)`` int8.
        scale: ``(num_embeddings,)`` float32, without the factor: a head may share it.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, embedding: nn.Embedding, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = embedding.padding_idx
        self.set_numbers("", embedding.weight, dim=1)
        # says which type the model is of
        self.register_buffer("zero", torch.zeros((), dtype=embedding.weight.dtype, device="cpu"), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``(...)`` integers to ``(..., embedding_dim)``."""
        numbers = nn.functional.embedding(ids, self.weight)
        rows = (numbers * self.scale[ids].unsqueeze(-1)).to(self.zero.dtype)  # (..., embedding_dim)
        return rows if self.factor == 1 else rows * self.factor

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def quantized_names(model: nn.Module) -> list[str]:
    """The modules of ``model`` that are in int8, by name."""
    return [name for name, module in model.named_modules() if isinstance(module, Int8Module)]


def check_not_quantized(model: nn.Module) -> None:
    """Raise ``ConfigError`` if ``model`` is in int8, where it can neither be converted nor trained."""
    check(
        not quantized_names(model),
        f"{type(model).__name__}: is in int8; must be converted, trained and merged before quantize_",
    )


def _runs_in_int8(x: Tensor) -> bool:
    """Whether there is a product of int8 numbers for ``x``: without gradients, and where ours can run."""
    return (
        x.device.type == "cpu"
        and x.dtype in TYPES
        and not needs_gradients((x,))
        and not torch.onnx.is_in_onnx_export()
        and _can_be_compiled()
    )


def _can_be_compiled() -> bool:
    failure = compile_failure()
    if failure is not None:
        warn_once(
            "int8: the CPU kernel cannot be compiled here, and linear layers multiply their numbers out at every call, "
            f"which takes longer than in float32; the compiler says: {failure}"
        )
    return failure is None
