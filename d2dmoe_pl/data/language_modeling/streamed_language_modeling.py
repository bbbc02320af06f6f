"""Text that is too long to be downloaded or tokenised beforehand, to train a language model on."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import datasets
import torch
from torch.utils.data import DataLoader, Dataset

from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.language_modeling.language_modeling import LanguageModeling
from d2dmoe_pl.data.language_modeling.streaming import PackedStream, StreamLoader, head
from d2dmoe_pl.data.own_data_checks import SPLITS
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.errors import check


class StreamedLanguageModeling(LanguageModeling):
    """Like ``LanguageModeling``, with training documents read and packed as they are needed, once.

    The stream's shards, files mostly, are dealt to processes and loader processes; where these are more, they share a
    shard. What counts as an epoch is up to ``epoch_blocks``: then the model is validated and a checkpoint kept, and the
    stream goes on. Resuming reads again what was read, tokenises it and drops it.

    Each split to evaluate on is the first documents of its own stream; or, without one (``validation: null``), of the
    first shard of the training stream, which then begins after them.

    Args:
        source: Where the splits are.
        tokenizer: Hub name or folder of a Hugging Face tokenizer.
        epoch_blocks: Blocks that make an epoch, over all processes.
        evaluation_documents: Documents of each split to evaluate on.
        objective: ``causal`` or ``masked``.
        length: Tokens of a block, ``L``; at most what the model has positions for.
        text_column: Column of the documents; of text files, ``text``.
        mask_share: Share of a block's tokens to predict, if masked.
        batch_size: Blocks a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: As ``LanguageModeling`` does; for numbers that are not positive, or an epoch shorter than a batch;
            in training, if the stream ends before it.
    """

    loaded = SPLITS[1:]  # the training split is read as it is needed

    def __init__(
        self,
        source: DatasetSource,
        tokenizer: str,
        epoch_blocks: int,
        evaluation_documents: int = 1000,
        objective: Literal["causal", "masked"] = "causal",
        length: int = 512,
        text_column: str = "text",
        mask_share: float = 0.15,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(source, tokenizer, objective, length, text_column, mask_share, batch_size, num_workers)
        check(epoch_blocks >= batch_size, f"epoch_blocks={epoch_blocks}: must be at least batch_size={batch_size}")
        check(evaluation_documents > 0, f"evaluation_documents={evaluation_documents}: must be positive")
        self.epoch_blocks = epoch_blocks
        self.evaluation_documents = evaluation_documents
        self._skipped = 0

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        streams = self.source.stream()
        heads = {name: datasets.Dataset.from_list(list(stream.take(1))) for name, stream in streams.items()}
        check_columns(heads, {"text_column": self.text_column})  # a stream may not know its own beforehand
        self._stream = streams.pop("train")
        missing = [name for name in SPLITS[1:] if name not in streams]
        self._skipped = len(missing) * self.evaluation_documents
        first_shard = self._stream.shard(self._stream.num_shards, 0)
        taken = head(first_shard, self.text_column, self._skipped + 1)
        check(
            len(taken) > self._skipped,
            f"evaluation_documents={self.evaluation_documents}: the first shard of the training stream has only "
            f"{len(taken)} documents; must have more than {self._skipped}, for {' and '.join(missing)}",
        )
        self.check_known(taken)
        texts = {name: head(stream, self.text_column, self.evaluation_documents) for name, stream in streams.items()}
        for place, name in enumerate(missing):
            first = place * self.evaluation_documents
            texts[name] = taken[first : first + self.evaluation_documents]
        packed = {
            name: self.packed(datasets.Dataset.from_dict({self.text_column: of_split}), name)
            for name, of_split in texts.items()
        }
        return packed, self.token_prediction()

    @property
    def augmented(self) -> bool:
        return True  # each epoch goes on in the stream where the last ended

    @property
    def num_training_samples(self) -> int:
        return self.epoch_blocks

    def training_loader(self) -> StreamLoader:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, num_processes = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        )
        batches = self.epoch_blocks // (self.batch_size * num_processes)
        check(
            batches > 0,
            f"epoch_blocks={self.epoch_blocks}: must be at least {self.batch_size * num_processes}, a batch in each of "
            f"{num_processes} processes",
        )
        blocks = PackedStream(
            self._stream, self.text_column, self._skipped, self.packer, rank, num_processes, self.seed
        )
        loader = DataLoader(
            blocks,
            batch_size=self.batch_size,
            drop_last=True,
            collate_fn=partial(self.drawn_batch, augment=not self.is_ordered),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return StreamLoader(loader, batches, num_processes)
