"""What the rest of the package asks of a model family."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters._attention import AttentionParts, Projection, find_projections, plain_linear
from d2dmoe_pl.adapters._ffn import FFN, TransposedLinear
from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing
from d2dmoe_pl.errors import ConfigError, check

TaskName = Literal[
    "text-classification",
    "text-regression",
    "multi-label-classification",
    "token-classification",
    "question-answering",
    "causal-language-modeling",
    "masked-language-modeling",
    "text-to-text",
    "embeddings",
    "image-classification",
    "audio-classification",
]


KEY = "d2dmoe"  # in an artifact's config.json, for what is ours
MASK = "attention_mask"  # in a batch, for what is 0 where there is padding
NO_MASK = ""  # in its place, where padding is to be treated as text


class Adapter(ABC):
    """One model family: where its FFNs and attention projections are, how it is called, described and rebuilt.

    Attributes:
        family: Its name, in artifacts and errors.
        title: What its models are called.
        tasks: What they have heads for.
        attention: What its attention's projections are called; None for a family that does not name them.
        tells_hidden_states: Whether it knows what the layers of its models are.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    tasks: ClassVar[tuple[TaskName, ...]]
    attention: ClassVar[AttentionParts | None] = None
    tells_hidden_states: ClassVar[bool] = True

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family."""

    @abstractmethod
    def ffns(self, model: nn.Module) -> list[FFN]:
        """Every dense FFN, first to last. FFNs that were replaced are no longer among them."""

    @abstractmethod
    def put_(self, model: nn.Module, ffn: FFN, module: nn.Module) -> None:
        """Let ``module``, ``(..., d_model)`` to the same shape, compute what ``ffn`` computed."""

    def taken_back_(self, model: nn.Module, name: str) -> None:  # noqa: B027 (most families change modules alone)
        """Undo what :meth:`put_` did beside replacing modules, now that the FFN ``name`` is dense again."""

    def put_with_residual_(self, model: nn.Module, ffn: FFN, module: nn.Module) -> None:
        """Let ``module``, ``(..., d_model)`` to the same shape, compute ``norm(x + dropout(ffn(x)))`` as well.

        Families whose FFNs have a ``residual_norm`` define it; the others are never asked to.
        """
        raise TypeError(f"{ffn.name}: a {self.family} has no LayerNorm after the FFN's residual")

    def projections(self, model: nn.Module) -> list[Projection]:
        """Every linear projection of self-attention, first to last. Those that were replaced are no longer among them.

        Raises:
            ConfigError: If the family does not name them, or a fused one cannot be taken apart.
        """
        if self.attention is None:
            raise ConfigError(
                f"{self.family}: its adapter names no attention projections; to name them, set attention in "
                f"{type(self).__module__}"
            )
        return find_projections(model, self.attention, self.as_linear)

    def as_linear(self, module: Any) -> nn.Linear | TransposedLinear | None:
        """``module`` as an ``nn.Linear``; None if it is no linear projection."""
        return plain_linear(module)

    def embedding_scale(self, module: nn.Module) -> float | None:
        """What ``module`` multiplies the rows that it looks up by; None if it is no embedding, or does more."""
        # one with a largest norm scales its rows as they are looked up
        return 1.0 if type(module) is nn.Embedding and module.max_norm is None else None

    def streams(self, model: nn.Module) -> Mapping[str, str]:
        """Which parts of ``model`` see tokens of one padding mask each.

        Returns:
            What a batch calls the mask, or ``NO_MASK``, by the part's dotted path; the empty path is all of the model.
        """
        return {"": MASK}

    def padding_mask(self, model: nn.Module, name: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The mask, ``(B, L)``, of the tokens that the module ``name`` sees; None where nothing is padding."""
        return batch.get(stream_of(self.streams(model), name)[1])

    def answer_tokens(self, model: nn.Module) -> tuple[int, int] | None:
        """What a model that answers texts with texts begins and ends an answer with; None for any other."""
        return None

    def text_end(self, model: nn.Module) -> int | None:
        """The token id by which a head finds where a text ends; None for a head that reads elsewhere."""
        return None

    def write(self, model: nn.Module, batch: Mapping[str, Tensor], num_tokens: int) -> Tensor:
        """What ``model`` answers the texts of a batch with, greedily: token ids ``(B, L)``, ``num_tokens`` at most."""
        raise TypeError(f"a {self.family} writes no answers")

    def vocabulary_size(self, model: nn.Module) -> int | None:
        """How many token ids there are; None for models of anything but text."""
        return None

    def num_positions(self, model: nn.Module) -> int | None:
        """How many tokens a text may have; None for models of anything but text."""
        return None

    def input_shape(self, model: nn.Module) -> tuple[int, int, int] | None:
        """Channels, height and width of the pictures that ``model`` takes; None for models of anything but pictures."""
        return None

    def set_preprocessing_(self, model: nn.Module, preprocessing: ImagePreprocessing) -> None:  # noqa: B027
        """Record in the model's own config how pictures become its input, where its library keeps that there."""

    @abstractmethod
    def set_activation_(self, model: nn.Module, ffns: Sequence[FFN], name: str, is_all: bool) -> None:
        """Give ``ffns`` the activation ``name``, and record it in the model's own config where they are all it has.

        Raises:
            ConfigError: If the family knows no such activation.
        """

    @abstractmethod
    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Call ``model`` with what it needs of ``batch``; labels are left out.

        Returns:
            By head: classification and multi-label ``(B, C)``; regression ``(B, 1)``; embedding, the text's vector,
            ``(B, d)``; token classification ``(B, L, C)``; question answering, of a token as the answer's first and
            last, ``(B, 2, L)``; language modelling and text-to-text, over a vocabulary of ``V``, ``(B, L, V)``.
        """

    def vocabulary_head(self, model: nn.Module) -> nn.Module | None:
        """What makes logits over a vocabulary of vectors ``(B, L, d)``, each on its own; None where nothing does."""
        return None

    def run_layers(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Call ``model`` as :meth:`logits` does, for what its layers see: logits that nobody reads may be left out."""
        self.logits(model, batch)

    def traced_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What :meth:`logits` gives for a batch as :meth:`in_order` gives it: nothing in it depends on values."""
        return self.logits(model, batch)

    def in_order(self, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Callable[[Tensor], Tensor]]:
        """A batch with padding where the model has learnt it, and the way back for the logits."""
        return batch, lambda logits: logits

    @abstractmethod
    def random_inputs(self, model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
        """A batch of noise, as :meth:`logits` takes it, without padding.

        Args:
            model: Of this family.
            batch_size: ``B``.
            length: Tokens of each text, for models of text.

        Raises:
            ConfigError: If the model has not so many positions.
        """

    @abstractmethod
    def head(self, model: nn.Module) -> Head:
        """What ``model`` has at its end."""

    @abstractmethod
    def num_outputs(self, model: nn.Module) -> int:
        """Number of the head's outputs: classes, 1 for regression; of a token, 2 to answer questions, ``V`` of text."""

    def label_names(self, model: nn.Module) -> list[str] | None:
        """Names of a classifier's outputs by index, ``LABEL_0``, ... where nobody gave it any; None for other heads."""
        return None

    @abstractmethod
    def logits_and_hidden_states(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What :meth:`logits` gives, and what the embeddings and each layer give, ``(B, L, d_model)``; one call.

        Where a norm follows the last layer, its output may stand for the layer's. There are none where
        ``tells_hidden_states`` says so.
        """

    @abstractmethod
    def config(self, model: nn.Module) -> dict[str, Any]:
        """The ``config.json`` from which :meth:`build` makes the dense model again."""

    def save_beside(self, model: nn.Module, folder: Path) -> None:  # noqa: B027 (most libraries keep nothing)
        """Write into ``folder`` what the model's library keeps beside configuration and weights."""

    def mark_converted_(self, model: nn.Module) -> None:  # noqa: B027 (most libraries have no such method)
        """Let ``model`` save itself as what it is now, where its library has a method for that."""

    @abstractmethod
    def build(self, folder: Path) -> nn.Module:
        """The dense model that ``folder/config.json`` and what lies beside it describe, weights not loaded."""

    @abstractmethod
    def rebuild(self, model: nn.Module) -> nn.Module:
        """A new dense model like the one that ``model``, converted or not, was at first; weights are not copied."""

    @abstractmethod
    def fill_buffers_(self, model: nn.Module) -> None:
        """Compute the buffers of ``model`` that no file of weights holds; they are on the meta device.

        Parameters and other buffers have their values already, and keep them.
        """

    def exact_buffers(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let ``model`` be cast in the body, all but what its library has in float32 whatever the type."""
        return nullcontext()

    def cast_(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Give ``model`` another floating type, all but its :meth:`exact_buffers`."""
        with self.exact_buffers(model):
            model.to(dtype)


class ModelSource(ABC):
    """Where a run's first model comes from: a hub, a folder, or random initialisation.

    Attributes:
        new_head: Once built, which parameters of the head no file gave, as a text; None where all of them are from a
            file, or none is meant to be.
    """

    new_head: str | None = None

    def output_names(self) -> list[str] | None:
        """Names of a trained classifier's outputs by index, ``LABEL_0``, ... where it has none; None for others."""
        return None

    @abstractmethod
    def build(self, label_names: Sequence[str]) -> nn.Module:
        """The model with one output a label, weights loaded.

        A trained head is kept if ``label_names`` are its own :meth:`output_names`, and made anew otherwise.
        """

    @abstractmethod
    def build_structure(self, label_names: Sequence[str]) -> nn.Module:
        """The same model on the meta device: shapes without weights, for checks before anything long runs."""


def stream_of(streams: Mapping[str, str], name: str) -> tuple[str, str]:
    """Path and mask of the stream, one of :meth:`Adapter.streams`, that the module ``name`` is in."""
    path = max((path for path in streams if not path or name.startswith(f"{path}.")), key=len)
    return path, streams[path]


def module_at(model: nn.Module, name: str) -> tuple[Any, str]:
    """The parent of the module with dotted path ``name``, and its attribute name there."""
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def check_of_library(model: nn.Module, is_known: bool) -> None:
    """Raise ``ConfigError`` unless ``is_known``, whether a file can name how the library makes ``model``."""
    check(
        is_known,
        f"{type(model).__name__}: no file could say how it is made again; must be of a class of its library, and made "
        "as that makes it, to be saved as an artifact; keep its state_dict otherwise",
    )


def place_meta_buffers_(model: nn.Module) -> list[nn.Module]:
    """Give buffers on the meta device memory on the CPU, without values; the modules that have such buffers."""
    found = []
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device="cpu")
        if names:
            found.append(module)
    return found
