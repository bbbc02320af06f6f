"""What scoring a batch costs against an ordinary training step, measured in one process, alternating, medians.

    python tests/benchmarks/importance_scoring.py

``ImportanceScoring`` of 32 samples of 128 tokens through BERT-base; the published code makes 768 gradient calls.
A round takes about 50 s on one core; ``--rounds 3`` is enough to see the ratio.
"""

import argparse

import torch
import transformers
from training_steps import attach, compare, report

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moebert.importance import Importance
from d2dmoe_pl.phases import FineTuning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=options.layers)
    model = HuggingFaceModel("text-classification", config=config).build(["a", "b"])
    batch = {
        "input_ids": torch.randint(5, 30000, (options.batch, options.length)),
        "attention_mask": torch.ones(options.batch, options.length, dtype=torch.long),
        "labels": torch.randint(0, 2, (options.batch,)),
    }
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {options.layers} layers, {options.batch} x {options.length}")

    plain = attach(FineTuning(init_from="-"), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    importance = Importance(select_ffns(model), torch.device("cpu"))

    def train() -> None:
        optimizer.zero_grad()
        model.train()
        plain.training_step(batch, 0).backward()
        optimizer.step()

    def score() -> None:
        model.eval()
        importance.add(
            lambda: plain.task_loss(plain.logits(batch), batch) * options.batch,
            lambda name: batch["attention_mask"],
            torch.ones(options.batch, dtype=torch.bool),
        )

    contenders = {"training step": train, "scoring a batch": score}
    report("ImportanceScoring", compare(contenders, options.rounds), 2.0)


if __name__ == "__main__":
    main()
