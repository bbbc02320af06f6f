"""What layers do in the course of a training, as one picture of all of them: a curve for each would be dozens."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

MOST = 400  # steps that are kept; every other goes where there are more


class LayersOverSteps:
    """Values by kind, layer and step."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
        self._added: Counter[str] = Counter()
        self._shown: Counter[str] = Counter()  # how many of those that were added the newest picture has

    def add(self, kind: str, step: int, values: Mapping[str, Tensor]) -> None:
        """Add a value of each layer, a scalar; it is read when a picture is drawn."""
        course = self._kinds.setdefault(kind, [])
        if course and course[-1][0] == step:  # gradients are accumulated
            course.pop()
        course.append((step, {name: value.detach() for name, value in values.items()}))
        if len(course) > MOST:
            del course[1::2]
        self._added[kind] += 1

    def draw(self, loggers: Iterable[object], step: int, is_last: bool = False) -> None:
        """Have every TensorBoard among ``loggers`` show what :meth:`figures` gives."""
        for kind, figure in self.figures(is_last).items():
            for logger in loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"layers/{kind}", figure, step)

    def figures(self, is_last: bool = False) -> dict[str, Figure]:
        """A heat map of each kind that has twice the values of its picture before: layers down and steps across.

        Args:
            is_last: Whether there will be no other, so that a single new value is enough. A picture shows all that went
                before, and one takes as long as a training step.
        """
        enough = {kind: self._shown[kind] + 1 if is_last else 2 * self._shown[kind] for kind in self._kinds}
        kinds = [kind for kind, least in enough.items() if self._added[kind] >= max(1, least)]
        self._shown.update({kind: self._added[kind] - self._shown[kind] for kind in kinds})
        return {kind: _drawn(kind, self._kinds[kind]) for kind in kinds}


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
