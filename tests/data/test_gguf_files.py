"""Models and tokenizers in GGUF files of llama.cpp."""

import importlib.util
import shutil

import gguf
import gguf_files
import numpy as np
import pytest
import torch
import transformers

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.data import DatasetSource, LanguageModeling
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import ExpertClustering, SparsityEnforcement
from d2dmoe_pl.phases._preflight import preflight

FILE = "tiny.Q8_0.gguf"


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return gguf_files.llama()


@pytest.fixture(scope="module")
def folder(dense, tmp_path_factory):
    """Has the file of ``dense``, whose weights are by then those that the file holds."""
    folder = tmp_path_factory.mktemp("gguf")
    gguf_files.write_gguf(dense, folder / FILE)
    return folder


def source(folder, file=FILE, task="causal-language-modeling", **kwargs):
    return HuggingFaceModel(task, str(folder), gguf_file=file, **kwargs)


def assert_same(model, dense):
    expected, found = dense.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value.to(model.dtype)) for name, value in expected.items())


class TestModels:
    @pytest.mark.thorough
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_it_is_an_ordinary_dense_model(self, dense, folder, tmp_path, dtype):
        made = source(folder, dtype=dtype)
        model = made.build([])
        assert made.new_head is None
        assert str(model.dtype) == f"torch.{dtype}"
        assert_same(model, dense)
        assert not [key for key in (*vars(model), *vars(model.config)) if "quantiz" in key and key != "is_quantized"]
        assert not getattr(model, "is_quantized", False)
        assert model.config.name_or_path == str(folder)  # as of any other model
        assert "quant" not in model.config.to_json_string()
        assert "A tiny model" not in model.config.to_json_string()  # the file's title
        model.save_pretrained(tmp_path / "saved")
        save_artifact(model, tmp_path / "artifact")
        assert_same(load_model(tmp_path / "artifact"), dense)
        for name in ("saved", "artifact"):
            assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name), dense)

    def test_it_computes_what_the_dense_one_computes(self, dense, folder):
        ids = torch.tensor([[1, 32, 3, 7, 5, 24]])
        with torch.no_grad():
            torch.testing.assert_close(source(folder).build([])(ids).logits, dense(ids).logits)

    def test_its_config_is_the_files(self, dense, folder):
        config = source(folder).build_structure([]).config
        for name in ("hidden_size", "vocab_size", "num_key_value_heads", "max_position_embeddings", "rope_parameters"):
            assert getattr(config, name) == getattr(dense.config, name)

    def test_tied_embeddings_stay_tied(self, tmp_path):
        tied = gguf_files.llama(tie_word_embeddings=True)
        model = source(gguf_files.write_gguf(tied, tmp_path / FILE).parent).build([])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_same(model, tied)

    def test_a_classifier_gets_a_new_head(self, folder, dense):
        made = source(folder, task="text-classification")
        model = made.build(["a", "b"])
        assert made.new_head == "score.weight"
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)

    def test_a_path_is_taken_too(self, folder, dense):
        loaded = load_pretrained(transformers.AutoModelForCausalLM, str(folder / FILE), "model")
        assert_same(loaded.float(), dense)
        loaded.config.to_json_string()

    def test_it_goes_into_the_phases(self, folder, tmp_path):
        (tmp_path / "a.txt").write_text("the cat. " * 60 + "\n\n" + "the dog. " * 60)
        data = LanguageModeling(
            DatasetSource(train=str(tmp_path / "a.txt"), validation=None, test=None, held_out=0.4),
            str(folder / FILE),
            length=12,
        )
        preflight(
            [SparsityEnforcement(displacement=0.0, source=source(folder)), ExpertClustering(8, "parameter")], [data]
        )
        assert len(data.tokenizer) == 34


class TestTokenizers:
    def test_it_is_the_files_and_can_be_saved(self, folder, tmp_path):
        tokenizer = load_pretrained(transformers.AutoTokenizer, str(folder / FILE), "tokenizer")
        text = "the cat. the</s>"
        ids = [32, 3, 7, 5, 24, 4, 33, 2]
        assert tokenizer(text)["input_ids"] == ids
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
        tokenizer.save_pretrained(tmp_path)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids

    def test_it_has_no_token_that_the_file_has_not(self, folder):
        tokenizer = load_pretrained(transformers.AutoTokenizer, str(folder / FILE), "tokenizer")
        assert len(tokenizer) == len(gguf_files.TOKENS)
        assert max(tokenizer("the <|endoftext|>")["input_ids"]) < len(gguf_files.TOKENS)


class TestRefusals:
    def refusal(self, folder, file=FILE):
        with pytest.raises(ConfigError) as raised:
            source(folder, file).build_structure([])
        assert "\n" not in str(raised.value)
        return str(raised.value)

    def test_no_such_file(self, folder):
        said = f"no such file; the GGUF files in {folder} are: {FILE}"
        assert self.refusal(folder, "no.gguf") == f"gguf_file='no.gguf': {said}"
        with pytest.raises(ConfigError, match=f"^tokenizer='{folder}/no.gguf': {said}$"):
            load_pretrained(transformers.AutoTokenizer, f"{folder}/no.gguf", "tokenizer")
        assert self.refusal("nobody/nothing").startswith(f"gguf_file={FILE!r}: no such file on the hub (")

    def test_without_name(self):
        message = "gguf_file='a.gguf': allowed only with name, the folder or hub name that has it"
        with pytest.raises(ConfigError, match=f"^{message}$"):
            HuggingFaceModel("causal-language-modeling", config=transformers.LlamaConfig(), gguf_file="a.gguf")

    @pytest.mark.parametrize("package", ["gguf", "accelerate"])
    def test_a_package_that_is_missing(self, folder, monkeypatch, package):
        find = importlib.util.find_spec
        monkeypatch.setattr("d2dmoe_pl.data.gguf_files.find_spec", lambda name: None if name == package else find(name))
        said = f"gguf_file={FILE!r}: the package {package} is not installed; pip install gguf accelerate"
        assert self.refusal(folder) == said

    def test_what_is_no_gguf_file(self, tmp_path):
        for content in (b"", b"GG", b"not a model"):
            (tmp_path / FILE).write_bytes(content)
            assert self.refusal(tmp_path) == f"gguf_file={FILE!r}: is no GGUF file; must be one"

    @pytest.mark.parametrize("left", [8, 20, 60, 400, 900, 1500, 0.5, -64])
    def test_what_is_truncated(self, folder, tmp_path, left):
        whole = (folder / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
        assert self.refusal(tmp_path).startswith(f"gguf_file={FILE!r}: is truncated or broken (")
        with pytest.raises(ConfigError, match=f"^tokenizer='{tmp_path / FILE}': is truncated or broken "):
            load_pretrained(transformers.AutoTokenizer, str(tmp_path / FILE), "tokenizer")

    def test_a_type_that_cannot_be_dequantised(self, dense, tmp_path):
        gguf_files.write_gguf(dense, tmp_path / FILE, raw_type=gguf.GGMLQuantizationType.Q8_1)
        assert self.refusal(tmp_path) == (
            f"gguf_file={FILE!r}: has tensors of type Q8_1 (blk.1.ffn_down.weight), which cannot be dequantised; must "
            "be requantised"
        )

    def test_a_type_that_nobody_knows(self, dense, tmp_path):
        gguf_files.write_gguf(dense, tmp_path / FILE)
        content = (tmp_path / FILE).read_bytes()
        name = b"blk.1.ffn_down.weight"
        at = content.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and these
        (tmp_path / FILE).write_bytes(content[:at] + (99).to_bytes(4, "little") + content[at + 4 :])
        assert self.refusal(tmp_path) == (
            f"gguf_file={FILE!r}: has tensors of type 99, which gguf does not know; must be requantised"
        )

    def test_an_architecture_that_transformers_does_not_read(self, dense, tmp_path):
        gguf_files.write_gguf(dense, tmp_path / FILE, architecture="bert")
        assert self.refusal(tmp_path) == (
            f"gguf_file={FILE!r}: not what transformers can make (GGUF model with architecture bert is not supported "
            "yet.)"
        )

    def test_a_part_of_a_model(self, dense, tmp_path):
        gguf_files.write_gguf(dense, tmp_path / FILE, keys={"split.count": 3})
        assert self.refusal(tmp_path) == (
            f"gguf_file={FILE!r}: is a part of a model; must be all of it, which llama-gguf-split --merge makes"
        )

    @pytest.mark.parametrize(
        ("made", "what"),
        [
            ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight"),
            ({"keys": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type"),
        ],
    )
    def test_scaled_positions(self, dense, tmp_path, made, what):
        gguf_files.write_gguf(dense, tmp_path / FILE, **made)
        assert self.refusal(tmp_path) == (
            f"gguf_file={FILE!r}: scales its rotary positions ({what}), which transformers does not read from GGUF; "
            "must be another file, or the model as it was before"
        )
        gguf_files.write_gguf(dense, tmp_path / FILE, keys={"llama.rope.scaling.type": "none"})
        source(tmp_path).build_structure([])

    @pytest.mark.parametrize("task", ["causal-language-modeling", "text-classification"])
    def test_weights_that_would_be_left_out(self, dense, tmp_path, task):
        gguf_files.write_gguf(dense, tmp_path / FILE, extra={"blk.0.attn_q.bias": np.ones(32, np.float32)})
        with pytest.raises(ConfigError) as raised:
            source(tmp_path, task=task).build(["a", "b"])
        assert str(raised.value).startswith(f"gguf_file={FILE!r}: holds 32 weights that LlamaFor")

    def test_weights_that_are_missing(self, dense, tmp_path):
        shallow = gguf_files.llama(num_hidden_layers=1)
        shallow.config.num_hidden_layers = 2
        gguf_files.write_gguf(shallow, tmp_path / FILE)
        with pytest.raises(ConfigError, match=r"its file has no weights that fit for 9 of the 21 tensors of Llama"):
            source(tmp_path).build([])

    def test_a_changed_file_is_looked_at_anew(self, folder, tmp_path):
        (tmp_path / FILE).write_bytes(b"nothing")
        self.refusal(tmp_path)
        shutil.copy(folder / FILE, tmp_path / FILE)
        source(tmp_path).build_structure([])
