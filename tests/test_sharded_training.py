"""Two processes that share a model's parameters (FSDP2, on the CPU) train what one process trains."""

from pathlib import Path

import forked_commands
import pytest
import tiny
import torch
import yaml
from recipe import arguments
from safetensors.torch import load_file

from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, save_artifact
from d2dmoe_pl.cli import main
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.phase_cli import PhaseCLI
from d2dmoe_pl.phases._accumulated_gradients import GRADIENTS

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

TWO = ["trainer.devices=2", "trainer.strategy=fsdp2", "data.init_args.batch_size=4"]
BESIDE = [TWO[0], "trainer.strategy=ddp", TWO[2]]  # two processes, each with the whole model
WORDS = "abcdefghijklmnopqrstuvwxyz"
# documents of 25 tokens; of the 41 blocks to validate on, processes have 20 and 21, which are 5 and 6 batches of 4
SIZES = (("train", 40), ("validation", 20))
LLAMA = "llama-causal-language-modeling"
# Adam makes much of what rounding makes of gradients that are nearly zero
OPTIMIZER = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
COURSE = {"optimizer": OPTIMIZER, "warmup": 0.0, "decay": "none"}
BEST = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "validation/loss"}}


def run(command):
    """Run a command in two processes; what they say."""
    ended = forked_commands.run(command, processes=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stderr


def write(folder, phases):
    """A recipe of ``phases`` on texts in which a letter tells the next."""
    texts = {split: [" ".join(WORDS[(i + 3 * j) % 26] for j in range(24)) for i in range(n)] for split, n in SIZES}
    for split, lines in texts.items():
        (folder / f"{split}.txt").write_text("\n\n".join(lines))
    tokenizer = tiny.tokenizer(folder / "tokenizer", WORDS, ("[PAD]", "[UNK]", "<eos>"))
    source = {split: str(folder / f"{split}.txt") for split, _ in SIZES}
    data = {"source": {**source, "test": None}, "tokenizer": tokenizer, "length": 12, "batch_size": 8}
    trainer = {
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 2, "limit_train_batches": 6},
        **{"enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": 1.0},
    }
    shared = {"data": {"class_path": "LanguageModeling", "init_args": data}, "trainer": trainer}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"shared": shared, "phases": phases}, sort_keys=False))
    return str(file)


def phase(class_path, callbacks=(), course=COURSE, **settings):
    made = {"model": {"class_path": class_path, "init_args": {**course, **settings}}}
    return {**made, "trainer": {"callbacks": list(callbacks)}} if callbacks else made


def assert_same(one, two):
    """The artifacts of a phase are the same, but for rounding."""
    histories = [read_artifact(folder / "artifact").history for folder in (one, two)]
    for mine, other in zip(*histories, strict=True):
        assert mine.phase == other.phase
        assert mine.metrics == pytest.approx(other.metrics, rel=1e-4)
    assert (one / "artifact" / "config.json").read_text().split('"history"')[0] == (
        two / "artifact" / "config.json"
    ).read_text().split('"history"')[0]
    tensors = [load_model(folder / "artifact").state_dict() for folder in (one, two)]
    torch.testing.assert_close(tensors[1], tensors[0], rtol=1e-5, atol=1e-5)


@pytest.fixture
def dense(tmp_path):
    save_artifact(tiny.dense(LLAMA), tmp_path / "dense", [PhaseRecord("FineTuning")])
    return str(tmp_path / "dense")


@pytest.fixture
def experts(tmp_path):
    model = tiny.dense(LLAMA)
    convert_to_moe_(model, ExpertsConfig(8))
    save_artifact(model, tmp_path / "experts", [PhaseRecord("ExpertClustering")])
    return str(tmp_path / "experts")


@pytest.fixture
def routed(tmp_path):
    save_artifact(tiny.routed(LLAMA), tmp_path / "routed", [PhaseRecord("RouterRegression")])
    return str(tmp_path / "routed")


@pytest.mark.thorough
def test_fine_tuning_and_sparsity_enforcement(tmp_path, dense):
    first = phase("FineTuning", init_from=dense, hidden_weight=0.5)
    recipe = write(
        tmp_path, {"tuning": first, "sparsity": phase("SparsityEnforcement", [BEST], alpha=0.01, hidden_weight=0.5)}
    )
    main(arguments(recipe, tmp_path / "one"))
    said = run(arguments(recipe, tmp_path / "two", "--set", *TWO))
    assert said.count("Finished. The model:") == 1
    before = load_file(Path(dense) / "model.safetensors")
    for name in ("tuning", "sparsity"):
        assert_same(tmp_path / "one" / name, tmp_path / "two" / name)
        after = load_file(tmp_path / "two" / name / "artifact" / "model.safetensors")
        assert max((after[key] - before[key]).abs().max() for key in before) > 1e-2  # it has been trained
        before = after


@pytest.mark.thorough
def test_recovery_tuning(tmp_path, routed):
    sweep = {"class_path": "TauSweep", "init_args": {"taus": [0.5, 1.0]}}
    recipe = write(
        tmp_path, {"recovery": phase("RecoveryTuning", [sweep], init_from=routed, num_held_out=17, hidden_weight=0.5)}
    )
    main(arguments(recipe, tmp_path / "one"))
    run(arguments(recipe, tmp_path / "two", "--set", *TWO))
    assert_same(tmp_path / "one" / "recovery", tmp_path / "two" / "recovery")


@pytest.mark.thorough
@pytest.mark.parametrize("class_path", ["FineTuning", "RouterRegression"])
def test_a_training_goes_on_from_its_checkpoint(tmp_path, dense, experts, class_path):
    recipe = write(
        tmp_path, {"tuning": phase(class_path, init_from=experts if class_path == "RouterRegression" else dense)}
    )
    command = ["fit", f"--config={recipe}:tuning"]
    two = [f"--{setting}" for setting in TWO]
    main([*command, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    run([*command, *two, f"--trainer.default_root_dir={tmp_path / 'half'}", "--trainer.max_epochs=1"])
    (checkpoint,) = (tmp_path / "half").rglob("last.ckpt")
    run([*command, *two, f"--trainer.default_root_dir={tmp_path / 'two'}", f"--ckpt_path={checkpoint}"])
    assert_same(*(tmp_path / name / "lightning_logs" / "version_0" for name in ("one", "two")))


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", [BESIDE, TWO])
@pytest.mark.parametrize("class_path", ["FineTuning", "RouterRegression"])
def test_a_training_goes_on_between_two_steps(tmp_path, dense, experts, class_path, strategy):
    """Steps are of three batches, and validations after four leave a checkpoint."""
    each = {**BEST, "init_args": {**BEST["init_args"], "save_top_k": -1}}
    settings = {"init_from": experts, "cache_memory": 0} if class_path == "RouterRegression" else {"init_from": dense}
    recipe = write(tmp_path, {"tuning": phase(class_path, [each], **settings)})
    often = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4"]
    command = ["fit", f"--config={recipe}:tuning", *often]
    two = [f"--{setting}" for setting in strategy]
    main([*command, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    run([*command, *two, f"--trainer.default_root_dir={tmp_path / 'half'}", "--trainer.max_epochs=1"])
    (checkpoint,) = (tmp_path / "half").rglob("epoch=0-step=1.ckpt")
    assert GRADIENTS in torch.load(checkpoint, weights_only=True)
    run([*command, *two, f"--trainer.default_root_dir={tmp_path / 'two'}", f"--ckpt_path={checkpoint}"])
    assert_same(*(tmp_path / name / "lightning_logs" / "version_0" for name in ("one", "two")))


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])  # gated; transposed weights; gate and up in one
@pytest.mark.parametrize("routers", [phase("RouterRegression", width=8), phase("ExpertSelection", k=3)])
def test_clustering_and_routers(tmp_path, family, routers):
    kind = f"{family}-causal-language-modeling"
    save_artifact(tiny.dense(kind), tmp_path / "dense", [PhaseRecord("FineTuning")])
    experts = phase("ExpertClustering", course={}, init_from=str(tmp_path / "dense"), num_experts=8, num_samples=32)
    recipe = write(tmp_path, {"experts": experts, "routers": routers})
    run(arguments(recipe, tmp_path / "beside", "--set", *BESIDE))
    assert run(arguments(recipe, tmp_path / "two", "--set", *TWO)).count("Finished. The model:") == 1
    for name in ("experts", "routers"):
        assert_same(tmp_path / "beside" / name, tmp_path / "two" / name)
    # what was clustered is the model's: it computes what it did before
    model, dense = (load_model(path) for path in (tmp_path / "two" / "experts" / "artifact", tmp_path / "dense"))
    inputs = tiny.batch(kind)
    computed, before = (tiny.logits_of_tokens(each.eval(), inputs) for each in (model, dense))
    torch.testing.assert_close(computed, before, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("router", ["ground_truth", "similarity"])  # which read experts' weights
def test_selection_by_routers_that_are_not_trained(tmp_path, experts, router):
    selection = phase("ExpertSelection", init_from=experts, k=3, router=router)
    recipe = write(tmp_path, {"selection": selection})
    main(arguments(recipe, tmp_path / "one"))
    run(arguments(recipe, tmp_path / "two", "--set", *TWO))
    assert_same(tmp_path / "one" / "selection", tmp_path / "two" / "selection")


@pytest.mark.parametrize(
    ("class_path", "strategy", "said"),
    [
        ("BudgetCalibration", "fsdp2", r"strategy=fsdp2: BudgetCalibration needs the model whole in every process"),
        ("StandInFitting", "fsdp2", r"strategy=fsdp2: StandInFitting needs the model whole in every process"),
        (
            "FineTuning",
            '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}',
            r"strategy=ModelParallelStrategy: must be fsdp2",
        ),
    ],
)
def test_what_cannot_be_sharded_is_said_before_anything_starts(tmp_path, dense, class_path, strategy, said):
    recipe = write(tmp_path, {"only": phase(class_path, course={}, init_from=dense)})
    with pytest.raises(ConfigError, match=said):
        PhaseCLI(["--config", yaml_of(recipe), f"--trainer.strategy={strategy}"], run=False)


def yaml_of(recipe):
    content = yaml.safe_load(Path(recipe).read_text())
    file = Path(recipe).with_name("phase.yaml")
    file.write_text(yaml.safe_dump({**content["shared"], **content["phases"]["only"]}))
    return str(file)
