"""The adapters of all model families, and which of them a model needs."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from d2dmoe_pl.adapters._adapter import Adapter
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.plugins import Plugins

FALLBACK = "any_"  # begins the names of those for models that no family describes
ADAPTERS: Plugins[Adapter] = Plugins(
    "d2dmoe_pl.adapters",
    "ADAPTER",
    "an instance of a subclass of d2dmoe_pl.adapters.Adapter, under its family's name",
    lambda plugin: isinstance(plugin, Adapter),
)


def register_adapter(adapter: Adapter) -> None:
    """Make a model family known, under its ``family``; for this process. It is asked before those of the package.

    Raises:
        ConfigError: If there is another adapter for a family of that name.

    Example:
        >>> from d2dmoe_pl.adapters import adapter_named, register_adapter
        >>> llama = adapter_named("llama")
        >>> class GraniteAdapter(type(llama)):
        ...     family, title, model_types = "granite", "Hugging Face Granite", ("granite",)
        >>> register_adapter(GraniteAdapter())
        >>> adapter_named("granite").title
        'Hugging Face Granite'
    """
    ADAPTERS.register(adapter.family, adapter)


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of the model's family.

    Raises:
        ConfigError: If there is none.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl.adapters import adapter_for
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> adapter_for(transformers.GPT2LMHeadModel(config)).family
        'gpt2'
    """
    for adapter in _by_likelihood(model):
        if adapter.matches(model):
            return adapter
    raise ConfigError(
        f"{type(model).__name__}: is no model of transformers or timm; call adopt_ first, with an example of what it "
        "is called with"
    )


def adapter_named(family: str) -> Adapter:
    """The adapter of ``family``, as an artifact records it.

    Raises:
        ConfigError: If there is none.

    Example:
        >>> from d2dmoe_pl.adapters import adapter_named
        >>> adapter_named("bert").title
        'Hugging Face BERT'
    """
    return ADAPTERS.find(family, "family")


def _by_likelihood(model: nn.Module) -> Iterator[Adapter]:
    """All adapters: those from outside first, then those called like the model's library or file; fallbacks last."""
    file = type(model).__module__.split(".")

    def unlikely(name: str) -> tuple[Any, ...]:
        is_called_so = any(part.startswith(name) or name.startswith(f"{part}_") for part in file)
        return ADAPTERS.is_own(name), name.startswith(FALLBACK), not is_called_so, not ADAPTERS.is_imported(name), name

    return (ADAPTERS.find(name, "family") for name in sorted(ADAPTERS.names(), key=unlikely))
