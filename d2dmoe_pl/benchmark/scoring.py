"""How good predictions are, beside how fast they come."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from d2dmoe_pl.data import TaskData
from d2dmoe_pl.data.task import Batch, Task
from d2dmoe_pl.errors import check
from d2dmoe_pl.phases._labels import answer_as_model, number_as_model
from d2dmoe_pl.phases._model_checks import check_head, check_inputs, check_outputs

Predict = Callable[[Batch], Tensor]
SCORED_BATCH = 32  # samples at once
TIMED_SAMPLES = 16


@dataclass(frozen=True)
class Scoring:
    """Test samples, and the task that they are of.

    Attributes:
        batches: Of samples, with labels.
        task: Says what is good.
    """

    batches: Sequence[Batch]
    task: Task

    @torch.no_grad()
    def score(self, predict: Predict) -> float:
        """The task's main metric over all samples, in percent if it is a share."""
        metrics = self.task.metrics()
        for batch in self.batches:
            metrics.update(predict(batch).float().cpu(), batch)
        value = float(metrics.compute()[self.task.main_metric])
        return 100 * value if self.task.in_percent else value

    def loss(self, score: float, dense: float) -> float:
        """How much worse ``score`` is than ``dense``."""
        return dense - score if self.task.higher_is_better else score - dense


def scoring_of(model: nn.Module, data: TaskData, samples: int) -> Scoring | None:
    """The first ``samples`` of the test split, or as many as there are; None for none.

    Raises:
        ConfigError: If the model has not the head, or the outputs, that the data needs, or cannot take its samples, or
            the task's metrics are of what it writes, which other runtimes do not do.
    """
    if not samples:
        return None
    check_head(model, data.head)
    data.prepare_data()
    data.setup()
    number_as_model(data, model)  # as are the labels from here on
    assert data.task is not None
    check_outputs(model, data.task)
    check(
        not data.task.measures_written,
        f"scored_samples={samples}: must be 0 where metrics are of what the model writes, as {data.task.main_metric}; "
        "or measure exact_match",
    )
    batches = _batches(model, data, SCORED_BATCH, -(-samples // SCORED_BATCH))
    if batches:
        left = samples - sum(len(batch["labels"]) for batch in batches[:-1])
        batches[-1] = {name: value[:left] for name, value in batches[-1].items()}
    return Scoring(batches, data.task)


def first_batches(model: nn.Module, data: TaskData, batch_size: int) -> list[Batch]:
    """The first samples of the test split: a batch, or several small ones, since texts differ in length.

    Raises:
        ConfigError: If there are fewer, or the model has not the head that the data needs, or cannot take its samples.
    """
    batches = _batches(model, data, batch_size, max(1, TIMED_SAMPLES // batch_size))
    samples = len(batches[0]["labels"])
    check(samples == batch_size, f"batch_size={batch_size}: must be at most {samples}, the samples of the test split")
    return [batch for batch in batches if len(batch["labels"]) == batch_size]


def _batches(model: nn.Module, data: TaskData, batch_size: int, most: int) -> list[Batch]:
    check_head(model, data.head)
    data.prepare_data()
    data.setup()
    answer_as_model(data, model)
    check_inputs(model, data)
    data.batch_size = batch_size
    loader: DataLoader | list[DataLoader] = data.predict_dataloader()  # in order, as samples come
    first: Iterable[Batch] = loader[0] if isinstance(loader, list) else loader
    return list(islice(first, most))


def placed(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on ``device``, what is no index or mask in ``dtype``."""
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in batch.items()
    }
