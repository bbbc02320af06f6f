"""What is given to ``compress`` is checked before it is used, and a wish that tells nothing is said."""

import pytest
import stand_ins
import tiny
import transformers
import yaml

from d2dmoe_pl import compress
from d2dmoe_pl.cli import main
from d2dmoe_pl.compression import recipe_for_model
from d2dmoe_pl.compression.budget_for_target import budget_for
from d2dmoe_pl.compression.recipe_for_model import _loaded
from d2dmoe_pl.compression.target import parse_target
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint

NAMED = "TextClassification"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target": 0.5}, "^target='0.5': must be str$"),
        ({"target": None}, "^target=None: must be given$"),
        ({"batch_size": "many"}, "^batch_size='many': must be int$"),
        ({"data": {}}, "^data={}: must say its class_path, as a recipe does$"),
        ({"data": {"class_path": NAMED}, "task": "nope"}, "^task='nope': allowed are text-classification, "),
        ({"data": {"class_path": "TextFoo"}}, "^data: class_path='TextFoo': no such class; "),
        ({"data": {"class_path": NAMED, "init_args": {"foo": 1}}}, "^data: TextClassification has no setting 'foo'$"),
        (
            {"data": {"class_path": NAMED, "init_args": {"tokenizer": "t", "source": {"tain": "a"}}}},
            "^source.tain: no such setting; ",
        ),
    ],
)
def test_what_is_given_is_checked(tmp_path, given, said):
    tiny.SOURCES["bert"]().build(["a", "b"]).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=said):
        compress(str(tmp_path / "model"), **{"task": "text-classification", "output_dir": tmp_path / "out", **given})


def test_a_head_whose_outputs_have_no_names_is_none_that_is_missing(tmp_path, monkeypatch):
    """It has been trained, and which output is which class is all that is not known."""
    monkeypatch.chdir(tmp_path)
    stand_ins.write_emotion(tmp_path / "texts")
    model = transformers.BertForSequenceClassification(tiny.bert_config(num_labels=5))
    model.save_pretrained("model")
    tiny.tokenizer("model", stand_ins.WORDS)
    said = (
        r"^labels: which of the model's 5 outputs, which have no names, is which .* id2label or label_names in its con"
    )
    with pytest.raises(ConfigError, match=said):
        compress("model", "texts")
    model.bert.save_pretrained("model")
    with pytest.raises(ConfigError, match=r"^effort='minutes': model has no head for cat, dog, eel, fox, gnu, and min"):
        compress("model", "texts")


def test_a_model_without_a_head_has_none_for_any_class(tmp_path, monkeypatch):
    """Its config says of two outputs what is so by default; and what the task is may have been told wrong."""
    monkeypatch.chdir(tmp_path)
    texts = "".join(f"the cat {i},{i % 3}\n" for i in range(60))
    (tmp_path / "texts.csv").write_text(f"text,label\n{texts}")
    tiny.dense("gpt2-causal-language-modeling").save_pretrained("model")
    tiny.tokenizer("model", stand_ins.WORDS)
    said = (
        "effort='minutes': model has no head for 0, 1, 2, and minutes trains none; must be hours, or a model that has "
        "been trained on these labels"
    )
    with pytest.raises(ConfigError) as error:
        compress("model", "texts.csv")
    assert str(error.value) == f"{said}; task='text-classification' is what the columns tell, and can be given"
    with pytest.raises(ConfigError) as error:
        compress("model", "texts.csv", task="text-classification")
    assert str(error.value) == said


def test_a_block_of_a_text_is_as_many_predictions_as_it_has_tokens(tmp_path, monkeypatch, capsys):
    """So that a single one is enough to calibrate on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.txt").write_text("the cat saw the dog\n\n" * 120)
    tiny.dense("gpt2-causal-language-modeling").save_pretrained("model")
    tiny.tokenizer("model", stand_ins.WORDS, ("[PAD]", "[UNK]", "<eos>"))
    given = ["--model", "model", "--data", "all.txt", "--target", "drop=1", "--print_config"]
    monkeypatch.setattr(recipe_for_model, "check_enough", lambda *_: pytest.fail("samples are not what counts"))
    main(["compress", *given])
    assert yaml.safe_load(capsys.readouterr().out)["shared"]["data"]["class_path"] == "LanguageModeling"


def test_where_no_files_can_be_written_is_told_first(tmp_path):
    (tmp_path / "out").write_text("mine")
    for model in ("nowhere", tiny.dense("bert")):
        with pytest.raises(ConfigError, match=r"^output_dir='.*out': no files can be written there \(Not a dir"):
            compress(model, "nowhere.csv", output_dir=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_data_of_ones_own(tmp_path, monkeypatch):
    """A class by its place, as a recipe names it."""
    (tmp_path / "own_texts.py").write_text("from d2dmoe_pl.data import TextClassification as T\nclass Own(T): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    stand_ins.write_emotion(tmp_path / "texts")
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", stand_ins.WORDS)
    source = {"dataset": str(tmp_path / "texts")}
    made = _loaded({"class_path": "own_texts.Own", "init_args": {"source": source, "tokenizer": tokenizer}})
    assert (type(made).__name__, made.num_training_samples) == ("Own", 24)


@pytest.mark.parametrize(("dense", "is_said"), [(0.0, True), (40.0, False)])
def test_a_drop_from_nothing_is_told(capfd, dense, is_said):
    points = (BudgetPoint((1.0,), 1.0, 1.0, 0.0, dense), BudgetPoint((0.0,), 0.2, 0.6, 0.4, 0.0))
    path = BudgetPath(("layer",), "dynk_max", "exact_match", True, True, 100, points)
    found = budget_for(parse_target("drop=0.5"), path, None)
    assert (found.point == points[1]) == is_said
    said = "drop=0.5 cannot be told here: exact match is 0 with every expert on"
    assert (said in capfd.readouterr().err) == is_said
    budget_for(parse_target("ffn_flops=50%"), path, None)
    said = "What ffn_flops=50% loses cannot be told here: exact match is 0 with every expert on"
    assert (said in capfd.readouterr().err) == is_said
