"""A model that has been trained keeps its own order of the labels, whatever that of the data; a new head is said."""

import json

import pytest
import tiny
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_ins import ANIMALS, COLOURS, phrase

from d2dmoe_pl.adapters import HuggingFaceModel, TimmModel, adapter_for
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.data import DatasetSource, TextClassification
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RecoveryTuning, SparsityEnforcement
from d2dmoe_pl.phases._labels import check_same_outputs, unlike

NAMES = ANIMALS[:3]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A CSV of texts whose label is their animal, and a tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [f"{phrase(i, 5)},{NAMES[i % 3]}\n" for i in range(30) if i % 5 < 3]
    (folder / "all.csv").write_text("".join(["text,label\n", *rows]))
    words = [*COLOURS, *ANIMALS]
    return str(folder / "all.csv"), tiny.tokenizer(folder / "tok", words, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))


def data(texts, **kwargs):
    file, tokenizer = texts
    return TextClassification(DatasetSource(train=file, validation=file, test=file), tokenizer, batch_size=8, **kwargs)


def classifier(folder, order, seed=0):
    """Save a tiny classifier of fixed answers by name, whose outputs are in some order."""
    torch.manual_seed(seed)
    config = tiny.bert_config(id2label=dict(enumerate(order)), label2id={name: i for i, name in enumerate(order)})
    model = transformers.BertForSequenceClassification(config)
    heads = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.classifier.weight.copy_(torch.stack([heads[NAMES.index(name)] for name in order]))
    model.save_pretrained(folder)
    return str(folder)


def fit_and_test(trainer, phase, datamodule):
    """Accuracy and loss of a fitted phase on the test split."""
    fitted = trainer(callbacks=[SaveArtifact()])
    fitted.fit(phase, datamodule=datamodule)
    (scores,) = fitted.test(phase, datamodule=datamodule, verbose=False)
    return scores


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5, deadline=None)
@given(order=st.permutations(NAMES))
def test_accuracy_does_not_depend_on_the_order_of_the_models_labels(trainer, texts, tmp_path_factory, order):
    results = []
    for names in (NAMES, order):
        folder = classifier(tmp_path_factory.mktemp("model"), list(names))
        phase = ExpertClustering(8, split="parameter", source=HuggingFaceModel("text-classification", folder))
        results.append(fit_and_test(trainer, phase, data(texts)))
        kept = adapter_for(phase.model).label_names(phase.model)
        assert kept == list(names)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_artifact_says_what_the_model_said(trainer, texts, tmp_path):
    folder = classifier(tmp_path / "model", ["eel", "cat", "dog"])
    phase = ExpertClustering(8, split="parameter", source=HuggingFaceModel("text-classification", folder))
    fit_and_test(trainer, phase, data(texts))
    config = json.loads((tmp_path / "run" / "artifact" / "config.json").read_text())
    assert config["id2label"] == {"0": "eel", "1": "cat", "2": "dog"}
    again = ExpertClustering(8, init_from=str(tmp_path / "run" / "artifact"))
    datamodule = data(texts)
    trainer().test(again, datamodule=datamodule, verbose=False)
    assert datamodule.task.label_names == ["eel", "cat", "dog"]


def test_other_labels_are_told_unless_a_new_head_is_made(trainer, texts, tmp_path, capsys, caplog):
    folder = classifier(tmp_path / "model", ["eel", "cat", "dog"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"] = {"0": "eel", "1": "yak", "2": "dog"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    source = HuggingFaceModel("text-classification", folder)
    message = "labels: the data's cat are none of the model's, which has been trained on eel, yak, dog; FineTuning of a"
    with pytest.raises(ConfigError, match=message):
        trainer().fit(ExpertClustering(8, source=source), datamodule=data(texts))
    caplog.set_level("INFO")
    phase = FineTuning(source=source)
    trainer().fit(phase, datamodule=data(texts))
    assert adapter_for(phase.model).label_names(phase.model) == ["cat", "dog", "eel"]
    said = [record.message for record in caplog.records if "new head" in record.message]
    assert said == [
        "BertForSequenceClassification gets a new head for cat, dog, eel: classifier.bias, classifier.weight begin "
        "anew."
    ]


@pytest.mark.parametrize(
    ("max_length", "said"),
    [
        (5, ["100% of the training texts have as many tokens or more, and what is behind them is left out."]),
        (64, []),
    ],
)
def test_what_is_cut_of_most_texts_is_said_once(trainer, texts, tmp_path, caplog, max_length, said):
    source = HuggingFaceModel("text-classification", classifier(tmp_path / "model", NAMES))
    trainer(callbacks=[SaveArtifact()]).fit(FineTuning(source=source), datamodule=data(texts, max_length=max_length))
    clustering = ExpertClustering(8, split="parameter", init_from=str(tmp_path / "run" / "artifact"))
    trainer().fit(clustering, datamodule=data(texts, max_length=max_length))
    found = [record.message for record in caplog.records if "left out" in record.message]
    assert found == [f"max_length={max_length}: {each}" for each in said]


@pytest.mark.parametrize(
    ("own", "unknown"),
    [
        (["0", "1", "2", "3", "4"], "3, 4"),
        (["1", "2", "3"], "1, 2, 3"),  # counted from 1, they may be other outputs than by number
        (["0", "cat", "fox"], "fox"),
        (["Cat", "cat", "dog"], "Cat, cat, dog"),  # one output for two
    ],
)
def test_only_labels_that_are_no_outputs_are_told(own, unknown):
    said = unlike(own, NAMES, "label_names")
    assert said.startswith(f"labels: the data's {unknown} are none of the model's, which has been trained on cat, dog")


def test_a_new_head_of_the_same_size_begins_anew(tmp_path):
    folder = classifier(tmp_path / "model", NAMES)
    trained = transformers.BertForSequenceClassification.from_pretrained(folder)
    kept, new = (HuggingFaceModel("text-classification", folder).build(names) for names in (NAMES, ["a", "b", "c"]))
    assert torch.equal(kept.classifier.weight, trained.classifier.weight)
    assert not torch.allclose(new.classifier.weight, trained.classifier.weight)
    assert 0 < new.classifier.weight.std() < 0.05
    assert torch.equal(new.bert.pooler.dense.weight, trained.bert.pooler.dense.weight)


def test_outputs_without_names_are_told_by_label_names(trainer, texts, tmp_path):
    transformers.BertForSequenceClassification(tiny.bert_config(num_labels=3)).save_pretrained(tmp_path / "model")
    nameless = HuggingFaceModel("text-classification", str(tmp_path / "model"))
    message = (
        "labels: which of the model's 3 outputs, which have no names, is which of the data's cat, dog, eel is not "
        "known; label_names of the source says it"
    )
    with pytest.raises(ConfigError, match=message):
        trainer().fit(SparsityEnforcement("hoyer", displacement=0.0, source=nameless), datamodule=data(texts))
    named = HuggingFaceModel("text-classification", str(tmp_path / "model"), label_names=["dog", "eel", "cat"])
    phase = ExpertClustering(8, split="parameter", source=named)
    datamodule = data(texts)
    trainer().fit(phase, datamodule=datamodule)
    assert adapter_for(phase.model).label_names(phase.model) == ["dog", "eel", "cat"]
    assert datamodule.task.label_names == ["dog", "eel", "cat"]
    FineTuning(source=nameless)  # trains the head, whatever it was


def test_a_file_without_a_head_needs_fine_tuning(trainer, tmp_path):
    transformers.BertModel(tiny.bert_config()).save_pretrained(tmp_path / "model")
    source = HuggingFaceModel("text-classification", str(tmp_path / "model"), label_names=["cat", "dog"])
    rows = "".join(f"{phrase(i, 5)},{NAMES[i % 2]}\n" for i in range(20))
    (tmp_path / "all.csv").write_text("text,label\n" + rows)
    texts = str(tmp_path / "all.csv"), tiny.tokenizer(tmp_path / "tok", ANIMALS)
    with pytest.raises(ConfigError, match=r"source: the model's file has no weights for its head \(classifier.bias, c"):
        trainer().fit(ExpertClustering(8, source=source), datamodule=data(texts))


def test_a_model_with_more_labels_than_the_data(trainer, texts, tmp_path):
    more = ["yak", "eel", "cat", "dog"]
    config = tiny.bert_config(id2label=dict(enumerate(more)))
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    source = HuggingFaceModel("text-classification", str(tmp_path / "model"))
    datamodule = data(texts)
    phase = ExpertClustering(8, split="parameter", source=source)
    trainer().fit(phase, datamodule=datamodule)
    assert (phase.model.num_labels, datamodule.task.label_names) == (4, more)
    phase = FineTuning(source=source)
    trainer().fit(phase, datamodule=datamodule)
    assert (phase.model.num_labels, datamodule.task.label_names) == (3, NAMES)


def test_timm_models_go_by_their_names_too(trainer, digits, tmp_path):
    model = tiny.dense()
    model.label_names = [str(digit) for digit in (3, 1, 4, 5, 9, 2, 6, 8, 7, 0)]
    model.reset_classifier(10)
    save_artifact(model, tmp_path / "model")
    trainer().test(FineTuning(init_from=str(tmp_path / "model")), datamodule=digits, verbose=False)
    assert digits.task.label_names == model.label_names
    names = [digits.class_names[i] for i in range(10)]
    labels = torch.stack([digits._splits["test"][i][1] for i in range(16)])
    batch = next(iter(digits.test_dataloader()))
    assert [model.label_names[i] for i in batch["labels"]] == [names[i] for i in labels]


def test_a_teacher_of_another_order(tmp_path):
    one, other, nameless = (
        tiny.SOURCES["bert"]().build(names) for names in (NAMES, NAMES[::-1], ["LABEL_0", "a", "b"])
    )
    check_same_outputs(one, one, "teacher")
    with pytest.raises(
        ConfigError, match="teacher='x': has the outputs eel, dog, cat; must have cat, dog, eel, in this"
    ):
        check_same_outputs(other, one, "teacher='x'")
    with pytest.raises(ConfigError, match="teacher='x': has the outputs LABEL_0, a, b; must have"):
        check_same_outputs(nameless, one, "teacher='x'")


SHAPE = {**tiny.DIGITS_VIT, "in_chans": 3}


class TestTimmCheckpoints:
    def checkpoint(self, tmp_path, num_classes=7, prefix=""):
        state = TimmModel("vit_tiny_patch16_224", **SHAPE).build([str(i) for i in range(num_classes)]).state_dict()
        torch.save({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "a.pth")
        return state, TimmModel("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "a.pth"), **SHAPE)

    def test_a_head_for_another_number_of_classes_is_left_out(self, tmp_path):
        state, source = self.checkpoint(tmp_path)
        model = source.build(["a", "b", "c", "d"])
        assert model.head.weight.shape[0] == 4
        assert torch.equal(model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
        assert source.new_head == "head.bias, head.weight"
        assert source.output_names() == [f"LABEL_{i}" for i in range(7)]
        assert torch.equal(source.build(["a"] * 7).head.weight, state["head.weight"])
        assert source.new_head is None

    def test_weights_that_do_not_arrive(self, tmp_path):
        _, source = self.checkpoint(tmp_path, prefix="net.body.")
        with pytest.raises(
            ConfigError, match=r"checkpoint_path='.*a.pth': has no weights that fit for 30 of the 32 tens"
        ):
            source.build(["a", "b"])
        (tmp_path / "a.pth").write_bytes(b"nothing")
        with pytest.raises(ConfigError, match=r"checkpoint_path='.*a.pth': cannot be read"):
            source.build(["a", "b"])
        (tmp_path / "a.pth").unlink()
        with pytest.raises(ConfigError, match=r"checkpoint_path='.*a.pth': no such file"):
            source.build(["a", "b"])

    def test_both_ways_to_weights(self):
        with pytest.raises(ConfigError, match="checkpoint_path='x': allowed only without pretrained"):
            TimmModel("vit_tiny_patch16_224", pretrained=True, checkpoint_path="x")


class TestHuggingFaceWeights:
    def rename(self, folder, rename):
        state = transformers.BertForSequenceClassification.from_pretrained(folder).state_dict()
        (folder / "model.safetensors").unlink()
        torch.save({rename(name): value for name, value in state.items()}, folder / "pytorch_model.bin")
        return HuggingFaceModel("text-classification", str(folder))

    @pytest.mark.parametrize(
        ("rename", "number"),
        [
            (lambda name: f"net.body.{name}", 37),
            (lambda name: name.replace("layer.1.", "layer.7."), 16),
            (lambda name: name.replace("word_embeddings", "words"), 1),
        ],
    )
    def test_weights_that_do_not_arrive(self, tmp_path, rename, number):
        classifier(tmp_path, NAMES)
        message = f"its file has no weights that fit for {number} of the 41 tensors of BertForSequenceClassification"
        with pytest.raises(ConfigError, match=message):
            self.rename(tmp_path, rename).build(NAMES)

    def test_a_pooler_is_part_of_a_head_that_lacks_it(self, tmp_path):
        classifier(tmp_path, NAMES)
        source = self.rename(tmp_path, lambda name: name.replace("pooler", "other"))
        source.build(NAMES)
        assert source.new_head == "bert.pooler.dense.bias, bert.pooler.dense.weight"


def test_a_recovered_model_and_its_teacher(trainer, tmp_path):
    student, teacher = tiny.routed("bert"), tiny.routed("bert")
    teacher.config.id2label = {0: "eel", 1: "dog", 2: "cat"}
    save_artifact(student, tmp_path / "student")
    save_artifact(teacher, tmp_path / "teacher")
    phase = RecoveryTuning(init_from=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"))
    with pytest.raises(
        ConfigError, match=r"teacher='.*teacher': has the outputs eel, dog, cat; must have cat, dog, eel"
    ):
        trainer().fit(phase, datamodule=tiny.TextData(4))
    assert load_model(tmp_path / "teacher").config.id2label[0] == "eel"
