"""What else makes a gated language model cheaper without training it, from their papers: perplexity at equal FLOPs.

    python tests/language_model_twins.py MODEL TRAIN_TEXT TEST_TEXT [--artifact CONVERTED] [--tokens 3072]

``MODEL`` is a dense causal model's folder. All are calibrated on the first blocks of ``TRAIN_TEXT`` and scored on those
of ``TEST_TEXT``. ``CONVERTED`` is an artifact with budgets, run at the same shares of the FFNs' FLOPs.

Thresholds are shares of a token's values here, not fixed numbers, so that each method runs exactly what it is to cost.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl import load_model, set_budget_
from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.moe.find_layers import select_ffns

SHARES = (0.75, 0.5, 0.25)
LENGTH = 256
Method = Callable[[FFN, Tensor], Tensor]  # an FFN and its inputs (N, d) on calibration tokens, to a choice of its own
Forward = Callable[[Tensor], Tensor]


def largest(values: Tensor, share: float) -> Tensor:
    """A mask of the ``share`` of each row's ``values``, ``(..., n)``, that are largest; one a row at least."""
    count = max(1, round(share * values.shape[-1]))
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(count, dim=-1).indices, True)


def gated(ffn: FFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the gate gives and what it is multiplied with, ``(..., d_ff)`` each."""
    return ffn.activation(ffn.gate_proj(x)), ffn.up(x)


def cats(share: float, ffn: FFN, inputs: Tensor) -> Forward:
    """CATS (arXiv 2404.08763): the gate in full, a third of the FLOPs; of the rest what its largest values let in."""
    kept = (3 * share - 1) / 2

    def forward(x: Tensor) -> Tensor:
        gate, up = gated(ffn, x)
        return ffn.down(gate * largest(gate.abs(), kept) * up)

    return forward


def sparse_inputs(into: float, out_of: float, by_weight: bool, ffn: FFN, inputs: Tensor) -> Forward:
    """TEAL (arXiv 2408.14690), and WINA (2505.19427), which weighs each value by the norm of the weights it meets.

    Gate and up-projection read the share ``into`` of a token's values, the down-projection the share ``out_of``.
    """

    def kept(linear: nn.Linear, x: Tensor, share: float) -> Tensor:
        norms = linear.weight.norm(dim=0) if by_weight else 1.0  # (in,)
        return x * largest(x.abs() * norms, share)

    def forward(x: Tensor) -> Tensor:
        gate = ffn.activation(ffn.gate_proj(kept(ffn.gate_proj, x, into)))
        return ffn.down(kept(ffn.down, gate * ffn.up(kept(ffn.up, x, into)), out_of))

    return forward


def input_shares(share: float) -> Iterator[tuple[float, float]]:
    """Pairs ``(into, out_of)`` that cost ``share``: two of three products read the first."""
    for ratio in (0.8, 0.9, 1.0, 1.1, 1.2, 1.3):
        into = min(1.0, ratio * share)
        out_of = 3 * share - 2 * into
        if 0 < out_of <= 1:
            yield into, out_of


def cmoe(share: float, ffn: FFN, inputs: Tensor, num_experts: int = 16, firing: float = 0.1) -> Forward:
    """CMoE (arXiv 2502.04416): neurons that fire most are shared, the rest clustered; representatives are the router.

    Half of what runs is shared experts. The routed are clustered by which tokens neurons are among the strongest for,
    around the most active ones, and an expert's score is what the neuron nearest to its centre gives.
    """
    gate, up = gated(ffn, inputs)
    fires = largest((gate * up).abs(), firing).float().t()  # (d_ff, N)
    size = ffn.d_ff // num_experts
    running = max(2, round(share * num_experts))
    shared = running // 2
    order = fires.sum(dim=1).argsort(descending=True)
    rest = order[shared * size :]
    routed = num_experts - shared
    centres = fires[rest[:routed]]  # of the most active ones
    for _ in range(3):
        cost = torch.cdist(fires[rest], centres)  # (neurons, routed)
        member = balanced(cost, size)
        centres = torch.stack([fires[rest[member == expert]].mean(dim=0) for expert in range(routed)])
    nearest = torch.cdist(fires[rest], centres)
    heads = torch.stack(
        [rest[nearest[:, expert].masked_fill(member != expert, torch.inf).argmin()] for expert in range(routed)]
    )
    router_share = 2 * routed / (3 * ffn.d_ff)  # what representatives cost, in full FLOPs
    expert_of = torch.full((ffn.d_ff,), -1)
    expert_of[rest] = member
    count = max(1, round((share - router_share) * num_experts) - shared)

    def forward(x: Tensor) -> Tensor:
        gate, up = gated(ffn, x)
        hidden = gate * up
        chosen = largest(hidden[..., heads].abs(), count / routed)  # (..., routed)
        runs = torch.cat([chosen, torch.ones_like(chosen[..., :1])], dim=-1)[..., expert_of]  # -1 is the shared ones
        return ffn.down(hidden * runs)

    return forward


def balanced(cost: Tensor, size: int) -> Tensor:
    """A cluster for each row of ``cost``, ``(rows, clusters)``, ``size`` rows each: the surest rows choose first."""
    member = torch.full((len(cost),), -1)
    room = [size] * cost.shape[1]
    preferences = cost.argsort(dim=1).tolist()
    for row in cost.amin(dim=1).argsort().tolist():
        member[row] = next(cluster for cluster in preferences[row] if room[cluster])
        room[int(member[row])] -= 1
    return member


@contextmanager
def replaced(model: nn.Module, ffns: Sequence[FFN], forwards: Sequence[Forward]) -> Iterator[None]:
    """Run the FFNs of ``model`` another way."""
    modules = [model.get_submodule(ffn.name) for ffn in ffns]
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def perplexity(model: nn.Module, blocks: Tensor) -> float:
    """Of blocks of tokens ``(B, L)``, each from its second token on."""
    losses = [F.cross_entropy(model(block.unsqueeze(0)).logits[0, :-1].float(), block[1:]).double() for block in blocks]
    return torch.stack(losses).mean().exp().item()


def inputs_of(model: nn.Module, ffns: Sequence[FFN], blocks: Tensor) -> list[Tensor]:
    """What each FFN is given, ``(N, d)``."""
    seen: list[list[Tensor]] = [[] for _ in ffns]
    handles = [
        model.get_submodule(ffn.name).register_forward_pre_hook(lambda _, args, into=into: into.append(args[0][0]))
        for ffn, into in zip(ffns, seen, strict=True)
    ]
    for block in blocks:
        model(block.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return [torch.cat(each) for each in seen]


def twins(model: nn.Module, calibration: Tensor, test: Tensor, share: float) -> Mapping[str, float]:
    """The perplexity of each method at a share of the FFNs' FLOPs; where it has a choice, by calibration tokens."""
    ffns = select_ffns(model)
    inputs = inputs_of(model, ffns, calibration[:8])

    def score(method: Method, blocks: Tensor) -> float:
        with replaced(model, ffns, [method(ffn, x) for ffn, x in zip(ffns, inputs, strict=True)]):
            return perplexity(model, blocks)

    found = {}
    if share > 1 / 3:
        found["CATS"] = score(partial(cats, share), test)
    for name, by_weight in (("TEAL", False), ("WINA", True)):
        ways = [partial(sparse_inputs, *shares, by_weight) for shares in input_shares(share)]
        found[name] = score(min(ways, key=lambda way: score(way, calibration[8:16])), test)
    found["CMoE"] = score(partial(cmoe, share), test)
    return found


def blocks_of(path: Path, tokenizer: Callable, count: int) -> Tensor:
    """The first ``count`` blocks of a text file, ``(count, LENGTH)``."""
    ids = tokenizer(path.read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: count * LENGTH].view(count, LENGTH)


@torch.no_grad()
def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 (slow)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=3072)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    calibration = blocks_of(given.train, tokenizer, 16)
    test = blocks_of(given.test, tokenizer, given.tokens // LENGTH)
    print(f"dense {perplexity(model, test):.2f}")
    converted = None if given.artifact is None else load_model(given.artifact, dtype="float32")
    for share in SHARES:
        found = dict(twins(model, calibration, test, share))
        if converted is not None:
            set_budget_(converted, ffn_flops=share)
            found["d2dmoe_pl"] = perplexity(converted, test)
        print(f"{share:.0%} of FFN FLOPs: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
