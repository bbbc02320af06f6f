"""From a dense BERT to MoEBERT: what is trained, by which loss, from what start, and what is refused."""

import dataclasses
import pickle

import pytest
import tiny
import torch
import transformers
from torch.nn import functional as F

from d2dmoe_pl.adapters import HuggingFaceModel, adapter_for
from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data.symmetric_kl import symmetric_kl
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moe.token_context import token_index
from d2dmoe_pl.moebert.conversion import convert_to_moebert_
from d2dmoe_pl.moebert.distillation import hidden_state_loss
from d2dmoe_pl.moebert.importance import Importance
from d2dmoe_pl.moebert.layer import MoEBERTConfig, moebert_layers
from d2dmoe_pl.moebert.routing import balanced_table
from d2dmoe_pl.phases import FineTuning, ImportanceScoring, MoEBERTDistillation
from d2dmoe_pl.phases._preflight import preflight

SIZES = {"num_experts": 4, "expert_dim": 12, "num_shared": 5}
ROUTINGS = ["gate_sentence", "gate_token", "hash_balance", "hash_random"]


@pytest.fixture
def scored(tmp_path):
    """Artifact of ImportanceScoring."""
    model = tiny.dense("bert", "gelu")
    importance = {ffn.name: torch.rand(tiny.WIDTH, dtype=torch.float64) for ffn in select_ffns(model)}
    history = [PhaseRecord("FineTuning"), PhaseRecord("ImportanceScoring")]
    save_artifact(model, tmp_path / "scored", history, tensors={"importance": importance})
    return str(tmp_path / "scored")


def distillation(path, **kwargs):
    adam = lambda parameters: torch.optim.Adam(parameters, lr=1e-3)  # noqa: E731
    return MoEBERTDistillation(**{**SIZES, "init_from": path, "optimizer": adam, **kwargs})


@pytest.mark.parametrize("routing", ROUTINGS)
def test_fit_artifact_load_and_test(trainer, scored, tmp_path, routing):
    phase = distillation(scored, routing=routing, gamma=0.1)
    run = trainer(callbacks=[SaveArtifact(), TauSweep()], limit_val_batches=1.0)
    run.fit(phase, datamodule=tiny.TextData(8))
    run.test(phase, datamodule=tiny.TextData(8), verbose=False)
    artifact = read_artifact(tmp_path / "run" / "artifact")
    assert (artifact.stage, artifact.tensors) == ("routed", [])
    assert [record.phase for record in artifact.history] == ["FineTuning", "ImportanceScoring", "MoEBERTDistillation"]
    inputs = tiny.batch("bert")
    assert torch.equal(tiny.logits(load_model(artifact.path), inputs), tiny.logits(phase.model.eval(), inputs))
    rows = (tmp_path / "run" / "tau_sweep.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["validation", ""], ["test", ""]]
    again = TauSweep()
    phase = distillation(str(artifact.path), routing=routing)
    trainer(callbacks=[again], logger=False).test(phase, datamodule=tiny.TextData(3), verbose=False)
    (row,) = again.rows["test"]
    assert row.experts_percent == pytest.approx(25)
    assert row.loss == pytest.approx(float(run.callback_metrics["test/loss"]), rel=1e-4)


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_other_families_with_a_norm_after_the_residual(trainer, tmp_path, kind):
    save_artifact(tiny.dense(kind, "gelu"), tmp_path / "dense", [PhaseRecord("FineTuning")])
    path = str(tmp_path / "run" / "artifact")
    for phase in (ImportanceScoring(init_from=str(tmp_path / "dense")), distillation(path)):
        preflight([phase], [tiny.TextData(8)])
        run = trainer(callbacks=[SaveArtifact()])
        run.fit(phase, datamodule=tiny.TextData(8))
    assert run.callback_metrics["train/hidden_state_loss"] > 0
    inputs = tiny.batch(kind)
    assert torch.equal(tiny.logits(load_model(path), inputs), tiny.logits(phase.model.eval(), inputs))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_loss_by_hand(trainer, scored, routing):
    phase = distillation(scored, routing=routing, beta=2.0, gamma=0.3)
    trainer(limit_train_batches=1).fit(phase, datamodule=tiny.TextData(8))
    phase.model.eval()
    logged, batch = {}, tiny.batch("bert", size=4)
    phase.log_dict = lambda values, **kwargs: logged.update(values)
    phase.log = lambda *args, **kwargs: None
    loss = phase.training_step(batch, 0)
    teacher = load_model(scored)
    logits, states = adapter_for(phase.model).logits_and_hidden_states(phase.model, batch)
    teacher_logits, teacher_states = adapter_for(teacher).logits_and_hidden_states(teacher, batch)
    expected = {
        "train/task_loss": F.cross_entropy(logits, batch["labels"]),
        "train/hidden_state_loss": hidden_state_loss(states, teacher_states, token_index(batch["attention_mask"])),
        "train/prediction_loss": symmetric_kl(logits, teacher_logits).mean(),
    }
    total = expected["train/task_loss"] + 2 * (expected["train/hidden_state_loss"] + expected["train/prediction_loss"])
    if routing.startswith("gate"):
        balance = logged.pop("train/balance_loss")
        assert 0.5 < balance < 4
        total = total + 0.3 * balance
    assert set(logged) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(logged[name], value.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-6)


def test_beta_zero_is_the_task_loss_alone_and_has_no_teacher(trainer, scored):
    phase = distillation(scored, beta=0.0)
    run = trainer(limit_train_batches=1)
    run.fit(phase, datamodule=tiny.TextData(8))
    assert run.callback_metrics["train/loss"] == run.callback_metrics["train/task_loss"]
    assert "train/prediction_loss" not in run.callback_metrics
    assert phase._teacher is None


def test_the_student_starts_with_its_most_important_neurons(trainer, scored):
    phase = distillation(scored)
    trainer(limit_train_batches=0).fit(phase, datamodule=tiny.TextData(8))
    importance = read_artifact(scored).read_tensors("importance")
    for ffn in select_ffns(load_model(scored)):
        best = importance[ffn.name].argsort(descending=True)[:5]
        experts = moebert_layers(phase.model)[ffn.name].experts
        assert torch.equal(experts.up_weight[3, :5], ffn.up.weight[best])


def test_the_teacher_is_frozen_and_not_part_of_checkpoints(trainer, scored):
    phase = distillation(scored)
    trainer().fit(phase, datamodule=tiny.TextData(8))
    teacher = phase._teacher.model
    before = load_model(scored).state_dict()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any("teacher" in name for name in phase.state_dict())
    buffers = dict(phase.model.named_buffers())
    assert all(buffer.data_ptr() == buffers[name].data_ptr() for name, buffer in teacher.named_buffers())


def test_vectors_of_experts_are_not_decayed(trainer, scored):
    phase = distillation(scored, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5))
    run = trainer(limit_train_batches=1)
    run.fit(phase, datamodule=tiny.TextData(8))
    experts = next(iter(moebert_layers(phase.model).values())).experts
    decayed = {id(parameter) for parameter in run.optimizers[0].param_groups[0]["params"]}
    names = {name for name, parameter in experts.named_parameters() if id(parameter) in decayed}
    assert names == {"up_weight", "down_weight"}


def test_balanced_table_comes_from_the_training_split(trainer, scored):
    phase = distillation(scored, routing="hash_balance")
    data = tiny.TextData(8)
    trainer(limit_train_batches=1).fit(phase, datamodule=data)
    ids = torch.cat([sample["input_ids"] for sample in data._splits["train"]])
    expected = balanced_table(torch.bincount(ids, minlength=40), 4, 0)
    for layer in moebert_layers(phase.model).values():
        assert torch.equal(layer.routing.table, expected)
    assert not data.ordered


class TestPublishedFiles:
    def write(self, path, value):
        path.write_bytes(pickle.dumps(value))
        return str(path)

    def importance(self, tmp_path, layers=2, width=tiny.WIDTH):
        order = [torch.randperm(width).tolist() for _ in range(layers)]
        return self.write(tmp_path / "i.pkl", {"importance": [list(range(width, 0, -1))] * layers, "idx": order}), order

    def test_in_place_of_scores_and_table(self, trainer, tmp_path):
        save_artifact(tiny.dense("bert", "gelu"), tmp_path / "dense", [PhaseRecord("FineTuning")])
        importance_file, order = self.importance(tmp_path)
        hashes = [id % 4 for id in range(40)]
        phase = distillation(
            str(tmp_path / "dense"),
            importance_file=importance_file,
            hash_list_file=self.write(tmp_path / "h.pkl", hashes),
            routing="hash_balance",
        )
        preflight([phase])
        trainer(limit_train_batches=0).fit(phase, datamodule=tiny.TextData(8))
        for ffn, best in zip(select_ffns(load_model(tmp_path / "dense")), order, strict=True):
            layer = moebert_layers(phase.model)[ffn.name]
            assert torch.equal(layer.experts.up_weight[0, :5], ffn.up.weight[best[:5]])
            assert layer.routing.table.tolist() == hashes

    def test_that_do_not_fit(self, scored, tmp_path):
        with pytest.raises(ConfigError, match=r"importance_file='.*': has 3 layers; must have the model's 2"):
            preflight([distillation(scored, importance_file=self.importance(tmp_path, 3)[0])])
        with pytest.raises(ConfigError, match=r"importance of .*: \(47,\); must be one score for each of its 48"):
            preflight([distillation(scored, importance_file=self.importance(tmp_path, 2, 47)[0])])
        short = self.write(tmp_path / "h.pkl", [0] * 39)
        with pytest.raises(ConfigError, match=r"hash_list_file='.*': has 39 entries; must have one for each of the 40"):
            preflight([distillation(scored, hash_list_file=short)])
        evil = self.write(tmp_path / "h.pkl", MoEBERTConfig)
        with pytest.raises(ConfigError, match=r"the pickle asks for d2dmoe_pl.moebert.layer.MoEBERTConfig"):
            preflight([distillation(scored, hash_list_file=evil)])


class TestPreflight:
    def chain(self, **kwargs):
        return [FineTuning(source=tiny.SOURCES["bert"]()), ImportanceScoring(), distillation(None, **kwargs)]

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_a_whole_chain_passes(self, routing):
        phases = self.chain(routing=routing)
        phases[2].init_from = "not/there/yet"
        preflight(phases)
        assert all(phase.model is None for phase in phases)

    def test_too_few_neurons(self):
        phases = self.chain(expert_dim=20)
        phases[2].init_from = "not/there/yet"
        with pytest.raises(ConfigError, match="num_experts=4, expert_dim=20, num_shared=5: need 65 neurons"):
            preflight(phases)

    def test_more_shared_neurons_than_an_expert_holds(self):
        with pytest.raises(ConfigError, match=r"num_shared=13: must lie in \[0, expert_dim\], which is 12"):
            self.chain(num_shared=13)

    def test_without_importance(self, tmp_path):
        save_artifact(tiny.dense("bert"), tmp_path / "dense", [PhaseRecord("FineTuning")])
        message = (
            "is the work of FineTuning, without importance scores; MoEBERTDistillation starts from ImportanceScoring"
        )
        with pytest.raises(ConfigError, match=message):
            preflight([distillation(str(tmp_path / "dense"))])
        first, _, last = self.chain()
        with pytest.raises(ConfigError, match=message):
            preflight([first, last])

    @pytest.mark.parametrize(
        ("shape", "shown"),
        [
            ({"num_hidden_layers": 3}, "a bert of 3 layers of width 24; must be a bert of 2 layers of width 24"),
            ({"hidden_size": 32}, "a bert of 2 layers of width 32; must be a bert of 2 layers of width 24"),
        ],
    )
    def test_a_teacher_of_another_shape(self, scored, tmp_path, shape, shown):
        config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **{**tiny.SHAPE, **shape})
        other = HuggingFaceModel("text-classification", config=config).build(tiny.LABELS)
        save_artifact(other, tmp_path / "teacher", [PhaseRecord("FineTuning")])
        with pytest.raises(ConfigError, match=f"teacher='.*/teacher': is {shown}, as the student is"):
            preflight([distillation(scored, teacher=str(tmp_path / "teacher"))])

    def test_no_such_teacher(self, scored):
        with pytest.raises(ConfigError, match="teacher='nowhere': no such folder"):
            preflight([distillation(scored, teacher="nowhere")])

    def test_bad_weights(self):
        with pytest.raises(ConfigError, match="beta=-1: must not be negative"):
            MoEBERTDistillation(beta=-1)
        with pytest.raises(ConfigError, match="gamma=-1: must not be negative"):
            MoEBERTDistillation(gamma=-1)


def test_another_teacher(trainer, scored, tmp_path):
    save_artifact(tiny.dense("bert"), tmp_path / "teacher", [PhaseRecord("FineTuning")])
    phase = distillation(scored, teacher=str(tmp_path / "teacher"))
    trainer(limit_train_batches=1).fit(phase, datamodule=tiny.TextData(8))
    assert torch.equal(phase._teacher.model.classifier.weight, load_model(tmp_path / "teacher").classifier.weight)


def test_important_neurons_make_better_experts_than_random_ones():
    """Before any training: a model that tells which third of the vocabulary most tokens are from."""

    def samples(count):
        labels = torch.randint(3, (count,))
        own = torch.rand(count, 12) < 0.55
        ids = torch.where(
            own, 5 + 11 * labels[:, None] + torch.randint(11, (count, 12)), torch.randint(5, 38, (count, 12))
        )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    model = tiny.SOURCES["bert"]().build(tiny.LABELS).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = samples(64)
        optimizer.zero_grad()
        F.cross_entropy(tiny.logits(model, batch), batch["labels"]).backward()
        optimizer.step()
    model.eval()
    importance, training = Importance(select_ffns(model), torch.device("cpu")), samples(256)
    every = torch.ones(256, dtype=torch.bool)
    loss = lambda: F.cross_entropy(tiny.logits(model, training), training["labels"], reduction="sum")  # noqa: E731
    importance.add(loss, lambda name: None, every)
    save = {name: value.clone() for name, value in model.state_dict().items()}
    test = samples(1000)

    def distance(scores):
        """How far the predictions of experts from ``scores`` are from the dense model's."""
        twin = tiny.SOURCES["bert"]().build(tiny.LABELS).eval()
        twin.load_state_dict(save)
        convert_to_moebert_(twin, dataclasses.replace(tiny.MOEBERT, num_shared=8), importance=scores)
        with torch.no_grad():
            return symmetric_kl(tiny.logits(twin, test), tiny.logits(model, test)).mean().item()

    random = [distance({name: torch.rand(tiny.WIDTH) for name in importance.scores}) for _ in range(5)]
    assert distance(importance.scores) < min(random)
