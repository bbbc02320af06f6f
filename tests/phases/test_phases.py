"""Each phase on tiny models: what it changes, what it leaves alone, what it refuses."""

import copy
from functools import partial

import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2dmoe_pl.adapters import TimmModel
from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.data import Classification
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moebert.importance import Importance
from d2dmoe_pl.phases import ExpertClustering, FineTuning, ImportanceScoring, RouterRegression, SparsityEnforcement
from d2dmoe_pl.phases._optimized_phase import learning_rate_factor
from d2dmoe_pl.phases._preflight import preflight
from d2dmoe_pl.structure import describe

DIGIT_LABELS = [str(digit) for digit in range(10)]


def digits_source(**kwargs):
    return TimmModel("vit_tiny_patch16_224", mlp_ratio=3.0, **{**tiny.DIGITS_VIT, **kwargs})


@pytest.fixture
def artifact(tmp_path):
    """Write the artifact of an earlier phase, ReLU and 10 classes, at the stage asked for."""

    def make(stage, activation="relu"):
        path = tmp_path / f"{stage}-{activation}"
        model = digits_source().build(DIGIT_LABELS)
        phases = [FineTuning(source=digits_source(), activation=activation)]
        phases += [ExpertClustering(8)] if stage != "dense" else []
        phases += [RouterRegression(8)] if stage == "routed" else []
        for phase in phases:
            phase.transform_(model)
            phase.finish_(model)
        save_artifact(model, path, [PhaseRecord(type(phase).__name__) for phase in phases])
        return str(path)

    return make


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class TestFineTuning:
    def test_learns_and_leaves_an_artifact(self, trainer, digits, tmp_path):
        phase = FineTuning(source=digits_source(), activation="relu", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
        run = trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0, callbacks=[SaveArtifact()])
        run.fit(phase, datamodule=digits)
        assert run.callback_metrics["validation/accuracy"] > 0.5
        model = load_model(tmp_path / "run" / "artifact")
        assert all(ffn.is_sparse for ffn in select_ffns(model))
        inputs = {"pixel_values": torch.rand(2, 1, 8, 8)}
        assert torch.equal(tiny.logits(model, inputs), tiny.logits(phase.model.eval(), inputs))
        assert model.label_names == DIGIT_LABELS

    def test_continues_from_an_artifact(self, trainer, digits, artifact):
        phase = FineTuning(init_from=artifact("dense"))
        trainer().fit(phase, datamodule=digits)
        assert [record.phase for record in phase.history] == ["FineTuning"]
        assert phase.model.training

    def test_any_optimizer_and_no_decay_of_biases(self, trainer, digits):
        phase = FineTuning(source=digits_source(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5))
        run = trainer()
        run.fit(phase, datamodule=digits)
        decayed, plain = run.optimizers[0].param_groups
        assert decayed["weight_decay"] == 0.5
        assert plain["weight_decay"] == 0.0
        assert all(parameter.dim() >= 2 for parameter in decayed["params"])
        assert len(decayed["params"]) + len(plain["params"]) == len(list(phase.model.parameters()))

    def test_neither_source_nor_artifact(self):
        message = "init_from=None: FineTuning needs the artifact of an earlier phase, or a source"
        with pytest.raises(ConfigError, match=message):
            preflight([FineTuning()])

    def test_both_source_and_artifact(self):
        with pytest.raises(ConfigError, match="init_from='x': allowed only without source"):
            FineTuning(init_from="x", source=digits_source())

    def test_bad_warmup(self):
        with pytest.raises(ConfigError, match=r"warmup=1.5: must lie in \[0, 1\]"):
            FineTuning(source=digits_source(), warmup=1.5)


def test_learning_rate_schedules():
    at = [0.0, 0.1, 0.2, 0.6, 1.0]
    assert [learning_rate_factor(p, 0.2, "none") for p in at] == [0, 0.5, 1, 1, 1]
    assert [learning_rate_factor(p, 0.2, "linear") for p in at] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [learning_rate_factor(p, 0.2, "cosine") for p in at] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert learning_rate_factor(0.0, 0.0, "linear") == 1


class TestSparsityEnforcement:
    @pytest.mark.parametrize("penalty", ["l1", "hoyer"])
    def test_makes_activations_sparser_than_training_without(self, trainer, digits, artifact, penalty):
        zeros = {}
        for alpha in (0.0, 0.05):
            phase = SparsityEnforcement(
                penalty, alpha, init_from=artifact("dense"), optimizer=lambda p: torch.optim.Adam(p, lr=5e-3)
            )
            run = trainer(max_epochs=3, limit_train_batches=30)
            run.fit(phase, datamodule=digits)
            names = [f"sparsity_zeros/{ffn.name}" for ffn in select_ffns(phase.model)]
            zeros[alpha] = sum(float(run.callback_metrics[name]) for name in names) / len(names)
        assert zeros[0.05] > zeros[0.0] + 0.1

    def test_gelu_without_displacement_is_refused_before_anything_runs(self, artifact):
        message = (
            "penalty='l1' with displacement=None: allowed only on ReLU, but blocks.0.mlp has GELU.*"
            r"set displacement \(e.g. -10 or 0\), or fine-tune with activation=relu first"
        )
        with pytest.raises(ConfigError, match=message):
            preflight([SparsityEnforcement("l1", init_from=artifact("dense", activation=None))])

    def test_gelu_with_displacement(self, trainer, digits, artifact):
        phase = SparsityEnforcement("hoyer", displacement=-2.0, init_from=artifact("dense", activation=None))
        run = trainer()
        run.fit(phase, datamodule=digits)
        assert run.callback_metrics["train/penalty"] > 0

    def test_loss_is_task_loss_plus_alpha_times_penalty(self, trainer, digits, artifact):
        phase = SparsityEnforcement("l1", alpha=0.3, init_from=artifact("dense"))
        run = trainer(limit_train_batches=1)
        run.fit(phase, datamodule=digits)
        parts = {key: float(run.callback_metrics[f"train/{key}"]) for key in ("loss", "task_loss", "penalty", "alpha")}
        assert parts["alpha"] == pytest.approx(0.3)
        assert parts["loss"] == pytest.approx(parts["task_loss"] + 0.3 * parts["penalty"], rel=1e-5)

    def test_padding_is_not_penalised(self):
        """The penalty of a padded batch is the mean over real tokens, each as if it stood alone."""
        model = tiny.dense("bert")
        inputs = tiny.batch("bert", size=4)
        phase = SparsityEnforcement("l1", alpha=1.0, init_from="-")
        phase.model, phase.task, phase._ffns = model, Classification(tiny.LABELS), select_ffns(model)
        phase._trainer = type("T", (), {"estimated_stepping_batches": 1, "global_step": 0})()
        logged = {}
        phase.log_dict = lambda values, **kwargs: logged.update(values)
        phase.log = lambda *args, **kwargs: None
        phase.training_step(inputs, 0)
        penalties, lengths = [], inputs["attention_mask"].sum(dim=1)
        padded_penalty = logged["train/penalty"].item()
        for row, length in enumerate(lengths):
            alone = {key: value[row : row + 1, :length] for key, value in inputs.items() if key != "labels"}
            phase.training_step({**alone, "labels": inputs["labels"][row : row + 1]}, 0)
            penalties.append(logged["train/penalty"].item())
        expected = sum(p * int(n) for p, n in zip(penalties, lengths, strict=True)) / int(lengths.sum())
        assert padded_penalty == pytest.approx(expected, rel=1e-4)

    def test_negative_alpha(self):
        with pytest.raises(ConfigError, match="alpha=-1: must not be negative"):
            SparsityEnforcement(alpha=-1)


class TestExpertClustering:
    @pytest.mark.parametrize("split", ["activation", "coactivation", "parameter", "random"])
    def test_changes_nothing_but_the_order_of_neurons(self, trainer, digits, artifact, split):
        path = artifact("dense")
        phase = ExpertClustering(8, split, num_samples=50, init_from=path)
        trainer(limit_train_batches=1.0).fit(phase, datamodule=digits)
        dense = load_model(path)
        inputs = {"pixel_values": torch.rand(4, 1, 8, 8)}
        torch.testing.assert_close(tiny.logits(phase.model, inputs), tiny.logits(dense, inputs), rtol=1e-5, atol=1e-6)
        for ffn in select_ffns(dense):
            rows = phase.model.get_submodule(ffn.name).experts.up_weight.flatten(0, 1)
            assert sorted(rows.tolist()) == sorted(ffn.up.weight.tolist())

    @pytest.mark.parametrize("batch_size", [7, 50, 64])
    def test_does_not_depend_on_the_batch_size(self, trainer, digits, artifact, batch_size):
        path, results = artifact("dense"), []
        for size in (10, batch_size):
            digits.batch_size = size
            phase = ExpertClustering(8, num_samples=50, init_from=path)
            trainer(limit_train_batches=1.0).fit(phase, datamodule=digits)
            results.append(state(phase.model))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])

    def test_stops_reading_when_it_has_seen_enough(self, trainer, digits, artifact):
        phase = ExpertClustering(8, num_samples=33, init_from=artifact("dense"))
        trainer(limit_train_batches=1.0).fit(phase, datamodule=digits)
        assert phase.seen == 48  # three batches of 16

    def test_width_not_divisible(self, artifact):
        with pytest.raises(ConfigError, match=r"num_experts=7: must divide the FFN width, which is 48 in blocks.0.mlp"):
            preflight([ExpertClustering(7, init_from=artifact("dense"))])

    def test_activation_split_of_a_gelu_model(self, artifact):
        path = artifact("dense", activation=None)
        with pytest.raises(ConfigError, match=r"split='activation': needs exact zeros, but blocks.0.mlp has GELU"):
            preflight([ExpertClustering(8, init_from=path)])
        preflight([ExpertClustering(8, "parameter", init_from=path)])

    def test_bad_settings(self):
        with pytest.raises(
            ConfigError, match="split='astrology': allowed are activation, coactivation, parameter, random"
        ):
            ExpertClustering(8, "astrology")
        with pytest.raises(ConfigError, match="num_experts=0: must be positive"):
            ExpertClustering(0)
        with pytest.raises(ConfigError, match="num_samples=0: must be positive"):
            ExpertClustering(8, num_samples=0)


class TestImportanceScoring:
    @pytest.mark.parametrize("batch_size", [1, 5])
    def test_leaves_the_model_as_it_was_and_scores_beside_it(self, trainer, tmp_path, batch_size):
        save_artifact(tiny.dense("bert"), tmp_path / "dense", [PhaseRecord("FineTuning")])
        phase = ImportanceScoring(init_from=str(tmp_path / "dense"))
        trainer(limit_train_batches=1.0, callbacks=[SaveArtifact()]).fit(phase, datamodule=tiny.TextData(batch_size))
        artifact = read_artifact(tmp_path / "run" / "artifact")
        assert (artifact.stage, artifact.tensors) == ("dense", ["importance"])
        before, after = load_model(tmp_path / "dense"), load_model(artifact.path)
        assert all(torch.equal(before.state_dict()[name], value) for name, value in after.state_dict().items())
        data = tiny.TextData(32)
        data.setup()
        data.ordered = True
        batch = next(iter(data.train_dataloader()))  # all 32 samples
        expected = Importance(select_ffns(before), torch.device("cpu"))
        expected.add(lambda: phase.task_loss(tiny.logits(before, batch), batch) * 32, batch["attention_mask"])
        scores = artifact.read_tensors("importance")
        assert set(scores) == set(expected.scores)
        for name, score in scores.items():
            torch.testing.assert_close(score, expected.scores[name], rtol=1e-4, atol=1e-5 * float(score.max()))

    def test_figures(self, trainer, digits, artifact, tmp_path):
        trainer().fit(ImportanceScoring(init_from=artifact("dense")), datamodule=digits)
        events = EventAccumulator(str(tmp_path / "run"))
        events.Reload()
        assert events.Tags()["images"] == ["importance/blocks.0.mlp", "importance/blocks.1.mlp"]


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


class TestPreflight:
    def chain(self, **kwargs):
        return [
            FineTuning(source=digits_source(), activation=kwargs.get("activation", "relu")),
            SparsityEnforcement(),
            ExpertClustering(kwargs.get("num_experts", 8)),
            RouterRegression(8),
        ]

    def test_a_later_phase_that_cannot_work_is_found_at_once(self):
        with pytest.raises(ConfigError, match="num_experts=5"):
            preflight(self.chain(num_experts=5))
        with pytest.raises(ConfigError, match="penalty='hoyer' with displacement=None"):
            preflight(self.chain(activation=None))

    def test_phases_in_the_wrong_order(self):
        phases = self.chain()
        with pytest.raises(ConfigError, match="is the work of FineTuning, at stage 'dense'; RouterRegression starts"):
            preflight([phases[0], phases[3]])

    def test_a_whole_chain_passes_without_weights(self):
        phases = self.chain()
        preflight(phases)
        assert all(phase.model is None for phase in phases)


class TestHeads:
    def test_data_that_needs_a_head_the_model_has_not(self, trainer, digits):
        message = "head='question-answering' of BertForQuestionAnswering: the data needs a model with head 'classi"
        phase = FineTuning(source=tiny.SOURCES["bert-question-answering"]())
        with pytest.raises(ConfigError, match=message):
            preflight([phase], [digits])
        with pytest.raises(ConfigError, match=message):
            trainer().fit(phase, datamodule=tiny.TextData(4))
        preflight([FineTuning(source=digits_source())], [digits])

    def test_an_artifact_with_another_head(self, trainer, tmp_path):
        save_artifact(tiny.dense("bert-regression"), tmp_path / "artifact", [PhaseRecord("FineTuning")])
        phase = FineTuning(init_from=str(tmp_path / "artifact"))
        with pytest.raises(ConfigError, match="head='regression' of BertForSequenceClassification: the data needs"):
            preflight([phase], [tiny.TextData(4)])
        with pytest.raises(ConfigError, match="head='regression' of BertForSequenceClassification: the data needs"):
            trainer().test(phase, datamodule=tiny.TextData(4), verbose=False)

    def test_an_artifact_with_other_labels(self, trainer, digits, tmp_path):
        save_artifact(tiny.dense(), tmp_path / "artifact", [PhaseRecord("FineTuning")])
        with pytest.raises(ConfigError, match="outputs=3 of VisionTransformer: must be 10, since the data has the lab"):
            trainer().test(FineTuning(init_from=str(tmp_path / "artifact")), datamodule=digits, verbose=False)


def test_predictions(trainer, digits, artifact):
    phase = RouterRegression(8, init_from=artifact("routed"))
    batches = trainer(limit_predict_batches=2).predict(phase, datamodule=digits)
    assert [batch["predictions"].shape for batch in batches] == [(16,), (16,)]
    torch.testing.assert_close(batches[0]["probabilities"].sum(dim=1), torch.ones(16))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama"])
def test_padded_texts_go_through_every_phase(trainer, tmp_path, kind):
    """Texts of different lengths, from tokens to a routed model."""
    phases = [
        FineTuning(source=tiny.SOURCES[kind](), activation="relu"),
        SparsityEnforcement("l1"),
        ExpertClustering(8, num_samples=20),
        RouterRegression(8),
    ]
    for i, phase in enumerate(phases):
        phase.init_from = str(tmp_path / "run" / "artifact") if i else None
        trainer(callbacks=[SaveArtifact()]).fit(phase, datamodule=tiny.TextData(4))
    model = load_model(tmp_path / "run" / "artifact")
    assert len(moe_layers(model)) == 2
    assert [record.phase for record in phases[-1].history] == ["FineTuning", "SparsityEnforcement", "ExpertClustering"]
