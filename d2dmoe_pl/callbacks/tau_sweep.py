"""The curve of the task's main metric against cost."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from rich.console import Console
from torch import nn
from torchmetrics import MetricCollection

from d2dmoe_pl.callbacks.sweep_settings import BUDGET, SweepSetting, check_budgets, reachable
from d2dmoe_pl.callbacks.sweep_table import (
    SweepRow,
    as_markdown,
    as_table,
    draw_curve,
    draw_layers,
    drawn,
    shown,
    sweep_row,
    write_csv,
)
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.metrics.expert_load import ExpertLoad
from d2dmoe_pl.metrics.flops import SampleSize, flops_outside_ffns, sample_inputs, sample_sizes
from d2dmoe_pl.metrics.model_cost import ModelCost
from d2dmoe_pl.moe.budgets.budget_path import budget_path
from d2dmoe_pl.moe.find_layers import expert_layers, moe_layers
from d2dmoe_pl.phases import Phase

DEFAULT_TAUS = [0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0]


@dataclass
class _SplitMetrics:
    """What is gathered over one split: the task's metrics and the experts' load at each setting, the samples' cost."""

    name: str
    metrics: list[MetricCollection]
    loads: list[ExpertLoad]
    cost: ModelCost


class TauSweep(L.Callback):
    """Run every validation and test batch at each setting, and report the task's main metric and FLOPs.

    Writes ``tau_sweep.csv`` and ``tau_sweep.png`` to the run's folder, a table to the terminal, and the table, the
    curve and a heat map of the layers to TensorBoard. FLOPs count a multiply-add as 2, the routers in, padding out.

    A model whose routing has no ``tau``, such as MoEBERT's, is one point instead of a curve.

    Args:
        taus: Values in [0, 1]; larger runs more experts, 1 is the dense layer. None for some from 0.3 to 1.
        rule: Gating rule, e.g. the name of a file in ``moe/gating``.
        ks: With rule ``topk``, numbers of experts that each token runs, swept instead of ``taus``.
        budgets: With ``BudgetCalibration``, shares of the dense FFNs' FLOPs, swept instead of ``taus``, with a ``tau``
            for each layer; ``rule`` is then the model's.

    Raises:
        ConfigError: If there is no ``tau``, ``k`` or budget, one out of range, ``ks`` with another rule, or an unknown
            rule.
    """

    def __init__(
        self,
        taus: list[float] | None = DEFAULT_TAUS,
        rule: str = "dynk_max",
        ks: list[int] | None = None,
        budgets: list[float] | None = None,
    ) -> None:
        check(taus != [], "taus=[]: must hold at least one value in [0, 1]")
        check(ks != [], "ks=[]: must hold at least one number of experts")
        check(budgets != [], "budgets=[]: must hold at least one share of the dense FFNs' FLOPs")
        check(ks is None or taus in (None, DEFAULT_TAUS), f"ks={ks}: allowed only without taus")
        check(
            budgets is None or (ks is None and taus in (None, DEFAULT_TAUS)),
            f"budgets={budgets}: allowed only without taus and ks",
        )
        for budget in budgets or []:
            check(0 < budget <= 1, f"budgets={budget}: must lie in (0, 1], a share of the dense FFNs' FLOPs")
        if budgets is not None:
            self.settings = [SweepSetting(BUDGET, budget) for budget in budgets]
        else:
            swept: list[float] = list(DEFAULT_TAUS if taus is None else taus) if ks is None else list(ks)
            self.settings = [SweepSetting("tau" if ks is None else "k", value, rule) for value in swept]
            for setting in self.settings:
                setting.gate  # noqa: B018 (which checks it)
        self.rows: dict[str, list[SweepRow]] = {}
        self._flops_outside: dict[SampleSize, int] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": {split: [asdict(row) for row in rows] for split, rows in self.rows.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = {field.name for field in fields(SweepRow)}  # an earlier version's rows are made anew
        self.rows = {
            split: [SweepRow(**row) for row in rows]
            for split, rows in state_dict["rows"].items()
            if all(row.keys() == known for row in rows)
        }

    def check_model(self, phase: Phase, model: nn.Module) -> None:
        """Raise ``ConfigError`` unless ``model``, as ``phase`` leaves it, can be set to what is swept."""
        self._check_phase(phase)
        if self.settings[0].swept == BUDGET:
            check_budgets(phase.finds_budgets or not moe_layers(model))
        elif moe_layers(model):
            try:
                for setting in self.settings:
                    with setting.on(model):
                        pass
            except ConfigError as error:  # a phase may have a setting of the same name
                raise ConfigError(f"callbacks: TauSweep: {error}") from error

    def setup(self, trainer: L.Trainer, phase: Phase, stage: str) -> None:
        self._check_phase(phase)

    @staticmethod
    def _check_phase(phase: Phase) -> None:
        check(
            phase.ends_at == "routed",
            "callbacks: TauSweep needs a phase that makes routers (RouterRegression, ExpertSelection, "
            f"MoEBERTDistillation), not {type(phase).__name__}",
        )

    def on_validation_start(self, trainer: L.Trainer, phase: Phase) -> None:
        self._start(trainer, phase, "validation")

    def on_test_start(self, trainer: L.Trainer, phase: Phase) -> None:
        self._start(trainer, phase, "test")

    def on_validation_batch_end(
        self, trainer: L.Trainer, phase: Phase, outputs: object, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._sweep_batch(phase, batch, self._splits[dataloader_idx])

    def on_test_batch_end(
        self, trainer: L.Trainer, phase: Phase, outputs: object, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._sweep_batch(phase, batch, self._splits[dataloader_idx])

    def on_validation_end(self, trainer: L.Trainer, phase: Phase) -> None:
        if not trainer.sanity_checking:
            self._report_all(trainer, phase, final=trainer.state.fn == TrainerFn.VALIDATING)

    def on_test_end(self, trainer: L.Trainer, phase: Phase) -> None:
        self._report_all(trainer, phase, final=True)

    def _start(self, trainer: L.Trainer, phase: Phase, stage: str) -> None:
        self._layers = expert_layers(phase.model)
        self._settings: Sequence[SweepSetting | None] = [None]
        if trainer.sanity_checking and self.settings[0].swept == BUDGET:
            self._settings = []  # they are not known yet
        elif moe_layers(phase.model):
            self._settings = reachable(self.settings, phase.model)
        num_experts = [layer.sizes.num_experts for layer in self._layers.values()]
        self._splits = [
            _SplitMetrics(
                name,
                [phase.task.metrics().to(phase.device) for _ in self._settings],
                [ExpertLoad(num_experts).to(phase.device) for _ in self._settings],
                ModelCost().to(phase.device),
            )
            for name in phase.data.split_names(stage)
        ]

    @torch.no_grad()
    def _sweep_batch(self, phase: Phase, batch: Batch, split: _SplitMetrics) -> None:
        for setting, metrics, load in zip(self._settings, split.metrics, split.loads, strict=True):
            with _set(setting, phase):
                with self._watched(load), phase.trainer.precision_plugin.forward_context():
                    logits = phase.logits(batch)
                metrics.update(logits, phase.with_written(batch))
        sizes = sample_sizes(batch)
        for size in set(sizes) - self._flops_outside.keys():
            self._flops_outside[size] = flops_outside_ffns(phase.model, sample_inputs(batch, size))
        split.cost.update([self._flops_outside[size] for size in sizes])

    def _watched(self, load: ExpertLoad) -> AbstractContextManager[None]:
        """Count the experts that run in the body, and what they do."""
        layers = list(enumerate(self._layers.values()))
        counting = [layer.watch(partial(load.update, index)) for index, layer in layers]
        return hooked([*counting, *(layer.watch_work(partial(load.update_work, index)) for index, layer in layers)])

    def _report_all(self, trainer: L.Trainer, phase: Phase, final: bool) -> None:
        for split in self._splits:
            self._report(trainer, phase, split, final)

    def _report(self, trainer: L.Trainer, phase: Phase, measured: _SplitMetrics, final: bool) -> None:
        split, metric = measured.name, phase.task.main_metric
        samples, flops_outside = measured.cost.compute()  # every process takes part in the sums
        loads = [load.compute() for load in measured.loads]
        values = [metrics.compute() for metrics in measured.metrics]
        self.rows[split] = []
        for setting, value, load in zip(self._settings, values, loads, strict=True):
            scores = float(value["loss"]), phase.task, float(value[metric])
            with _set(setting, phase):  # which says whether routers run
                row = sweep_row(split, setting, *scores, self._layers, load, samples, flops_outside)
            self.rows[split].append(row)
        folder = trainer.log_dir
        if not trainer.is_global_zero:
            return
        rows = [row for split_rows in self.rows.values() for row in split_rows]
        key = f"{split}/{metric}"
        dense = [record for record in phase.history if key in record.metrics][:1]
        references = {f"{split} after {record.phase}": shown(record.metrics[key], phase.task) for record in dense}
        curve = drawn(draw_curve(rows, references))
        if folder is not None:
            write_csv(rows, Path(folder) / "tau_sweep.csv")
            Image.fromarray(curve).save(Path(folder) / "tau_sweep.png")
        self._log(trainer, split, curve)
        if final:
            Console(markup=False).print(as_table(self.rows[split], self._title(split, phase)))
            if folder is not None:
                Console(markup=False).print(
                    f"Curve and table: {Path(folder) / 'tau_sweep.png'}, tau_sweep.csv", soft_wrap=True
                )

    def _title(self, split: str, phase: Phase) -> str:
        setting = self._settings[0]
        if setting is None:
            return split
        path = budget_path(phase.model)
        rule = path.rule if setting.swept == BUDGET and path is not None else setting.rule
        routers = {layer.get_router().config.kind for layer in moe_layers(phase.model).values()}
        return f"{split}, rule {rule}, router {' and '.join(sorted(routers))}"

    def _log(self, trainer: L.Trainer, split: str, curve: np.ndarray) -> None:
        """The curve, a heat map of the layers and the table; scalars at each setting would be hundreds."""
        rows = self.rows[split]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                step = trainer.global_step
                logger.experiment.add_image(f"tau_sweep/{split}", curve, step, dataformats="HWC")
                logger.experiment.add_figure(f"tau_sweep/{split}_layers", draw_layers(rows), step)
                logger.experiment.add_text(f"tau_sweep/{split}_table", as_markdown(rows), step)


def _set(setting: SweepSetting | None, phase: Phase) -> AbstractContextManager[None]:
    """Have the model at a setting in the body; one whose routing has none is as it is."""
    return nullcontext() if setting is None else setting.on(phase.model)
