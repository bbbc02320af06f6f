"""The tree keeps its promises: one direction of imports, names in their place, docs in step, configs that parse."""

import ast
import re
from pathlib import Path

import pages
import pytest
import transformers

from d2dmoe_pl.chain_arguments import chain_parser
from d2dmoe_pl.chain_settings import phase_arguments
from d2dmoe_pl.data.embeddings import pooling
from d2dmoe_pl.phase_cli import PhaseCLI
from d2dmoe_pl.phases._preflight import preflight

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "d2dmoe_pl"
# what stands left may be imported by what stands right
FLOW = [
    ["sharded_tensors"],
    [
        "borrowed_tensors",
        "errors",
        "evaluation_mode",
        "finite_weights",
        "free_memory",
        "given_files",
        "hooks",
        "hub_folders",
        "notices",
        "signals",
        "typed_settings",
        "whole_files",
    ],
    ["auto_classes", "checkpoints", "parser_line", "plugins", "recipe"],
    ["failures", "null_settings"],
    ["benchmark_arguments", "chain_arguments", "compile_arguments", "compress_arguments"],
    ["__main__", "entry"],
    ["data"],
    ["adapters"],
    ["moe"],
    ["metrics"],
    ["moebert"],
    ["artifact_parts", "parts_without_weights", "structure", "weights_reading", "weights_types", "weights_writing"],
    ["artifact", "auto_models"],
    ["compiled_artifact", "harness", "hub"],
    ["phases"],
    ["callbacks"],
    ["benchmark"],
    ["report"],
    ["run_folders"],
    ["phase_cli"],
    ["chain_lock", "chain_settings", "chain_status"],
    ["chain"],
    ["compile_command", "compression"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(FLOW) for name in names}
ARCHITECTURES = re.compile(r"(?i)(?<!moe)bert|vit\b|vision_?transformer|deit|gpt|llama|gemma")
SOURCES = sorted(PACKAGE.rglob("*.py"))
# configurations of the pretrained models that recipes name
ON_HUB = {
    "smollm2": transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
    ),
    "google-t5/t5-small": transformers.T5Config(decoder_start_token_id=0),
    "google-bert/bert-base-uncased": transformers.BertConfig(),
    "mpiorczynski/relu-bert-base-uncased": transformers.BertConfig(hidden_act="relu"),
    "mpiorczynski/relu-vit-base-patch16-224": transformers.ViTConfig(hidden_act="relu"),
    "my/text_model": transformers.BertConfig(),
    "my/image_model": transformers.ViTConfig(),
    "google/vit-base-patch16-224": transformers.ViTConfig(),
    "openai-community/gpt2": transformers.GPT2Config(),
    "sentence-transformers/all-MiniLM-L6-v2": transformers.BertConfig(hidden_size=384, intermediate_size=1536),
    "google/gemma-2b": transformers.GemmaConfig(hidden_size=2048, num_hidden_layers=18, num_attention_heads=8),
}
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def place(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "d2dmoe_pl" else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("d2dmoe_pl."))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    if file == PACKAGE / "__init__.py":
        return
    for imported in imports(file):
        assert RANK[imported] <= RANK[place(file)], f"imports {imported}, against the flow"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_architectures_are_named_in_adapters_only(file):
    if place(file) == "adapters":
        return
    identifiers = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
    assert not {name for name in identifiers if ARCHITECTURES.search(name)}


@pytest.mark.parametrize(
    "file", [*SOURCES, *(ROOT / "tests").rglob("*.py")], ids=lambda file: str(file.relative_to(ROOT))
)
def test_files_hold_one_idea(file):
    assert file.stem not in ("utils", "common", "helpers", "misc")
    assert file.read_text().count("\n") <= 300


def test_ci_runs_the_readmes_test_line_but_for_the_thorough_ones():
    start, tests = (block.text.strip() for block in pages.blocks(pages.README, "bash")[:2])
    assert "requirements.txt" in start
    assert "main.py chain" in start
    assert "pytest" in tests
    assert len(tests.splitlines()) == len(start.splitlines()) == 1
    assert f'{tests} -m "not thorough" || exit' in (ROOT / ".ci" / "run").read_text().splitlines()


def test_requirements_have_a_floor_and_a_ceiling():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        requirement, _, _ = line.partition("; ")  # where it has wheels
        assert re.fullmatch(r"[a-z0-9-]+(\[[a-z]+\])?>=[\d.]+,<[\d.]+", requirement), line


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_fits_together(recipe, tmp_path, monkeypatch):
    config = chain_parser().parse_args(["--config", str(recipe), "--output_dir", str(tmp_path / "run")])
    settings = {None: [], **{name: [] for name in config.phases}}
    openings = [PhaseCLI(args=phase_arguments(config, settings, i), run=False) for i in range(len(config.phases))]
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", ON_HUB.__getitem__)
    monkeypatch.setattr(pooling, "_file", lambda model, name: None)  # what the hub has of a model beside its config
    for opening in openings:
        if getattr(opening.model.source, "gguf_file", None) is not None:
            opening.model.source.gguf_file = None  # which is not here; its config is in ON_HUB
    preflight([opening.model for opening in openings])
    assert not (tmp_path / "run").exists()


def test_configs_hold_recipes_and_nothing_else():
    assert sorted((ROOT / "configs").rglob("*")) == RECIPES


def test_public_names_have_docstrings():
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), file
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file}: {node.name}"
