"""The tokenizer of texts of one's own is the model's, or one that numbers words as it does."""

from pathlib import Path

import pytest
import stand_ins
import tiny
import transformers

from d2dmoe_pl.compression.own_data import data_config
from d2dmoe_pl.errors import ConfigError

NONE = {"text_columns": None, "label_column": None, "image_column": None, "audio_column": None}


def test_a_tokenizer_is_the_models_or_of_its_vocabulary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("all.txt").write_text("the the\n\nthe\n\n" * 30)

    def tokenizer_for(model, tokenizer=None):
        made, _ = data_config("all.txt", "causal-language-modeling", model, tokenizer, NONE, {}, 8)
        return made["init_args"]["tokenizer"]

    transformers.GPT2Config(n_positions=16).save_pretrained("model")
    said = "tokenizer=None: must be the folder or hub name of the model's tokenizer"
    with pytest.raises(ConfigError, match=f"^{said}$"):
        tokenizer_for("model")
    other = tiny.tokenizer("other", list(reversed(stand_ins.WORDS)))
    assert tokenizer_for("model", other) == other  # nothing tells that it is not the model's
    tiny.tokenizer("model", stand_ins.WORDS)
    assert tokenizer_for("model") == "model"
    longer = tiny.tokenizer("longer", [*stand_ins.WORDS, "more"])
    assert tokenizer_for("model", longer) == longer
    with pytest.raises(ConfigError) as error:
        tokenizer_for("model", other)
    total = len(stand_ins.WORDS) + 2
    strange = sum(a != b for a, b in zip(stand_ins.WORDS, reversed(stand_ins.WORDS), strict=True))
    assert str(error.value) == (
        f"tokenizer='other': of its {total} tokens {strange} have other numbers than by the tokenizer of model, or "
        "none; must be one of the same vocabulary"
    )
