"""What every phase shares: where its model comes from, the course of its life, how it is evaluated."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, cast

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MetricCollection

from d2dmoe_pl.adapters import ModelSource, adapter_for
from d2dmoe_pl.artifact import load_model, read_artifact
from d2dmoe_pl.artifact_parts import Artifact, PhaseRecord
from d2dmoe_pl.data.epoch_order import folded, seed_generators
from d2dmoe_pl.data.task import Batch, Task
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.budgets.budget_path import set_budget_path_
from d2dmoe_pl.phases._accumulated_gradients import AccumulatedGradients
from d2dmoe_pl.phases._best_checkpoint import BestEpoch, find_moved_, restore_best_
from d2dmoe_pl.phases._exact_averages import ExactAverages
from d2dmoe_pl.phases._exact_types import ExactTypes
from d2dmoe_pl.phases._labels import build_for, number_as_model
from d2dmoe_pl.phases._last_validation import validate_again
from d2dmoe_pl.phases._layers_over_steps import LayersOverSteps
from d2dmoe_pl.phases._model_checks import change_in_place, check_fits, check_head
from d2dmoe_pl.phases._seeded_course import SeededCourse
from d2dmoe_pl.phases._sharding import shard_, shares_model

COURSE = "phase"  # key in checkpoints


class Phase(ExactTypes):
    """One step from a dense model to a dynamic-k one: takes a model, changes it, leaves an artifact.

    The course of a phase, in which subclasses define what they need of 1, 2, 4, 5 and 6:

    1. :meth:`check_start` refuses a model that this phase cannot start from;
    2. :meth:`transform_` gives the model the structure that the phase works on;
    3. it is fitted, in the usual Lightning hooks;
    4. :meth:`conclude` gathers what was found out, once, on every process;
    5. :meth:`finish_` gives the model the structure that it leaves with;
    6. :meth:`tensors` are saved beside it.

    The checks that come before a chain starts go through 1, 2 and 5 on the meta device. To evaluate, a phase takes the
    model that it left itself, and only :meth:`prepare_evaluation_` is called.

    Attributes:
        starts_from: The stage, ``dense``, ``experts`` or ``routed``, that a model must have to be fitted.
        ends_at: The stage that it has afterwards.
        makes_head: Whether a source's model gets a new head where its own is for other labels.
        takes_samples_in_order: Whether it is fitted on training samples in order and unaugmented.
        can_be_sharded: Whether it can work with a model whose parameters are parted among processes.
        kept_whole: Kinds of modules that it trains beside a frozen model, which every process has whole then.
        leaves: Names of the tensor files that its artifact has beside the weights; :meth:`tensors` gives them.
        finds_budgets: Whether it leaves a model that knows budgets.
        model: The network, once made.
        task: What it is to do: the data's.
        metrics: The task's metrics by split, ``validation`` and ``test`` among them.
        history: The phases that it went through before this one.
        measured: What the last validation during the fit found, by name.
        best: Once fitted, the epoch whose weights it has, where a metric is monitored; None for the last.
        goes_on_otherwise: Whether its weights are, in the end, others than those of the last step, and measured anew.

    Args:
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.
        source: A pretrained or new model, instead of ``init_from``.

    Raises:
        ConfigError: If both ``init_from`` and ``source`` are given.
    """

    starts_from: ClassVar[str] = "dense"
    ends_at: ClassVar[str] = "dense"
    makes_head: ClassVar[bool] = False
    takes_samples_in_order: ClassVar[bool] = False
    leaves: ClassVar[tuple[str, ...]] = ()
    can_be_sharded: ClassVar[bool] = False
    kept_whole: ClassVar[tuple[type[nn.Module], ...]] = ()
    finds_budgets: ClassVar[bool] = False
    model: nn.Module
    task: Task
    metrics: nn.ModuleDict

    def __init__(self, init_from: str | None = None, source: ModelSource | None = None) -> None:
        super().__init__()
        check(
            init_from is None or source is None,
            f"init_from={init_from!r}: allowed only without source, since both say where the model comes from",
        )
        self.init_from = init_from
        self.source = source
        self.model = None  # type: ignore[assignment] # until configure_model
        self.task = None  # type: ignore[assignment] # until configure_model
        self.history: list[PhaseRecord] = []
        self.best: BestEpoch | None = None
        self.goes_on_otherwise = False
        self.measured: dict[str, float] = {}
        self._is_ended = False
        self._layers_over_steps = LayersOverSteps()

    def check_start(self, stage: str, came_from: str, beside: Collection[str]) -> None:
        """Raise ``ConfigError`` unless this phase can be fitted from what another left.

        Args:
            stage: The model's.
            came_from: The phase that it is the work of.
            beside: Names of the tensor files that this phase left beside the weights.
        """
        check(
            stage == self.starts_from,
            f"init_from={self.init_from!r}: is the work of {came_from}, at stage {stage!r}; "
            f"{type(self).__name__} starts from stage {self.starts_from!r}",
        )

    def transform_(self, model: nn.Module) -> None:
        """Check that ``model`` can go through this phase, and give it the structure that the phase works on.

        Uses shapes only, so that a whole chain can be checked on the meta device before any of it runs.

        Raises:
            ConfigError: If the model does not fit.
        """

    def conclude(self) -> None:
        """Gather, on every process, what :meth:`finish_` and :meth:`tensors` need; called once, after training."""

    def finish_(self, model: nn.Module) -> None:
        """Give ``model`` the structure that it has when the phase is done, after :meth:`transform_`."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What the fitted phase leaves beside the weights: for each name in ``leaves``, tensors by name."""
        return {}

    def check_data(self, running: "Phase") -> None:
        """Raise ``ConfigError`` if the data of ``running``, a phase in its fit, is too little to fit this one on it."""

    def prepare_evaluation_(self, model: nn.Module) -> None:
        """Set up a model that is loaded to be evaluated, not fitted."""

    @property
    def data(self) -> TaskData:
        """The trainer's data."""
        data: TaskData = self.trainer.datamodule  # type: ignore[attr-defined] # Lightning sets it on the instance
        return data

    @property
    def is_fitting(self) -> bool:
        """Whether the phase is fitted, and not only evaluated."""
        return self.trainer.state.fn == TrainerFn.FITTING

    def read_start(self, is_to_fit: bool = True) -> Artifact | None:
        """The artifact to start from, checked to be whole; None if there is a ``source`` instead.

        Raises:
            ConfigError: If there is neither, or the artifact is broken; for a fit, also if it is in int8.
        """
        check(
            self.init_from is not None or self.source is not None,
            f"init_from={self.init_from}: {type(self).__name__} needs the artifact of an earlier phase, or a source",
        )
        if self.init_from is None:
            return None
        artifact = read_artifact(self.init_from)
        check(
            not (is_to_fit and artifact.quantized),
            f"init_from={str(self.init_from)!r}: is in int8, which no phase can go on from; must be the artifact "
            "that it was made from",
        )
        return artifact

    def configure_model(self) -> None:
        """Make the model; Lightning calls this once the data is set up, possibly more than once."""
        if self.is_made:
            number_as_model(self.data, self.model)  # which may be other data than before
            return
        artifact = self.read_start(self.is_fitting)
        data = self.data
        seed_generators(folded(data.seed, "model"))  # what is new in it does not depend on how the data was read
        assert data.task is not None  # it is set up by now
        if artifact is None:
            assert self.source is not None
            self.model = build_for(data, self.source, self.makes_head)
            check_head(self.model, data.head)
        else:
            self.model = load_model(artifact.path, mapped=shares_model(self))
            self.history = artifact.history
            check_head(self.model, data.head)
            number_as_model(data, self.model)
        self.task = data.task
        check_fits(self.model, data)
        if self.is_fitting:
            if artifact is None:
                self.check_start("dense", "a source", ())
            else:
                self.check_start(artifact.stage, artifact.phase, artifact.tensors)
            if data.preprocessing is not None:
                adapter_for(self.model).set_preprocessing_(self.model, data.preprocessing)
            self.model.train()
            set_budget_path_(self.model, None)  # of the model as it was
            change_in_place(self.transform_, self.model)
        else:
            self.prepare_evaluation_(self.model)
        splits = [split for stage in ("validation", "test") for split in data.split_names(stage)]
        self.metrics = nn.ModuleDict({split: self.task.metrics() for split in splits})
        shard_(self.model, self)

    def configure_callbacks(self) -> list[L.Callback]:
        return [SeededCourse(), ExactAverages(), AccumulatedGradients()]

    def on_train_end(self) -> None:
        self._layers_over_steps.draw(self.loggers, self.global_step, is_last=True)
        self.end_training()

    def end_training(self) -> None:
        """Let the model have the structure that it leaves with; done once.

        A training that is resumed from its very end has nothing to train, and none of training's hooks.
        """
        if self._is_ended:
            return
        self._is_ended = True
        self._keep_measured()
        self.best = restore_best_(self)
        self.goes_on_otherwise = self.best is not None and self.best.step != self.global_step
        self.conclude()
        if self.goes_on_otherwise:
            self.measured = {}
            validate_again(self.trainer)
            self._keep_measured()
        change_in_place(self.finish_, self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._keep_measured()
        checkpoint[COURSE] = {"measured": self.measured}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.measured = dict(checkpoint.get(COURSE, {}).get("measured", {}))
        find_moved_(self.trainer, checkpoint)

    def _keep_measured(self) -> None:
        metrics = self.trainer.callback_metrics
        self.measured |= {key: float(value) for key, value in metrics.items() if key.startswith("validation")}

    def logits(self, batch: Batch) -> Tensor:
        """The model's logits for a batch, ``(B, ...)``."""
        return adapter_for(self.model).logits(self.model, batch)

    def run_layers(self, batch: Batch) -> None:
        """Run the model on a batch where its logits are not read, only what is watched inside."""
        adapter_for(self.model).run_layers(self.model, batch)

    def with_written(self, batch: Batch, is_wanted: bool = False) -> Batch:
        """The batch with what the model writes for it, if that is wanted, or if the task's metrics are of it."""
        if not is_wanted and not self.task.measures_written:
            return batch
        return {**batch, "written": adapter_for(self.model).write(self.model, batch, self.task.most_written)}

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The task's loss, a scalar."""
        return self.task.loss(logits, batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation_step("validation", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation_step("test", batch, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """What the task makes of the logits, one row a sample."""
        batch = self.with_written(batch, self.task.most_written > 0)
        return self.task.predictions(batch["written"] if "written" in batch else self.logits(batch), batch)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("validation")
        self._layers_over_steps.draw(self.loggers, self.global_step)

    def log_by_layer(self, kind: str, values: Mapping[str, Tensor]) -> None:
        """Log a scalar of each layer, by its name: a picture in TensorBoard, as often as curves have a point."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined] # 0 for never
        if not self.trainer.training or (every > 0 and (self.global_step + 1) % every == 0):
            self._layers_over_steps.add(kind, self.global_step, values)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _evaluation_step(self, stage: str, batch: Batch, dataloader_idx: int) -> None:
        split = self.data.split_names(stage)[dataloader_idx]
        self.metrics_of(split).update(self.logits(batch), self.with_written(batch))

    def metrics_of(self, split: str) -> MetricCollection:
        """The task's metrics of one split."""
        return cast(MetricCollection, self.metrics[split])

    def _log_metrics(self, stage: str) -> None:
        for split, metrics in ((split, self.metrics_of(split)) for split in self.data.split_names(stage)):
            if metrics["loss"].update_called:  # a phase with a step of its own measures otherwise
                values = {f"{split}/{name}": value for name, value in metrics.compute().items()}
                self.log_dict(values, prog_bar=True, sync_dist=True)  # the same on all processes by now
                metrics.reset()
