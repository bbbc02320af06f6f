"""Causal and masked language models go through the phases like any other model."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.convert import moe_layers
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RouterRegression, SparsityEnforcement
from d2dmoe_pl.phases.base import check_outputs
from d2dmoe_pl.phases.preflight import preflight


class Tokens(Task):
    """The next token, or the same one: enough of a task to run phases on."""

    main_metric = "loss"

    def __init__(self, head, vocabulary_size=40):
        self.head = head
        self.label_names = [str(token) for token in range(vocabulary_size)]
        self.shift = int(head == "causal-language-modeling")

    def loss(self, logits, batch):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        predicted = logits[:, : logits.shape[1] - self.shift]
        return F.cross_entropy(predicted.flatten(0, 1), labels[:, self.shift :].flatten())

    def prediction_loss(self, student_logits, teacher_logits, batch):
        raise AssertionError("not asked for")

    def scores(self):
        return {}

    def predictions(self, logits, batch):
        return {"predictions": logits.argmax(dim=-1)}


class TokenData(tiny.TextData):
    def __init__(self, head):
        super().__init__(batch_size=8)
        self.head = head

    def load(self):
        splits, _ = super().load()
        long = {name: [sample for sample in split if len(sample["input_ids"]) > 1] for name, split in splits.items()}
        return long, Tokens(self.head)


@pytest.mark.parametrize(
    "kind",
    [
        *("gpt2-causal-language-modeling", "gemma-3-causal-language-modeling"),
        *("distilbert-masked-language-modeling", "roberta-masked-language-modeling"),
    ],
)
def test_from_dense_to_routed(trainer, tmp_path, kind):
    head = tiny.TASKS[kind]
    phases = [
        FineTuning(source=tiny.SOURCES[kind](), activation="relu"),
        SparsityEnforcement("hoyer"),
        ExpertClustering(8, num_samples=20),
        RouterRegression(8),
    ]
    for i, phase in enumerate(phases):
        phase.init_from = str(tmp_path / "run" / "artifact") if i else None
        preflight([phase], [head])
        callbacks = [SaveArtifact(), *([TauSweep([0.3, 1.0])] if i == 3 else [])]
        run = trainer(callbacks=callbacks)
        run.fit(phase, datamodule=TokenData(head))
    run.test(phase, datamodule=TokenData(head), verbose=False)
    low, dense = callbacks[-1].rows["test"]
    assert 0 < low.ffn_flops_percent < dense.ffn_flops_percent
    assert low.loss != dense.loss
    model = load_model(tmp_path / "run" / "artifact")
    assert len(moe_layers(model)) == 2
    inputs = tiny.batch(kind)
    assert torch.equal(tiny.logits(model, inputs), tiny.logits(phase.model.eval(), inputs))


def test_a_vocabulary_may_be_larger_than_the_tokenizers_and_not_smaller():
    model = tiny.dense("gpt2-causal-language-modeling")
    check_outputs(model, Tokens("causal-language-modeling", 38))
    with pytest.raises(ConfigError, match="vocabulary=40 of GPT2LMHeadModel: must be at least 41, which the data's"):
        check_outputs(model, Tokens("causal-language-modeling", 41))


def test_a_model_with_another_head():
    message = "head='classification' of GPT2ForSequenceClassification: the data needs a model with head 'causal-languag"
    with pytest.raises(ConfigError, match=message):
        preflight([FineTuning(source=tiny.SOURCES["gpt2"]())], ["causal-language-modeling"])
