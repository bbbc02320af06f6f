"""Models that read padding as text, of which experts make no exception."""

import logging
from functools import partial

import pytest
import tiny
import torch
import transformers
from conversions import converts_exactly

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, add_routers_, convert_to_moe_, set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.phases import ExpertClustering, ImportanceScoring, SparsityEnforcement

TEXT = {"vocab_size": 40, "max_position_embeddings": 64, **tiny.SHAPE}
READING = {
    "convbert": lambda: transformers.ConvBertConfig(embedding_size=24, **TEXT),
    "yoso": lambda: transformers.YosoConfig(use_expectation=True, **TEXT),
    "nystromformer": lambda: transformers.NystromformerConfig(segment_means_seq_len=64, num_landmarks=64, **TEXT),
    "funnel": lambda: transformers.FunnelConfig(
        vocab_size=40, d_model=24, n_head=2, d_head=12, d_inner=48, block_sizes=[1, 1], num_decoder_layers=1
    ),
}
HEADS = {
    "texts": transformers.AutoModelForSequenceClassification,
    "tokens": transformers.AutoModelForTokenClassification,
    "answers": transformers.AutoModelForQuestionAnswering,
    "vocabulary": transformers.AutoModelForMaskedLM,
    "vectors": transformers.AutoModel,
}


def spread(make, auto):
    model = auto.from_config(make()).eval()
    tiny._spread(model)
    return model


def padded(is_in_front):
    ids, mask = torch.randint(5, 40, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    for row, length in ((1, 4), (2, 1)):
        mask[row, slice(6 - length) if is_in_front else slice(length, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def result(model, batch):
    """What a model says, at tokens where it says something of each."""
    output = model(**batch)
    given = output[0] if "start_logits" not in output else torch.stack([output.start_logits, output.end_logits], -1)
    return given[batch["attention_mask"].bool()] if given.dim() == 3 else given


PAIRS = [(name, head) for name in READING for head in HEADS if (name, head) != ("funnel", "vectors")]  # it has two


@pytest.mark.parametrize(("name", "head"), PAIRS)
@torch.no_grad()
def test_with_all_experts_it_is_the_dense_model(name, head, caplog):
    model = spread(READING[name], HEADS[head])
    # a head that reads the first token is given no padding there
    batches = [padded(is_in_front) for is_in_front in (False, True)[: 1 if head == "texts" else 2]]
    dense = [result(model, batch) for batch in batches]
    with caplog.at_level(logging.WARNING, logger="d2dmoe_pl"):
        convert_to_moe_(model, ExpertsConfig(8))
        add_routers_(model, RouterConfig(4))
        set_gate_(model, GateConfig("dynk_max", 1.0))
    for batch, expected in zip(batches, dense, strict=True):
        torch.testing.assert_close(result(model, batch), expected, rtol=1e-4, atol=1e-4)
    reads = (name, head) != ("funnel", "texts")  # whose pools leave out what has padding in it
    assert sum("reads padding as text" in record.message for record in caplog.records) == reads


@torch.no_grad()
def test_padding_within_a_model_is_routed_as_text_is(tmp_path, caplog):
    """A text is filled up to windows inside, beyond what a mask says."""
    model = spread(lambda: transformers.LongformerConfig(attention_window=4, pad_token_id=1, **TEXT), HEADS["tokens"])
    batch = padded(False)
    dense = result(model, batch)
    tiny.route_(model, 8, tau=1.0)
    said = "gives its FFNs other positions than a text has, (2, 8) for (2, 6), so that padding is routed, run and"
    assert sum(said in message for message in caplog.messages) == 1
    torch.testing.assert_close(result(model, batch), dense, rtol=1e-4, atol=1e-4)
    save_artifact(model, tmp_path)
    loaded, counts = load_model(tmp_path), []
    handles = [layer.watch(lambda mask: counts.append(len(mask))) for layer in moe_layers(loaded).values()]
    loaded(**batch)
    assert counts == [24] * len(handles)


@torch.no_grad()
def test_it_is_remembered(tmp_path):
    model, batch = spread(READING["convbert"], HEADS["texts"]), padded(False)
    converts_exactly(model, batch, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    routed = {}
    handles = [
        layer.watch(lambda mask, name=name: routed.update({name: len(mask)}))
        for name, layer in moe_layers(loaded).items()
    ]
    loaded(**batch)
    assert set(routed.values()) == {18}
    assert len(handles) == 2
    save_artifact(loaded, tmp_path / "again")
    assert adapter_for(loaded).streams(load_model(tmp_path / "again")) == {"": ""}


@pytest.mark.parametrize("head", ["texts", "tokens", "vectors"])
@pytest.mark.parametrize(
    "config",
    [
        lambda: transformers.DebertaConfig(**TEXT),
        lambda: transformers.FalconConfig(pad_token_id=0, **TEXT),
        lambda: transformers.BigBirdConfig(**TEXT),
    ],
)
def test_others_leave_padding_out(config, head, caplog):
    model = spread(config, HEADS[head])
    with caplog.at_level(logging.WARNING, logger="d2dmoe_pl"):
        convert_to_moe_(model, ExpertsConfig(8))
    assert "reads padding" not in caplog.text
    assert adapter_for(model).streams(model) == {"": "attention_mask"}
    assert not hasattr(model.config, "d2dmoe_reads_padding")


@pytest.mark.parametrize("make", [READING["convbert"], lambda: transformers.ErnieConfig(**TEXT)])
@pytest.mark.parametrize(
    "phase", [partial(ExpertClustering, 4, split="activation"), ImportanceScoring, SparsityEnforcement]
)
def test_it_is_known_before_a_phase_watches_calls(make, phase, trainer, tmp_path):
    names = {"id2label": dict(enumerate(tiny.LABELS)), "label2id": {name: i for i, name in enumerate(tiny.LABELS)}}
    config = make()
    config.update({"num_labels": len(tiny.LABELS), **names})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    swap_activation_(model, ActivationConfig("relu"))
    save_artifact(model, tmp_path / "dense", [PhaseRecord("FineTuning")])
    trainer(callbacks=[SaveArtifact()]).fit(phase(init_from=str(tmp_path / "dense")), datamodule=tiny.TextData(8))
    assert load_model(tmp_path / "run" / "artifact") is not None
