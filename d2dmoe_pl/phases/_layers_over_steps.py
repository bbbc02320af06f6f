"""What layers do in the course of a training, as one picture of all of them: a curve for each would be dozens."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

MOST = 400  # steps that are kept; every other goes where there are more


class LayersOverSteps:
    """Values by kind, layer and step."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}

    def add(self, kind: str, step: int, values: Mapping[str, Tensor]) -> None:
        """Add a value of each layer, a scalar; it is read when a picture is drawn."""
        course = self._kinds.setdefault(kind, [])
        if course and course[-1][0] == step:  # gradients are accumulated
            course.pop()
        course.append((step, {name: value.detach() for name, value in values.items()}))
        if len(course) > MOST:
            del course[1::2]

    def figures(self) -> dict[str, Figure]:
        """A heat map of each kind, layers down and steps across."""
        return {kind: _drawn(kind, course) for kind, course in self._kinds.items()}


def _drawn(kind: str, course: Sequence[tuple[int, Mapping[str, Tensor]]]) -> Figure:
    names = list(course[0][1])
    shown = [[float(values[name]) for _, values in course] for name in names]  # (layers, steps)
    figure = Figure(figsize=(7, 1.5 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
    every = max(1, len(course) // 8)
    axes.set_xticks(range(0, len(course), every), [str(step) for step, _ in course[::every]])
    axes.set_yticks(range(len(names)), [name if len(name) <= 30 else f"...{name[-27:]}" for name in names])
    axes.set_xlabel("step")
    figure.colorbar(image, label=kind.replace("_", " "))
    return figure
