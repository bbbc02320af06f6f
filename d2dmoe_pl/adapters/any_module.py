"""Any model at all, once :func:`adopt_` has seen what it is called with: its FFNs are found by tracing."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from d2dmoe_pl.adapters._adapter import MASK, NO_MASK
from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._padding_read import reads_padding
from d2dmoe_pl.adapters._structural import FOUND, PROVED, StructuralAdapter, fitting
from d2dmoe_pl.data.head import Head
from d2dmoe_pl.errors import ConfigError, check, said_of

EXAMPLE = "_d2dmoe_example"  # attribute of a model
TELLS_PADDING = "_d2dmoe_tells_padding"  # attribute of one that takes a mask: whether that says what is never read


def adopt_(model: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Find the FFNs of a model that is of no library, so that it can be converted.

    What is found is proved: with every FFN computed as what it is taken for, the model gives the same for ``example``.
    An ``attention_mask`` that it takes is tried as well: what is zero there runs no expert, if nothing reads it.
    Everything that works on a model in place works then, but for :func:`d2dmoe_pl.merge_to_dense_`; to save it is left
    to you, as no file says how it is made.

    Args:
        model: Any model, called with tensors by name, that gives a tensor.
        example: What it is called with: a batch of two or more, without padding.

    Raises:
        ConfigError: If the model cannot be traced, gives something else than a tensor, or no FFN is found. The model
            is then as it was; likewise for an example that holds anything but batches of tensors.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from d2dmoe_pl import ExpertsConfig, adopt_, convert_to_moe_
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        ...     def forward(self, x):
        ...         return x + self.down(torch.relu(self.up(x)))
        >>> model = nn.Sequential(Block(), Block()).eval()
        >>> x = torch.randn(2, 5, 8)
        >>> before = model(x)
        >>> adopt_(model, {"input": x})
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> type(model[0].down).__name__, torch.allclose(model(x), before, atol=1e-5)
        ('MoELayer', True)
    """
    check(isinstance(example, Mapping), f"example: is {said_of(example)}; must be tensors by name")
    check(bool(example), "example={}: must hold what the model is called with")
    for name, tensor in example.items():
        check(
            isinstance(tensor, Tensor) and tensor.dim() > 0 and tensor.numel() > 0,
            f"example: {name} is {said_of(tensor)}; must be a tensor of a batch, with something in it",
        )
    known = set(inspect.signature(model.forward).parameters)
    unknown = sorted(set(example) - known)
    check(not unknown, f"example: {', '.join(unknown)} are no arguments of {type(model).__name__}; it takes {known}")
    if model.__dict__.get(EXAMPLE) is not None and ADAPTER.is_dense(model, model.__dict__.get(FOUND, [])):
        for found in (FOUND, PROVED, TELLS_PADDING):  # by another example
            model.__dict__.pop(found, None)
    model.__dict__[EXAMPLE] = {name: tensor.detach().clone() for name, tensor in example.items()}
    try:
        ADAPTER.ffns(model)
    except Exception:  # the model's own too, of an example that it cannot be called with
        del model.__dict__[EXAMPLE]
        raise


class AnyModuleAdapter(StructuralAdapter):
    """See :class:`StructuralAdapter`. Batches hold what the model is called with, under the names of its arguments."""

    family = "any_module"
    title = "any other, in Python"
    tasks = ()

    def matches(self, model: Any) -> bool:
        return EXAMPLE in model.__dict__

    def examples(self, model: Any) -> Sequence[Mapping[str, Tensor]]:
        """The model's example; and others, of its values moved and scaled: another size, and another length."""
        example: Mapping[str, Tensor] = model.__dict__[EXAMPLE]
        other = {name: _shuffled(tensor) for name, tensor in self.random_inputs(model, 3, 0).items()}
        length = next((tensor.shape[1] for tensor in example.values() if tensor.dim() > 1), 0)
        shorter = {
            name: tensor[:, :-1] if tensor.dim() > 1 and tensor.shape[1] == length else tensor
            for name, tensor in other.items()
        }
        return [example, other, *([shorter] if length > 1 else [])]

    def streams(self, model: Any) -> Mapping[str, str]:
        """See :meth:`Adapter.streams`; none where a mask says something else than what is padding."""
        takes_none = MASK not in inspect.signature(model.forward).parameters
        return {"": MASK if model.__dict__.get(TELLS_PADDING, takes_none) else NO_MASK}

    def ffns(self, model: Any) -> list[FFN]:
        found = super().ffns(model)
        if len(found) == len(self._sites(model)):  # later, what has experts cannot be asked
            self.try_mask(model)
        return found

    def try_mask(self, model: Any) -> None:
        """Find out, once, whether the model's mask, if it takes one, says what is padding, which nothing reads."""
        is_here = not any(parameter.is_meta for parameter in model.parameters())
        if MASK in inspect.signature(model.forward).parameters and is_here and TELLS_PADDING not in model.__dict__:
            model.__dict__[TELLS_PADDING] = self._tells_padding(model)
            if not model.__dict__[TELLS_PADDING]:
                say = resolve_name("d2dmoe_pl.notices:notice")  # which brings Lightning, for what is said seldom
                say(
                    f"{type(model).__name__}: what is zero in its attention_mask is not only padding, or is read all "
                    "the same, so that every position is routed, run and counted."
                )

    def _tells_padding(self, model: Any) -> bool:
        sites = self._sites(model)
        texts = fitting(self.random_inputs(model, 2, 0), model)
        whole = texts.get(MASK, torch.ones(2, *sites[0].shape[1:-1], dtype=torch.long))
        if any(site.shape[1:-1] != whole.shape[1:] for site in sites) or not bool(whole.all()):
            return False
        try:
            return not reads_padding(self, model, sites, texts, torch.ones_like(whole), {"": MASK})
        except Exception:  # whatever a model raises that takes no such mask
            return False

    def masked(self, model: Any, texts: Mapping[str, Tensor], mask: Tensor) -> Mapping[str, Tensor]:
        """What the model is called with, and a mask ``(B, L)``."""
        return {**texts, MASK: mask}

    @staticmethod
    def token_dim(logits: Tensor) -> int:
        """Which dimension of three is that of tokens."""
        return 1

    def set_activation_(self, model: Any, ffns: Sequence[FFN], name: str, is_all: bool) -> None:
        check(name in ACT2FN, f"activation={name!r}: allowed are {', '.join(sorted(ACT2FN))}")
        for ffn in ffns:
            self.put_activation_(model, ffn, ACT2FN[name])

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        taken = inspect.signature(model.forward).parameters
        output: Any = model(**{key: value for key, value in batch.items() if key in taken})
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"it gives {said_of(output)}; must give one tensor to be adopted, as a module around it can (models of "
                "transformers and timm need no adopt_)"
            )
        return output

    def random_inputs(self, model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
        """The model's example, as often as makes ``batch_size``."""

        def repeated(tensor: Tensor) -> Tensor:
            times = -(-batch_size // len(tensor))
            return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch_size]

        return {name: repeated(tensor) for name, tensor in model.__dict__[EXAMPLE].items()}

    def head(self, model: Any) -> Head:
        return "classification"

    def num_outputs(self, model: Any) -> int:
        with torch.no_grad():
            return self.logits(model, model.__dict__[EXAMPLE]).shape[-1]

    def logits_and_hidden_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :meth:`Adapter.logits_and_hidden_states`; there are none."""
        return self.logits(model, batch), ()

    def config(self, model: Any) -> dict[str, Any]:
        raise self._cannot(model)

    def build(self, folder: Path) -> nn.Module:
        raise ConfigError(f"{folder}: is of a model of no library, which no file can build again")

    def rebuild(self, model: Any) -> nn.Module:
        raise self._cannot(model)

    def fill_buffers_(self, model: Any) -> None:
        raise self._cannot(model)

    @staticmethod
    def _cannot(model: Any) -> ConfigError:
        return ConfigError(
            f"{type(model).__name__}: is of no library that could build it again; keep its state_dict, and adopt and "
            "convert a new one before it is loaded"
        )


def _shuffled(tensor: Tensor) -> Tensor:
    """Other values of the same kind, which a model must take too."""
    moved = tensor.flatten()[torch.randperm(tensor.numel(), device=tensor.device)].view_as(tensor)
    return moved * 0.7 if moved.is_floating_point() else moved


ADAPTER = AnyModuleAdapter()
