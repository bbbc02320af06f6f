"""Router regression: routers learn, and nothing else changes."""

import copy
from functools import partial

import pytest
import tiny
import torch
from digits_models import state

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import RouterRegression
from d2dmoe_pl.phases._preflight import preflight
from d2dmoe_pl.structure import describe


def test_an_evaluation_keeps_gates_that_differ_by_layer(trainer, tmp_path, caplog):
    model = tiny.routed("bert")
    first, second = moe_layers(model)
    set_tau_(model, 0.3, lambda _, name: name == first)
    set_tau_(model, 0.9, lambda _, name: name == second)
    save_artifact(model, tmp_path / "routed", [PhaseRecord("RouterRegression")])
    for given, taus in (({}, [0.3, 0.9]), ({"tau": 0.9}, [0.9, 0.9]), ({"rule": "dynk_cumulative"}, [0.3, 0.9])):
        caplog.clear()
        phase = RouterRegression(init_from=str(tmp_path / "routed"), **given)
        trainer().validate(phase, datamodule=tiny.TextData(8), verbose=False)
        gates = [layer.get_gate().config for layer in moe_layers(phase.model).values()]
        assert [gate.tau for gate in gates] == taus
        assert {gate.rule for gate in gates} == {given.get("rule", "dynk_max")}
        said = [message for message in caplog.messages if message.startswith("Evaluated with")]
        assert len(said) == bool(given)


class TestRouterRegression:
    @pytest.mark.parametrize("target", ["norm", "activation_sum"])
    def test_only_routers_change_and_they_get_better(self, trainer, digits, artifact, target):
        adam = partial(torch.optim.Adam, lr=1e-2)
        phase = RouterRegression(8, target, init_from=artifact("experts"), optimizer=adam)
        before, losses = {}, []
        phase.on_train_start = lambda: before.update(state(phase.model))
        run = trainer(max_epochs=3, limit_train_batches=40)
        step = phase.training_step
        phase.training_step = lambda batch, batch_idx: losses.append(step(batch, batch_idx)) or losses[-1]
        run.fit(phase, datamodule=digits)
        after = state(phase.model)
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed == {name for name in after if ".router." in name}
        losses = [loss.item() for loss in losses]
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10])

    def test_leaves_a_gated_model(self, trainer, digits, artifact):
        phase = RouterRegression(8, tau=0.6, rule="dynk_cumulative", init_from=artifact("experts"))
        trainer().fit(phase, datamodule=digits)
        assert {str(made["gate"]) for made in describe(phase.model).values()} == {
            "{'rule': 'dynk_cumulative', 'tau': 0.6, 'k': None}"
        }

    def test_targets_are_the_norms_of_expert_outputs(self, trainer, digits, artifact):
        phase = RouterRegression(8, init_from=artifact("experts"))
        trainer(limit_train_batches=1).fit(phase, datamodule=digits)
        twin = copy.deepcopy(phase.model).eval()
        for layer in moe_layers(twin).values():
            layer.gate = None
        batch = next(iter(digits.val_dataloader()))
        expected = {}

        def naive(name):
            def hook(layer, args, output):
                tokens = args[0].flatten(0, 1)
                outputs = torch.einsum("nes,esd->ned", layer.experts.hidden(tokens), layer.experts.down_weight)
                expected[name] = (layer.router(tokens) - outputs.norm(dim=-1)).square().mean()

            return hook

        for name, layer in moe_layers(twin).items():
            layer.register_forward_hook(naive(name))
        tiny.logits(twin, batch)
        for layer in moe_layers(phase.model).values():
            layer.gate = None
        got = phase._router_losses(batch)
        for name, loss in expected.items():
            torch.testing.assert_close(got[name], loss)

    def test_a_step_makes_no_tensor_of_experts_by_tokens_by_width(self, trainer, digits, artifact):
        phase = RouterRegression(8, init_from=artifact("experts"))
        trainer(limit_train_batches=1).fit(phase, datamodule=digits)
        for layer in moe_layers(phase.model).values():
            layer.gate = None
        batch = next(iter(digits.val_dataloader()))
        with tiny.Shapes() as shapes:
            sum(phase._router_losses(batch).values()).backward()
        tokens, experts, d_model = 16 * 5, 8, 16
        assert tuple(sorted((tokens, experts, 6))) in shapes.seen  # the activations, seen on their way
        assert tuple(sorted((tokens, experts, d_model))) not in shapes.seen

    @pytest.mark.parametrize(("stage", "wrote"), [("dense", "FineTuning"), ("routed", "RouterRegression")])
    def test_artifact_of_another_phase(self, artifact, stage, wrote):
        message = f"is the work of {wrote}, at stage '{stage}'; RouterRegression starts from stage 'experts'"
        with pytest.raises(ConfigError, match=message):
            preflight([RouterRegression(8, init_from=artifact(stage))])

    def test_evaluates_its_own_artifact_at_another_tau(self, trainer, digits, artifact):
        path = artifact("routed")
        results = []
        for tau in (0.0, 1.0):
            phase = RouterRegression(8, tau=tau, init_from=path)
            trainer().test(phase, datamodule=digits, verbose=False)
            assert {made["gate"]["tau"] for made in describe(phase.model).values()} == {tau}
            results.append(phase.trainer.callback_metrics["test/loss"].item())
        assert results[0] != results[1]

    def test_bad_settings(self):
        with pytest.raises(ConfigError, match=r"tau=1.2: must lie in \[0, 1\]"):
            RouterRegression(tau=1.2)
        with pytest.raises(ConfigError, match="width=0: a router needs at least one hidden neuron"):
            RouterRegression(width=0)
        with pytest.raises(ConfigError, match="rule='best': allowed are dynk_cumulative, dynk_max, topk"):
            RouterRegression(rule="best")
