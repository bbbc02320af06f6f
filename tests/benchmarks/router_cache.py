"""What an epoch of ``RouterRegression`` takes that runs the frozen model, and one that draws from the cache.

    python tests/benchmarks/router_cache.py

On random weights of MiniLM's shape (6 layers, d=384, h=1,536, E=64) and sentences of 22 random tokens.
"""

import argparse
import logging
import statistics
import tempfile
import time

import lightning as L
import torch
import transformers

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.data import Classification, TaskData
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.phases import RouterRegression

LABELS = ["a", "b"]
LENGTH = 22


class RandomTokens(TaskData):
    """So many sentences to train on, and one each to evaluate on."""

    def __init__(self, num_sentences: int) -> None:
        super().__init__(batch_size=32)
        self.num_sentences = num_sentences

    def load(self):
        sentences = list(torch.randint(5, 30000, (self.num_sentences, LENGTH)))
        return {"train": sentences, "validation": sentences[:1], "test": sentences[:1]}, Classification(LABELS)

    def collate(self, samples, augment):
        ids = torch.stack(samples)  # (B, L)
        labels = torch.zeros(len(ids), dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Clock(L.Callback):
    """Seconds of each epoch, and MiB of the cache in memory and on disk."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer, phase):
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer, phase):
        self.seconds.append(time.perf_counter() - self.started)
        self.memory, self.disk = (size / 2**20 for size in (phase._cache.rows.memory, phase._cache.rows.disk))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=912)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--cache_memory", type=int, default=2048)
    parser.add_argument("--precision", default="bf16-mixed")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}
    model = HuggingFaceModel("text-classification", config=transformers.BertConfig(**shape)).build(LABELS)
    swap_activation_(model, ActivationConfig("relu"))
    convert_to_moe_(model, ExpertsConfig(64))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        save_artifact(model, folder, [PhaseRecord("ExpertClustering")])
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=options.epochs,
            precision=options.precision,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[clock],
        )
        phase = RouterRegression(options.width, cache_memory=options.cache_memory, init_from=folder)
        trainer.fit(phase, datamodule=RandomTokens(options.sentences))
    first, *later = clock.seconds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.precision}")
    print(f"{options.sentences * LENGTH} tokens, {clock.memory:.0f} MiB in memory, {clock.disk:.0f} MiB on disk")
    print(
        f"first epoch {first:.2f} s, later ones {statistics.median(later):.2f} s ({min(later):.2f} to {max(later):.2f})"
    )


if __name__ == "__main__":
    main()
