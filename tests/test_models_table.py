"""The table of models says what is so."""

import models_table
import pytest

from d2dmoe_pl import phases
from d2dmoe_pl.phases import FineTuning, OptimizedPhase, Phase


@pytest.mark.thorough
def test_the_page_has_the_table_as_it_is_now():
    text = models_table.PAGE.read_text()
    assert text.count(models_table.BEGIN) == text.count(models_table.END) == 1
    assert models_table.placed(text) == text, "run python tests/models_table.py"


def test_every_phase_is_tried():
    tried = {type(phase) for method in models_table.METHODS.values() for phase in method}
    known = {value for value in vars(phases).values() if isinstance(value, type) and issubclass(value, Phase)}
    assert tried == known - {Phase, OptimizedPhase, FineTuning}


def test_a_model_that_a_phase_refuses_is_not_said_to_go_through_it():
    cells = {row[0]: row[2:7] for row in models_table.rows(["bert", "gpt2", "llama"])}
    assert cells["Hugging Face BERT"] == ["plain, separate", "yes", "yes", "yes", "yes"]
    assert cells["Hugging Face GPT-2"] == ["plain, fused", "yes", "yes", "yes", "`ImportanceScoring`"]
    assert cells["Hugging Face Llama"] == ["gated, separate", "yes", "yes", "yes", "no"]
