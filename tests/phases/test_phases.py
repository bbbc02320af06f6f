"""What holds for every phase: checks before it starts, heads, predictions, padded texts."""

from functools import partial

import pytest
import tiny
import torch
from digits_models import digits_source

from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.data import DatasetSource, Digits, TextClassification
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import (
    AttentionDistillation,
    BudgetCalibration,
    BudgetDistillation,
    CutoffFitting,
    ExpertClustering,
    FineTuning,
    ImportanceScoring,
    RecoveryTuning,
    RouterRegression,
    SparsityEnforcement,
    StandInFitting,
)
from d2dmoe_pl.phases._preflight import preflight


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
        with pytest.raises(
            ConfigError,
            match="labels: the data's 3, 4, 5, 6, 7 and 2 more are none of the model's, which has been trained",
        ):
            trainer().test(FineTuning(init_from=str(tmp_path / "artifact")), datamodule=digits, verbose=False)


class TestSizes:
    @pytest.mark.parametrize("split", ["train", "validation", "test"])
    def test_a_long_text_in_one_split_alone(self, trainer, tmp_path, split):
        for name in ("train", "validation", "test"):
            length = 17 if name == split else 3
            (tmp_path / f"{name}.csv").write_text(f"text,label\n{'a ' * length},x\nb,y\n")
        where = DatasetSource(**{name: str(tmp_path / f"{name}.csv") for name in ("train", "validation", "test")})
        tokenizer = tiny.tokenizer(tmp_path / "tok", "ab")
        phase = FineTuning(source=tiny.SOURCES["bert"]())
        message = f"max_length=17: the longest text of the {split} split has so many tokens; must be at most 16, "
        with pytest.raises(ConfigError, match=message):
            trainer().fit(phase, datamodule=TextClassification(where, tokenizer))
        fits = TextClassification(where, tokenizer, max_length=16, batch_size=2)
        trainer().fit(FineTuning(source=tiny.SOURCES["bert"]()), datamodule=fits)

    @pytest.mark.parametrize(
        ("special", "found"),
        [
            ((), "row 0 of the train split: its text has the token 2 0 times"),
            (("[SEP]", "[CLS]"), "row 1 of the test split: its text has the token 2 2 times"),
        ],
    )
    def test_ends_of_texts_where_a_head_looks_for_them(self, trainer, tmp_path, special, found):
        for name in ("train", "validation", "test"):
            (tmp_path / f"{name}.csv").write_text(f"text,label\nb,x\n{'b [SEP] b' if name == 'test' else 'b'},y\n")
        where = DatasetSource(**{name: str(tmp_path / f"{name}.csv") for name in ("train", "validation", "test")})
        data = TextClassification(where, tiny.tokenizer(tmp_path / "tok", "ab", ("[PAD]", "[UNK]", *special)))
        with pytest.raises(
            ConfigError, match=f"{found}; must have it 1 times, since MT5ForSequenceClassification finds"
        ):
            trainer().fit(FineTuning(source=tiny.SOURCES["any_encoder_decoder-mt5"]()), datamodule=data)

    def test_pictures_of_another_size_or_number_of_channels(self, tmp_path):
        for shape, gives in (({"in_chans": 3}, "3 x 8 x 8"), ({"img_size": 16}, "1 x 16 x 16")):
            message = f"pixel_values: the data gives 1 x 8 x 8 .channels x height x width.; must be {gives}, "
            with pytest.raises(ConfigError, match=message):
                preflight([FineTuning(source=digits_source(**shape))], [Digits()])


def test_predictions(trainer, digits, artifact):
    phase = RouterRegression(8, init_from=artifact("routed"))
    batches = trainer(limit_predict_batches=2).predict(phase, datamodule=digits)
    assert [batch["predictions"].shape for batch in batches] == [(16,), (16,)]
    torch.testing.assert_close(batches[0]["probabilities"].sum(dim=1), torch.ones(16))


@pytest.mark.parametrize("make", [RecoveryTuning, partial(BudgetDistillation, "model")])
def test_what_a_library_keeps_as_it_is_does_not_learn(make):
    model = tiny.routed("whisper")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen
    make(init_from="anywhere").transform_(model)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("make", "stage"),
    [
        (partial(AttentionDistillation, multiple_of=4), "dense"),
        (partial(FineTuning, hidden_weight=1.0), "dense"),
        (partial(SparsityEnforcement, hidden_weight=1.0), "dense"),
        (ImportanceScoring, "dense"),
        (partial(ExpertClustering, 8), "dense"),
        (partial(RouterRegression, 8), "experts"),
        (partial(CutoffFitting, num_tokens=100), "routed"),
        (partial(StandInFitting, 4), "routed"),
        (partial(RecoveryTuning, hidden_weight=1.0), "routed"),
        (partial(BudgetCalibration, estimate="gradients"), "routed"),
    ],
    ids=lambda made: getattr(made, "func", made).__name__ if callable(made) else made,
)
def test_every_phase_ends_in_a_narrow_type_where_it_begins_in_a_wide_one(make, stage, precision, trainer, tmp_path):
    phase, model = make(init_from=str(tmp_path / "before")), tiny.dense("bert")
    if stage == "experts":
        convert_to_moe_(model, ExpertsConfig(8))
    elif stage == "routed":
        tiny.route_(model)
    save_artifact(model, tmp_path / "before", [PhaseRecord("RouterRegression")])
    trainer(precision=precision, callbacks=[SaveArtifact()]).fit(phase, datamodule=tiny.TextData(8))
    assert read_artifact(tmp_path / "run" / "artifact").phase == type(phase).__name__


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
