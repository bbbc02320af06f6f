"""What every phase shares: where its model comes from, how it is evaluated, how it is optimised."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from d2dmoe_pl.adapters import ModelSource, adapter_for
from d2dmoe_pl.artifact import Artifact, PhaseRecord, load_model, read_artifact
from d2dmoe_pl.errors import check

Batch = Mapping[str, Tensor]
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
        label_names = self.trainer.datamodule.label_names
        if artifact is None:
            self.model = self.source.build(label_names)
        else:
            self.model = load_model(artifact.path)
            self.history = artifact.history
        if self.trainer.state.fn == TrainerFn.FITTING:
            if artifact is None:
                self.check_start("dense", "a source", ())
            else:
                self.check_start(artifact.stage, artifact.phase, artifact.tensors)
            self.model.train()
            self.transform_(self.model)
        else:
            self.prepare_evaluation_(self.model)
        self.metrics = nn.ModuleDict(
            {
                stage: nn.ModuleDict(
                    {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(len(label_names), average="micro")}
                )
                for stage in ("validation", "test")
            }
        )

    def prepare_evaluation_(self, model: nn.Module) -> None:
        """Set up a model that is loaded to be evaluated, not fitted."""

    def logits(self, batch: Batch) -> Tensor:
        """The model's logits for a batch, ``(B, C)``."""
        return adapter_for(self.model).logits(self.model, batch)

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, a scalar."""
        return F.cross_entropy(logits, batch["labels"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step("validation", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Class indices ``(B,)`` and probabilities ``(B, C)``."""
        probabilities = self.logits(batch).softmax(dim=-1)
        return {"predictions": probabilities.argmax(dim=-1), "probabilities": probabilities}

    def _evaluation_step(self, stage: str, batch: Batch) -> None:
        logits = self.logits(batch)
        metrics = self.metrics[stage]
        metrics["loss"].update(self.task_loss(logits, batch), weight=len(logits))
        metrics["accuracy"].update(logits, batch["labels"])
        self.log_dict({f"{stage}/{name}": metric for name, metric in metrics.items()}, on_epoch=True, prog_bar=True)


class OptimizedPhase(Phase):
    """A phase that trains parameters.

    Args:
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.
        source: A pretrained or new model, instead of ``init_from``.
        optimizer: Any class of ``torch.optim``, with its arguments; biases and norms are not decayed.
        warmup: Share of the training over which the learning rate rises linearly from 0.
        decay: How the learning rate falls to 0 after the warm-up: ``none``, ``linear`` or ``cosine``.

    Raises:
        ConfigError: If ``warmup`` is outside [0, 1].
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

    def configure_optimizers(self) -> dict:
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        # experts keep vectors of their own as the rows of a matrix
        vectors = ("bias", "norm_weight")
        undecayed = {name for name, parameter in trained if parameter.dim() < 2 or name.endswith(vectors)}
        groups = [
            {"params": [parameter for name, parameter in trained if name not in undecayed]},
            {"params": [parameter for name, parameter in trained if name in undecayed], "weight_decay": 0.0},
        ]
        optimizer = self.optimizer([group for group in groups if group["params"]])
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
