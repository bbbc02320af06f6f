"""Causal and masked language models go through the phases like any other model."""

import math
from functools import partial

import pytest
import tiny
import torch
import transformers

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data import DatasetSource, LanguageModeling, TextClassification
from d2dmoe_pl.data.language_modeling.token_prediction import TokenPrediction
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RouterRegression, SparsityEnforcement
from d2dmoe_pl.phases._model_checks import check_outputs
from d2dmoe_pl.phases._preflight import preflight

WORDS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.mark.parametrize(
    "kind",
    [
        *("gpt2-causal-language-modeling", "gemma-3-causal-language-modeling"),
        *("distilbert-masked-language-modeling", "roberta-masked-language-modeling"),
    ],
)
def test_from_dense_to_routed(trainer, tmp_path, make_data, kind):
    phases = [
        FineTuning(source=tiny.SOURCES[kind](), activation="relu"),
        SparsityEnforcement("hoyer"),
        ExpertClustering(8, num_samples=20),
        RouterRegression(8),
    ]
    for i, phase in enumerate(phases):
        phase.init_from = str(tmp_path / "run" / "artifact") if i else None
        preflight([phase], [make_data(kind)])
        callbacks = [SaveArtifact(), *([TauSweep([0.3, 1.0])] if i == 3 else [])]
        run = trainer(callbacks=callbacks)
        run.fit(phase, datamodule=make_data(kind))
    run.test(phase, datamodule=make_data(kind), verbose=False)
    low, dense = callbacks[-1].rows["test"]
    assert 0 < low.ffn_flops_percent < dense.ffn_flops_percent
    assert low.loss != dense.loss
    assert dense.score == pytest.approx(math.exp(dense.loss), rel=1e-5)
    assert not dense.in_percent
    model = load_model(tmp_path / "run" / "artifact")
    assert len(moe_layers(model)) == 2
    inputs = tiny.batch(kind)
    with torch.no_grad():
        assert torch.equal(tiny.logits(model, inputs), tiny.logits(phase.model.eval(), inputs))


@pytest.mark.parametrize("kind", ["gpt2-causal-language-modeling", "bert-masked-language-modeling"])
def test_relufication(trainer, tmp_path, make_data, kind):
    """Pretraining goes on after the swap to ReLU, and the model learns what the swap cost it and more."""
    model = tiny.SOURCES[kind]().build([])
    save_artifact(model, tmp_path / "pretrained", [PhaseRecord("FineTuning")])
    optimizer = partial(torch.optim.AdamW, lr=0.01)
    pretrained = {"init_from": str(tmp_path / "pretrained")}
    phase = FineTuning(activation="relu", optimizer=optimizer, **pretrained)
    run = trainer(max_epochs=3, limit_train_batches=1.0, callbacks=[SaveArtifact()])
    run.test(FineTuning(**pretrained), datamodule=make_data(kind), verbose=False)
    before = float(run.callback_metrics["test/perplexity"])
    run.fit(phase, datamodule=make_data(kind))
    run.test(phase, datamodule=make_data(kind), verbose=False)
    assert float(run.callback_metrics["test/perplexity"]) < 0.8 * before
    relu = load_model(tmp_path / "run" / "artifact")
    assert all(ffn.is_sparse for ffn in select_ffns(relu))


def test_blocks_longer_than_the_model_has_positions(make_data):
    kind = "bert-masked-language-modeling"
    phase = FineTuning(source=tiny.SOURCES[kind]())
    preflight([phase], [make_data(kind, 16)])
    with pytest.raises(ConfigError, match=r"^length=17: must be at most 16, the positions that BertForMaskedLM has$"):
        preflight([phase], [make_data(kind, 17)])
    for kind, most in (("llama-causal-language-modeling", 64), ("mpnet-masked-language-modeling", 14)):
        with pytest.raises(
            ConfigError, match=rf"^length={most + 1}: must be at most {most}, the positions that \w+ has$"
        ):
            preflight([FineTuning(source=tiny.SOURCES[kind]())], [make_data(kind, most + 1)])
    kind = "roberta-masked-language-modeling"
    with pytest.raises(ConfigError, match="length=15: must be at most 14, the positions that RobertaForMaskedLM has"):
        preflight([FineTuning(source=tiny.SOURCES[kind]())], [make_data(kind, 15)])


def test_positions_that_begin_after_paddings_in_any_model():
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Data2VecTextConfig(vocab_size=40, max_position_embeddings=16, **shape)
    for model in (transformers.Data2VecTextForMaskedLM(config), tiny.dense("roberta-masked-language-modeling")):
        assert adapter_for(model).num_positions(model) == 14
    t5 = tiny.dense("t5-text-to-text")  # has distances instead
    assert adapter_for(t5).num_positions(t5) is None


def test_a_vocabulary_may_be_larger_than_the_tokenizers_and_not_smaller():
    model = tiny.dense("gpt2-causal-language-modeling")
    check_outputs(model, TokenPrediction("causal-language-modeling", ["token"] * 38))
    with pytest.raises(ConfigError, match="vocabulary=40 of GPT2LMHeadModel: must be at least 41, which the data's"):
        check_outputs(model, TokenPrediction("causal-language-modeling", ["token"] * 41))


@pytest.mark.parametrize("kind", ["gpt2-causal-language-modeling", "bert-masked-language-modeling", "bert"])
def test_a_tokenizer_that_knows_more_than_the_model_embeds(tmp_path, kind):
    words = [first + second for first in "abcdef" for second in "abcdef"]
    tokenizer = tiny.tokenizer(tmp_path / "tok", words, SPECIAL)
    source = DatasetSource(train="nowhere.txt", validation=None, test=None)  # is not looked at before
    objective = tiny.TASKS[kind].partition("-")[0]
    data = (
        TextClassification(source, tokenizer)
        if kind == "bert"
        else LanguageModeling(source, tokenizer, objective, length=12)
    )
    phase = FineTuning(source=tiny.SOURCES[kind]())
    message = r"^tokenizer: gives 41 token ids; must be at most the 40 that \w+ embeds$"
    with pytest.raises(ConfigError, match=message):
        preflight([phase], [data])


def test_a_model_with_another_head(make_data):
    message = "head='classification' of GPT2ForSequenceClassification: the data needs a model with head 'causal-languag"
    with pytest.raises(ConfigError, match=message):
        preflight([FineTuning(source=tiny.SOURCES["gpt2"]())], [make_data("gpt2-causal-language-modeling")])
