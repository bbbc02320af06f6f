"""Teachers that nothing can be learnt from are told before any phase of a chain has begun."""

from types import SimpleNamespace

import pytest
import tiny

from d2dmoe_pl import save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import BudgetDistillation, MoEBERTDistillation, RecoveryTuning

SIZES = {"num_experts": 4, "expert_dim": 12, "num_shared": 5, "importance_file": "unread"}
PHASES = [
    (RecoveryTuning, {"num_held_out": 0}, lambda: tiny.routed("bert")),
    (BudgetDistillation, {}, lambda: tiny.routed("bert")),
    (MoEBERTDistillation, SIZES, lambda: tiny.dense("bert", "gelu")),
]


@pytest.fixture(params=PHASES, ids=lambda param: param[0].__name__)
def begun(request, tmp_path):
    """Makes a phase with a teacher of a name in the folder of its chain, and the model that it would be given."""
    kind, settings, build = request.param

    def begin(name):
        start = tmp_path / "run" / "before" / "artifact"
        return kind(**settings, init_from=str(start), teacher=str(tmp_path / name)), build()

    return begin


def test_none_is_there(begun, tmp_path):
    phase, model = begun("nowhere")
    with pytest.raises(ConfigError, match=r"^teacher='.*nowhere': no such folder; must be the artifact that a phase"):
        phase.transform_(model)


def test_is_no_artifact(begun, tmp_path):
    (tmp_path / "folder").mkdir()
    phase, model = begun("folder")
    with pytest.raises(ConfigError, match=r"^teacher='.*folder': no artifact, config.json cannot be read"):
        phase.transform_(model)


def test_predicts_something_else(begun, tmp_path):
    save_artifact(tiny.dense("bert-question-answering", "gelu"), tmp_path / "other")
    phase, model = begun("other")
    with pytest.raises(ConfigError) as error:
        phase.transform_(model)
    expected = f"teacher={str(tmp_path / 'other')!r}: has the head 'question-answering'; must have 'classification', as"
    assert str(error.value) == f"{expected} the student has"


def test_has_other_labels(begun, tmp_path):
    teacher = tiny.dense("bert", "gelu")
    teacher.config.id2label = {0: "eel", 1: "dog", 2: "cat"}
    save_artifact(teacher, tmp_path / "other")
    phase, model = begun("other")
    with pytest.raises(ConfigError, match=r"^teacher='.*other': has the outputs eel, dog, cat; must have cat, dog"):
        phase.check_data(SimpleNamespace(model=model))


def test_an_earlier_phase_has_yet_to_leave_it(begun):
    phase, model = begun("run/fine_tuning/artifact")
    if not isinstance(phase, MoEBERTDistillation):
        phase.transform_(model)
    phase.check_data(SimpleNamespace(model=model))
