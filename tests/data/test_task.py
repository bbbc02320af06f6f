"""Losses, metrics and predictions of each kind of task, against naive twins."""

import math
from types import MappingProxyType

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from d2dmoe_pl.data import Classification, KeepingVectors, Regression
from d2dmoe_pl.data.symmetric_kl import symmetric_kl
from d2dmoe_pl.errors import ConfigError


class TestClassification:
    task = Classification(["no", "yes"], ["f1", "accuracy", "matthews_correlation"])
    batch = MappingProxyType({"labels": torch.tensor([1, 0, 1, 1, 0])})
    logits = torch.tensor([[0.0, 1], [0, 1], [1, 0], [0, 2], [3, 0]])  # predicted 1 1 0 1 0

    def test_metrics(self):
        metrics = self.task.metrics()
        for part in (slice(0, 3), slice(3, 5)):
            metrics.update(self.logits[part], {"labels": self.batch["labels"][part]})
        values = {name: float(value) for name, value in metrics.compute().items()}
        assert values == pytest.approx(
            {
                "loss": float(F.cross_entropy(self.logits, self.batch["labels"])),
                "f1": 2 / 3,  # 2 true positives, 1 false positive, 1 false negative
                "accuracy": 3 / 5,
                "matthews_correlation": (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2),
            }
        )
        assert self.task.main_metric == "f1"
        metrics.reset()
        metrics.update(self.logits[:1], {"labels": self.batch["labels"][:1]})
        assert metrics.compute()["accuracy"] == 1

    def test_losses_and_predictions(self):
        teacher = torch.randn(5, 2)
        assert self.task.loss(self.logits, self.batch) == F.cross_entropy(self.logits, self.batch["labels"])
        torch.testing.assert_close(
            self.task.prediction_loss(self.logits, teacher, self.batch), symmetric_kl(self.logits, teacher).mean()
        )
        predictions = self.task.predictions(self.logits, self.batch)
        assert predictions["predictions"].tolist() == [1, 1, 0, 1, 0]
        torch.testing.assert_close(predictions["probabilities"], self.logits.softmax(-1))

    def test_f1_of_three_classes(self):
        with pytest.raises(ConfigError, match="f1 needs two classes, but there are 3"):
            Classification("abc", ["f1"])


class TestRegression:
    task = Regression("similarity")

    def test_metrics(self):
        logits, labels = torch.randn(20, 1), torch.randn(20, dtype=torch.float64)
        metrics = self.task.metrics()
        for part in (slice(0, 13), slice(13, 20)):
            metrics.update(logits[part], {"labels": labels[part]})
        values = metrics.compute()
        x, y = logits[:, 0].numpy(), labels.numpy()
        assert float(values["pearson"]) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-5)
        assert float(values["spearman"]) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-5)
        assert float(values["loss"]) == pytest.approx(((x - y) ** 2).mean(), rel=1e-5)

    def test_losses_and_predictions(self):
        student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
        batch = {"labels": torch.tensor([1.0, 5.0])}
        assert float(self.task.loss(student, batch)) == 4.5
        assert float(self.task.prediction_loss(student, teacher, batch)) == 2.5
        assert self.task.predictions(student, batch)["predictions"].tolist() == [1, 2]
        assert self.task.num_outputs == 1


@pytest.mark.parametrize("task", [Regression("score"), KeepingVectors(6)])
def test_of_a_squared_error_the_curvature_is_told_where_predictions_are_right_too(task):
    """Squared gradients along a change, halved, are on average what the change adds to the divergence."""
    width = task.num_outputs
    logits, change = torch.randn(4, width, dtype=torch.float64), 1e-3 * torch.randn(4, width, dtype=torch.float64)
    batch = {"labels": logits.squeeze(-1)}
    told = torch.zeros(4, dtype=torch.float64)  # (B,)
    for seed in range(2000):
        given = logits.clone().requires_grad_()
        loss = task.weight(batch) * task.curvature_loss(given, batch, seed)
        (slopes,) = torch.autograd.grad(loss, given)
        told += 0.5 * (slopes * change).sum(dim=1).square() / 2000
    for row in range(4):
        one = slice(row, row + 1)
        expected = float(task.prediction_loss((logits + change)[one], logits[one], {"labels": batch["labels"][one]}))
        assert float(told[row]) == pytest.approx(expected, rel=0.2)


def test_of_a_likelihood_the_curvature_is_its_own():
    task, logits, batch = Classification(["no", "yes"]), torch.randn(3, 2), {"labels": torch.tensor([1, 0, 1])}
    assert task.curvature_loss(logits, batch, 0) == task.loss(logits, batch)
