"""docs/api.md: what the package exports, from its signatures and docstrings.

    python tests/api_page.py

writes it. By hand are the groups below alone; a name of ``d2dmoe_pl`` that is in none of them is an error.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import d2dmoe_pl

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
INTRODUCTION = """# API

What `d2dmoe_pl` exports; `python tests/api_page.py` writes this page from the docstrings. A function whose name ends in
`_` changes the model that it is given. Phases, callbacks and data are classes of `d2dmoe_pl.phases`,
`d2dmoe_pl.callbacks` and `d2dmoe_pl.data`, and mostly named in [recipes](recipes.md); `python main.py fit --help`
describes them. Whatever else a module of the package holds may change without notice.
"""
GROUPS = {
    "In one call": ["compress"],
    "Any model": ["adopt_"],
    "Loading and saving": ["load_model", "save_artifact", "push_to_hub", "PhaseRecord"],
    "Running": [
        "set_tau_",
        "set_budget_",
        "set_gate_",
        "GateConfig",
        "set_backend_",
        "quantize_",
        "QuantizationConfig",
        "optimize_",
        "save_compiled",
        "load_compiled",
    ],
    "Conversion": [
        "swap_activation_",
        "ActivationConfig",
        "convert_to_moe_",
        "ExpertsConfig",
        "add_routers_",
        "RouterConfig",
        "merge_to_dense_",
    ],
    "Attention projections": ["replace_projections_", "ProjectionConfig"],
    "MoEBERT": ["convert_to_moebert_", "MoEBERTConfig", "set_hash_table_"],
    "Models to start from": ["HuggingFaceModel", "TimmModel"],
    "Plug-ins": [
        "register_gate",
        "register_router",
        "register_split",
        "register_routing",
        "register_backend",
        "register_adapter",
    ],
    "Errors": ["ConfigError", "NonFiniteLossError"],
}
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")
WIDTH = 96  # of a signature; longer ones have a line for each argument


def definition(value: object) -> ast.FunctionDef | ast.ClassDef:
    """The definition of a function or class, as it is written."""
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    return node


def parameters(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """What is given in a call, with types and defaults: arguments, or the fields of a dataclass."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
        pairs = [_parameter(a.arg, a.annotation, d) for a, d in zip(given.args, defaults, strict=True)]
        if given.kwonlyargs:
            pairs.append("*")
        pairs += [_parameter(a.arg, a.annotation, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
        return [pair for pair in pairs if pair != "self"]
    constructor = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    if constructor:
        return parameters(constructor[0])
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    return [_parameter(field.target.id, field.annotation, field.value) for field in fields]


def _parameter(name: str, annotation: ast.expr | None, default: ast.expr | None) -> str:
    text = name if annotation is None else f"{name}: {ast.unparse(annotation)}"
    if isinstance(default, ast.Call):  # a dataclass's field(default_factory=dict)
        default = next(ast.Call(each.value, [], []) for each in default.keywords if each.arg == "default_factory")
    return text if default is None else f"{text} = {ast.unparse(default)}"


def signature(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """How ``name`` is called."""
    given = parameters(node)
    returns = "" if isinstance(node, ast.ClassDef) or node.returns is None else f" -> {ast.unparse(node.returns)}"
    line = f"{name}({', '.join(given)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {each}," for each in given), f"){returns}"])


def sections(docstring: str) -> dict[str, str]:
    """The sections of a docstring in Google's style by their titles; what comes before them has an empty one."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", docstring, flags=re.MULTILINE)
    titled = zip(parts[1::2], parts[2::2], strict=True)
    return {"": parts[0].strip(), **{title: textwrap.dedent(text) for title, text in titled}}


def markdown(text: str) -> str:
    """Text of a docstring in Markdown: one line a paragraph, code and references in backticks."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def items(text: str) -> list[str]:
    """The entries of a section, ``name: what it is``, as a list in Markdown."""
    entries = re.findall(r"^(\w+): (.*?)(?=^\w|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return [f"- `{name}`: {markdown(said)}" for name, said in entries]


def described(name: str) -> str:
    """One name of the package."""
    value = getattr(d2dmoe_pl, name)
    said = sections(inspect.getdoc(value) or "")
    node = definition(value)
    called = [] if inspect.isclass(value) and issubclass(value, Exception) else [signature(name, node)]
    parts = [f"### {name}", *(f"```text\n{line}\n```" for line in called), markdown(said[""])]
    for title in ("Args", "Attributes"):
        if title in said:
            parts.append("\n".join(items(said[title])))
    if "Returns" in said:
        parts.append(f"Returns: {markdown(said['Returns'])}")
    if "Raises" in said:
        parts.append("\n".join(entry.replace("- ", "Raises ", 1) for entry in items(said["Raises"])))
    if "Example" in said:
        parts.append(f"```pycon\n{said['Example'].strip()}\n```")
    return "\n\n".join(parts)


def render() -> str:
    """The page."""
    parts = [INTRODUCTION.strip()]
    for title, names in GROUPS.items():
        parts += [f"## {title}", *(described(name) for name in names)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
