"""Hidden states that phases keep: what the error is of, that they are kept, what is refused."""

from functools import partial

import pytest
import tiny
import torch

from d2dmoe_pl.adapters import HuggingFaceModel, adapter_for
from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import set_gate_, set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import BudgetDistillation, FineTuning, RecoveryTuning, SparsityEnforcement
from d2dmoe_pl.phases._hidden_states import hidden_state_error

SGD = partial(torch.optim.SGD, lr=0.05)
# of a phase, with and without hidden states: what it starts from and how it learns
PHASES = {
    "fine_tuning": lambda folder, weight: FineTuning("silu", weight, init_from=folder, optimizer=SGD),
    "sparsity_enforcement": lambda folder, weight: SparsityEnforcement(
        alpha=0.03, hidden_weight=weight, init_from=folder, optimizer=SGD
    ),
    "recovery_tuning": lambda folder, weight: RecoveryTuning(
        0.2, 0.2, 1.0, 0.0, weight, num_held_out=0, init_from=folder, optimizer=SGD
    ),
}


def saved(kind, folder):
    model = tiny.routed("bert") if kind == "recovery_tuning" else tiny.dense("bert")
    save_artifact(model, folder, [PhaseRecord("RouterRegression")])
    return str(folder)


def states_of(model, batch):
    with torch.no_grad():
        return adapter_for(model).logits_and_hidden_states(model.eval(), batch)[1]


class TestError:
    def test_by_hand(self):
        states = [torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[30.0, 0.0], [0.0, 10.0]]])]
        wanted = [torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), torch.tensor([[[10.0, 0.0], [0.0, 10.0]]])]
        # layers: (1 / 2 + 1 / 1) / 2 and (400 / 100 + 0) / 2
        assert hidden_state_error(states, wanted, {}) == pytest.approx((0.75 + 2.0) / 2)

    def test_padding_counts_for_nothing(self):
        wanted = [torch.randn(2, 3, 4)]
        states = [wanted[0].clone()]
        states[0][0, 2] += 100.0
        batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
        assert hidden_state_error(states, wanted, batch) == 0
        assert hidden_state_error(states, wanted, {}) > 1

    def test_scale_of_a_layer_counts_for_nothing(self):
        wanted = [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
        states = [each + torch.randn(2, 3, 4) for each in wanted]
        scaled = [[one, 100 * other] for one, other in (states, wanted)]
        torch.testing.assert_close(hidden_state_error(*scaled, {}), hidden_state_error(states, wanted, {}))


@pytest.mark.parametrize("phase", PHASES)
def test_hidden_states_are_kept_better_than_without(phase, trainer, tmp_path):
    folder = saved(phase, tmp_path / "before")
    batch = tiny.batch("bert")
    dense = load_model(folder)
    if moe_layers(dense):
        set_gate_(dense, None)
    before = states_of(dense, batch)
    errors = {}
    for weight in (0.0, 5.0):
        made = PHASES[phase](folder, weight)
        run = trainer(max_epochs=10, limit_train_batches=1.0)
        run.fit(made, datamodule=tiny.TextData(8))
        if moe_layers(made.model):
            set_tau_(made.model, 0.2)
        errors[weight] = hidden_state_error(states_of(made.model, batch), before, batch).item()
        assert ("train/hidden_state_loss" in run.callback_metrics) == (weight > 0)
    assert errors[5.0] < 0.9 * errors[0.0]


def test_what_is_kept_are_the_states_before_the_swap(trainer, tmp_path):
    folder = saved("fine_tuning", tmp_path / "before")
    phase = FineTuning("silu", 1.0, init_from=folder, optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer(limit_train_batches=1).fit(phase, datamodule=tiny.TextData(8))
    batch = tiny.batch("bert")
    _, kept = phase._kept(phase.model.eval(), batch)
    expected = hidden_state_error(states_of(phase.model, batch), states_of(load_model(folder), batch), batch)
    assert kept["hidden_state_loss"].item() == pytest.approx(expected.item())
    assert expected > 0


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_learnt_from_has_the_precision_of_what_learns(phase, trainer, tmp_path):
    made = PHASES[phase](saved(phase, tmp_path / "before"), 1.0)
    trainer(precision="bf16-true").fit(made, datamodule=tiny.TextData(8))
    teacher = made._teacher if phase == "recovery_tuning" else made._kept._before
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}


def test_what_is_kept_does_not_move_with_the_model(trainer, tmp_path):
    folder = saved("fine_tuning", tmp_path / "before")
    phase = FineTuning(hidden_weight=0.1, init_from=folder, optimizer=SGD)
    trainer(max_epochs=3).fit(phase, datamodule=tiny.TextData(8))
    before, kept, after = (
        dict(model.named_parameters()) for model in (load_model(folder), phase._kept._before.model, phase.model)
    )
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert not all(torch.equal(after[name], value) for name, value in before.items())


def test_a_teacher_of_another_depth(trainer, tmp_path):
    deeper = HuggingFaceModel("text-classification", config=tiny.bert_config(num_hidden_layers=3)).build(tiny.LABELS)
    save_artifact(deeper, tmp_path / "deeper", [PhaseRecord("FineTuning")])
    folder = saved("recovery_tuning", tmp_path / "before")
    phase = RecoveryTuning(hidden_weight=1.0, teacher=str(tmp_path / "deeper"), init_from=folder)
    message = "hidden_weight: the teacher has 4 hidden states of width 24; must have 3 of width 24, as the model has"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        trainer().fit(phase, datamodule=tiny.TextData(8))


def test_states_that_are_not_one_a_token():
    states = [torch.zeros(2, 3, 4)]
    with pytest.raises(
        ConfigError, match=r"hidden_weight: must be 0, since hidden states of shape \(2, 3, 4\) are not"
    ):
        hidden_state_error(states, states, {"attention_mask": torch.ones(2, 6)})


def test_without_a_weight_predictions_of_the_teacher_count_for_nothing(trainer, tmp_path):
    folder = saved("recovery_tuning", tmp_path / "before")
    phase = RecoveryTuning(beta=0.0, hidden_weight=1.0, num_held_out=0, init_from=folder, optimizer=SGD)
    run = trainer()
    run.fit(phase, datamodule=tiny.TextData(8))
    assert "train/hidden_state_loss" in run.callback_metrics
    assert "train/prediction_loss" not in run.callback_metrics


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("any_transformer", "hidden_weight=1.0: must be 0 with .*, whose layers are not known"),
        ("any_timm", "hidden_weight=1.0: must be 0 with .*, whose layers are not known"),
        ("t5", "hidden_weight=1.0: must be 0 with T5ForSequenceClassification, which has more than one stack"),
    ],
)
def test_models_whose_states_cannot_be_told(kind, why):
    for phase in (FineTuning(hidden_weight=1.0), SparsityEnforcement(hidden_weight=1.0)):
        with pytest.raises(ConfigError, match=f"^{why}$"):
            phase.transform_(tiny.dense(kind))
    with pytest.raises(ConfigError, match=f"^{why}$"):
        RecoveryTuning(hidden_weight=1.0, router_weight=0.0).transform_(tiny.routed(kind))
    with pytest.raises(ConfigError, match=f"^{why}$"):
        BudgetDistillation(hidden_weight=1.0).transform_(tiny.routed(kind))


@pytest.mark.parametrize("make", [BudgetDistillation, FineTuning, SparsityEnforcement, RecoveryTuning])
def test_negative_weights(make):
    with pytest.raises(ConfigError, match=r"^hidden_weight=-1.0: must not be negative$"):
        make(hidden_weight=-1.0)
