"""Texts that keep their vectors: what is to be kept, how near it comes, and sentence-transformers on what is left."""

import json
import shutil

import datasets
import huggingface_hub
import pytest
import tiny
import torch
import transformers

from d2dmoe_pl.adapters import HuggingFaceModel, adapter_for
from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.callbacks.prediction_file import PredictionFile
from d2dmoe_pl.data import DatasetSource, KeepingVectors, TextEmbeddings
from d2dmoe_pl.data.embeddings.keeping_vectors import KeptNeighbourhoods
from d2dmoe_pl.data.embeddings.pooling import (
    NEWER,
    POOLINGS,
    PROMPTS,
    TOKENS,
    check_modules,
    default_prompt,
    pooled,
    pooling_of,
    write_modules,
)
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RouterRegression, SparsityEnforcement

WORDS = ["red", "green", "blue", "name", "the", "colour"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
TEXTS = [" ".join(WORDS[i % 6] for i in range(start, start + 1 + start % 5)) for start in range(24)]


@pytest.fixture(scope="module", params=["mean", "cls"])
def folder(request, tmp_path_factory):
    """A tiny BERT as a folder of sentence-transformers, and texts."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = transformers.BertModel(tiny.bert_config())
    tiny._spread(model)
    model.save_pretrained(folder / "model")
    tiny.tokenizer(folder / "model", WORDS, SPECIAL)
    write_modules(folder / "model", request.param, 24)
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    splits = {"train": dataset, "validation": dataset.select(range(12)), "test": dataset.select(range(12, 24))}
    datasets.DatasetDict(splits).save_to_disk(folder / "data")
    return folder


def data_of(folder, **kwargs):
    return TextEmbeddings(DatasetSource(str(folder / "data")), str(folder / "model"), batch_size=4, **kwargs)


def source(folder):
    return HuggingFaceModel("embeddings", name=str(folder / "model"))


def test_neighbourhoods_are_those_of_the_same_texts_in_any_order():
    wanted = torch.randn(1500, 8)
    vectors = wanted + torch.linspace(0, 3, 1500)[:, None] * torch.randn(1500, 8)  # worse and worse
    found = []
    for order in (torch.arange(1500), torch.arange(1499, -1, -1), torch.randperm(1500)):
        kept = KeptNeighbourhoods()
        for part in order.split(64):
            kept.update(vectors[part], {"labels": wanted[part]})
        found.append([float(value) for value in kept.compute().values()])
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])
    first = KeptNeighbourhoods()
    first.update(vectors[:1000], {"labels": wanted[:1000]})
    assert found[0][1] < float(first.compute()["neighbours"]) - 0.05


def test_a_folder_without_its_pooling(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "1_Pooling")
    with pytest.raises(ConfigError, match=r"model: modules.json names 1_Pooling, which has no config.json; must"):
        pooling_of(tmp_path / "model")


@torch.no_grad()
def test_the_vectors_are_those_of_sentence_transformers(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(folder / "model"), device="cpu").encode(TEXTS[12:])
    data = data_of(folder)
    data.setup()
    kept = torch.cat([batch["labels"] for batch in data.test_dataloader()])
    unit = torch.nn.functional.normalize(kept, dim=1)
    torch.testing.assert_close(unit, torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    model = source(folder).build(data.task.label_names).eval()
    for batch in data.test_dataloader():
        torch.testing.assert_close(adapter_for(model).logits(model, batch), batch["labels"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_texts_are_in_lower_case_where_the_model_says_so(folder, tmp_path):
    """An older model says so beside its tokenizer, which keeps capitals; they are words that it does not know."""
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / TOKENS).write_text(json.dumps({"max_seq_length": 16, "do_lower_case": True}))
    (tmp_path / "data.csv").write_text("text\n" + "".join(f"{text.title()}\n" for text in TEXTS))
    data = TextEmbeddings(
        DatasetSource(**dict.fromkeys(("train", "validation", "test"), str(tmp_path / "data.csv"))),
        str(tmp_path / "model"),
    )
    data.setup()
    assert data.tokenizer("Red the BLUE")["input_ids"] == data_tokens(folder, "red the blue")
    data.save_processor(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("RED")["input_ids"] == data_tokens(folder, "red")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    kept = torch.cat([batch["labels"] for batch in data.test_dataloader()])
    theirs = torch.tensor(model.encode([text.title() for text in TEXTS]))
    torch.testing.assert_close(torch.nn.functional.normalize(kept, dim=1), theirs, rtol=1e-4, atol=1e-5)


def data_tokens(folder, text):
    return transformers.AutoTokenizer.from_pretrained(folder / "model")(text)["input_ids"]


@pytest.mark.thorough
def test_through_the_phases_and_back_into_sentence_transformers(folder, trainer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    start = source(folder)
    for phase in (
        FineTuning(source=start, activation="relu"),
        SparsityEnforcement(),
        ExpertClustering(8, num_samples=16),
        RouterRegression(8),
    ):
        if phase.source is None:
            phase.init_from = str(tmp_path / "run" / "artifact")
        sweep = [TauSweep([0.0, 1.0])] if isinstance(phase, RouterRegression) else []
        given = trainer(callbacks=[SaveArtifact(), *sweep], limit_train_batches=2)
        given.fit(phase, datamodule=data_of(folder))
    [measured] = given.test(phase, datamodule=data_of(folder))
    assert {"test/cosine", "test/rank_correlation", "test/neighbours", "test/loss"} <= set(measured)
    artifact = tmp_path / "run" / "artifact"
    again = sentence_transformers.SentenceTransformer(str(artifact), device="cpu")
    model, data = load_model(artifact), data_of(folder)
    data.setup()
    ours = torch.cat([adapter_for(model).logits(model, batch) for batch in data.test_dataloader()])
    theirs = torch.tensor(again.encode(TEXTS[12:]))
    torch.testing.assert_close(theirs, torch.nn.functional.normalize(ours, dim=1), rtol=1e-4, atol=1e-5)
    file = PredictionFile(str(tmp_path / "vectors.csv"))
    trainer(callbacks=[file]).predict(phase, datamodule=data_of(folder))
    assert [row["0"] for row in file.rows] == pytest.approx(theirs[:, 0].tolist(), abs=1e-4)


def test_vectors_are_computed_anew_for_other_weights(folder, tmp_path):
    data = data_of(folder)
    data.setup()
    before = next(iter(data.test_dataloader()))["labels"]
    other = transformers.BertModel(tiny.bert_config())
    other.save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path, WORDS, SPECIAL)
    changed = TextEmbeddings(DatasetSource(str(folder / "data")), str(tmp_path), batch_size=4)
    changed.setup()
    assert not torch.allclose(next(iter(changed.test_dataloader()))["labels"], before)


def test_vectors_are_computed_anew_for_other_settings(folder, tmp_path):
    """Of the same weights, in the same folder."""
    transformers.BertModel(tiny.bert_config(hidden_act="gelu")).save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path, WORDS, SPECIAL)
    found = []
    for activation in ("gelu", "relu", "gelu"):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": activation}))
        data = TextEmbeddings(DatasetSource(str(folder / "data")), str(tmp_path), batch_size=4)
        data.setup()
        found.append(next(iter(data.test_dataloader()))["labels"])
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_pooling():
    states = torch.tensor([[[1.0, 5.0], [3.0, 1.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    expected = {"mean": [2.0, 3.0], "cls": [1.0, 5.0], "max": [3.0, 5.0], "last": [3.0, 1.0]}
    assert {pooling: pooled(states, mask, pooling)[0].tolist() for pooling in POOLINGS} == expected
    behind, before = states.flip(1), mask.flip(1)  # padding on the left, as decoders' tokenizers put it
    assert pooled(behind, before, "cls")[0].tolist() == [3.0, 1.0]
    assert pooled(behind, before, "last")[0].tolist() == [1.0, 5.0]
    assert pooled(states, None, "last")[0].tolist() == [9.0, 9.0]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_a_folder_says(pooling, tmp_path):
    assert pooling_of(tmp_path) is None
    write_modules(tmp_path, pooling, 24)
    assert pooling_of(tmp_path) == pooling
    newer = {read: written for written, read in NEWER.items()}[pooling]
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": newer}))
    assert pooling_of(tmp_path) == pooling


def test_what_the_hub_says(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^me/it: modules.json, by which it says how it makes vectors, cannot be f"):
        pooling_of("me/it")
    cached = tmp_path / "models--me--it"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    write_modules(cached / "snapshots" / "1", "cls", 24)
    assert pooling_of("me/it") == "cls"
    (cached / ".no_exist" / "1").mkdir(parents=True)
    (cached / ".no_exist" / "1" / PROMPTS).touch()  # as the hub has said before
    assert default_prompt("me/it") == ""


def test_what_stands_before_texts_is_kept(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    said = {"prompts": {"query": "the name ", "document": ""}, "default_prompt_name": "query"}
    (tmp_path / "model" / PROMPTS).write_text(json.dumps(said))
    data, bare = data_of(tmp_path), data_of(folder)
    data.source = bare.source
    data.setup()
    bare.setup()
    texts = ["red", "green blue"]
    expected = bare.raw_samples([f"the name {text}" for text in texts])["input_ids"][:]
    assert data.raw_samples(texts)["input_ids"][:] == expected
    assert (
        data._splits["test"]["input_ids"][:]
        == bare.raw_samples([f"the name {text}" for text in TEXTS[12:]])["input_ids"][:]
    )
    (tmp_path / "artifact").mkdir()
    data.save_processor(tmp_path / "artifact")
    assert json.loads((tmp_path / "artifact" / PROMPTS).read_text()) == said
    pooling = tmp_path / "model" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"include_prompt": False}))
    with pytest.raises(ConfigError, match="leaves its prompts out of its pooling, which is not computed here"):
        check_modules(tmp_path / "model")


@pytest.mark.parametrize("kinds", [["Transformer", "Pooling", "Normalize"], ["Transformer", "Pooling"]])
def test_vectors_that_are_not_of_length_one_keep_theirs(folder, tmp_path, kinds):
    shutil.copytree(folder / "model", tmp_path / "model")
    said = tmp_path / "model" / "modules.json"
    said.write_text(json.dumps(json.loads(said.read_text())[: len(kinds)]))
    data = TextEmbeddings(DatasetSource(str(folder / "data")), str(tmp_path / "model"), batch_size=12)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    vectors = data.task.predictions(batch["labels"], batch)["predictions"]
    lengths, own = vectors.norm(dim=1), batch["labels"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(12) if "Normalize" in kinds else own)
    assert (own - 1).abs().min() > 0.01
    data.save_processor(tmp_path)
    assert [each["type"].split(".")[-1] for each in json.loads((tmp_path / "modules.json").read_text())] == kinds


def test_what_is_not_computed_here(folder, tmp_path):
    write_modules(tmp_path, "mean", 24)
    modes = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    message = "pools by pooling_mode_mean_tokens, pooling_mode_max_tokens; must be one of mean, cls, max, last"
    with pytest.raises(ConfigError, match=message):
        pooling_of(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    data = data_of(folder)
    data.model = str(tmp_path)
    with pytest.raises(ConfigError, match="has a Dense behind its pooling, which is not computed here"):
        data.setup()


def test_neighbourhoods():
    vectors = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    kept = KeptNeighbourhoods()
    kept.update(vectors * 3, {"labels": vectors})
    assert {name: float(value) for name, value in kept.compute().items()} == pytest.approx(
        {"rank_correlation": 1.0, "neighbours": 1.0}
    )
    kept.reset()
    kept.update(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)), {"labels": vectors})
    assert kept.compute()["rank_correlation"] < 0.2
    assert kept.compute()["neighbours"] < 0.5


def test_losses():
    task = KeepingVectors(2)
    wanted = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert task.loss(wanted, {"labels": wanted}) == 0
    assert float(task.loss(torch.zeros(2, 2), {"labels": wanted})) == pytest.approx(1.0)


def test_texts_longer_than_the_model_has_positions(folder, tmp_path):
    limit = tiny.bert_config().max_position_embeddings
    long = datasets.Dataset.from_dict({"text": [*TEXTS, "red " * (limit - 1)]})
    splits = {"train": long, "validation": long, "test": long}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    data = TextEmbeddings(DatasetSource(str(tmp_path / "data")), str(folder / "model"), max_length=10 * limit)
    message = f"^max_length={10 * limit}: the longest text has {limit + 1} tokens; must be at most {limit}, which"
    with pytest.raises(ConfigError, match=message):
        data.setup("fit")
