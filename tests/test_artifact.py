"""Artifacts are whole or not there, hold no pickle, and say what they are."""

import json
import shutil

import pytest
import timm
import tiny
import torch
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from d2dmoe_pl import artifact as artifacts
from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, record_metrics, save_artifact
from d2dmoe_pl.errors import ConfigError


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "artifact"
    save_artifact(
        tiny.routed(), path, [PhaseRecord("FineTuning", {"test/accuracy": 0.5}), PhaseRecord("RouterRegression")]
    )
    return path


def test_what_it_says(saved):
    artifact = read_artifact(saved)
    assert (artifact.stage, artifact.phase, artifact.family) == ("routed", "RouterRegression", "timm_vit")
    assert artifact.history[0].metrics == {"test/accuracy": 0.5}
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "d2dmoe.safetensors"]


def test_two_lines_of_python(saved):
    import d2dmoe_pl  # noqa: PLC0415 (the two lines)

    model = d2dmoe_pl.load_model(saved)
    assert not model.training
    assert tiny.logits(model, tiny.batch()).shape == (3, 3)


def test_metrics_are_added_to_the_last_phase(saved):
    record_metrics(saved, {"test/accuracy": 0.25})
    assert [record.metrics for record in read_artifact(saved).history] == [
        {"test/accuracy": 0.5},
        {"test/accuracy": 0.25},
    ]
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "d2dmoe.safetensors"]


def test_the_processor_is_saved_beside(tmp_path):
    save_artifact(
        tiny.dense(),
        tmp_path / "artifact",
        [PhaseRecord("X")],
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
    )
    assert (tmp_path / "artifact" / "tokenizer.json").read_text() == "{}"


def test_tensors_lie_beside_the_weights(tmp_path):
    values = {"blocks.0.mlp": torch.arange(3.0), "blocks.1.mlp": torch.ones(4, dtype=torch.float64)}
    save_artifact(tiny.dense(), tmp_path / "artifact", [PhaseRecord("X")], tensors={"importance": values})
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact.tensors == ["importance"]
    read = artifact.read_tensors("importance")
    assert all(torch.equal(read[name], value) for name, value in values.items())
    (tmp_path / "artifact" / "importance.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"importance.safetensors is missing or truncated"):
        read_artifact(tmp_path / "artifact")


def test_a_replaced_artifact_is_the_new_one(saved):
    save_artifact(tiny.dense(), saved, [PhaseRecord("FineTuning")])
    assert read_artifact(saved).stage == "dense"
    assert [entry.name for entry in saved.parent.iterdir()] == ["artifact"]


@pytest.mark.parametrize("moment", ["save_processor", "_write_json", "safetensors"])
def test_killed_while_saving_leaves_the_old_artifact_or_none(tmp_path, monkeypatch, moment):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    path = tmp_path / "artifact"
    arguments = (tiny.dense(), path, [PhaseRecord("FineTuning")], killed if moment == "save_processor" else None)
    with monkeypatch.context() as patch:
        if moment == "safetensors":
            patch.setattr(artifacts, "write_weights", killed)
        elif moment != "save_processor":
            patch.setattr(artifacts, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            save_artifact(*arguments)
    assert not path.exists()
    save_artifact(tiny.dense(), path, [PhaseRecord("FineTuning")])
    assert read_artifact(path).stage == "dense"
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_no_such_folder(tmp_path):
    with pytest.raises(
        ConfigError, match=r"init_from='.*nowhere': no such folder; must be the artifact that a phase wrote"
    ):
        read_artifact(tmp_path / "nowhere")


def test_a_folder_of_runs_is_told_with_what_they_left(tmp_path):
    for phase in ("run/second", "run/first"):
        save_artifact(tiny.dense(), tmp_path / phase / "artifact")
    told = [str(tmp_path / "run" / phase / "artifact") for phase in ("first", "second")]
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "config.json").write_text('{"model_type": "bert"}')  # another library's
    save_artifact(tiny.dense(), tmp_path / "compressed" / "model")
    save_artifact(tiny.dense(), tmp_path / "compressed" / "first" / "artifact")
    of_compress = str(tmp_path / "compressed" / "model")
    for folder, meant in (("run/first", told[0]), ("run", " or ".join(told)), ("compressed", of_compress)):
        with pytest.raises(ConfigError) as error:
            read_artifact(tmp_path / folder)
        assert str(error.value).endswith(f"; did you mean {meant}?")


def test_a_folder_that_is_no_artifact(tmp_path):
    with pytest.raises(ConfigError, match=r"no artifact, config.json cannot be read"):
        read_artifact(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match=r"no artifact, config.json has no key 'd2dmoe'"):
        read_artifact(tmp_path)


def test_missing_weights(saved):
    (saved / "d2dmoe.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"d2dmoe.safetensors is missing or truncated"):
        read_artifact(saved)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_truncated_weights(saved, kept):
    weights = saved / "d2dmoe.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"init_from='.*artifact': d2dmoe.safetensors is missing or truncated"):
        read_artifact(saved)
    with pytest.raises(ConfigError, match=r"path='.*artifact': d2dmoe.safetensors is missing or truncated"):
        load_model(saved)


def test_an_artifact_can_be_moved(saved, tmp_path):
    moved = shutil.move(saved, tmp_path / "elsewhere")
    assert load_model(moved) is not None


def test_it_says_its_format_and_a_newer_one_is_refused_in_one_line(saved):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    assert config["d2dmoe"]["format"] == 2
    config["d2dmoe"]["format"] = 9
    file.write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"^path='.*': has format 9, that of a newer d2dmoe_pl; this one reads formats up to 8$"
    ):
        load_model(saved)


@pytest.mark.parametrize("kind", ["bert-masked-language-modeling", "gpt2-causal-language-modeling"])
def test_tied_weights_stay_tied(kind, tmp_path):
    model = tiny.dense(kind)
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_weights_that_are_tied_by_hand_stay_so(tmp_path):
    kind = "llama-causal-language-modeling"
    model = tiny.dense(kind)
    model.lm_head.weight = model.model.embed_tokens.weight
    tiny.route_(model)
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    batch = tiny.batch(kind)
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "modernbert", "gemma", "phi", "t5"])
def test_a_narrow_type_is_what_the_models_library_makes_of_it(name, tmp_path):
    kind = next(kind for kind in tiny.SOURCES if kind.split("-")[0] == name)
    model = tiny.routed(kind)
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact", dtype="bfloat16")
    made = type(model)._from_config(model.config, dtype=torch.bfloat16)
    wanted, own = dict(made.named_buffers()), dict(model.named_buffers())
    for buffer_name, buffer in loaded.named_buffers():
        if buffer_name in wanted:
            assert buffer.dtype == wanted[buffer_name].dtype
            assert torch.equal(buffer, own[buffer_name].to(buffer.dtype))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_what_is_no_artifact_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    message = r"^path='.*': is there, and no artifact; must be a new folder, an empty one, or an artifact, which is"
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ConfigError, match=message):
            save_artifact(tiny.routed(), path)
    (tmp_path / "config.json").write_text("{}")  # of a model of another library
    with pytest.raises(ConfigError, match=message):
        save_artifact(tiny.routed(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_loading_initialises_nothing_at_random(saved):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)


SIZE = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "in_chans": 1}


class OwnVisionTransformer(VisionTransformer):
    """What a user may have registered with timm."""


def own_vision_transformer(pretrained=False, **settings):
    return build_model_with_cfg(OwnVisionTransformer, "own_vision_transformer", pretrained, **settings)


def test_what_is_registered_with_timm_is_saved_as_timm_has_recorded_it(tmp_path):
    timm.models.register_model(own_vision_transformer)
    model = tiny.route_(timm.create_model("own_vision_transformer", num_classes=3, **SIZE).eval())
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    assert type(loaded) is OwnVisionTransformer
    batch = tiny.batch()
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))


def test_what_timm_has_recorded_in_classes_is_to_be_said_in_names(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, act_layer=nn.SiLU, **SIZE)
    with pytest.raises(ConfigError, match=r"^VisionTransformer: set model.model_args to the keyword arguments given"):
        save_artifact(tiny.route_(model), tmp_path / "artifact")
    model.model_args = {"act_layer": "silu", **SIZE}
    save_artifact(model, tmp_path / "artifact")
    assert type(load_model(tmp_path / "artifact").blocks[0].mlp.experts.activation) is nn.SiLU
