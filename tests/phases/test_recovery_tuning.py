"""Recovery: what learns from what, that the curve gets better, what is refused."""

from functools import partial

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import (
    ExpertsConfig,
    add_routers_,
    convert_to_moe_,
    set_gate_,
    set_tau_,
    temporary_gate,
)
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.layer import observed
from d2dmoe_pl.moe.routers import RouterConfig, gram_matrices, output_norms
from d2dmoe_pl.phases import RecoveryTuning
from d2dmoe_pl.phases._preflight import preflight
from d2dmoe_pl.structure import describe


def saved(model, folder, stage="RouterRegression"):
    save_artifact(model, folder, [PhaseRecord(stage)])
    return str(folder)


@pytest.fixture
def routed(tmp_path):
    """The artifact of a BERT of 8 experts a layer, gate at tau 0.5."""
    return saved(tiny.routed("bert"), tmp_path / "routed")


def fit(trainer, phase, **kwargs):
    trainer(limit_train_batches=1.0, callbacks=[SaveArtifact()], **kwargs).fit(phase, datamodule=tiny.TextData(8))


def attached(trainer, phase):
    """``phase`` as it is after a fit that changes nothing, in evaluation mode."""
    phase.optimizer = partial(torch.optim.SGD, lr=0.0)
    fit(trainer, phase)
    phase.model.eval()
    phase.zero_grad()
    return phase


def test_the_task_trains_executed_experts_only_and_no_router(trainer, routed):
    phase = attached(trainer, RecoveryTuning(0.0, 0.0, beta=0.0, router_weight=0.0, init_from=routed))
    set_tau_(phase.model, 0.0)  # one expert a token
    ran = {}
    handles = [
        layer.watch(lambda mask, name=name: ran.setdefault(name, mask.any(dim=0)))
        for name, layer in moe_layers(phase.model).items()
    ]
    batch = {key: value[:1, :2] if value.dim() > 1 else value[:1] for key, value in tiny.batch("bert").items()}
    tiny.logits(phase.model, batch)  # two tokens leave most of the 8 experts out
    [handle.remove() for handle in handles]
    phase._forward(batch, tau=0.0)[0].sum().backward()
    for name, layer in moe_layers(phase.model).items():
        got_gradient = layer.experts.up_weight.grad.abs().sum(dim=(1, 2)) > 0
        assert not ran[name].all()
        assert not (got_gradient & ~ran[name]).any()
        assert got_gradient.any()
        assert all(parameter.grad is None for parameter in layer.router.parameters())


@pytest.mark.parametrize("target", ["norm", "relative_norm", "activation_sum"])
def test_routers_go_on_learning_what_they_were_trained_to_give(trainer, tmp_path, target):
    model = tiny.dense("bert")
    convert_to_moe_(model, ExpertsConfig(8))
    add_routers_(model, RouterConfig(8, target=target))
    set_gate_(model, GateConfig("dynk_max", 0.5))
    phase = attached(trainer, RecoveryTuning(beta=0.0, init_from=saved(model, tmp_path / "routed")))
    inputs, hidden = {}, {}
    batch, layers = tiny.batch("bert"), moe_layers(phase.model)

    def keep(name, tokens, activations):
        inputs[name], hidden[name] = tokens, activations

    with temporary_gate(phase.model, GateConfig("dynk_max", 0.5)), observed(layers, keep):
        tiny.logits(phase.model, batch)
    _, _, losses, _ = phase._forward(batch, tau=0.5)
    for name, layer in layers.items():
        assert layer.router.config.target == target
        norms = output_norms(hidden[name], gram_matrices(layer.experts.down_weight))
        sums = hidden[name].abs().sum(dim=-1)
        wanted = {"norm": norms, "relative_norm": norms / norms.mean(dim=1, keepdim=True)}.get(
            target, sums / sums.max()
        )
        torch.testing.assert_close(losses[name], F.mse_loss(layer.router(inputs[name]), wanted))


def test_routers_learn_the_norms_at_the_gate_and_nothing_else_learns_from_that(trainer, routed):
    phase = attached(trainer, RecoveryTuning(beta=0.0, init_from=routed))
    batch = tiny.batch("bert")
    inputs = {}

    def keep(name):
        def hook(router, args):
            inputs.setdefault(name, args[0])

        return hook

    for name, layer in moe_layers(phase.model).items():
        layer.router.register_forward_pre_hook(keep(name))
    _, _, losses, _ = phase._forward(batch, tau=0.5)
    sum(losses.values()).backward()
    trained = {name for name, parameter in phase.model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in phase.model.named_parameters() if ".router." in name}
    for name, layer in moe_layers(phase.model).items():
        experts = layer.experts
        norms = output_norms(experts.hidden(inputs[name]), gram_matrices(experts.down_weight))
        torch.testing.assert_close(losses[name], F.mse_loss(layer.router(inputs[name]), norms))


def test_routers_have_their_own_learning_rate(trainer, routed, tmp_path):
    """With the model's at 0, routers alone move; both rates are warmed up alike."""
    before = load_model(routed).state_dict()
    phase = RecoveryTuning(
        router_lr=0.01, num_held_out=0, init_from=routed, optimizer=partial(torch.optim.Adam, lr=0.0), warmup=0.5
    )
    rates, log = [], phase.on_before_optimizer_step
    phase.on_before_optimizer_step = lambda optimizer: (
        rates.append({group["lr"] for group in optimizer.param_groups}) or log(optimizer)
    )
    fit(trainer, phase, max_epochs=2)
    after = load_model(tmp_path / "run" / "artifact").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".router." in name}
    assert rates[0] == {0.0}
    assert rates[4] == {0.0, 0.01}  # of 8 steps


def test_the_teacher_is_the_dense_model_that_it_was(trainer, routed):
    phase = attached(trainer, RecoveryTuning(init_from=routed))
    expected = load_model(routed)
    set_gate_(expected, None)
    batch = tiny.batch("bert")
    teacher = phase._teacher.model
    assert torch.equal(tiny.logits(teacher, batch), tiny.logits(expected.eval(), batch))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any("teacher" in name for name in phase.state_dict())


def test_tau_is_drawn_from_the_range_and_left_as_it_was(trainer, routed, tmp_path):
    phase = RecoveryTuning(0.2, 0.6, init_from=routed)
    drawn, forward = [], phase._forward
    phase._forward = lambda batch, tau: drawn.append(tau) or forward(batch, tau)
    fit(trainer, phase, max_epochs=5)
    assert len(set(drawn)) == len(drawn) == 20
    assert 0.2 <= min(drawn) < 0.3 < 0.5 < max(drawn) <= 0.6
    gates = [made["gate"] for made in describe(load_model(tmp_path / "run" / "artifact")).values()]
    assert [gate["tau"] for gate in gates] == [0.5, 0.5]


def test_the_curve_gets_better(trainer, routed, tmp_path):
    """At one expert a token the distance to the dense model falls, and routers follow the experts that move."""

    def distance(model):
        teacher, errors = load_model(routed).eval(), []
        set_gate_(teacher, None)
        set_tau_(model.eval(), 0.0)
        data = tiny.TextData(32)
        data.setup()
        batch = next(iter(data.val_dataloader()))
        errors.append(F.mse_loss(tiny.logits(model, batch), tiny.logits(teacher, batch)))
        return float(sum(errors))

    before = distance(load_model(routed))
    phase = RecoveryTuning(
        0.0,
        0.5,
        task_weight=1.0,
        num_held_out=0,
        beta=20.0,
        alpha=0.0,
        init_from=routed,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
    )
    fit(trainer, phase, max_epochs=30)
    assert distance(load_model(tmp_path / "run" / "artifact")) < 0.7 * before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau_min": -0.1}, r"tau_min=-0.1: must lie in \[0, 1\]"),
        ({"tau_max": 1.1}, r"tau_max=1.1: must lie in \[0, 1\]"),
        ({"tau_min": 0.9, "tau_max": 0.3}, "tau_min=0.9: must be at most tau_max=0.3"),
        ({"beta": -1}, "beta=-1: must not be negative"),
        ({"router_weight": -1}, "router_weight=-1: must not be negative"),
        ({"router_lr": 0.0}, "router_lr=0.0: must be positive"),
        ({"router_lr": 0.1, "router_weight": 0}, "router_lr=0.1: allowed only with a router_weight above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RecoveryTuning(**arguments)


def test_starts_that_do_not_fit(tmp_path):
    dense = saved(tiny.dense("bert"), tmp_path / "dense", "FineTuning")
    with pytest.raises(ConfigError, match="at stage 'dense'; RecoveryTuning starts from stage 'routed'"):
        preflight([RecoveryTuning(init_from=dense)])
    moebert = saved(tiny.moebert(), tmp_path / "moebert", "MoEBERTDistillation")
    with pytest.raises(ConfigError, match="has no MoE layer with a router; RecoveryTuning needs some"):
        preflight([RecoveryTuning(init_from=moebert)])
    model = tiny.routed("bert")
    set_gate_(model, GateConfig("topk", k=2))
    fixed = saved(model, tmp_path / "fixed", "ExpertSelection")
    with pytest.raises(ConfigError, match="must be one that is set by tau, since RecoveryTuning draws it"):
        preflight([RecoveryTuning(init_from=fixed)])


def losses(model, taus=(0.2, 0.5, 1.0)):
    """The loss on all held-out samples at some settings."""
    data, found = tiny.TextData(8), []
    data.setup()
    batches = list(data.val_dataloader())
    for tau in taus:
        set_tau_(model.eval(), tau)
        logits = torch.cat([tiny.logits(model, batch) for batch in batches])
        found.append(F.cross_entropy(logits, torch.cat([batch["labels"] for batch in batches])).item())
    return found


@torch.no_grad()
def test_what_was_better_before_is_kept(trainer, routed, tmp_path, caplog):
    phase = RecoveryTuning(init_from=routed, optimizer=partial(torch.optim.SGD, lr=1.0, maximize=True))
    fit(trainer, phase, max_epochs=2)
    before, after = load_model(routed).state_dict(), load_model(tmp_path / "run" / "artifact").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "Of the weights, those before go on: their loss on held-out samples is 1.000 of what it was" in caplog.text


def test_no_loss_is_larger_afterwards(trainer, routed, tmp_path):
    phase = RecoveryTuning(0.2, 1.0, task_weight=1.0, init_from=routed, optimizer=partial(torch.optim.Adam, lr=1e-3))
    fit(trainer, phase, max_epochs=6)
    before, after = losses(load_model(routed)), losses(load_model(tmp_path / "run" / "artifact"))
    assert sum(after) < sum(before)
    assert all(a <= b * 1.02 for a, b in zip(after, before, strict=True))


def test_few_labels_weigh_little(trainer, routed):
    phase = attached(trainer, RecoveryTuning(init_from=routed))
    assert phase._task_weight == pytest.approx(32 / 100_000)
    phase = attached(trainer, RecoveryTuning(task_weight=0.5, init_from=routed))
    assert phase._task_weight == 0.5


def test_activations_are_kept_sparse(trainer, routed):
    phase = attached(trainer, RecoveryTuning(init_from=routed))
    _, penalties, _, _ = phase._forward(tiny.batch("bert"), tau=0.5)
    assert len(penalties) == 2
    assert all(1 <= penalty <= tiny.WIDTH for penalty in penalties)  # the neurons that fire, at most
    phase = attached(trainer, RecoveryTuning(alpha=0.0, init_from=routed))
    assert phase._forward(tiny.batch("bert"), tau=0.5)[1] == []


def test_few_experts_are_wanted_where_experts_are_penalized(trainer, routed):
    sizes = {}
    for penalized in ("neurons", "experts"):
        learn = partial(torch.optim.Adam, lr=3e-3)
        settings = {"alpha": 0.5, "penalized": penalized, "num_held_out": 0, "init_from": routed, "optimizer": learn}
        phase = RecoveryTuning(**settings)
        fit(trainer, phase, max_epochs=10)
        phase.penalized = "experts"
        with torch.no_grad():
            sizes[penalized] = torch.stack(phase._forward(tiny.batch("bert"), tau=0.5)[1]).mean()
    assert 1 <= sizes["experts"] < 0.9 * sizes["neurons"]  # of 8, by what each adds


def test_the_mean_of_the_last_half_survives_a_resumption(trainer, routed, tmp_path):
    def run(ckpt_path=None, callbacks=()):
        L.seed_everything(3, verbose=False)
        phase = RecoveryTuning(num_held_out=0, init_from=routed)
        settings = {"limit_train_batches": 1.0, "max_epochs": 4, "enable_checkpointing": bool(callbacks)}
        own = trainer(**settings, callbacks=callbacks)
        own.fit(phase, datamodule=tiny.TextData(8), ckpt_path=ckpt_path, weights_only=True)
        return phase

    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
    whole, torn = run(callbacks=[checkpoint]), run(tmp_path / "checkpoints" / "epoch=2.ckpt")
    assert whole._average.steps == torn._average.steps == 8
    for name, mean in whole._average.mean.items():
        torch.testing.assert_close(torn._average.mean[name], mean)
