"""What cannot be compiled ahead of time, and programs that must not run here, end in a line."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import tiny
import torch
import transformers

from d2dmoe_pl import ConfigError, load_compiled, load_model, save_artifact, save_compiled
from d2dmoe_pl.cli import main
from d2dmoe_pl.moe.ahead_of_time import attach_programs_, write_programs
from d2dmoe_pl.moe.compiled_calls import Relation


def texts():
    return {"input_ids": torch.randint(1, 40, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}


def changed(folder, tmp_path, **made_on):
    target = tmp_path / "changed"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    described = json.loads((target / "programs.json").read_text())
    described["made_on"] |= made_on
    (target / "programs.json").write_text(json.dumps(described))
    return target


@pytest.mark.parametrize(
    ("made_on", "said"),
    [
        ({"torch": "2.0.0"}, r"was compiled for PyTorch 2\.0\.0, and here is 2\."),
        ({"operators": "abc"}, r"was compiled for version of this package's operators abc, and here is [0-9a-f]{16}"),
        ({"machine": "riscv64"}, r"was compiled for processors riscv64, and here is "),
        ({"processor": ["avx1024"]}, r"was compiled for a processor with avx1024, which this one has not"),
    ],
)
def test_programs_for_others_are_refused(compiled_folders, tmp_path, made_on, said):
    with pytest.raises(ConfigError, match=said + r".*; must be compiled here: main\.py compile$"):
        load_compiled(changed(compiled_folders[1], tmp_path, **made_on))


def test_programs_of_another_model_are_refused(compiled_folders, tmp_path):
    _, after = compiled_folders
    folder = changed(after, tmp_path)
    torch.manual_seed(1)
    save_artifact(tiny.routed("bert", num_experts=4), tmp_path / "other")
    for name in ("config.json", "d2dmoe.safetensors"):
        (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ConfigError, match=r"was compiled from another model, whose .* is float32 \[8"):
        load_compiled(folder)


def test_a_folder_without_programs_is_refused(compiled_folders, tmp_path):
    with pytest.raises(ConfigError, match=r"has no programs, programs\.json cannot be read \(.*No such file"):
        load_compiled(compiled_folders[0])
    folder = changed(compiled_folders[1], tmp_path)
    (folder / "programs.json").write_text('{"format": 99}')
    with pytest.raises(ConfigError, match=r"has programs of format 99; this release reads 2$"):
        load_compiled(folder)


def test_programs_that_are_not_as_they_were_written_are_refused(compiled_folders, tmp_path):
    folder = changed(compiled_folders[1], tmp_path)
    for file in (folder / "programs.pt2", folder / "programs.so"):
        content = file.read_bytes()
        for broken in (content[:-1000], b"", None):
            file.unlink()
            if broken is not None:
                file.write_bytes(broken)
            with pytest.raises(ConfigError, match=rf"{file.name} is missing, or not as it was written; must be comp"):
                load_compiled(folder)
            file.touch()
        file.write_bytes(content)
    described = json.loads((folder / "programs.json").read_text())
    broken = [(name, 5) for name in ("programs", "output", "settings", "tensors")]
    for name, value in [*broken, *((name, {"one": 5}) for name in ("programs", "output", "tensors"))]:
        (folder / "programs.json").write_text(json.dumps({**described, name: value}))
        with pytest.raises(ConfigError, match=r"programs\.json describes no programs|was compiled from another model"):
            load_compiled(folder)


def without_compiler(tmp_path, folder, code):
    """What a process prints that has no compiler, nor a library that was compiled before."""
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "empty")}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.thorough
def test_where_there_is_no_compiler_operators_are_those_beside_the_programs(compiled_folders, tmp_path):
    given = texts()
    torch.save((given, load_compiled(compiled_folders[1])(**given).logits), tmp_path / "expected")
    code = f"""if True:
        import sys, torch
        from d2dmoe_pl import load_compiled
        model = load_compiled(sys.argv[1])
        given, expected = torch.load({str(tmp_path / "expected")!r})
        assert torch.equal(model(**given).logits, expected)
        assert [*model._compiled_call_impl._known.values()] != [None]
        plain = model.forward(**given).logits  # by operators as well
        print(float((plain - expected).detach().norm()))
    """
    ran = without_compiler(tmp_path, compiled_folders[1], code)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 1e-4
    assert "compil" not in ran.stderr
    assert not list((tmp_path / "empty").glob("**/*.so"))


@pytest.mark.thorough
def test_operators_that_cannot_be_loaded_end_in_a_line(compiled_folders, tmp_path):
    folder = changed(compiled_folders[1], tmp_path)
    (folder / "programs.so").write_bytes(b"of another system")
    described = json.loads((folder / "programs.json").read_text())
    described["checksums"]["programs.so"] = hashlib.sha256(b"of another system").hexdigest()
    (folder / "programs.json").write_text(json.dumps(described))
    code = "import sys; from d2dmoe_pl import load_compiled; load_compiled(sys.argv[1])"
    ran = without_compiler(tmp_path, folder, code)
    said = rf"ConfigError: '{folder}': its operators cannot be loaded \(.*\), and the compiler says: .*none"
    assert re.search(said, ran.stderr.strip().splitlines()[-1]), ran.stderr


@torch.no_grad()
@pytest.mark.parametrize("wrong", [-1, 40, 10**12])
@pytest.mark.parametrize("samples", [1, 3])
def test_ids_of_no_token_are_the_models_own_error(compiled_folders, wrong, samples):
    """A program would end the process, or take the last token for one that is negative."""
    model = load_compiled(compiled_folders[1])
    given = {"input_ids": torch.ones(samples, 9, dtype=torch.int64)}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    before = model(**given).logits
    given["input_ids"][-1, 4] = wrong
    with pytest.raises(IndexError, match="index out of range"):
        model(**given)
    given["input_ids"][-1, 4] = 1
    assert torch.equal(model(**given).logits, before)
    assert model._compiled_call_impl.passed_over == []


@torch.no_grad()
def test_a_call_for_hidden_states_alone_runs_without_programs(compiled_folders):
    """Transformers leaves hooks on the model, which do nothing in other calls; a hook of one's own counts."""
    model = load_compiled(compiled_folders[1])
    given = texts()
    before = model(**given).logits
    shown = model(**given, output_hidden_states=True)
    assert len(shown.hidden_states) == 3
    assert any("capturing" in str(hook) for each in model.modules() for hook in each._forward_hooks.values())
    assert torch.equal(model(**given).logits, before)
    assert model._compiled_call_impl.passed_over == ["it was compiled for calls without output_hidden_states"]
    model.classifier.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(model(**given).logits, 2 * before)
    assert len(model._compiled_call_impl.passed_over) == 2


def test_a_model_is_compiled_once(compiled_folders, tmp_path):
    compiled = load_compiled(compiled_folders[1])
    with pytest.raises(ConfigError, match=r"^BertForSequenceClassification: is optimised already$"):
        save_compiled(compiled, tmp_path / "again")
    with pytest.raises(ConfigError, match=r"^BertForSequenceClassification: is optimised already$"):
        attach_programs_(compiled, compiled_folders[1])


def test_a_model_elsewhere_is_refused(tmp_path):
    model = tiny.routed("bert").to("meta")
    with pytest.raises(ConfigError, match=r"^BertForSequenceClassification: is on meta; must be on the CPU, where"):
        write_programs(model, texts(), tmp_path)


def test_an_output_with_more_than_tensors_is_refused(tmp_path):
    model = tiny.routed("bert-embedding")
    model.config.is_decoder = model.config.use_cache = True  # it then gives what it remembers of the text
    with pytest.raises(
        ConfigError, match=r"gives \w+ beside tensors; must give tensors alone, to be compiled ahead of"
    ):
        write_programs(model, texts(), tmp_path)


@pytest.mark.parametrize("said", ["__import__('os')", "size_0_0.real == 1", "size_0_0 ==", "[1][0] == 1", "f(1)"])
def test_what_is_said_of_sizes_is_arithmetic(said):
    with pytest.raises(ConfigError, match=r"^sizes of inputs: .* is no arithmetic"):
        Relation(said)


@pytest.mark.parametrize(
    ("said", "holds"), [("size_0_1 >= size_1_0 and size_0_1 % 2 == 0", True), ("-size_0_1 > 0", False)]
)
def test_relations_hold_or_not(said, holds):
    assert Relation(said).holds({"size_0_1": 4, "size_1_0": 3}) is holds


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: artifact=None: must be the folder artifact that a phase left"),
        (["--dtype", "float16"], "error: dtype='float16': allowed are float32, bfloat16, int8"),
        (
            ["--around", "bfloat16"],
            "error: around='bfloat16': is the type around int8; must go, or --dtype int8 be there",
        ),
        (["--tau", "0.5", "--budget", "0.5"], "error: tau=0.5, budget=0.5: must be one of them"),
        (["--output_dir", "BEFORE"], "is the artifact that is compiled; must be another folder"),
    ],
)
def test_wrong_settings_end_in_a_line(compiled_folders, arguments, said, capsys):
    before = str(compiled_folders[0])
    own = [argument.replace("BEFORE", before) for argument in arguments]
    with pytest.raises(SystemExit):
        main(["compile", *(["--artifact", before] if arguments else []), *own])
    assert said in capsys.readouterr().err


def test_where_all_experts_would_be_computed_it_is_refused(tmp_path):
    model = tiny.moebert()
    with pytest.raises(
        ConfigError, match=r"of its 2 layers that choose experts, 2 would compute all of them ahead of time"
    ):
        save_compiled(model, tmp_path / "compiled")
    assert not (tmp_path / "compiled").exists()


@pytest.mark.thorough
def test_what_pytorch_cannot_export_is_refused(tmp_path):
    model = tiny.routed("t5")  # its head looks for the ends of texts
    with pytest.raises(ConfigError, match=r"^T5ForSequenceClassification: cannot be compiled ahead of time; PyTorch's"):
        save_compiled(model, tmp_path / "compiled")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"input_ids": torch.ones(2, 1, dtype=torch.int64)}, r"batch: input_ids is .*; must be of two tokens or more$"),
        ({"input_ids": torch.ones(0, 8, dtype=torch.int64)}, r"batch: input_ids is .*; must be a tensor of one sample"),
        ({"input_ids": [[1, 2]]}, r"batch: input_ids is .*; must be a tensor of one sample or more$"),
        ({"text": torch.ones(2, 8)}, r"batch: BertForSequenceClassification cannot be called with text \("),
        ({}, r"batch: BertForSequenceClassification cannot be called with nothing \("),
    ],
)
def test_a_batch_that_is_none_is_refused(batch, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        save_compiled(tiny.routed("bert"), tmp_path / "compiled", batch)
    assert not (tmp_path / "compiled").exists()


@pytest.mark.thorough
@torch.no_grad()
def test_what_a_call_alone_makes_is_no_other_model(tmp_path):
    """With longrope, the first call gives the model frequencies that one which is loaded has not."""
    scaled = {"short_factor": [1.0] * 3, "long_factor": [4.0] * 3, "original_max_position_embeddings": 16}
    config = transformers.Phi3Config(
        **{"vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        **{"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "original_max_position_embeddings": 16},
        rope_parameters={"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, **scaled},
    )
    model = tiny.route_(transformers.Phi3ForCausalLM(config).eval(), 4, 1.0)
    save_artifact(model, tmp_path / "plain")
    save_compiled(load_model(tmp_path / "plain"), tmp_path / "compiled")
    plain, compiled = load_model(tmp_path / "plain"), load_compiled(tmp_path / "compiled")
    for length in (8, 15, 30, 10):
        ids = torch.randint(3, 40, (2, length))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.testing.assert_close(compiled(**given).logits, plain(**given).logits, rtol=1e-4, atol=1e-5)
