"""Recordings with labels, from any Hugging Face dataset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Audio, Dataset
from torch import Tensor
from transformers import AutoFeatureExtractor

from d2dmoe_pl.data.class_labels import encode_labels
from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.local_folders import check_reads_recordings, with_found_files
from d2dmoe_pl.data.sample_names import SAMPLE, sample_names
from d2dmoe_pl.data.task import Classification, Task
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.errors import ConfigError, check, one_line
from d2dmoe_pl.notices import notice

FEATURES = ("input_features", "input_values")  # what feature extractors call what they make of recordings


class AudioClassification(TaskData):
    """Recordings with a label each, as the feature extractor of a model prepares them: cut or filled to one length.

    It goes with ``HuggingFaceModel`` of the task ``audio-classification``.

    Batches: what the feature extractor makes, ``input_features`` ``(B, mel bins, frames)`` of Whisper's,
    ``input_values`` of others: ``(B, frames, mel bins)`` of AST's, waves ``(B, samples)`` of Wav2Vec2's and its
    relatives'; of those that tell a model what is filled up, ``recorded`` ``(B, samples)``; and ``labels`` ``(B,)``.

    Args:
        source: Where the splits are.
        processor: Hub name or folder of the feature extractor, which is most often the model's.
        audio_column: Column of the recordings: ``datasets.Audio`` or paths of files, read with the package
            ``torchcodec``; or their numbers from -1 to 1, at the feature extractor's rate.
        label_column: Column of the labels, strings or whole numbers.
        seconds: The length of waves, to which recordings are cut or filled up with silence; spectrograms have one of
            their own.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: For ``seconds`` that are not positive; to load, for a ``processor`` that is not there or is not of
            recordings, and for a recording that cannot be read.
    """

    raw_inputs = "recordings"

    def __init__(
        self,
        source: DatasetSource,
        processor: str,
        audio_column: str = "audio",
        label_column: str = "label",
        seconds: float = 10.0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check(seconds > 0, f"seconds={seconds}: must be positive")
        self.seconds = seconds
        self.source = source
        self.processor_name = processor
        self.audio_column = audio_column
        self.label_column = label_column
        self._extractor: Any = None
        self._said = False

    def load_processor(self) -> None:
        if self._extractor is None:
            extractor: Any = load_pretrained(AutoFeatureExtractor, self.processor_name, "processor")
            names = extractor.model_input_names
            check(
                not set(FEATURES).isdisjoint(names) and hasattr(extractor, "sampling_rate"),
                f"processor={self.processor_name!r}: makes {', '.join(names)}; must make {' or '.join(FEATURES)} of "
                "recordings",
            )
            self._extractor = extractor

    def load(self) -> tuple[Mapping[str, Any], Task]:
        same = f"audio_column={self.audio_column!r}: is the label_column; must be another"
        check(self.audio_column != self.label_column, same)
        splits = self.source.load()
        check_columns(splits, {"audio_column": self.audio_column, "label_column": self.label_column})
        named = {name: self._named(split, name) for name, split in splits.items()}
        encoded, names = encode_labels(named, self.label_column)
        return encoded, Classification(names)

    def _named(self, split: Dataset, name: str) -> Dataset:
        """The split with recordings at the rate that is wanted, and what each sample is called."""
        split = split.select_columns([self.audio_column, self.label_column])
        feature = split.features[self.audio_column]
        are_paths = getattr(feature, "dtype", None) in ("string", "large_string")
        kind = str(getattr(getattr(feature, "feature", None), "dtype", ""))
        check(
            isinstance(feature, Audio) or are_paths or kind.startswith("float"),
            f"audio_column={self.audio_column!r}: has {feature} in the {name} split; must be recordings, their paths, "
            "or lists of their numbers, from -1 to 1",
        )
        names = sample_names(split, name)
        if are_paths:
            split = with_found_files(split, self.audio_column, self.source.folder_of(name), "recordings")
        return self._encoded(split, not kind).add_column(SAMPLE, list(names))

    def _encoded(self, split: Dataset, are_files: bool) -> Dataset:
        """The split with files as they are, which are read one by one, where a broken one can be told by its name."""
        if not are_files:
            return split
        check_reads_recordings(f"audio_column={self.audio_column!r}")
        return split.cast_column(self.audio_column, Audio(decode=False))

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        """Recordings by their paths."""
        names = list(map(str, inputs))
        paths = Dataset.from_dict({self.audio_column: names, SAMPLE: names})
        return self._encoded(paths, are_files=True).add_column("labels", [0] * len(names))

    def collate(self, samples: Sequence[dict[str, Any]], augment: bool) -> dict[str, Tensor]:
        recordings = [self._numbers(sample) for sample in samples]
        self._say_once_if_cut(max(map(len, recordings)) / self._extractor.sampling_rate)
        return {**self._prepared(recordings), "labels": torch.tensor([sample["labels"] for sample in samples])}

    def silence(self) -> dict[str, Tensor]:
        """What a model is given of a recording, once the feature extractor is loaded: of one without sound."""
        samples = getattr(self._extractor, "n_samples", self._extractor.sampling_rate // 20)
        return self._prepared([np.zeros(round(samples), dtype=np.float32)])

    def _prepared(self, recordings: Sequence[np.ndarray]) -> dict[str, Tensor]:
        rate = self._extractor.sampling_rate
        length: dict[str, Any] = {}
        if self._makes_waves():
            length = {"padding": "max_length", "truncation": True, "max_length": max(1, round(self.seconds * rate))}
        made = self._extractor(recordings, sampling_rate=rate, return_tensors="pt", **length)
        batch = {name: made[name] for name in FEATURES if name in made}
        if length and "attention_mask" in made:
            batch["recorded"] = made["attention_mask"]
        return batch

    def _makes_waves(self) -> bool:
        return "input_values" in self._extractor.model_input_names and not hasattr(self._extractor, "max_length")

    def _say_once_if_cut(self, longest: float) -> None:
        if self._makes_waves() and longest > self.seconds and not self._said:
            self._said = True
            notice(f"seconds={self.seconds:g}: a recording has {longest:.1f}; what lies behind is left out.")

    def _numbers(self, sample: dict[str, Any]) -> np.ndarray:
        recording = sample[self.audio_column]
        where = f"audio_column={self.audio_column!r}: {sample[SAMPLE]}"
        check(recording is not None, f"{where} has no recording")
        if isinstance(recording, dict):
            try:
                recording = Audio(sampling_rate=self._extractor.sampling_rate).decode_example(recording)["array"]
            except (OSError, RuntimeError, ValueError) as error:
                raise ConfigError(f"{where} cannot be read ({one_line(str(error))})") from error
        numbers = np.asarray(recording, dtype=np.float32)
        check(numbers.ndim == 1 and len(numbers) > 0, f"{where} has the shape {numbers.shape}; must be of one channel")
        if not np.isfinite(numbers).all():
            raise ConfigError(f"{where} has numbers that are not finite")
        return numbers

    def save_processor(self, folder: Path) -> None:
        self._extractor.save_pretrained(folder)
