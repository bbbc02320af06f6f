"""The page about the API says what the package exports."""

import api_page

import d2dmoe_pl


def test_every_name_is_in_one_group():
    grouped = [name for names in api_page.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(set(d2dmoe_pl.__all__) - {"__version__"})


def test_the_page_is_in_step():
    assert api_page.PAGE.read_text() == api_page.render(), "run python tests/api_page.py"


def test_a_signature_is_as_written():
    node = api_page.definition(d2dmoe_pl.set_tau_)
    expected = "set_tau_(model: nn.Module, tau: float, filter_fn: LayerFilterFn | None = None) -> None"
    assert api_page.signature("set_tau_", node) == expected
    assert api_page.parameters(api_page.definition(d2dmoe_pl.ExpertsConfig)) == [
        "num_experts: int",
        "num_projection_experts: int | None = None",
    ]


def test_sections_become_markdown():
    said = api_page.sections(
        "A line.\n\nMore.\n\nArgs:\n    tau: In\n        [0, 1].\n    k: See :meth:`Gate.forward`."
    )
    assert said[""] == "A line.\n\nMore."
    assert api_page.items(said["Args"]) == ["- `tau`: In [0, 1].", "- `k`: See `forward`."]
