"""What the data asks of a model: which head, which loss, which metrics. Nothing else knows what is being learnt."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef
from torchmetrics.wrappers import LambdaInputTransformer

from d2dmoe_pl.data.head import VOCABULARY_HEADS, Head
from d2dmoe_pl.data.output_names import places
from d2dmoe_pl.data.symmetric_kl import symmetric_kl
from d2dmoe_pl.errors import check

Batch = Mapping[str, Tensor]


class Task(ABC):
    """What a model is to do with a batch, and how well it does it.

    Attributes:
        head: The head that a model needs.
        label_names: Names of the model's outputs, by index.
        main_metric: The metric to judge by, one of :meth:`scores`.
        in_percent: Whether the main metric is a share of 1, which people read as a percentage.
        higher_is_better: Whether a larger value of the main metric is better.
        most_written: Where predictions are texts, how many tokens of one the model writes at most.
        measures_written: Whether metrics are of these texts; batches to measure then hold ``written`` ``(B, L)``.
        writes_rows: Whether there are :meth:`rows` of predictions for a file.
    """

    head: Head
    label_names: list[str]
    main_metric: str
    in_percent: ClassVar[bool] = True
    higher_is_better: ClassVar[bool] = True
    most_written: int = 0
    measures_written: bool = False
    writes_rows: ClassVar[bool] = False

    @property
    def num_outputs(self) -> int:
        """Number of the model's outputs (of each token, to answer questions)."""
        return len(self.label_names)

    @property
    def is_share_of_samples(self) -> bool:
        """Whether the main metric is the share of samples that are right, which says how far few samples may be off.

        Correlations, F1 and the like are not, nor is the share of words: those of one text are right or wrong together.
        """
        return False

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """What training minimises: a scalar, the mean over what is predicted for the batch."""

    @abstractmethod
    def prediction_loss(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """How far a student's predictions are from its teacher's: a scalar, the mean as in :meth:`loss`."""

    @abstractmethod
    def scores(self) -> dict[str, Metric]:
        """New metrics by name, each with an ``update(logits, batch)`` and summed over processes.

        A metric that computes a dict gives several, under the dict's own names.
        """

    @abstractmethod
    def predictions(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What the logits say, one row a sample."""

    def rows(self, outputs: dict[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
        """One row of a file a sample, or a part of one.

        Args:
            outputs: What :meth:`predictions` gave for a batch.
            labels: The batch's; None where there are none.
        """
        raise NotImplementedError(f"{type(self).__name__} writes no rows")

    def joined(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows to be written, of those of a whole split, costs in them: others where one is of a sample's part."""
        return rows

    def with_label_names(self, label_names: Sequence[str]) -> "Task":
        """The same task for a model whose outputs are these, by index; the task's own names are among them."""
        task = copy(self)
        task.label_names = list(label_names)
        return task

    def curvature_loss(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        """A loss whose squared gradients, halved, tell what a small change of predictions adds to the divergence.

        A task's own loss does, where it is a likelihood's (the Fisher information). The gradient of a squared error is
        zero where predictions are right, whatever the curvature: there it is a sum of outputs with random signs, whose
        squared gradients are the squared change, on average over the signs (Hutchinson, 1990).

        Args:
            logits: Of the batch.
            batch: With ``labels``.
            seed: Of what is drawn.
        """
        return self.loss(logits, batch)

    def weight(self, batch: Batch) -> int:
        """How much the loss of a batch counts in a mean over batches: its number of samples."""
        return len(batch["labels"])

    def metrics(self) -> MetricCollection:
        """New :meth:`scores`, and the mean ``loss``; ``update`` takes (logits, batch)."""
        exact = self.head not in VOCABULARY_HEADS  # whose logits are many
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # of sums; where trainers run in a narrow type it is that
        try:
            loss = MeanLoss(self.loss, self.weight, exact)
            return MetricCollection({"loss": loss, **self.scores()}, compute_groups=False)
        finally:
            torch.set_default_dtype(default)


def at_least_single(values: Tensor) -> Tensor:
    """The values in float32, or in float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class MeanLoss(MeanMetric):
    """Mean of a loss over batches and processes.

    Args:
        loss: Maps (logits, batch) to the mean over the batch.
        weight: Maps a batch to what its mean counts.
        exact: Compute and add in float64, so that the mean does not depend on how samples are put into batches.
    """

    def __init__(
        self, loss: Callable[[Tensor, Batch], Tensor], weight: Callable[[Batch], int], exact: bool = False
    ) -> None:
        super().__init__()
        self.loss = loss
        self.weight_of = weight
        self.exact = exact
        if exact:
            self.set_dtype(torch.float64)

    def update(self, logits: Tensor, batch: Batch) -> None:  # type: ignore[override] # as all metrics of a task
        """Add a batch."""
        super().update(self.loss(logits.double() if self.exact else logits, batch), weight=self.weight_of(batch))

    def compute(self) -> Tensor:
        """The mean so far, a scalar."""
        return super().compute().float()


class Classification(Task):
    """One of ``C`` classes a sample: logits ``(B, C)``, ``labels`` ``(B,)``; cross-entropy.

    Labels can be probabilities ``(B, C)`` instead, as those of mixed images are; to a metric, the likeliest counts.

    Args:
        label_names: Names of the classes by their index.
        metrics: Of ``accuracy``, ``f1`` (of the second of two classes) and ``matthews_correlation``; the first is the
            main one.

    Raises:
        ConfigError: If ``f1`` is asked for with other than two classes.
    """

    head: Head = "classification"
    writes_rows = True

    def __init__(self, label_names: Sequence[str], metrics: Sequence[str] = ("accuracy",)) -> None:
        self.label_names = list(label_names)
        self.main_metric = metrics[0]
        self._names = tuple(metrics)
        classes = self.num_outputs
        check("f1" not in metrics or classes == 2, f"metrics={metrics}: f1 needs two classes, but there are {classes}")
        self._positive = 1  # the class that F1 is of

    def with_label_names(self, label_names: Sequence[str]) -> "Classification":
        task = super().with_label_names(label_names)
        assert isinstance(task, Classification)
        if "f1" in self._names:
            found = places(self.label_names, label_names)
            assert found is not None
            task._positive = found[self._positive]
        return task

    @property
    def is_share_of_samples(self) -> bool:
        return self.main_metric == "accuracy"

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        labels, logits = batch["labels"], at_least_single(logits)
        return F.cross_entropy(logits, labels.to(logits.dtype) if labels.is_floating_point() else labels)

    def prediction_loss(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return symmetric_kl(student_logits, teacher_logits).mean()

    def scores(self) -> dict[str, Metric]:
        is_positive = [partial(_is_class, of, self._positive) for of in (_most_likely, _label)]
        known: dict[str, Callable[[], Metric]] = {
            "accuracy": lambda: _of_classes(MulticlassAccuracy(self.num_outputs, average="micro")),
            "f1": lambda: LambdaInputTransformer(BinaryF1Score(), *is_positive),
            "matthews_correlation": lambda: _of_classes(MulticlassMatthewsCorrCoef(self.num_outputs)),
        }
        return {name: known[name]() for name in self._names}

    def predictions(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Class indices ``(B,)`` and probabilities ``(B, C)``."""
        return {"predictions": _most_likely(logits), "probabilities": logits.softmax(dim=-1)}

    def rows(self, outputs: dict[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
        """Label and prediction by name, and the probability of each class."""
        names, rows = self.label_names, []
        for i, prediction in enumerate(outputs["predictions"].tolist()):
            row: dict[str, Any] = {} if labels is None else {"label": names[int(labels[i])]}
            probabilities = zip(names, outputs["probabilities"][i].tolist(), strict=True)
            row |= {"prediction": names[prediction]} | {f"probability of {name}": p for name, p in probabilities}
            rows.append(row)
        return rows


class Regression(Task):
    """A number a sample: logits ``(B, 1)``, ``labels`` ``(B,)``; mean squared error.

    Args:
        label_name: What the number is called.
    """

    head: Head = "regression"
    main_metric = "pearson"
    writes_rows = True

    def __init__(self, label_name: str) -> None:
        self.label_names = [label_name]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(_number(logits), batch["labels"].float())

    def prediction_loss(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(student_logits.float(), teacher_logits.float())

    def curvature_loss(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        numbers = _number(logits)  # (B,)
        return 2**0.5 * (random_signs(numbers, seed) * numbers).mean()

    def scores(self) -> dict[str, Metric]:
        known = {"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()}
        return {name: LambdaInputTransformer(metric, _number, _label_number) for name, metric in known.items()}

    def predictions(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Numbers ``(B,)``."""
        return {"predictions": _number(logits)}

    def rows(self, outputs: dict[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
        """Label and prediction."""
        known = [] if labels is None else labels.tolist()
        return [
            {**({"label": float(known[i])} if known else {}), "prediction": prediction}
            for i, prediction in enumerate(outputs["predictions"].tolist())
        ]


def random_signs(values: Tensor, seed: int) -> Tensor:
    """1 or -1 for each value."""
    drawn = torch.randint(2, values.shape, generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 1).to(values)


def _of_classes(metric: Metric) -> Metric:
    return LambdaInputTransformer(metric, _most_likely, _label)


def _is_class(of: Callable[[Any], Tensor], index: int, value: Any) -> Tensor:
    return of(value) == index


def _most_likely(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _label(batch: Any) -> Tensor:
    labels = batch["labels"]
    return _most_likely(labels) if labels.dim() == 2 else labels


def _number(logits: Tensor) -> Tensor:
    return logits.squeeze(-1).float()


def _label_number(batch: Any) -> Tensor:
    return batch["labels"].float()
