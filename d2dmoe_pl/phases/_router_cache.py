"""What routers learn from, kept from the one epoch in which the frozen model computes it."""

from collections import defaultdict
from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor

from d2dmoe_pl.data.cacheable_loader import CacheableLoader
from d2dmoe_pl.data.epoch_order import folded
from d2dmoe_pl.phases._row_cache import RowCache
from d2dmoe_pl.phases._schedule import planned_steps, steps_of

MIB = 2**20


class UnevenTokensError(Exception):
    """Layers see different numbers of tokens, as an encoder's and a decoder's do: they have no rows in common."""


class RouterCache:
    """The tokens that reach the routers and what these are to give: a row a token, with the columns of every layer.

    Tokens are kept in the type in which products are computed, under autocast the lower one, which loses nothing that
    a router's first product would not; targets as they are. They are given in batches ``(n, columns)``, for
    :meth:`examples`.

    Args:
        rows: Where they are kept.
        seed: Of their order.
    """

    def __init__(self, rows: RowCache, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self._batch: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # of each of a layer's runs
        self._widths: dict[str, tuple[int, int]] = {}

    def add(self, name: str, tokens: Tensor, target: Tensor) -> None:
        """Take in what the router of the layer ``name`` learns from a batch: ``(N, d_model)`` and ``(N, E)``."""
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
        self._batch[name].append((tokens.to("cpu", dtype), target.cpu()))

    def end_batch(self) -> None:
        """Go on to the next batch, after all layers of one are added.

        Raises:
            OSError: As :meth:`RowCache.add` does.
            UnevenTokensError: If the layers were given different numbers of tokens.
        """
        batch = {name: [torch.cat(parts) for parts in zip(*runs, strict=True)] for name, runs in self._batch.items()}
        self._batch.clear()
        numbers = {len(tokens) for tokens, _ in batch.values()}
        if len(numbers) > 1:
            raise UnevenTokensError(f"layers see different numbers of tokens, {', '.join(map(str, sorted(numbers)))}")
        self._widths = {name: (tokens.shape[1], target.shape[1]) for name, (tokens, target) in batch.items()}
        self.rows.add(torch.cat([part for pair in batch.values() for part in pair], dim=1))  # (N, columns)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Those of one epoch."""
        return self.rows.shuffled(folded(self.seed, "rows", epoch))

    def examples(self, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Tokens ``(n, d_model)`` and targets ``(n, E)`` of rows ``(n, columns)``, by layer."""
        parts = iter(rows.split([width for pair in self._widths.values() for width in pair], dim=1))
        return {name: (next(parts), next(parts)) for name in self._widths}


def why_not_cached(trainer: L.Trainer, augmented: bool) -> str | None:
    """Why what the routers learn from differs between the epochs; None if it does not."""
    loader = trainer.train_dataloader
    if augmented or not isinstance(loader, CacheableLoader):
        return "each epoch sees other samples, since the data is augmented or goes on"
    if trainer.num_training_batches < len(loader):
        return f"each epoch sees another {trainer.num_training_batches} of the {len(loader)} batches"
    return None


def is_one_epoch(trainer: L.Trainer) -> bool:
    """Whether the whole training is one epoch, or less."""
    return steps_of(trainer, 1) >= planned_steps(trainer)
