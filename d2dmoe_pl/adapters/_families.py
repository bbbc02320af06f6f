"""The adapters of all model families, and which of them a model needs."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from d2dmoe_pl.adapters._adapter import Adapter
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.plugins import Plugins

FALLBACK = "any_"  # begins the names of those for models that no family describes
ADAPTERS: Plugins[Adapter] = Plugins(
    "d2dmoe_pl.adapters",
    "ADAPTER",
    "an instance of a subclass of d2dmoe_pl.adapters.Adapter",
    lambda plugin: isinstance(plugin, Adapter),
)


def register_adapter(adapter: Adapter) -> None:
    """Make a model family known, under its ``family``; for this process. It is asked before those of the package.

    Raises:
        ConfigError: If there is another adapter for a family of that name, or this one lacks what one has to say.

    Example:
        >>> from d2dmoe_pl.adapters import adapter_named, register_adapter
        >>> llama = adapter_named("llama")
        >>> class GraniteAdapter(type(llama)):
        ...     family, title, model_types = "granite", "Hugging Face Granite", ("granite",)
        >>> register_adapter(GraniteAdapter())
        >>> adapter_named("granite").title
        'Hugging Face Granite'
    """
    if isinstance(adapter, Adapter):
        _check_complete(adapter)
    ADAPTERS.register(getattr(adapter, "family", "adapter"), adapter)


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
    inside = next((name for name, part in model.named_modules() if name and _is_known(part)), None)
    if inside is not None:
        raise ConfigError(
            f"{type(model).__name__}: is no model of transformers or timm itself; must be the one that is its {inside}"
        )
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
    adapter = ADAPTERS.find(family, "family")
    if not ADAPTERS.is_own(family):
        _check_complete(adapter)
        check(
            adapter.family == family,
            f"family={family!r}: is the name of an entry point whose adapter is for {adapter.family!r}; must be the "
            "same, by which artifacts find it",
        )
    return adapter


def _is_known(model: nn.Module) -> bool:
    return any(adapter.matches(model) for adapter in _by_likelihood(model))


def _check_complete(adapter: Adapter) -> None:
    """Raise ``ConfigError`` if the adapter lacks an attribute that its class, or one above, says an adapter has.

    And if it has one text where it must have several.
    """
    named = [name for kind in type(adapter).__mro__ for name in inspect.get_annotations(kind)]
    lacking = [name for name in dict.fromkeys(named) if not hasattr(adapter, name)]
    check(not lacking, f"{type(adapter).__name__}: has no {', '.join(lacking)}, which an adapter must have")
    for name in ("tasks", "model_types"):
        value = getattr(adapter, name, ())
        check(
            not isinstance(value, str),  # in which each of its parts would be found
            f"{type(adapter).__name__}: {name}={value!r}; must be a tuple of texts",
        )


def _by_likelihood(model: nn.Module) -> Iterator[Adapter]:
    """All adapters: those from outside first, then those called like the model's library or file; fallbacks last."""
    file = type(model).__module__.split(".")

    def unlikely(name: str) -> tuple[Any, ...]:
        is_called_so = any(part.startswith(name) or name.startswith(f"{part}_") for part in file)
        return ADAPTERS.is_own(name), name.startswith(FALLBACK), not is_called_so, not ADAPTERS.is_imported(name), name

    return (adapter_named(name) for name in sorted(ADAPTERS.names(), key=unlikely))
