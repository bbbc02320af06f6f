"""Hugging Face families whose FFN is one module, which is replaced whole."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from d2dmoe_pl.adapters._adapter import module_at
from d2dmoe_pl.adapters._ffn import FFN, AnyLinear, LinearRows
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter, check_not_chunked
from d2dmoe_pl.errors import ConfigError, check


@dataclass(frozen=True)
class PartNames:
    """What a family calls the parts of its FFN; of those that it has not, None.

    ``up`` may name the module ``gate_proj`` as well: the first half of its outputs is then the gate's.
    """

    up: str
    activation: str
    down: str
    gate_proj: str | None = None
    hidden_dropout: str | None = None
    output_dropout: str | None = None


class FFNModuleAdapter(HuggingFaceAdapter):
    """The FFN's module is replaced; what it had of dropout goes into the replacement, the rest of the layer stays.

    Attributes:
        ffn_classes: The classes of that module.
        parts: What it calls its parts; by class where they differ.
    """

    ffn_classes: ClassVar[tuple[type[nn.Module], ...]]
    parts: ClassVar[PartNames | Mapping[type[nn.Module], PartNames]]

    def ffns(self, model: Any) -> list[FFN]:
        found = {name: module for name, module in model.named_modules() if isinstance(module, self.ffn_classes)}
        for name, module in found.items():
            check_not_chunked(module, name)
        return [self._ffn(name, module) for name, module in found.items()]

    def put_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        parent, attribute = module_at(model, ffn.name)
        setattr(parent, attribute, module)

    def put_activation_(self, model: Any, ffn: FFN, activation: nn.Module) -> None:
        module = model.get_submodule(ffn.name)
        setattr(module, self._parts(module).activation, activation)

    def _parts(self, module: nn.Module) -> PartNames:
        if isinstance(self.parts, PartNames):
            return self.parts
        return next(parts for kind, parts in self.parts.items() if isinstance(module, kind))

    def _ffn(self, name: str, module: nn.Module) -> FFN:
        parts = self._parts(module)
        for part, called in asdict(parts).items():
            check(
                called is None or hasattr(module, called),
                f"{type(module).__name__}: has no {called}, which {type(self).__name__} calls its {part}",
            )
        up = self._linear(module, parts.up)
        gate = None if parts.gate_proj is None else self._linear(module, parts.gate_proj)
        if parts.gate_proj == parts.up:
            assert isinstance(up, nn.Linear)
            half = up.out_features // 2
            gate, up = LinearRows(up, slice(half)), LinearRows(up, slice(half, None))
        return FFN(
            name=name,
            up=up,
            activation=getattr(module, parts.activation),
            down=self._linear(module, parts.down),
            gate_proj=gate,
            hidden_dropout=nn.Identity() if parts.hidden_dropout is None else getattr(module, parts.hidden_dropout),
            output_dropout=nn.Identity() if parts.output_dropout is None else getattr(module, parts.output_dropout),
        )

    def _linear(self, module: nn.Module, part: str) -> AnyLinear:
        inner = getattr(module, part)
        linear = self.as_linear(inner)
        if linear is None:
            raise ConfigError(
                f"{type(module).__name__}.{part}: is a {type(inner).__name__}; must be a linear layer to be split into "
                "experts"
            )
        return linear
