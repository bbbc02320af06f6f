"""The Triton kernel against its plain twin: in Triton's interpreter, or on the GPU where there is one."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ffns import in_a_gap
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.experts.experts import Experts

pytest.importorskip("triton")

from d2dmoe_pl.moe.execution import triton as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
NARROW, WIDE = 5, 140  # neurons: less than a block, and more than one kernel holds


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(params=kernel.WAYS)
def _way(request, monkeypatch):
    """Every way in its turn, whichever would be the fastest."""
    monkeypatch.setattr(kernel, "fastest", lambda *_: "")
    monkeypatch.setattr(kernel, "way_by_rule", lambda *_: request.param)


def make_experts(d_model, num_experts, expert_dim, gated=False, bias=True, activation="relu", d_out=None, **kwargs):
    d_ff = num_experts * expert_dim
    ffn = FFN(
        name="ffn",
        up=nn.Linear(d_model, d_ff, bias=bias),
        activation=ACTIVATIONS[activation](),
        down=nn.Linear(d_ff, d_out or d_model, bias=bias),
        gate_proj=nn.Linear(d_model, d_ff, bias=bias) if gated else None,
        **kwargs,
    )
    return Experts(ffn, num_experts, None, "triton").to(DEVICE)


def twin(experts, tokens, mask, *cutoffs):
    """The plain twin, in float64."""
    experts.set_backend("reference")
    output = experts.double()(tokens.double(), mask, *cutoffs)
    experts.set_backend("triton")
    return output


def assert_equals_twin(experts, tokens, mask, relative=1e-5, cutoffs=()):
    """The largest error, relative to the largest output."""
    got = experts(tokens, mask, *cutoffs)
    expected = twin(experts, tokens, mask, *cutoffs)
    assert got.shape == expected.shape
    assert got.dtype == tokens.dtype
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=relative * max(scale, 1e-30))


@st.composite
def cases(draw):
    return {
        "tokens": draw(st.integers(0, 40)),
        "num_experts": draw(st.integers(1, 20)),
        "expert_dim": draw(st.integers(1, 40)),
        "d_model": draw(st.integers(1, 80)),
        "d_out": draw(st.none() | st.integers(1, 80)),
        "gated": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "density": draw(st.sampled_from([0.0, 0.2, 1.0])),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.thorough
@pytest.mark.usefixtures("_way")
@given(cases())
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_plain_twin_at_any_shape(case):
    torch.manual_seed(case.pop("seed"))
    tokens, density = case.pop("tokens"), case.pop("density")
    experts = make_experts(**case)
    mask = torch.rand(tokens, case["num_experts"], device=DEVICE) < density
    assert_equals_twin(experts, torch.randn(tokens, case["d_model"], device=DEVICE), mask)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("expert_dim", [NARROW, WIDE])
@pytest.mark.parametrize("gated", [False, True])
def test_leaves_small_activations_out(expert_dim, gated):
    experts = make_experts(40, 3, expert_dim, gated, activation="gelu")
    tokens, exact = torch.randn(50, 40, device=DEVICE), copy.deepcopy(experts).double()
    of_gates = torch.tensor(in_a_gap(exact.gates(tokens.double())), device=DEVICE) if gated else None
    cutoffs = torch.tensor(in_a_gap(exact.hidden(tokens.double(), of_gates)), device=DEVICE), of_gates
    assert_equals_twin(experts, tokens, torch.rand(50, 3, device=DEVICE) < 0.4, cutoffs=cutoffs)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("expert_dim", [NARROW, WIDE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
def test_narrow_types(expert_dim, dtype, gated):
    experts = make_experts(40, 3, expert_dim, gated, activation="gelu").to(dtype)
    tokens = torch.randn(50, 40, dtype=dtype, device=DEVICE)
    assert_equals_twin(
        experts, tokens, torch.rand(50, 3, device=DEVICE) < 0.4, relative=2e-2
    )  # the interpreter cuts off bits that a GPU rounds


@pytest.mark.thorough
@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("expert_dim", [NARROW, WIDE])
def test_more_tokens_than_one_chunk_and_block(monkeypatch, expert_dim):
    monkeypatch.setattr(kernel, "PAIRS_SPACE", 1)  # a chunk at a time
    tokens = 2 * kernel.CHUNK + 3
    experts = make_experts(20, 3, expert_dim)
    mask = torch.rand(tokens, 3, device=DEVICE) < 0.3
    mask[:, 2] = True  # several blocks of one list
    assert_equals_twin(experts, torch.randn(tokens, 20, device=DEVICE), mask)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("expert_dim", [NARROW, WIDE])
class TestEveryWay:
    @pytest.mark.parametrize("chosen", [[1], [0, 2], [0, 1, 2]])
    def test_all_tokens_on_the_same_experts(self, expert_dim, chosen):
        mask = torch.zeros(9, 3, dtype=torch.bool, device=DEVICE)
        mask[:, chosen] = True
        assert_equals_twin(make_experts(12, 3, expert_dim), torch.randn(9, 12, device=DEVICE), mask)

    def test_no_expert_leaves_the_output_bias(self, expert_dim):
        experts = make_experts(12, 3, expert_dim)
        got = experts(torch.randn(4, 12, device=DEVICE), torch.zeros(4, 3, dtype=torch.bool, device=DEVICE))
        torch.testing.assert_close(got, experts.down_bias.expand(4, -1))

    def test_non_contiguous_input(self, expert_dim):
        tokens = torch.randn(12, 2, 9, device=DEVICE)[:, 0].t()
        mask = (torch.rand(3, 9, device=DEVICE) < 0.5).t()
        assert not tokens.is_contiguous()
        assert not mask.is_contiguous()
        assert_equals_twin(make_experts(12, 3, expert_dim), tokens, mask)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_nan_stays_in_its_row(self, expert_dim, activation):
        tokens = torch.randn(4, 12, device=DEVICE)
        tokens[1, 5] = torch.nan
        mask = torch.ones(4, 3, dtype=torch.bool, device=DEVICE)
        got = make_experts(12, 3, expert_dim, activation=activation)(tokens, mask)
        assert got.isnan().any(dim=1).tolist() == [False, True, False, False]

    @pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # from the interpreter; its result is right
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_large_activations(self, expert_dim, activation):
        tokens = 1e4 * torch.randn(4, 12, device=DEVICE)
        mask = torch.ones(4, 3, dtype=torch.bool, device=DEVICE)
        assert_equals_twin(make_experts(12, 3, expert_dim, activation=activation), tokens, mask)

    def test_autocast(self, expert_dim):
        experts = make_experts(12, 3, expert_dim, gated=True)
        tokens, mask = torch.randn(4, 12, device=DEVICE), torch.rand(4, 3, device=DEVICE) < 0.5
        with torch.autocast(DEVICE, torch.bfloat16):
            got = experts(tokens, mask)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), twin(experts, tokens, mask), rtol=0.05, atol=0.05)


class TestOperator:
    @pytest.fixture
    def arguments(self):
        experts = make_experts(12, 3, WIDE, gated=True, activation="silu")
        return experts, torch.randn(6, 12, device=DEVICE), torch.rand(6, 3, device=DEVICE) < 0.5

    def test_compiles_without_a_graph_break(self, arguments):
        experts, tokens, mask = arguments
        torch._dynamo.reset()
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens, mask), experts(tokens, mask))

    def test_exports_as_one_operator(self, arguments):
        experts, tokens, mask = arguments
        rows = {0: torch.export.Dim("rows")}
        program = torch.export.export(experts, (tokens, mask), dynamic_shapes={"tokens": rows, "mask": rows})
        calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert calls.count(torch.ops.d2dmoe_pl.moe_triton.default) == 1
        torch.testing.assert_close(program.module()(tokens[:5], mask[:5]), experts(tokens[:5], mask[:5]))

    @pytest.mark.parametrize("way", ["", *kernel.WAYS])
    @pytest.mark.parametrize("expert_dim", [NARROW, WIDE])
    def test_fake_kernel_agrees(self, expert_dim, way):
        experts = make_experts(12, 3, expert_dim, bias=False)
        weights = (experts.up_weight.detach(), None, None, None, experts.down_weight.detach()[..., :7], None)
        tokens, mask = torch.randn(12, 6, device=DEVICE).t(), torch.rand(6, 3, device=DEVICE) < 0.5
        torch.library.opcheck(kernel.moe_triton, (tokens, mask, *weights, "relu", way))


class TestRefusals:
    def run(self, message, tokens=None, **kwargs):
        experts = make_experts(4, 2, 3, **kwargs)
        with pytest.raises(ConfigError, match=f"^backend='triton': {message}$"):
            experts(
                torch.randn(5, 4, device=DEVICE) if tokens is None else tokens,
                torch.ones(5, 2, dtype=torch.bool, device=DEVICE),
            )

    def test_gradients(self):
        with torch.enable_grad():
            self.run(r"has no gradients; run under torch.no_grad\(\), or train with 'auto', 'reference' or 'grouped'")

    def test_frozen_experts_need_no_context(self):
        experts = make_experts(4, 2, 3).requires_grad_(False)
        with torch.enable_grad():
            experts(torch.randn(5, 4, device=DEVICE), torch.ones(5, 2, dtype=torch.bool, device=DEVICE))

    def test_active_dropout(self):
        message = r"has no dropout, and p=0.1 is active; call model.eval\(\) first"
        self.run(message, hidden_dropout=nn.Dropout(0.1))

    def test_unknown_activation(self, monkeypatch):
        monkeypatch.setitem(ACTIVATIONS, "selu", nn.SELU)
        self.run("the activation SELU is not one of relu, gelu, gelu_tanh, silu, tanh", activation="selu")

    def test_types(self):
        message = "tokens are torch.float64 and weights torch.float32; both must be torch.float32 or "
        tokens = torch.randn(5, 4, dtype=torch.float64, device=DEVICE)
        self.run(message + "torch.bfloat16 or torch.float16", tokens)

    def test_no_gpu(self, monkeypatch):
        monkeypatch.setattr(kernel, "INTERPRETED", SimpleNamespace(value=False))
        experts = make_experts(4, 2, 3).cpu()
        with pytest.raises(ConfigError, match=r"^backend='triton': needs tokens on a CUDA device, they are on cpu$"):
            experts(torch.randn(5, 4), torch.ones(5, 2, dtype=torch.bool))

    def test_no_triton(self, monkeypatch):
        monkeypatch.delitem(sys.modules, kernel.__name__)
        monkeypatch.setitem(sys.modules, "triton", None)
        with pytest.raises(ConfigError, match=r"^backend='triton': the package triton is not installed; it comes with"):
            make_experts(4, 2, 3)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from d2dmoe_pl.moe.execution import _triton_kernels as kernel

def shared_memory(function, constants, stages=3, **types):
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(function, signature, {(function.arg_names.index(name),): v for name, v in constants.items()})
    options = {"num_stages": stages, "num_warps": 8}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared

lists = dict(rows="*i16", counts="*i32", num_experts="i32")
weights = {name: "*bf16" for name in ("up_weight", "up_bias", "gate_weight", "gate_bias", "down_weight", "hidden")}
weights["cutoff"] = weights["gate_cutoff"] = "*fp32"
blocks = dict(D=768, CHUNK=512, BLOCK_M=128, BLOCK_K=64); of_mask = dict(mask="*u8", slots="*i16", num_experts="i32")
print(shared_memory(kernel.list_tokens, dict(CHUNK=512, BLOCK_E=4), num_tokens="i32", **(lists | of_mask)))
up = dict(S=24, BLOCK_N=32, **blocks)
print(shared_memory(kernel.up_listed, up | dict(ACTIVATION="gelu"), tokens="*bf16", **lists, **weights))
whole = dict(mask="*u8", num_experts="i32", up="*bf16", gate="*bf16", cutoff="*fp32", gate_cutoff="*fp32")
print(shared_memory(kernel.activate_all, dict(S=24, WIDTH=3072, ACTIVATION="gelu", BLOCK=1024), **whole))
both = dict(S=128, D_OUT=768, ACTIVATION="gelu", BLOCK_S=128, BLOCK_N=64, **blocks)
given = dict(tokens="*bf16", pairs="*bf16", first_chunk="i32", **lists, **weights)
print(shared_memory(kernel.both_listed, both, 4, **given))
down = dict(pairs="*bf16", first_chunk="i32", **lists)
print(shared_memory(kernel.down_listed, dict(S=128, BLOCK_N=128, **blocks), **down, **weights))
sums = dict(pairs="*bf16", down_bias="*bf16", output="*bf16", first_token="i32", **of_mask)
sizes = (dict(BLOCK_E=1, BLOCK_D=1024), dict(BLOCK_E=64, BLOCK_D=64))
print(max(shared_memory(kernel.sum_pairs, dict(D=768, CHUNK=512, **size), **sums) for size in sizes))
"""


def test_compiles_for_a_gpu(tmp_path):
    """The interpreter takes what the compiler would not; the compiler needs no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lists, up, whole, both, down, sums = map(int, done.stdout.split())
    assert max(lists, up, whole, down, sums) <= 101_376  # bytes a block may have on Ada and later
    assert both <= kernel.LARGEST_BLOCKS
