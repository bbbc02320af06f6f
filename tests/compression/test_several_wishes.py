"""Several wishes in one folder, and wishes that nothing would read."""

from dataclasses import replace

import pytest
import transformers

from d2dmoe_pl import compress
from d2dmoe_pl.compression import command, recipe_for_model
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import moe_layers


def taus(model):
    return [layer.get_gate().config.tau for layer in moe_layers(model).values()]


def test_each_is_loaded_as_it_was_wished_for(calibrated):
    wishes = ("ffn_flops=90%", "ffn_flops=60%")
    made = [compress("model", "texts", target=wish, output_dir="out") for wish in wishes]
    assert taus(made[0].load()) == pytest.approx(list(made[0].promised.taus))
    assert taus(made[1].load()) == pytest.approx(list(made[1].promised.taus))
    assert taus(made[0].load()) != taus(made[1].load())
    of_another = replace(made[0], path=replace(made[0].path, metric="another"))
    with pytest.raises(ConfigError, match=r"^out/model: has been made anew since; must be what this compress made"):
        of_another.load()


def test_a_recipe_of_another_seed_stays_and_is_told(place):
    file = place / "out" / "recipe.yaml"
    phases = {"a": {"model": {"init_args": {}}}}
    command._write_recipe(file, {"seed": 0, "shared": {"data": {"class_path": "A"}}, "phases": phases}, "minutes")
    first = f"# effort minutes; python main.py chain --config {file} --output_dir {file.parent}\n"
    assert file.read_text().startswith(first)
    with pytest.raises(ConfigError, match=r"is there already, of seed=0; must be another --output_dir for seed=3"):
        command._write_recipe(file, {"seed": 3}, "minutes")


def test_a_model_in_memory_with_other_settings_is_another(place):
    dense = transformers.BertForSequenceClassification.from_pretrained("model")
    (place / "out").mkdir()
    command._kept(dense, place / "out" / "start")
    (place / "out" / command.RECIPE).write_text("phases: {}")
    assert command._kept(dense, place / "out" / "start") == place / "out" / "start"
    dense.config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match=r"start: is of another model than the one that is given"):
        command._kept(dense, place / "out" / "start")


DATA = {"class_path": "TextClassification", "init_args": {"source": {"train": "texts/train.csv"}, "tokenizer": "model"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"model": "model", "data": DATA, "task": "text-classification", "label_column": "target"},
            r"^label_column='target': must be left out, since data says its own, in its init_args$",
        ),
        (
            {"model": "model", "data": DATA, "task": "text-classification", "tokenizer": "nowhere"},
            r"^tokenizer='nowhere': must be left out, since data says its own",
        ),
        ({"effort": "hours", "label_column": "nonsense"}, r"^label_column='nonsense': must be left out, since neither"),
        (
            {"task": "text-regression"},
            r"^task='text-regression': must be left out, since neither model nor",
        ),
    ],
)
def test_options_that_nothing_would_read(place, given, said):
    with pytest.raises(ConfigError, match=said):
        compress(**given, output_dir="out")
    assert not (place / "out").exists()
    assert recipe_for_model.OF_FILES
