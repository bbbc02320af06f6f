"""What is wished for: so many FLOPs, so much faster, or no more than so much worse."""

import re
from dataclasses import dataclass

from d2dmoe_pl.errors import check

KINDS = {"ffn_flops": "%", "flops": "%", "speed": "x", "drop": ""}
FORM = re.compile(r"(\w+)\s*=\s*([0-9.]+)\s*([%x]?)")


@dataclass(frozen=True)
class Target:
    """A wish.

    Attributes:
        kind: ``ffn_flops`` or ``flops``, a share of the dense model's; ``speed``, a multiple of the dense
            model's;
            ``drop``, how much worse the task's metric may be, in points.
        value: Of it.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        unit = KINDS[self.kind]
        return f"{self.kind}={100 * self.value:g}%" if unit == "%" else f"{self.kind}={self.value:g}{unit}"


def parse_target(text: str, against: str | None = None) -> Target:
    """A wish as it is written on the command line.

    Args:
        text: Such as ``ffn_flops=10%``, ``flops=0.45``, ``speed=2x`` or ``drop=0.5``.
        against: What else a speed is told beside than the dense model in PyTorch, which need not be slower.

    Raises:
        ConfigError: For anything else.

    Example:
        >>> from d2dmoe_pl.compression.target import parse_target
        >>> parse_target("ffn_flops=10%")
        Target(kind='ffn_flops', value=0.1)
        >>> str(parse_target("speed=2"))
        'speed=2x'
    """
    wanted = "ffn_flops=10%, flops=45%, speed=2x or drop=0.5"
    found = FORM.fullmatch(text.strip())
    check(found is not None and found[1] in KINDS, f"target={text!r}: must be such as {wanted}")
    assert found is not None
    kind, number, unit = found.groups()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    check(value >= 0 and unit in ("", KINDS[kind]), f"target={text!r}: must be such as {wanted}")
    if KINDS[kind] == "%":
        value = value / 100 if unit else value
        check(0 < value <= 1, f"target={text!r}: must be more than 0% and at most 100% of the dense model's FLOPs")
    least = 1 if against is None else 0
    check(kind != "speed" or value > least, f"target={text!r}: must be more than {least}x, the dense model's speed")
    return Target(kind, value)
