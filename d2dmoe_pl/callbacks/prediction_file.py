"""What a model says of each sample, and what that cost, in a file."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import lightning as L
from datasets import Dataset
from torch import Tensor

from d2dmoe_pl.data.sample_names import file_names, numbers_of
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.metrics.flops import SampleSize, flops_outside_ffns, layer_tokens, sample_inputs, sample_sizes
from d2dmoe_pl.metrics.sample_cost import sample_cost
from d2dmoe_pl.moe.expert_layer import ExpertLayer
from d2dmoe_pl.moe.find_layers import expert_layers
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.phases import Phase
from d2dmoe_pl.whole_files import replaced_file

WRITERS: dict[str, Callable[[Dataset, Path], Any]] = {".csv": Dataset.to_csv, ".parquet": Dataset.to_parquet}


class PredictionFile(L.Callback):
    """Write a row a sample, in the order of the test split, while ``predict`` runs.

    Columns: ``input``, where it was given on the command line, or ``file``, of a picture or recording that has one;
    ``sample``, its number from 1, in the training split where the test split is held out of that; ``label``, where
    there is one; ``prediction``; of classes, the probability of each by its name; of questions about a text, the
    ``question``, and the ``margin`` of the best answer over none; and where there are layers with experts,
    ``experts_percent`` and ``flops`` (of the whole model for this sample; a multiply-add is 2), of a text's windows
    the mean and the sum.

    Args:
        file: Its ending, ``.csv`` or ``.parquet``, decides the format.
        inputs: What the samples are called, where they are given on the command line.

    Raises:
        ConfigError: For another ending; to predict, for a task of anything but classes, numbers and answers, in
            several processes, or where no file can be written.
    """

    def __init__(self, file: str = "predictions.csv", inputs: Sequence[str] | None = None) -> None:
        ending = Path(file).suffix
        check(ending in WRITERS, f"output={file!r}: the ending must be one of {', '.join(WRITERS)}")
        self.file = Path(file)
        self.inputs = inputs
        self.rows: list[dict[str, Any]] = []
        self._flops_outside: dict[SampleSize, int] = {}
        self._masks: list[tuple[str, Tensor]] = []  # of each run of a layer in a batch, which some have several of
        self._works: list[tuple[str, Tensor]] = []

    def on_predict_start(self, trainer: L.Trainer, phase: Phase) -> None:
        """Watch what the model's layers decide, once it is known that the file can be written."""
        self._check_writable()
        check(trainer.world_size == 1, f"devices={trainer.world_size}: predictions are written by one process alone")
        check(phase.task.writes_rows, f"predict: writes classes, numbers and answers, not what {phase.task.head} gives")
        self.rows, self._flops_outside = [], {}
        # what a text costs that is written token after token is not known by sample
        layers: dict[str, Any] = {} if phase.task.most_written else expert_layers(phase.model)
        self._layers: dict[str, ExpertLayer] = {name: layer for name, layer in layers.items() if _decides(layer)}

        def add(found: list[tuple[str, Tensor]], name: str, value: Tensor) -> None:
            found.append((name, value))

        watching = [layer.watch(partial(add, self._masks, name)) for name, layer in self._layers.items()]
        working = [layer.watch_work(partial(add, self._works, name)) for name, layer in self._layers.items()]
        self._watching = hooked([*watching, *working])
        self._watching.__enter__()

    def _check_writable(self) -> None:
        """Raise ``ConfigError`` where nothing could be written, before all is computed."""
        check(not self.file.is_dir(), f"output={str(self.file)!r}: is a folder; must be a file")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.file.parent):  # it has no name that could be left behind
                pass
        except OSError as error:
            said = f"output={str(self.file)!r}: no files can be written there ({error.strerror})"
            raise ConfigError(said) from error

    def on_predict_batch_start(self, *_: Any) -> None:
        """Forget what layers did before."""
        self._masks.clear()
        self._works.clear()

    def on_predict_batch_end(
        self, trainer: L.Trainer, phase: Phase, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the rows of a batch."""
        if dataloader_idx > 0:
            return
        rows = phase.task.rows(outputs, None if self.inputs is not None else batch["labels"])
        self.rows += rows
        if self._layers:
            names = [name for name, _ in self._masks]
            assert names == [name for name, _ in self._works]
            masks, works = ([value for _, value in found] for found in (self._masks, self._works))
            alike = [[len(mask) // len(rows)] * len(rows) for mask in masks]
            tokens = [layer_tokens(phase.model, name, batch) or same for name, same in zip(names, alike, strict=True)]
            sizes = sample_sizes(batch)
            for size in set(sizes) - self._flops_outside.keys():
                self._flops_outside[size] = flops_outside_ffns(phase.model, sample_inputs(batch, size))
            outside = [self._flops_outside[size] for size in sizes]
            cost = sample_cost([self._layers[name] for name in names], masks, works, tokens, outside)
            for row, share, flops in zip(rows, cost.experts_percent, cost.flops, strict=True):
                row.update(experts_percent=share, flops=flops)

    def on_predict_end(self, trainer: L.Trainer, phase: Phase) -> None:
        """Write the file, whole or not at all."""
        self._watching.__exit__(None, None, None)
        numbers = count(1) if self.inputs is not None else numbers_of(phase.data, "test")
        self.rows = [
            {"sample": number, **row} for number, row in zip(numbers, phase.task.joined(self.rows), strict=False)
        ]
        column, names = ("file", _files(trainer)) if self.inputs is None else ("input", self.inputs)
        if any(name is not None for name in names):
            named = zip(names[: len(self.rows)], self.rows, strict=True)  # batches may have been limited
            self.rows = [{column: name, **row} for name, row in named]
        with replaced_file(self.file) as aside:
            WRITERS[self.file.suffix](Dataset.from_list(self.rows), aside)


def _files(trainer: L.Trainer) -> Sequence[str | None]:
    loaders: Any = trainer.predict_dataloaders
    return file_names((loaders[0] if isinstance(loaders, list) else loaders).dataset)


def _decides(layer: ExpertLayer) -> bool:
    """Whether a layer chooses among its experts; one without a gate runs all."""
    return not isinstance(layer, MoELayer) or layer.gate is not None
