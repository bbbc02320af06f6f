"""Converted models in other libraries: LoRA by PEFT, the Trainer of transformers, accelerate, checkpointing."""

import copy
from itertools import product

import pytest
import tiny
import torch
import transformers

from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, set_budget_, set_budget_path_
from d2dmoe_pl.moe.budgets.second_order import SecondOrder
from d2dmoe_pl.moe.conversion import ExpertsConfig, add_routers_, convert_to_moe_, set_backend_, set_gate_, set_tau_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.cutoffs.fitting import fit_cutoffs_
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.layer import learned_choices, observed
from d2dmoe_pl.moe.quantization.quantize import quantize_
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.moe.stand_ins.fitting import FittingConfig, fit_stand_ins_

KINDS = ["bert", "llama-causal-language-modeling", "phi3-causal-language-modeling", "t5-text-to-text"]
EXPERTS = ["experts.up_weight", "experts.down_weight"]


def inputs_of(kind):
    return {key: value for key, value in tiny.batch(kind).items() if key != "labels"}


def without_dropout_(model):
    """The model, with nothing random in it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_accelerate_keeps_elsewhere(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny.dense(kind)
    accelerate.cpu_offload(model)
    with pytest.raises(ConfigError, match=r": accelerate keeps its weights elsewhere until they are needed; must be"):
        convert_to_moe_(model, ExpertsConfig(8))
    whole = accelerate.dispatch_model(tiny.dense(kind), {"": "cpu"})
    inputs = {key: torch.ones_like(value) if "mask" in key else value for key, value in inputs_of(kind).items()}
    with torch.no_grad():
        before = whole(**inputs).logits
        convert_to_moe_(whole, ExpertsConfig(8))
        torch.testing.assert_close(whole(**inputs).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("prepare_", [lambda model: None, quantize_, lambda model: model.to(torch.bfloat16)])
def test_experts_run_on_weights_that_accelerate_brings(prepare_, offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny.routed("llama-causal-language-modeling", tau=0.3), inputs_of("llama-causal-language-modeling")
    prepare_(model)
    expected = model(**inputs).logits * inputs["attention_mask"].unsqueeze(2)
    folder = {"offload_dir": str(tmp_path / "weights")} if offload == "disk_offload" else {}
    getattr(accelerate, offload)(model, execution_device="cpu", **folder)
    for _ in range(2):
        found = model(**inputs).logits * inputs["attention_mask"].unsqueeze(2)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change_", [lambda model: add_routers_(model, RouterConfig()), merge_to_dense_, quantize_, "save_artifact"]
)
def test_nothing_is_made_of_weights_that_accelerate_keeps_elsewhere(change_, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny.routed("bert", tau=0.3), inputs_of("bert")
    expected = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    change_ = (lambda model: save_artifact(model, tmp_path / "saved")) if change_ == "save_artifact" else change_
    with pytest.raises(ConfigError, match=r": accelerate keeps its weights elsewhere until they are needed; must be"):
        change_(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(**inputs).logits, expected)
    change_(model)


class TestPEFT:
    def test_experts_are_trained_whole(self):
        peft = pytest.importorskip("peft")
        model, inputs = tiny.routed("bert", tau=0.3), inputs_of("bert")
        expected = model(**inputs).logits
        config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["experts"])
        adapted = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            torch.testing.assert_close(adapted(**inputs).logits, expected)
        set_backend_(adapted, "reference")
        assert {module.backend for module in adapted.modules() if isinstance(module, Experts)} == {"reference"}
        adapted(**inputs).logits.sum().backward()
        assert any(p.grad is not None for name, p in adapted.named_parameters() if "modules_to_save" in name)

    @pytest.mark.parametrize("kind", KINDS)
    def test_all_linear_leaves_routers_alone(self, kind):
        peft = pytest.importorskip("peft")
        model = tiny.routed(kind)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        names = [name for name, module in adapted.named_modules() if name.endswith("lora_A")]
        assert names
        assert not [name for name in names if ".router." in name]
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert all("lora_" in name for name in trained)

    @pytest.mark.parametrize("kind", KINDS)
    def test_experts_are_adapted_trained_and_merged(self, kind, tmp_path):
        peft = pytest.importorskip("peft")
        model, inputs = tiny.routed(kind, tau=0.6), inputs_of(kind)
        with torch.no_grad():
            before = model(**inputs).logits
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        torch.testing.assert_close(adapted(**inputs).logits, before, rtol=1e-4, atol=1e-4)
        for layer in moe_layers(adapted).values():
            assert layer.sizes.num_experts == 8
        names, base = tuple(moe_layers(model)), adapted.get_base_model()
        points = tuple(BudgetPoint((tau,) * len(names), tau, tau, 0.0, 90.0) for tau in (1.0, 0.2))
        set_budget_path_(base, BudgetPath(names, "dynk_max", "accuracy", True, True, samples=9, points=points))
        set_budget_(base, ffn_flops=0.4)
        assert [layer.gate.config.tau for layer in moe_layers(base).values()] == pytest.approx([0.4] * len(names))
        set_tau_(base, 0.6)
        adapted(**inputs).logits.square().mean().backward()
        gradients = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_B" in name]
        assert gradients
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            tuned = adapted(**inputs).logits
            assert not torch.allclose(tuned, before, atol=1e-3)
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).logits, tuned, rtol=1e-3, atol=1e-3)
            merged.save_pretrained(tmp_path)
            torch.testing.assert_close(load_model(tmp_path)(**inputs).logits, merged(**inputs).logits)

    def test_what_is_adapted_is_merged_before_it_becomes_something_else(self, tmp_path):
        peft = pytest.importorskip("peft")
        dense = peft.get_peft_model(tiny.dense("bert"), peft.LoraConfig(r=2, target_modules=["output.dense"]))
        with pytest.raises(ConfigError, match=r"layer.0.intermediate: its Linear of peft\S+ is no plain linear module"):
            convert_to_moe_(dense.get_base_model(), ExpertsConfig(8))
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
        adapted, inputs = peft.get_peft_model(tiny.routed("bert", tau=1.0), config).eval(), inputs_of("bert")
        with pytest.raises(ConfigError, match=r"layer.0.intermediate.experts: is a ParamWrapper that adapts weights"):
            merge_to_dense_(adapted.get_base_model())
        told = r"^\S+: is a \w+ that adapts weights, and what it adds would be lost"
        for model, function in product((dense, adapted), (quantize_, lambda model: save_artifact(model, tmp_path))):
            with pytest.raises(ConfigError, match=told):
                function(model.get_base_model())
        add_routers_(adapted.get_base_model(), RouterConfig(4))
        expected, merged = adapted(**inputs).logits, adapted.merge_and_unload()
        merge_to_dense_(merged)
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("cutoffs", [CutoffConfig(inputs=1.0, hidden=1.0), CutoffConfig(gate_proj=0.3)])
    @pytest.mark.parametrize("kind", KINDS[:3])
    def test_adapted_experts_are_watched_counted_and_fitted_as_merged_ones(self, kind, cutoffs):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
        adapted, inputs = peft.get_peft_model(tiny.routed(kind, tau=0.6), config).eval(), inputs_of(kind)
        merged = copy.deepcopy(adapted).merge_and_unload().eval()
        found = []
        for model in (adapted.get_base_model(), merged):
            fit_cutoffs_(model, cutoffs, run=lambda model=model: model(**inputs))
            fit_stand_ins_(model, FittingConfig(rank=2), run=lambda batch, model=model: model(**batch), batch=inputs)
            set_gate_(model, GateConfig("topk", k=3))
            layers, seen = moe_layers(model), []
            handles = [layer.watch_work(seen.append) for layer in layers.values()]
            with torch.no_grad(), observed(layers, lambda name, tokens, hidden, seen=seen: seen.append(hidden)):
                seen.append(model(**inputs).logits)
            for handle in handles:
                handle.remove()
            with learned_choices(layers, 1.0):
                seen.append(model(**inputs).logits)
            sums = SecondOrder(model, [[1.0, 0.5]] * len(layers))
            sums.add(lambda model=model: model(**inputs), lambda model=model: model(**inputs).logits.sum())
            seen.append(sums.divergences)
            found.append(seen)
        assert len(found[0]) == len(found[1])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)

    def test_tau_can_be_set_while_experts_are_adapted(self):
        peft = pytest.importorskip("peft")
        model, inputs = tiny.routed("bert", tau=1.0), inputs_of("bert")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)).eval()
        before = adapted(**inputs).logits
        set_tau_(adapted.get_base_model(), 0.0)
        assert not torch.allclose(adapted(**inputs).logits, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_of_transformers(tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    model = tiny.routed("bert", tau=0.7)
    start = copy.deepcopy(model.state_dict())
    batch = tiny.batch("bert", size=8)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    settings = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=checkpointing,
    )
    trainer = transformers.Trainer(model, settings, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert any("experts.up_weight" in name for name in changed)
    trainer.save_model(str(tmp_path / "saved"))
    inputs = inputs_of("bert")
    torch.testing.assert_close(load_model(tmp_path / "saved")(**inputs).logits, model.eval()(**inputs).logits)


def test_a_training_is_resumed_by_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    batch = tiny.batch("bert", size=8)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]

    def trained(steps, **kwargs):
        torch.manual_seed(0)
        model = without_dropout_(tiny.routed("bert", tau=0.7))
        settings = transformers.TrainingArguments(
            str(tmp_path / "run"),
            max_steps=steps,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            lr_scheduler_type="constant",
        )
        transformers.Trainer(model, settings, train_dataset=data).train(**kwargs)
        return model

    trained(2)
    resumed = trained(4, resume_from_checkpoint=True)
    whole = trained(4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    plain = without_dropout_(tiny.routed(kind, tau=0.6)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    inputs = inputs_of(kind)
    gradients = []
    for model in (plain, checkpointed):
        model(**inputs).logits.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny.routed("bert", tau=0.7)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    batch = tiny.batch("bert")
    losses = []
    for _ in range(8):
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert set(accelerator.get_state_dict(prepared)) == set(model.state_dict())
