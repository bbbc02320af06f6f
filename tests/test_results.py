"""The pages' results are those of the CSV files in docs/results, with settings chosen on the validation split."""

import pytest
import results

from d2dmoe_pl.recipe import read_recipe


def row(stage, tau, cost, accuracy):
    return {"stage": stage, "tau": str(tau), "ffn_flops_percent": str(cost), "accuracy": str(accuracy)}


CURVE = [
    row("validation", 0.5, 8, 80),
    row("validation", 0.7, 11.9, 90),
    row("validation", 0.8, 14, 89),
    row("validation", 0.9, 30, 95),
    row("test", 0.5, 9, 99),
    row("test", 0.7, 12.5, 88),
    row("test", 0.8, 13, 92),
    row("test", 0.9, 29, 94),
]


@pytest.mark.parametrize(("budget", "tau"), [(8, "0.5"), (11.9, "0.7"), (29, "0.7"), (30, "0.9"), (7, None)])
def test_the_setting_is_chosen_on_the_validation_split_within_the_budget(budget, tau):
    found = results.chosen(CURVE, "ffn_flops_percent", budget)
    assert (found and (found["stage"], found["tau"])) == (tau and ("test", tau))


def test_a_cell_needs_every_seed():
    dear = [row("validation", 0.9, 30, 95), row("test", 0.9, 30, 94)]
    assert results.cell([CURVE], "ffn_flops_percent", 12) == "88.00"
    assert results.cell([CURVE, dear], "ffn_flops_percent", 12) == ""
    assert results.cell([CURVE, dear], "ffn_flops_percent", 31) == "94.00 ± 0.00"


def test_pages_are_what_the_files_give():
    text, readme, budgets = (page.read_text() for page in (results.PAGE, results.README, results.BUDGETS_PAGE))
    for each in results.RESULTS:
        assert all(text.count(marker) == 1 for marker in results.markers(each))
        assert (each.folder / "results.png").is_file()
        assert len(results.picture(each).axes) == 2
    assert all(readme.count(marker) == 1 for marker in results.HEADLINE_MARKERS)
    assert results.page(text) == text, "run python tests/results.py draw"
    assert results.readme(readme) == readme, "run python tests/results.py draw"
    assert all(budgets.count(marker) == 1 for marker in results.PROMISED_MARKERS)
    assert results.budgets_page(budgets) == budgets, "run python tests/results.py draw"


@pytest.mark.parametrize("recipe", [each.recipe for each in results.RESULTS])
def test_the_control_is_trained_for_as_long_as_d2dmoe_and_its_recovery(recipe):
    def epochs(name, phase):
        return read_recipe(results.ROOT / "configs" / f"{name}.yaml")["phases"][phase]["trainer"]["max_epochs"]

    longest = epochs(recipe, "sparsity_enforcement") + epochs(recipe, "recovery_tuning")
    assert epochs(f"{recipe}_dense", "further_training") == longest


def test_a_budget_costs_what_it_says_though_not_to_the_last_digit():
    def of(stage, budget, cost, accuracy):
        return {"stage": stage, "budget": budget, "ffn_flops_percent": cost, "accuracy": accuracy}

    rows = [
        of("validation", "0.04", "4.01", "90"),
        of("validation", "0.05", "4.9", "95"),
        of("test", "0.04", "4.1", "91"),
    ]
    rows.append(of("test", "0.05", "4.8", "94"))
    assert results.chosen(rows, "ffn_flops_percent", 4) == rows[2]
    rows[1] = of("validation", "0.05", "4.9", "85")
    assert results.chosen(rows, "ffn_flops_percent", 6) == rows[3]
    assert results.price(rows[1], "ffn_flops_percent") == 5
    assert results.chosen(rows, "ffn_flops_percent", 3) is None
    assert results.price(of("test", "0.07", "7.1", "90"), "ffn_flops_percent") == 7  # which 100 * 0.07 is not
