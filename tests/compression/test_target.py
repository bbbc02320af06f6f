"""A wish is understood, or a line says how to write one."""

import pytest

from d2dmoe_pl.compression.target import Target, parse_target
from d2dmoe_pl.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "target", "said"),
    [
        ("ffn_flops=10%", Target("ffn_flops", 0.1), "ffn_flops=10%"),
        ("ffn_flops = 0.1", Target("ffn_flops", 0.1), "ffn_flops=10%"),
        ("flops=45 %", Target("flops", 0.45), "flops=45%"),
        ("speed=2x", Target("speed", 2.0), "speed=2x"),
        ("speed=1.5", Target("speed", 1.5), "speed=1.5x"),
        ("drop=0.5", Target("drop", 0.5), "drop=0.5"),
        ("drop=0", Target("drop", 0.0), "drop=0"),
    ],
)
def test_what_is_meant(text, target, said):
    assert parse_target(text) == target
    assert str(target) == said
    assert parse_target(said) == target


@pytest.mark.parametrize(
    "text", ["", "ffn_flops", "cost=10%", "drop=10%", "speed=2%", "flops=1.2.3", "drop=-1", "flops=x"]
)
def test_what_is_not(text):
    with pytest.raises(ConfigError) as error:
        parse_target(text)
    expected = f"target={text!r}: must be such as ffn_flops=10%, flops=45%, speed=2x or drop=0.5"
    assert str(error.value) == expected


@pytest.mark.parametrize("text", ["flops=10", "ffn_flops=0%", "flops=101%"])
def test_no_share(text):
    with pytest.raises(ConfigError, match="must be more than 0% and at most 100%"):
        parse_target(text)


def test_no_speed_up():
    with pytest.raises(ConfigError, match="target='speed=1x': must be more than 1x"):
        parse_target("speed=1x")
