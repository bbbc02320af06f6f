"""What is said of a model's folder with a file that is missing, cut off, or another in its place."""

import shutil

import huggingface_hub
import pytest
import tiny
import torch
import transformers

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.data.embeddings import pooling
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.errors import ConfigError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    transformers.BertForSequenceClassification(tiny.bert_config(num_labels=3)).save_pretrained(folder)
    return folder


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_pickle(folder, length):
    torch.save({"a": torch.zeros(3)}, folder / "pytorch_model.bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[:length])
    (folder / "model.safetensors").unlink()


NOT_WHOLE = r"a file of weights is not whole; must be copied or downloaded anew \("
MISSING = r"a file in the folder is missing or broken \("
FAULTS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), MISSING),
    "half of the weights": (lambda folder: halved(folder / "model.safetensors"), NOT_WHOLE),
    "a pointer": (lambda folder: (folder / "model.safetensors").write_bytes(POINTER), NOT_WHOLE),
    "an empty pickle": (lambda folder: as_pickle(folder, 0), rf"{NOT_WHOLE}EOFError\)$"),
    "half of the config": (lambda folder: halved(folder / "config.json"), MISSING),
    "an adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        r"is an adapter of PEFT without its model; must be the model with it merged in, by merge_and_unload\(\) and",
    ),
    "sizes of no model": (
        lambda folder: tiny.bert_config(num_attention_heads=5).save_pretrained(folder),
        r"not what transformers can make \(The hidden size \(24\) is not a multiple",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_told(whole, tmp_path, fault):
    folder = shutil.copytree(whole, tmp_path / "model")
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ConfigError, match=rf"^name='{folder}': {message}"):
        HuggingFaceModel("text-classification", str(folder)).build(tiny.LABELS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "tokenizer.json").write_text(
                (folder / "tokenizer.json").read_text().replace("BertPreTokenizer", "OneOfTomorrow")
            ),
            r"not what transformers can make \(.*PreTokenizer",
        ),
        (
            lambda folder: [(folder / "tokenizer.json").unlink(), transformers.LlamaConfig().save_pretrained(folder)],
            r"not what transformers can make \(Couldn't instantiate",
        ),
        (
            lambda folder: [(folder / "tokenizer.json").rename(folder / "spiece.model"), _of_t5(folder)],
            r"has its words in a file of sentencepiece, which cannot be read; must have a tokenizer.json, or pip "
            r"install sentencepiece protobuf$",
        ),
    ],
    ids=["newer", "none", "sentencepiece"],
)
def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path, spoil, message):
    tiny.tokenizer(tmp_path, ["red"])
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=rf"^tokenizer='{tmp_path}': {message}"):
        load_pretrained(transformers.AutoTokenizer, str(tmp_path), "tokenizer")


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer"])
def test_a_folder_of_gguf_files_is_told(tmp_path, kind):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError) as error:
        load_pretrained(getattr(transformers, kind), str(tmp_path), "model")
    said = f"model='{tmp_path}': is a folder of GGUF files; must be one of them, such as {tmp_path}/a.gguf"
    assert str(error.value) == said


def _of_t5(folder):
    transformers.T5Config().save_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()


def test_a_hub_that_refuses_does_not_say_how_a_model_pools(monkeypatch):
    def refuses(name, file):
        raise huggingface_hub.errors.HfHubHTTPError("403 Client Error.\nAsk for access.", response=Response())

    class Response:
        headers, request, status_code = {}, None, 403

    monkeypatch.setattr(pooling, "hf_hub_download", refuses)
    with pytest.raises(ConfigError, match=r"^me/model: modules.json, .*\(403 Client Error. Ask for access.\)$"):
        pooling.pooling_of("me/model")
