"""What phases share that give a model routers: the frozen model runs all its experts, and routers learn from that."""

import logging
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from d2dmoe_pl.data.cacheable_loader import CacheableLoader
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.conversion import add_routers_, set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.layer import observed
from d2dmoe_pl.moe.routers import Router, RouterConfig
from d2dmoe_pl.notices import notice
from d2dmoe_pl.phases._optimized_phase import OptimizedPhase, freeze_
from d2dmoe_pl.phases._repeated_layers import mean_over_runs
from d2dmoe_pl.phases._router_cache import MIB, RouterCache, UnevenTokensError, is_one_epoch, why_not_cached
from d2dmoe_pl.phases._row_cache import RowCache

_LOG = logging.getLogger(__name__)


class RouterTraining(OptimizedPhase):
    """A phase that adds a router to every MoE layer and trains it, if there is anything in it to train.

    Args:
        router: Of every layer.
        gate: Saved with the model.
        cache_memory: MiB a process for what the routers learn from. Since the model is frozen, it is computed in one
            epoch only and kept, what is beyond this in a file in the run's folder; the other epochs shuffle its tokens
            and cost only the routers. Targets over a batch's largest stay those of the batch in that epoch. Not done
            where epochs see different samples: augmented or streamed ones, or a part of the batches; nor at 0.
        kwargs: As for :class:`d2dmoe_pl.phases.OptimizedPhase`.

    Raises:
        ConfigError: If ``cache_memory`` is negative.
    """

    starts_from = "experts"
    ends_at = "routed"
    can_be_sharded = True
    kept_whole = (Router,)

    def __init__(self, router: RouterConfig, gate: GateConfig, cache_memory: int = 2048, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check(cache_memory >= 0, f"cache_memory={cache_memory}: must not be negative; MiB, 0 for no cache")
        self.router_config = router
        self.gate_config = gate
        self.cache_memory = cache_memory
        self._caches = False
        self._cache: RouterCache | None = None

    @abstractmethod
    def targets(self, name: str, hidden: Tensor) -> Tensor:
        """What the router of the layer ``name`` is to give where its experts' activations are ``hidden``.

        Args:
            name: Of the layer.
            hidden: ``(N, E, s)``.

        Returns:
            ``(N, E)``.
        """

    def transform_(self, model: nn.Module) -> None:
        add_routers_(model, self.router_config)
        freeze_(model, trained=[layer.get_router() for layer in moe_layers(model).values()])

    def finish_(self, model: nn.Module) -> None:
        set_gate_(model, self.gate_config)  # training ran all experts

    def prepare_evaluation_(self, model: nn.Module) -> None:
        """Keep the gate that the model was saved with, unless another is asked for, which is said."""
        layers = moe_layers(model)
        saved = {name: None if layer.gate is None else layer.gate.config for name, layer in layers.items()}
        wanted = {name: self.evaluation_gate(gate) for name, gate in saved.items()}
        changed = [name for name in layers if wanted[name] != saved[name]]
        if changed:
            asked, before = ({str(gates[name]): None for name in changed} for gates in (wanted, saved))
            notice(
                f"Evaluated with {', '.join(asked)}, which is asked for, in the place of what was saved, "
                f"{', '.join(sorted(before))}."
            )
            for gate in {wanted[name] for name in changed}:
                given = [name for name in changed if wanted[name] == gate]
                set_gate_(model, gate, partial(_is_among, given))

    def evaluation_gate(self, saved: GateConfig | None) -> GateConfig:
        """The gate to evaluate a model with that was saved with ``saved``."""
        return self.gate_config

    def on_validation_epoch_start(self) -> None:
        if self.is_fitting:  # what is recorded is of the gate that is saved
            set_gate_(self.model, self.gate_config)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.is_fitting:
            set_gate_(self.model, None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return super().configure_optimizers() if self._is_trained() else None

    def on_fit_start(self) -> None:
        self._layers = moe_layers(self.model)

    def on_train_start(self) -> None:
        self._cache = None  # of a training that was broken off
        self._folder = self.trainer.log_dir or self.trainer.default_root_dir  # asked on every process
        self._caches = self._is_trained() and self.cache_memory > 0 and not is_one_epoch(self.trainer)
        reason = why_not_cached(self.trainer, self.data.augmented) if self._caches else None
        if reason is not None:
            notice(f"Router inputs are not cached: {reason}.")
            self._caches = False
        if self._caches:
            rows = RowCache(int(self.trainer.num_training_batches), self.cache_memory * MIB, self._folder)
            self._cache = RouterCache(rows, self.data.seed)
            self._catch_up(self._loader.done_of_first_epoch)

    def on_train_batch_start(self, batch: Batch | Tensor, batch_idx: int) -> int | None:
        return None if self._is_trained() else -1  # -1 ends the epoch

    def training_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        losses = self._cached_losses(batch) if isinstance(batch, Tensor) else self._router_losses(batch)
        loss = torch.stack(list(losses.values())).mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log_by_layer("router_loss", losses)
        return loss

    def on_train_epoch_end(self) -> None:
        self._complete_cache()

    @torch.no_grad()
    def _catch_up(self, done: int) -> None:
        """After a resumption: take the batches that were done in the first epoch into the cache once more."""
        precision = self.trainer.precision_plugin
        for batch in islice(self._loader.batches_of(epoch=0), done):
            moved = self.trainer.strategy.batch_to_device(precision.convert_input(batch))
            with precision.train_step_context():
                self._router_losses(moved)
        if done >= self.trainer.num_training_batches:
            self._complete_cache()

    def _complete_cache(self) -> None:
        """At the end of the first epoch: let the next ones take their batches from the cache."""
        if self._cache is None or self._loader.cached is not None:
            return
        if self._cache.rows.added < self.trainer.num_training_batches:
            self._cache = None
            return
        with self._cache_can_fail():
            self._cache.rows.complete()
            self._loader.cached = self._cache.batches

    def conclude(self) -> None:
        if self._cache is not None:
            self._loader.cached = self._cache = None

    @property
    def _loader(self) -> CacheableLoader:
        """The loader of the samples, where what routers learn from is cached; streams have another kind."""
        loader = self.trainer.train_dataloader
        assert isinstance(loader, CacheableLoader)
        return loader

    def _is_trained(self) -> bool:
        return any(layer.get_router().is_trained for layer in moe_layers(self.model).values())

    def _router_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of each router, by layer, from one pass of the frozen model."""
        losses: defaultdict[str, list[Tensor]] = defaultdict(list)

        def learn(name: str, tokens: Tensor, hidden: Tensor) -> None:
            target = self.targets(name, hidden)  # (N, E)
            if self._cache is not None:
                self._cache.add(name, tokens, target)
            with torch.enable_grad():
                losses[name].append(self._layers[name].get_router().loss(tokens, target))

        with observed(self._layers, learn), torch.no_grad():
            self.run_layers(batch)
        if self._cache is not None:
            with self._cache_can_fail():
                self._cache.end_batch()
        return mean_over_runs(losses)

    @contextmanager
    def _cache_can_fail(self) -> Iterator[None]:
        """Go on without a cache where there is no disk for it, or layers have no rows in common."""
        try:
            yield
        except (OSError, UnevenTokensError) as error:
            _LOG.warning("router inputs are not cached: %s", error)
            self._cache, self._caches = None, False

    def _cached_losses(self, rows: Tensor) -> dict[str, Tensor]:
        """The loss of each router, by layer, on rows ``(n, columns)`` of the cache."""
        assert self._cache is not None
        examples = self._cache.examples(rows)
        return {name: self._layers[name].get_router().loss(*example) for name, example in examples.items()}


def _is_among(names: Sequence[str], layer: nn.Module, name: str) -> bool:
    return name in names
