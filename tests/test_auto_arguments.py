"""What is asked of transformers' ``Auto`` classes beside a converted model's name is done, or refused."""

import pytest
import tiny
import transformers
from transformers import AutoModelForSequenceClassification as Auto

from d2dmoe_pl.artifact import save_artifact


@pytest.fixture
def saved(tmp_path):
    model = tiny.routed("bert")
    save_artifact(model, tmp_path / "artifact")
    return model, str(tmp_path / "artifact")


def test_what_is_asked_of_a_call_is_done(saved):
    model, folder = saved
    asked = {"attn_implementation": "eager", "output_attentions": True, "device_map": "cpu", "token": "x"}
    loaded = Auto.from_pretrained(folder, **asked).eval()
    assert len(loaded(**tiny.batch("bert")).attentions) == model.config.num_hidden_layers
    assert loaded.config._attn_implementation == "eager"
    assert Auto.from_pretrained(folder).config._attn_implementation == model.config._attn_implementation
    assert next(Auto.from_pretrained(folder, device_map={"": "meta"}).parameters()).device.type == "meta"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"num_labels": 7},
            r"id2label={0: 'LABEL_0', .*: a converted model is loaded as it was saved; must be left out",
        ),
        (
            {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)},
            r"quantization_config=.*left out",
        ),
        ({"output_loading_info": True}, r"output_loading_info=True: a converted model is loaded as it was saved"),
        ({"device_map": {"a": "cpu", "b": "disk"}}, r"device_map={'a': 'cpu', 'b': 'disk'}: must be of one device"),
    ],
)
def test_what_cannot_be_done_is_refused(saved, asked, message):
    _, folder = saved
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Auto.from_pretrained(folder, **asked)
