"""The same samples again and again through a model of which little has changed: what comes before is not run anew."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


def block_of(name: str, model: nn.Module) -> str | None:
    """Name of the block that holds the layer ``name``: the outermost module on its way that is one of a list.

    Args:
        name: Of a module.
        model: That it is in.

    Returns:
        None where there is no list.

    Example:
        >>> from torch import nn
        >>> from d2dmoe_pl.moe.budgets.block_replay import block_of
        >>> block_of("1.0", nn.ModuleList([nn.Identity(), nn.Sequential(nn.ReLU())]))
        '1'
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        parent = model.get_submodule(".".join(parts[: end - 1]))
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            return ".".join(parts[:end])
    return None


class BlockReplay:
    """Hands out what the first blocks gave before, as long as none of their layers has another setting since.

    Blocks run one after another, each on what the one before gives, as those of Transformers do; a model whose layers
    are in no list of blocks, or in blocks that run in turns, is run whole each time.

    What every block gave last stays on the device, for each batch: of Transformers ``tokens * d_model`` values a block,
    padding in. A caller who has many batches and few settings needs one replay a batch, not one for all.

    Args:
        model: Whose blocks hold the layers.
        layers: Names of the layers that have settings, first to last.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        places = [block_of(name, model) for name in layers]
        names = [] if None in places else list(dict.fromkeys(places))
        self._blocks = [model.get_submodule(name) for name in names if name is not None]
        self._places = [names.index(place) for place in places] if names else []
        self._recorded: dict[Hashable, tuple[Sequence[float], dict[int, Any]]] = {}

    @contextmanager
    def running(self, batch: Hashable, settings: Sequence[float]) -> Iterator[int]:
        """Let the model, called once in the body, take from its blocks what they gave for this batch before.

        Args:
            batch: What the samples are known by.
            settings: Of each layer.

        Yields:
            How many of the layers do not run.
        """
        before, outputs = self._recorded.get(batch, ((), {}))
        same = 0
        while same < min(len(before), len(settings)) and before[same] == settings[same]:
            same += 1
        # blocks before that of the first layer that has changed
        still = len(self._blocks) if same == len(settings) else self._places[same] if self._places else 0
        still = min(still, len(self._blocks) - 1 if self._blocks else 0, len(outputs))
        kept = {index: outputs[index] for index in range(still)}
        self._recorded[batch] = ((), {})  # of a call that is broken off
        for index, block in enumerate(self._blocks[:still]):
            block.forward = partial(_give, kept[index])
        order: list[int] = []
        handles = [
            block.register_forward_hook(partial(_record, kept, order, index))
            for index, block in enumerate(self._blocks)
        ]
        try:
            yield sum(place < still for place in self._places)
        finally:
            for block in self._blocks[:still]:
                del block.forward
            for handle in handles:
                handle.remove()
        if _is_in_turn(order, len(self._blocks)):
            self._recorded[batch] = (tuple(settings), kept)
        else:
            self._blocks, self._places = [], []

    def forget(self, batch: Hashable) -> None:
        """Keep nothing of a batch."""
        self._recorded.pop(batch, None)


def _give(output: Any, *args: object, **kwargs: object) -> Any:
    return output


def _record(outputs: dict[int, Any], order: list[int], index: int, block: nn.Module, args: object, output: Any) -> None:
    outputs[index] = output
    order.append(index)


def _is_in_turn(order: Sequence[int], blocks: int) -> bool:
    """Whether so many blocks ran one after the other, each but the last once."""
    return len(order) >= blocks and list(order) == [*range(blocks), *[blocks - 1] * (len(order) - blocks)]
