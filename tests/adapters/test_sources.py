"""What models there are, and what is said of those there are not."""

import copy

import pytest
import timm
import tiny
import torch
import transformers
from torch import nn

from d2dmoe_pl.adapters import HuggingFaceModel, TimmModel, adapter_for
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.data.head import LABELLED_HEADS
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import SparsityEnforcement
from d2dmoe_pl.phases._preflight import preflight


def test_a_model_that_no_adapter_knows():
    with pytest.raises(ConfigError, match="Linear: is no model of transformers or timm; call adopt_ first"):
        adapter_for(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("around", "place"), [(torch.compile, "_orig_mod"), (nn.DataParallel, "module"), (nn.Sequential, "0")]
)
def test_a_known_model_with_something_around_it(around, place):
    message = rf"^\w+: is no model of transformers or timm itself; must be the one that is its {place}$"
    with pytest.raises(ConfigError, match=message):
        adapter_for(around(tiny.dense("bert")))


def test_an_architecture_without_ffns_stops_a_run_before_it_starts():
    config = transformers.MambaConfig(hidden_size=24, num_hidden_layers=2, vocab_size=40)
    message = "MambaForCausalLM: no adapter knows it, and tracing found no FFN of two linear modules with an activation"
    with pytest.raises(ConfigError, match=message):
        preflight([SparsityEnforcement(source=HuggingFaceModel("causal-language-modeling", config=config))])


def test_a_type_of_model_that_transformers_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "quark"}')
    source = HuggingFaceModel("text-classification", str(tmp_path))
    with pytest.raises(ConfigError, match=r"name='.*': not what transformers can make \(.*quark.*\)$"):
        source.build_structure(["a", "b"])


def test_a_pretrained_language_model_is_loaded_in_full_precision(tmp_path):
    config = tiny.decoder_config(transformers.LlamaConfig, dtype="bfloat16")
    saved = transformers.LlamaForCausalLM._from_config(config)
    saved.generation_config.eos_token_id = [2, 9]
    saved.save_pretrained(tmp_path)
    model = HuggingFaceModel("causal-language-modeling", str(tmp_path)).build(["what", "labels", "?"])
    assert saved.dtype == torch.bfloat16
    expected = saved.float().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [2, 9]
    assert adapter_for(model).num_outputs(model) == 40


OF_LABELS = [kind for kind in tiny.SOURCES if isinstance(tiny.SOURCES[kind](), HuggingFaceModel)]
OF_LABELS = [kind for kind in OF_LABELS if tiny.SOURCES[kind]().head in LABELLED_HEADS]


@pytest.mark.parametrize("kind", OF_LABELS)
def test_a_pretrained_model_without_a_head_gets_one(kind, tmp_path):
    """Whatever it is called, and whether it stands beside the model or around it."""
    made = tiny.SOURCES[kind]()
    without = transformers.AutoModel.from_config(copy.deepcopy(made.config))
    without.save_pretrained(tmp_path)
    source = HuggingFaceModel(made.task, str(tmp_path))
    labels = tiny.labels_of(kind)
    model = source.build(labels)
    pretrained = {id_of(value) for value in without.state_dict().values()}
    fresh = {name for name, value in model.named_parameters() if id_of(value) not in pretrained}
    assert fresh
    assert fresh <= set(source.new_head.split(", "))
    assert adapter_for(model).num_outputs(model) == len(labels)


def id_of(value):
    """What tells a tensor of random weights from another; those of norms and biases are alike."""
    return (tuple(value.shape), *value.flatten().tolist())


def test_a_head_that_transformers_has_not():
    source = HuggingFaceModel("question-answering", config=transformers.ViTConfig(**tiny.IMAGE, **tiny.SHAPE))
    with pytest.raises(ConfigError, match=r"task='question-answering': transformers has no such head .* type 'vit'"):
        source.build_structure(["start", "end"])


def test_a_decoders_classifier_needs_a_padding_id():
    config = tiny.decoder_config(transformers.LlamaConfig, pad_token_id=None, eos_token_id=[2, 3])
    assert HuggingFaceModel("text-classification", config=config).build(["a", "b"]).config.pad_token_id == 2
    config.eos_token_id = None
    model = HuggingFaceModel("text-classification", config=config).build(["a", "b"])
    with pytest.raises(
        ConfigError, match="pad_token_id=None in the config of LlamaForSequenceClassification: must be s"
    ):
        adapter_for(model).head(model)


def test_a_head_that_no_task_has():
    model = transformers.BertLMHeadModel(tiny.bert_config(is_decoder=True))
    message = (
        "BertLMHeadModel: its head is for none of the tasks that Hugging Face BERT models are used for here, which are "
        "text-classification, text-regression, multi-label-classification, token-classification, question-answering, "
        "masked-language-modeling"
    )
    with pytest.raises(ConfigError, match=message):
        adapter_for(model).head(model)


@pytest.mark.parametrize("kind", [kind for kind in tiny.CONFIGS if kind in tiny.TASKS])
def test_a_rate_of_zero_leaves_no_dropout_in_any_family(kind):
    config, task = tiny.CONFIGS[kind](), tiny.TASKS[kind]
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = 0.0  # stochastic depth, which is something else
    model = HuggingFaceModel(task, config=config, dropout=0.0).build(tiny.labels_of(kind))
    inputs = tiny.batch(kind)
    trained, again, evaluated = (tiny.logits(model.train(mode), inputs) for mode in (True, True, False))
    assert torch.equal(trained, again)
    torch.testing.assert_close(trained, evaluated)


def test_a_rate_of_dropout_is_saved_with_the_model(tmp_path):
    tiny.dense("bert").save_pretrained(tmp_path)
    model = HuggingFaceModel("text-classification", str(tmp_path), dropout=0.25).build(tiny.LABELS)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.25}
    model.save_pretrained(tmp_path / "again")
    again = transformers.BertConfig.from_pretrained(tmp_path / "again")
    assert (again.hidden_dropout_prob, again.attention_probs_dropout_prob, again.classifier_dropout) == (
        0.25,
        0.25,
        None,
    )


def test_vectors_are_matched_without_dropout():
    for dropout, rate in ((None, 0.0), (0.1, 0.1)):
        model = HuggingFaceModel("embeddings", config=tiny.bert_config(), dropout=dropout).build(["0"])
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {rate}
    assert tiny.bert_config().hidden_dropout_prob == 0.1


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_of_dropout_that_is_none(rate):
    with pytest.raises(ConfigError, match=rf"^dropout={rate}: must lie in \[0, 1\)$"):
        HuggingFaceModel("text-classification", "somewhere", dropout=rate)


def test_a_model_that_has_no_dropout_to_set():
    config = transformers.ConvNextConfig(num_channels=1, image_size=8, patch_size=4)
    with pytest.raises(ConfigError, match=r"^dropout=0.1: ConvNextConfig sets none$"):
        HuggingFaceModel("image-classification", config=config, dropout=0.1).build_structure(["a", "b"])


def test_unknown_timm_architecture_is_refused():
    with pytest.raises(
        ConfigError, match=r"architecture='vit_tiny_patch17': timm has no such model; allowed are e.g. vit_tiny"
    ):
        TimmModel("vit_tiny_patch17")


def test_a_folder_that_timm_saved_with_how_its_model_was_made(tmp_path):
    made = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **made)
    timm.models.save_for_hf(model, tmp_path, model_args=made)  # which adds the number of classes to them
    loaded = HuggingFaceModel("image-classification", str(tmp_path)).build(["ant", "bee", "cat"])
    assert adapter_for(loaded).input_shape(loaded) == (3, 16, 16)
    assert len(adapter_for(loaded).ffns(loaded)) == 1
    pictures = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(pictures).logits, model.eval()(pictures))
        save_artifact(loaded, tmp_path / "artifact")
        again = load_model(tmp_path / "artifact")
        assert again.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
        assert torch.equal(again(pictures).logits, loaded(pictures).logits)
