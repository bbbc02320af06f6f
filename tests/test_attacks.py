"""Files from others run nothing: checkpoints, artifacts, pickles and recipes that try to leave a mark."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from recipe import arguments, write_recipe

from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, save_artifact
from d2dmoe_pl.checkpoints import why_unreadable
from d2dmoe_pl.cli import main
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moebert.published_files import read_hash_list, read_importance

CALLS = {
    "system": "(lambda mark: (__import__('os').system, (f'touch {mark}',)))",
    "eval": "(lambda mark: (eval, (f'open({mark!r}, \\'w\\')',)))",
    "exec": "(lambda mark: (exec, (f'open({mark!r}, \\'w\\')',)))",
    "open": "(lambda mark: (open, (mark, 'w')))",
    "popen": "(lambda mark: (__import__('subprocess').check_call, (['touch', mark],)))",
    "touch": "(lambda mark: (__import__('pathlib').Path.touch, (__import__('pathlib').Path(mark),)))",
    "copy": "(lambda mark: (__import__('shutil').copyfile, ('/etc/hostname', mark)))",
    "run": "(lambda mark: (__import__('runpy').run_path, (mark + '.py',)))",
}


class Attack:
    def __init__(self, call, mark):
        self.call, self.mark = call, str(mark)

    def __reduce__(self):
        return eval(CALLS[self.call])(self.mark)


def spread(attack):
    """Places in a file where it could lie."""
    return {
        "alone": attack,
        "among weights": {"state_dict": {"a": torch.zeros(2), "b": attack}, "loops": {}},
        "in callbacks": {
            "state_dict": {},
            "loops": {},
            "optimizer_states": [],
            "lr_schedulers": [],
            "callbacks": attack,
        },
    }


@pytest.fixture
def mark(tmp_path):
    """What an attack would leave."""
    (tmp_path / "mark.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    return tmp_path / "mark"


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("place", ["alone", "among weights", "in callbacks"])
def test_checkpoints(tmp_path, mark, call, place):
    file = tmp_path / "last.ckpt"
    torch.save(spread(Attack(call, mark))[place], file)
    assert why_unreadable(file) is not None
    assert not mark.exists()


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("read", [read_importance, read_hash_list])
def test_published_pickles(tmp_path, mark, call, read):
    file = tmp_path / "file.pkl"
    file.write_bytes(pickle.dumps({"importance": [[1.0]], "more": Attack(call, mark)}))
    with pytest.raises(ConfigError):
        read(file)
    assert not mark.exists()


def planted(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "last.ckpt").write_bytes(content)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["zip", "plain pickle", "archive"])
def test_a_planted_last_checkpoint_of_a_chain(tmp_path, mark, capsys, kind):
    recipe, output = write_recipe(tmp_path / "recipe.yaml", epochs=1), tmp_path / "run"
    main(arguments(recipe, output))
    status = output / "router_regression" / "phase.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "finished": False}))
    buffer = io.BytesIO()
    if kind == "zip":
        torch.save({"state_dict": Attack("system", mark)}, buffer)
    elif kind == "plain pickle":
        pickle.dump(Attack("system", mark), buffer)
    else:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Attack("system", mark)))
            archive.writestr("archive/version", "3")
    planted(output / "router_regression" / "checkpoints", buffer.getvalue())
    main(arguments(recipe, output))
    assert not mark.exists()
    assert "router_regression: last.ckpt cannot be read" in capsys.readouterr().err
    assert json.loads(status.read_text())["finished"]


@pytest.mark.parametrize("given", [["fit", "--ckpt_path"], ["test", "--ckpt_path"]])
def test_a_checkpoint_named_on_the_command_line(tmp_path, mark, capsys, given):
    torch.save({"state_dict": {}, "loops": Attack("system", mark)}, tmp_path / "x.ckpt")
    recipe = write_recipe(tmp_path / "recipe.yaml", epochs=1)
    with pytest.raises(SystemExit) as exit_info:
        main(
            [
                given[0],
                "--config",
                f"{recipe}:fine_tuning",
                given[1],
                str(tmp_path / "x.ckpt"),
                "--trainer.logger=false",
            ]
        )
    assert exit_info.value.code == 2
    assert f"error: ckpt_path='{tmp_path}/x.ckpt': is no checkpoint that this package wrote" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"seed: 1\n", b"", b"PK\x03\x04 cut off", b"\x80\x02."])
def test_another_file_in_the_place_of_a_checkpoint(tmp_path, capsys, content):
    recipe = write_recipe(tmp_path / "recipe.yaml", epochs=1)
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", f"{recipe}:fine_tuning", "--ckpt_path", str(tmp_path / "x.ckpt")])
    assert exit_info.value.code == 2
    assert f"error: ckpt_path='{tmp_path}/x.ckpt': is no checkpoint that this package wrote" in capsys.readouterr().err


@pytest.fixture
def artifact(tmp_path):
    save_artifact(tiny.routed("bert"), tmp_path / "artifact", [PhaseRecord("RouterRegression")])
    return tmp_path / "artifact"


def changed(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["../x", "/x", "..", "a/../../x", "a\\\\x", "C:x", "", "a/b", 3])
def test_names_of_tensors_that_leave_the_folder(artifact, name):
    changed(artifact, lambda config: config["d2dmoe"].update(tensors=[name]))
    with pytest.raises(ConfigError, match=r"which is no file in the folder"):
        read_artifact(artifact)


@pytest.mark.parametrize("name", ["../x", "a/b", ".."])
def test_tensors_are_not_written_elsewhere(tmp_path, name):
    with pytest.raises(ConfigError, match=r"is no name of a file in the folder"):
        save_artifact(tiny.dense("bert"), tmp_path / "artifact", tensors={name: {"a": torch.zeros(1)}})
    assert not (tmp_path / "artifact").exists()


OF_BERT = {
    "no architecture": lambda config: config.update(architectures=["pipeline"]),
    "no model": lambda config: config.update(architectures=["AutoConfig"]),
    "code on the hub": lambda config: config.update(attn_implementation="evil/kernel"),
    "a family with a path": lambda config: config["d2dmoe"].update(family="../evil"),
    "a private family": lambda config: config["d2dmoe"].update(family="_attention"),
    "another module": lambda config: config["d2dmoe"].update(family="os"),
    "a router with a path": lambda config: next(iter(config["d2dmoe"]["layers"].values()))["router"].update(kind="a.b"),
    "a rule with a path": lambda config: next(iter(config["d2dmoe"]["layers"].values()))["gate"].update(rule="os.path"),
    "a backend with a path": lambda config: next(iter(config["d2dmoe"]["layers"].values())).update(backend="../x"),
}


@pytest.mark.parametrize("attack", list(OF_BERT))
def test_configurations_that_name_code(artifact, attack):
    changed(artifact, OF_BERT[attack])
    with pytest.raises(ConfigError):
        load_model(artifact)


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"])
def test_an_artifact_of_timm_brings_no_other_files(tmp_path, mark, key):
    torch.save(Attack("system", mark), tmp_path / "evil.pth")
    save_artifact(tiny.routed("timm_vit"), tmp_path / "artifact")
    changed(tmp_path / "artifact", lambda config: config["model_args"].update({key: str(tmp_path / "evil.pth")}))
    with pytest.raises(ConfigError, match=f"model_args={key}: allowed is only what the model is like"):
        load_model(tmp_path / "artifact")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "local-dir:evil"])
def test_an_artifact_of_timm_names_no_model_elsewhere(tmp_path, name):
    save_artifact(tiny.routed("timm_vit"), tmp_path / "artifact")
    changed(tmp_path / "artifact", lambda config: config.update(architecture=name))
    with pytest.raises(ConfigError, match="timm has no such model"):
        load_model(tmp_path / "artifact")


TAGS = ["!!python/object/apply:os.system ['touch {mark}']", "!!python/name:os.system", "!!python/module:os"]


@pytest.mark.parametrize("tag", TAGS)
def test_recipes_have_no_tags_of_python(tmp_path, mark, capsys, tag):
    recipe = Path(write_recipe(tmp_path / "recipe.yaml"))
    recipe.write_text(recipe.read_text() + f"seed: {tag.format(mark=mark)}\n")
    with pytest.raises(SystemExit):
        main(arguments(str(recipe), tmp_path / "run"))
    assert capsys.readouterr().err.count("error: ") == 1
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "..", "a/b", "a\\\\b"])
def test_phases_stay_in_the_output_folder(tmp_path, capsys, name):
    recipe = Path(write_recipe(tmp_path / "recipe.yaml"))
    recipe.write_text(recipe.read_text().replace("  fine_tuning:", f"  '{name}':"))
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(str(recipe), tmp_path / "run"))
    assert exit_info.value.code == 2
    assert "must be the name of a folder in output_dir" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
