"""What could not be loaded is not saved: it is told, and nothing is written."""

import pytest
import tiny
from torch import nn

from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.errors import ConfigError


def _subclass(model):
    # called as its parent is, as which it would come back
    model.__class__ = type(type(model).__name__, (type(model),), {})
    return model


def _made_by_its_class(model):
    del model.pretrained_cfg
    return model


@pytest.mark.parametrize(
    ("kind", "change"), [("bert", _subclass), ("timm_vit", _subclass), ("timm_vit", _made_by_its_class)]
)
def test_what_could_not_be_loaded_is_not_saved(kind, change, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^\w+: no file could say how it is made again; must be of a class of its li"
    ):
        save_artifact(change(tiny.routed(kind)), tmp_path / "artifact")
    assert not any(tmp_path.iterdir())


class _Packed(nn.Linear):
    def get_extra_state(self):
        return {"scale": 0.1}


def _packed(model):
    model.classifier = _Packed(24, 3)
    return model


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model: model.to("meta"), r"\S+ is on the meta device, without values; must be loaded"),
        (
            _packed,
            r"has classifier._extra_state, which is dict and no tensor, as other libraries keep what they quantise;",
        ),
    ],
)
def test_what_has_no_tensors_to_save_is_told(change, told, tmp_path):
    with pytest.raises(ConfigError, match=rf"^BertForSequenceClassification: {told}"):
        save_artifact(change(tiny.routed("bert")), tmp_path / "artifact")
    assert not any(tmp_path.iterdir())


def _headed(model):
    model.classifier = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))
    return model


def _widened(model):
    model.classifier = nn.Linear(24, 5)
    return model


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_headed, r"has classifier.0.weight of shape \(8, 24\), where one made by its config has None, so that it cou"),
        (_widened, r"has classifier.weight of shape \(5, 24\), where one made by its config has \(3, 24\), so that it"),
    ],
)
def test_parts_that_a_config_does_not_say_are_told_before_anything_is_written(change, told, tmp_path):
    with pytest.raises(ConfigError, match=f"^BertForSequenceClassification: {told}"):
        save_artifact(change(tiny.routed("bert")), tmp_path / "artifact")
    assert not any(tmp_path.iterdir())
