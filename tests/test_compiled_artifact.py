"""A model compiled ahead of time gives what it gave for all inputs and settings, or runs as if it were not compiled."""

import copy
import threading

import pytest
import tiny
import torch
from torch import nn

from d2dmoe_pl import (
    GateConfig,
    load_compiled,
    load_model,
    quantize_,
    save_artifact,
    save_compiled,
    set_backend_,
    set_gate_,
    set_tau_,
)
from d2dmoe_pl.cli import main
from d2dmoe_pl.compiled_artifact import noise_for
from d2dmoe_pl.moe.find_layers import moe_layers

TAUS = (0.2, 0.7, 1.0)


def texts(samples=2, tokens=8, pads=0):
    mask = torch.ones(samples, tokens, dtype=torch.int64)
    mask[-1, tokens - pads :] = 0
    ids = torch.randint(1, 40, (samples, tokens))
    return {"input_ids": ids, "attention_mask": mask}


def programs_run(model):
    """Of how many shapes of inputs a program was asked for, and there was one."""
    return sum(program is not None for program in model._compiled_call_impl._known.values())


@pytest.fixture
def both(compiled_folders):
    before, after = compiled_folders
    plain, compiled = load_model(before), load_compiled(after)
    assert compiled.bert.encoder.layer[0].intermediate.gate.config.tau == 0.4
    set_tau_(plain, 0.4)
    return plain, compiled


@torch.no_grad()
@pytest.mark.parametrize("given", [texts(1, 9), texts(1, 16), texts(2, 8), texts(5, 2), texts(3, 11, pads=4)])
def test_it_gives_what_the_model_gives_at_every_setting(both, given):
    plain, compiled = both
    for tau in TAUS:
        for model in both:
            set_tau_(model, tau)
        torch.testing.assert_close(compiled(**given).logits, plain(**given).logits)
    assert programs_run(compiled) == 1
    assert type(compiled(**given)) is type(plain(**given))


@torch.no_grad()
def test_inputs_may_lie_anywhere(both):
    plain, compiled = both
    given = {name: value.t().contiguous().t() for name, value in texts(3, 6).items()}
    torch.testing.assert_close(compiled(**given).logits, plain(**given).logits)
    given = {name: torch.cat([value, value], dim=1)[:, ::2] for name, value in texts(3, 6).items()}
    torch.testing.assert_close(compiled(**given).logits, plain(**given).logits)
    assert programs_run(compiled) == 1


@torch.no_grad()
def test_weights_that_change_where_they_are_count(both):
    given = texts()
    for model in both:
        model.classifier.weight.mul_(2)
        model.bert.encoder.layer[0].intermediate.experts.up_weight.mul_(0.5)
    plain, compiled = both
    torch.testing.assert_close(compiled(**given).logits, plain(**given).logits)
    assert programs_run(compiled) == 1


def test_threads_call_it_at_once(both):
    _, compiled = both
    given = [texts(1 + i % 3, 6 + i) for i in range(8)]
    with torch.no_grad():
        expected = [compiled(**each).logits for each in given]
    got = {}

    def call(i):
        got[i] = compiled(**given[i]).logits

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits in enumerate(expected):
        assert torch.equal(got[i], logits)


OTHER_CALLS = {
    "of one token": (texts(2, 1), "sizes or types of inputs are none"),
    "of other numbers": ({name: value.int() for name, value in texts().items()}, "sizes or types of inputs are none"),
    "without a mask": ({"input_ids": texts()["input_ids"]}, "for calls with attention_mask, a tensor on the CPU"),
    "with more": ({**texts(), "output_attentions": True}, "for calls without output_attentions"),
}


@torch.no_grad()
@pytest.mark.parametrize("given", OTHER_CALLS)
def test_other_calls_run_as_if_it_were_not_compiled(both, given, caplog):
    plain, compiled = both
    inputs, said = OTHER_CALLS[given]
    for _ in range(2):
        torch.testing.assert_close(compiled(**inputs).logits, plain(**inputs).logits)
    assert programs_run(compiled) == 0
    (line,) = [record.getMessage() for record in caplog.records if "not compiled" in record.getMessage()]
    assert said in line
    inputs = texts()
    torch.testing.assert_close(compiled(**inputs).logits, plain(**inputs).logits)
    assert programs_run(compiled) == 1


def test_gradients_of_weights_are_given(both, caplog):
    plain, compiled = both
    given = texts()
    for model in both:
        model.requires_grad_(True)
        model(**given).logits.sum().backward()
    torch.testing.assert_close(compiled.classifier.weight.grad, plain.classifier.weight.grad)
    assert any("gradients are wanted of its weights; such calls are" in each for each in caplog.messages)
    with torch.no_grad():
        compiled(**given)
    assert programs_run(compiled) == 1


def test_too_long_a_text_is_the_models_own_error(both):
    errors = []
    for model in both:
        with pytest.raises((RuntimeError, IndexError)) as error:
            model(**texts(1, 17))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


CHANGES = {
    "type": lambda model: model.double(),
    "rule": lambda model: set_gate_(model, GateConfig("topk", k=2)),
    "number of experts": lambda model: moe_layers(model)["bert.encoder.layer.1.intermediate"].gate.set_config(
        GateConfig("dynk_max", 0.1)
    ),
    "backend": lambda model: set_backend_(model, "reference"),
    "module": lambda model: setattr(
        model.bert.encoder.layer[1], "output", tiny.Doubled(model.bert.encoder.layer[1].output)
    ),
    "weight": lambda model: setattr(model.classifier, "weight", nn.Parameter(2 * model.classifier.weight)),
    "hook": lambda model: model.classifier.register_forward_hook(lambda module, args, output: 2 * output),
    "hook before": lambda model: model.classifier.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_count(both, change):
    plain, compiled = both
    given = texts(3, 7, pads=2)
    before = compiled(**given).logits
    for model in both:
        CHANGES[change](model)
    torch.testing.assert_close(compiled(**given).logits, plain(**given).logits)
    assert not torch.equal(compiled(**given).logits, before) or change == "backend"


def test_who_watches_sees_every_decision(both):
    plain, compiled = both
    given = texts(3, 7, pads=2)
    seen = {id(model): [] for model in both}
    with torch.no_grad():
        for model in both:
            for layer in moe_layers(model).values():
                layer.watch(seen[id(model)].append)
            model(**given)
    assert len(seen[id(compiled)]) == 2
    for own, other in zip(seen[id(plain)], seen[id(compiled)], strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("part", ["", "bert.embeddings"])
@torch.no_grad()
def test_dropout_is_on_in_training(both, part):
    _, compiled = both
    given = texts()
    compiled.get_submodule(part).train()
    compiled.bert.embeddings.dropout.p = 0.9
    assert not torch.equal(compiled(**given).logits, compiled(**given).logits)


@torch.no_grad()
def test_what_the_configuration_asks_for_is_given(both):
    _, compiled = both
    assert compiled(**texts()).hidden_states is None
    compiled.config.output_hidden_states = True
    assert len(compiled(**texts()).hidden_states) == 3


@torch.no_grad()
def test_a_copy_has_weights_of_its_own(both):
    _, compiled = both
    given = texts()
    copied = copy.deepcopy(compiled)
    copied.classifier.weight.zero_()
    copied.classifier.bias.zero_()
    assert copied(**given).logits.abs().max() == 0
    assert compiled(**given).logits.abs().max() > 0


@pytest.mark.thorough
@torch.no_grad()
def test_it_can_be_compiled_anew_and_exported(both):
    plain, compiled = both
    given = texts()
    expected = plain(**given).logits
    anew = torch.compile(lambda **inputs: compiled(**inputs).logits, backend="eager")
    torch.testing.assert_close(anew(**given), expected)
    exported = torch.export.export(compiled, (), kwargs=given)
    torch.testing.assert_close(exported.module()(**given).logits, expected)


def test_its_folder_is_an_artifact_too(compiled_folders, tmp_path):
    _, after = compiled_folders
    given = texts()
    compiled = load_compiled(after)
    torch.testing.assert_close(load_model(after)(**given).logits, compiled(**given).logits)
    save_artifact(compiled, tmp_path / "again")
    assert (tmp_path / "again" / "d2dmoe.safetensors").read_bytes() == (after / "d2dmoe.safetensors").read_bytes()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["timm_vit", "gpt2", "llama", "t5-text-to-text", "deberta_v2", "modernbert", "clip"])
@torch.no_grad()
def test_other_families(kind, dtype, tmp_path):
    model = tiny.routed(kind, tau=0.5).eval()
    if dtype == "int8":
        quantize_(model)
    batch = tiny.batch(kind)
    save_compiled(model, tmp_path / "compiled", batch)
    compiled = load_compiled(tmp_path / "compiled")
    for samples in ({key: value[:1] for key, value in batch.items()}, batch):
        for tau in TAUS:
            set_tau_(model, tau)
            set_tau_(compiled, tau)
            expected, got = tiny.logits(model, samples), tiny.logits(compiled, samples)
            assert (got - expected).norm() <= (1e-5 if dtype == "float32" else 0.05) * expected.norm()
    assert programs_run(compiled) == 2


@pytest.mark.thorough
@torch.no_grad()
def test_pictures_are_given_in_the_type_of_the_model(tmp_path):
    save_artifact(tiny.routed("timm_vit"), tmp_path / "before")
    folders = ["--artifact", str(tmp_path / "before"), "--output_dir", str(tmp_path / "after")]
    main(["compile", *folders, "--dtype", "bfloat16"])
    compiled = load_compiled(tmp_path / "after")
    pictures = tiny.batch()["pixel_values"].bfloat16()
    expected = load_model(tmp_path / "before", dtype="bfloat16")(pictures)
    assert (compiled(pictures) - expected).norm() < 0.05 * expected.norm()
    assert programs_run(compiled) == 1


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        ("bert", {"attention_mask", "token_type_ids"}),
        ("distilbert", {"attention_mask"}),
        ("gpt2", {"attention_mask"}),
        ("mpnet", {"attention_mask"}),
        ("timm_vit", set()),
    ],
)
@torch.no_grad()
def test_noise_is_what_tokenizers_give(kind, beside):
    model = tiny.dense(kind).eval()
    noise = noise_for(model)
    assert set(noise) - {"input_ids", "pixel_values", "x", "image"} == beside
    assert tiny.logits(model, noise).isfinite().all()
    assert set(noise_for(model, ["input_ids", "attention_mask"])) & {"token_type_ids"} == set()
