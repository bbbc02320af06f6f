"""llama.cpp writes beside PyTorch from the same weights, where its package is."""

import sys

import gguf_files
import pytest
import tiny
import torch

from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.benchmark.artifact_comparisons import artifact_comparisons
from d2dmoe_pl.benchmark.comparison import Settings, measure
from d2dmoe_pl.benchmark.gguf_runtime import GGUFRuntime, check_gguf
from d2dmoe_pl.cli import main
from d2dmoe_pl.errors import ConfigError

NEW = 6


@pytest.fixture
def model_and_file(tmp_path):
    model = gguf_files.llama(hidden_size=64, intermediate_size=96, initializer_range=0.3)
    with torch.no_grad():
        return model, str(gguf_files.write_gguf(model, tmp_path / "model.gguf"))


def greedily(model, prompts):
    return model.generate(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("texts", [1, 3])
def test_it_writes_what_pytorch_writes(model_and_file, texts):
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python brings it")
    model, file = model_and_file
    prompts = torch.randint(3, model.config.vocab_size, (texts, 7))
    expected = greedily(model, prompts)
    rival = GGUFRuntime(file, *expected.shape)
    written = rival.write(prompts, NEW)
    assert torch.equal(rival.write(prompts, NEW), written)  # from the start again
    assert torch.equal(written[:, :7], prompts)
    for text in (expected, written):  # it rounds activations to 8 bits, so that near ties fall either way
        likeliest = rival.likeliest(text[:, :-1])
        assert (likeliest == model(text[:, :-1]).logits.argmax(dim=-1)).float().mean() > 0.9
    assert (likeliest[:, 6:] == written[:, 7:]).float().mean() > 0.9  # token by token as in one go
    assert rival.type_name == "Q8_0"
    assert 1 < rival.bytes_per_weight < 4


def compared(model, file, folder):
    save_artifact(tiny.route_(model), folder / "artifact")
    settings = Settings(["model"], [torch.float32], [2], "auto", [], 2, torch.device("cpu"), decode=NEW, gguf=file)
    return artifact_comparisons(str(folder / "artifact"), [1.0], None, 7, settings)


def test_a_row_of_the_benchmark(model_and_file, tmp_path):
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python brings it")
    model, file = model_and_file
    [comparison] = compared(model, file, tmp_path)
    [ours, row] = measure(comparison, 2, torch.device("cpu"))
    assert (row.way, row.dtype, row.is_dense) == ("dense, llama.cpp", "Q8_0", True)
    assert row.agreement > 80
    assert 25 < row.bytes_percent < ours.bytes_percent


def test_another_models_file(model_and_file, tmp_path):
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python brings it")
    _, file = model_and_file
    other = gguf_files.llama(hidden_size=64, intermediate_size=96, vocab_size=50)
    with pytest.raises(ConfigError, match=r"has a vocabulary of 34; must be the artifact's model, which has 50$"):
        next(compared(other, file, tmp_path))


def test_refusals(model_and_file, tmp_path, monkeypatch, capsys):
    _, file = model_and_file
    with pytest.raises(ConfigError, match=r"gguf='nowhere.gguf': there is no such file$"):
        check_gguf("nowhere.gguf")
    (tmp_path / "text.gguf").write_text("text")
    with pytest.raises(ConfigError, match=r"is no GGUF file$"):
        check_gguf(str(tmp_path / "text.gguf"))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ConfigError, match=r"is not installed; pip install llama-cpp-python brings it$"):
        check_gguf(file)
    with pytest.raises(SystemExit):
        main(["benchmark", "--gguf", file])
    assert f"gguf={file!r}: only with --decode" in capsys.readouterr().err


def test_not_beside_a_gpu(model_and_file, monkeypatch, capsys):
    _, file = model_and_file
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("d2dmoe_pl.benchmark.command.check_gguf", lambda file: None)
    with pytest.raises(SystemExit):
        main(["benchmark", "--gguf", file, "--decode", "4", "--artifact", "anywhere"])
    assert f"gguf={file!r}: llama.cpp is timed on the CPU; add --device cpu" in capsys.readouterr().err
