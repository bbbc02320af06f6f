"""The Triton kernel on a GPU: is it right there, does it never wait for the GPU, how fast is it against the dense FFN.

    python tests/benchmarks/triton_on_gpu.py

All ways are timed at each expert width, and which of them is taken is said. Random masks, no router. Ratios are
the dense FFN's time over the MoE's, each the median of alternating runs; "graphs" replays CUDA graphs, "eager" counts
the launches too.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.moe.execution.triton import WAYS, moe_triton
from d2dmoe_pl.moe.experts.experts import Experts

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def make_experts(d_model: int, num_experts: int, expert_dim: int, gated: bool, dtype: torch.dtype) -> Experts:
    d_ff = num_experts * expert_dim
    gate = nn.Linear(d_model, d_ff) if gated else None
    ffn = FFN("ffn", nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model), gate)
    return Experts(ffn, num_experts, None, "triton").to("cuda", dtype)


def run(experts: Experts, tokens: Tensor, mask: Tensor, way: str) -> Tensor:
    return moe_triton(tokens, mask, *experts.weights, experts.activation_kind, way)


def check_outputs() -> bool:
    """Print the kernel's largest error, relative to the largest output of the plain twin in float64."""
    passed = True
    for dtype, allowed in TOLERANCE.items():
        for way in WAYS:
            worst = 0.0
            for num_tokens in (1, 197, 1500):
                for d_model, num_experts, expert_dim in ((768, 128, 24), (768, 24, 128), (33, 5, 7), (130, 3, 200)):
                    for gated in (False, True):
                        experts = make_experts(d_model, num_experts, expert_dim, gated, dtype)
                        tokens = torch.randn(num_tokens, d_model, device="cuda", dtype=dtype)
                        mask = torch.rand(num_tokens, num_experts, device="cuda") < 0.3
                        got = run(experts, tokens, mask, way)
                        twin = copy.deepcopy(experts).double()
                        twin.set_backend("reference")
                        expected = twin(tokens.double(), mask)
                        worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
            passed &= worst <= allowed
            print(f"  {dtype}, {way:11s}: largest error {worst:.1e}, allowed {allowed:.0e}")
    return passed


def check_no_waiting(experts: Experts, tokens: Tensor, mask: Tensor) -> None:
    """Raise where the kernel waits for the GPU."""
    experts(tokens, mask)
    torch.cuda.set_sync_debug_mode("error")
    experts(tokens, mask)
    torch.cuda.set_sync_debug_mode("default")


def graphed(function: Callable[[], Tensor]) -> Callable[[], None]:
    for _ in range(3):
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def compare(contenders: dict[str, Callable], rounds: int, repeats: int = 10) -> dict[str, tuple[float, float]]:
    """Median and half the interquartile range of each contender's milliseconds, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, contender in contenders.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                contender()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 2:  # the first rounds warm up
                times[name].append(start.elapsed_time(end) / repeats)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}


def dense_ffn(experts: Experts, tokens: Tensor) -> Callable[[], Tensor]:
    """The FFN that the experts were made from, with its neurons in their order."""
    up, up_bias, gate, gate_bias = (None if part is None else part.flatten(0, 1) for part in experts.weights[:4])
    down, down_bias = experts.down_weight.flatten(0, 1).t().contiguous(), experts.down_bias

    def ffn() -> Tensor:
        hidden = F.linear(tokens, up, up_bias)
        hidden = F.gelu(hidden) if gate is None else F.gelu(F.linear(tokens, gate, gate_bias)) * hidden
        return F.linear(hidden, down, down_bias)

    return ffn


def benchmark(options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype)
    tokens = torch.randn(options.tokens, options.d_model, device="cuda", dtype=dtype)
    kind = "gated GELU" if options.gated else "GELU"
    print(f"{options.dtype}, {options.tokens} tokens, d={options.d_model}, h={options.d_ff}, {kind}; milliseconds")
    for num_experts in options.num_experts:
        expert_dim = options.d_ff // num_experts
        experts = make_experts(options.d_model, num_experts, expert_dim, options.gated, dtype)
        for share in options.shares:
            mask = torch.rand(options.tokens, num_experts, device="cuda") < share
            check_no_waiting(experts, tokens, mask)
            ways = {way: partial(run, experts, tokens, mask, way) for way in WAYS}
            for mode, wrap in (("graphs", graphed), ("eager", lambda function: function)):
                functions = {"FFN": dense_ffn(experts, tokens)} | ways
                results = compare({name: wrap(function) for name, function in functions.items()}, options.rounds)
                print(f"  E={num_experts:3d}, {share:4.0%} executed, {mode:6s}", end="")
                for name, (median, spread) in results.items():
                    ratio = "" if name == "FFN" else f" ({results['FFN'][0] / median:.2f}x)"
                    print(f"   {name} {median:.4f} +- {spread:.4f}{ratio}", end="")
                print(f"   limit {1 / share:.1f}x")
            print(f"    auto takes {', '.join(experts.measured.values())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--d_model", type=int, default=768)
    parser.add_argument("--d_ff", type=int, default=3072)
    parser.add_argument("--num_experts", type=int, nargs="+", default=[128, 64, 32, 24, 8])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--gated", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was measured.")
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; outputs against the plain twin:", flush=True)
    with torch.no_grad():
        passed = not options.check or check_outputs()
        benchmark(options)
    if not passed:
        raise SystemExit("An output is off.")


if __name__ == "__main__":
    main()
