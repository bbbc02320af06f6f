"""Hugging Face families whose FFN is one module, which is replaced whole."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from d2dmoe_pl.adapters._adapter import module_at
from d2dmoe_pl.adapters._ffn import FFN, TransposedLinear
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter, check_not_chunked
from d2dmoe_pl.errors import ConfigError


@dataclass(frozen=True)
class PartNames:
    """What a family calls the parts of its FFN; of those that it has not, None."""

    up: str
    activation: str
    down: str
    gate_proj: str | None = None
    output_dropout: str | None = None


class FFNModuleAdapter(HuggingFaceAdapter):
    """The FFN's module is replaced; what it had of dropout goes into the replacement, the rest of the layer stays.

    Attributes:
        ffn_classes: The classes of that module.
        parts: What it calls its parts.
    """

    ffn_classes: ClassVar[tuple[type[nn.Module], ...]]
    parts: ClassVar[PartNames]

    def ffns(self, model: Any) -> list[FFN]:
        found = {name: module for name, module in model.named_modules() if isinstance(module, self.ffn_classes)}
        for name, module in found.items():
            check_not_chunked(module, name)
        return [self._ffn(name, module) for name, module in found.items()]

    def put_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        parent, attribute = module_at(model, ffn.name)
        setattr(parent, attribute, module)

    def put_activation_(self, model: Any, ffn: FFN, activation: nn.Module) -> None:
        setattr(model.get_submodule(ffn.name), self.parts.activation, activation)

    def _ffn(self, name: str, module: nn.Module) -> FFN:
        parts = self.parts
        return FFN(
            name=name,
            up=self._linear(module, parts.up),
            activation=getattr(module, parts.activation),
            down=self._linear(module, parts.down),
            gate_proj=None if parts.gate_proj is None else getattr(module, parts.gate_proj),
            output_dropout=nn.Identity() if parts.output_dropout is None else getattr(module, parts.output_dropout),
        )

    def _linear(self, module: nn.Module, part: str) -> nn.Linear | TransposedLinear:
        inner = getattr(module, part)
        linear = self.as_linear(inner)
        if linear is None:
            raise ConfigError(
                f"{type(module).__name__}.{part}: is a {type(inner).__name__}; must be a linear layer to be split into "
                "experts"
            )
        return linear
