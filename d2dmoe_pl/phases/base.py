"""What every phase shares: where its model comes from, how it is evaluated, how it is optimised."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from d2dmoe_pl.adapters import ModelSource, adapter_for
from d2dmoe_pl.artifact import Artifact, PhaseRecord, load_model, read_artifact
from d2dmoe_pl.data.task import VOCABULARY_HEADS, Batch, Head, Task
from d2dmoe_pl.errors import check

OptimizerFactory = Callable[[Iterable], torch.optim.Optimizer]


class Phase(L.LightningModule):
    """One step from a dense model to a dynamic-k one: takes a model, changes it, leaves an artifact.

    Subclasses say what they start from in ``starts_from``, check and restructure the model in :meth:`transform_`, and
    do their work in the usual Lightning hooks. The model is made in ``configure_model``, when the data is known.

    Attributes:
        starts_from: The stage, ``dense``, ``experts`` or ``routed``, that a model must have to be fitted.
        ends_at: The stage that it has afterwards.
        leaves: Names of the tensor files that its artifact has beside the weights; :meth:`tensors` gives them.
        model: The network, once made.
        task: What it is to do: the data's.
        metrics: The task's metrics by split, ``validation`` and ``test`` among them.
        history: The phases that it went through before this one.

    Args:
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.
        source: A pretrained or new model, instead of ``init_from``.

    Raises:
        ConfigError: If both ``init_from`` and ``source`` are given.
    """

    starts_from: ClassVar[str] = "dense"
    ends_at: ClassVar[str] = "dense"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __init__(self, init_from: str | None = None, source: ModelSource | None = None) -> None:
        super().__init__()
        check(
            init_from is None or source is None,
            f"init_from={init_from!r}: allowed only without source, since both say where the model comes from",
        )
        self.init_from = init_from
        self.source = source
        self.model: nn.Module | None = None
        self.task: Task | None = None
        self.history: list[PhaseRecord] = []

    def transform_(self, model: nn.Module) -> None:
        """Check that ``model`` can go through this phase, and give it the structure that the phase works on.

        Uses shapes only, so that a whole chain can be checked on the meta device before any of it runs.

        Raises:
            ConfigError: If the model does not fit.
        """

    def finish_(self, model: nn.Module) -> None:
        """Give ``model`` the structure that it has when the phase is done, after :meth:`transform_`."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What the fitted phase leaves beside the weights: for each name in ``leaves``, tensors by name."""
        return {}

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

    def read_start(self) -> Artifact | None:
        """The artifact to start from, checked to be whole; None if there is a ``source`` instead.

        Raises:
            ConfigError: If there is neither, or the artifact is broken.
        """
        check(
            self.init_from is not None or self.source is not None,
            f"init_from={self.init_from}: {type(self).__name__} needs the artifact of an earlier phase, or a source",
        )
        return None if self.init_from is None else read_artifact(self.init_from)

    def configure_model(self) -> None:
        """Make the model; Lightning calls this once the data is set up, possibly more than once."""
        if self.model is not None:
            return
        artifact = self.read_start()
        data = self.trainer.datamodule
        self.task = data.task
        if artifact is None:
            self.model = self.source.build(self.task.label_names)
        else:
            self.model = load_model(artifact.path)
            self.history = artifact.history
        check_head(self.model, self.task.head)
        check_outputs(self.model, self.task)
        check_token_ids(self.model, data.num_token_ids)
        check_length(self.model, data.sample_length)
        if self.trainer.state.fn == TrainerFn.FITTING:
            if artifact is None:
                self.check_start("dense", "a source", ())
            else:
                self.check_start(artifact.stage, artifact.phase, artifact.tensors)
            self.model.train()
            self.transform_(self.model)
        else:
            self.prepare_evaluation_(self.model)
        splits = [split for stage in ("validation", "test") for split in data.split_names(stage)]
        self.metrics = nn.ModuleDict({split: self.task.metrics() for split in splits})

    def prepare_evaluation_(self, model: nn.Module) -> None:
        """Set up a model that is loaded to be evaluated, not fitted."""

    def logits(self, batch: Batch) -> Tensor:
        """The model's logits for a batch, ``(B, ...)``."""
        return adapter_for(self.model).logits(self.model, batch)

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The task's loss, a scalar."""
        return self.task.loss(logits, batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation_step("validation", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation_step("test", batch, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """What the task makes of the logits, one row a sample."""
        return self.task.predictions(self.logits(batch), batch)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("validation")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _evaluation_step(self, stage: str, batch: Batch, dataloader_idx: int) -> None:
        split = self.trainer.datamodule.split_names(stage)[dataloader_idx]
        self.metrics[split].update(self.logits(batch), batch)

    def _log_metrics(self, stage: str) -> None:
        for split in self.trainer.datamodule.split_names(stage):
            values = {f"{split}/{name}": value for name, value in self.metrics[split].compute().items()}
            self.log_dict(values, prog_bar=True, sync_dist=True)  # the same on all processes by now
            self.metrics[split].reset()


def check_head(model: nn.Module, head: Head) -> None:
    """Raise ``ConfigError`` unless ``model`` has the head that the data needs."""
    has = adapter_for(model).head(model)
    check(
        has == head,
        f"head={has!r} of {type(model).__name__}: the data needs a model with head {head!r} "
        "(the source decides it, e.g. HuggingFaceModel by its task)",
    )


def check_outputs(model: nn.Module, task: Task) -> None:
    """Raise ``ConfigError`` unless ``model`` has an output for each label of the task, or each token id at least."""
    has, needed = adapter_for(model).num_outputs(model), task.num_outputs
    name = type(model).__name__
    if task.head in VOCABULARY_HEADS:  # many a model's is rounded up
        check(has >= needed, f"vocabulary={has} of {name}: must be at least {needed}, which the data's tokenizer has")
        return
    check(
        has == needed,
        f"outputs={has} of {name}: must be {needed}, since the data has the labels {', '.join(task.label_names[:20])}",
    )


def check_token_ids(model: nn.Module, num_token_ids: int | None) -> None:
    """Raise ``ConfigError`` unless ``model`` has an embedding for each token id of the data."""
    has = adapter_for(model).vocabulary_size(model)
    check(
        num_token_ids is None or has is None or num_token_ids <= has,
        f"tokenizer: gives {num_token_ids} token ids; must be at most the {has} that {type(model).__name__} embeds",
    )


def check_length(model: nn.Module, length: int | None) -> None:
    """Raise ``ConfigError`` unless ``model`` has a position for each of the ``length`` tokens of a sample."""
    has = adapter_for(model).num_positions(model)
    check(
        length is None or has is None or length <= has,
        f"length={length}: must be at most {has}, the positions that {type(model).__name__} has",
    )


class OptimizedPhase(Phase):
    """A phase that trains parameters.

    Args:
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.
        source: A pretrained or new model, instead of ``init_from``.
        optimizer: Any class of ``torch.optim``, with its arguments; biases and norms are not decayed.
        warmup: Share of the training over which the learning rate rises linearly from 0.
        decay: How the learning rate falls to 0 after the warm-up: ``none``, ``linear`` or ``cosine``.

    Raises:
        ConfigError: If ``warmup`` is outside [0, 1]; to fit, for gradients clipped with a fused optimizer in mixed
            precision.
    """

    def __init__(
        self,
        init_from: str | None = None,
        source: ModelSource | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        warmup: float = 0.1,
        decay: Literal["none", "linear", "cosine"] = "linear",
    ) -> None:
        super().__init__(init_from, source)
        check(0.0 <= warmup <= 1.0, f"warmup={warmup}: must lie in [0, 1], a share of the training")
        self.optimizer = optimizer
        self.warmup = warmup
        self.decay = decay

    def learning_rate(self, name: str) -> float | None:
        """What the learning rate of the parameter ``name`` rises to; None for the optimizer's own."""
        return None

    def configure_optimizers(self) -> dict:
        vectors = ("bias", "norm_weight")  # experts keep vectors of their own as the rows of a matrix
        groups: dict[tuple, list[nn.Parameter]] = {}  # by what they have of their own
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decayed = parameter.dim() >= 2 and not name.endswith(vectors)
                own = {"weight_decay": None if decayed else 0.0, "lr": self.learning_rate(name)}
                given = tuple((key, value) for key, value in own.items() if value is not None)
                groups.setdefault(given, []).append(parameter)
        optimizer = self.optimizer([{"params": trained, **dict(given)} for given, trained in groups.items()])
        clipped, mixed = self.trainer.gradient_clip_val, isinstance(self.trainer.precision_plugin, MixedPrecision)
        check(
            not (clipped and mixed and optimizer.defaults.get("fused")),
            f"gradient_clip_val={clipped}: must be null with fused=True in mixed precision, or fused false",
        )
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            return learning_rate_factor(step / max(1, total), self.warmup, self.decay)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])


def learning_rate_factor(progress: float, warmup: float, decay: str) -> float:
    """What the learning rate is multiplied by after a share ``progress`` of the training, in [0, 1]."""
    if progress < warmup:
        return progress / warmup
    rest = (progress - warmup) / max(1.0 - warmup, 1e-12)  # share of the decay that is done
    if decay == "linear":
        return max(0.0, 1.0 - rest)
    if decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, rest)))
    return 1.0


def freeze_(module: nn.Module, trained: Sequence[nn.Module] = ()) -> None:
    """Put ``module`` into evaluation mode without gradients, all but the modules in ``trained``."""
    module.eval().requires_grad_(False)
    for part in trained:
        part.train().requires_grad_(True)
