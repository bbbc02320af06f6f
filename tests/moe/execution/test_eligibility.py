"""Compiled kernels: what they refuse, what ``auto`` does instead, ``torch.compile`` and ``torch.export``."""

import multiprocessing
import resource
import warnings

import pytest
import tiny
import torch
from ffns import assert_close, experts_of, make_ffn
from torch import nn

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import set_backend_
from d2dmoe_pl.moe.execution import auto, cpu, grouped, reference
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.find_layers import moe_layers

CASE = {
    "tokens": 700,
    "num_experts": 3,
    "expert_dim": 150,
    "d_model": 67,
    "d_out": None,
    "gated": True,
    "bias": True,
    "activation": "gelu",
    "density": 0.4,
}
MASK = torch.ones(2, 3, dtype=torch.bool)


@pytest.fixture
def broken_compiler(tmp_path, monkeypatch):
    """A process that has not compiled yet, and cannot."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setattr(cpu, "_has_operators", lambda: False)
    for function in (cpu._load, auto._warn):
        function.cache_clear()
    yield
    cpu._load.cache_clear()


class TestCPU:
    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("tokens", [1, 3, 70, 700])
    def test_any_number_of_threads(self, tokens, dtype):
        """More threads than tokens, experts dealt out to threads, several blocks of tokens a thread."""
        before = torch.get_num_threads()
        experts, x, mask = experts_of({**CASE, "tokens": tokens}, "reference")
        expected = experts.double()(x.double(), mask)
        experts.to(dtype).set_backend("cpu")
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                got = experts(x.to(dtype), mask)
                tolerance = 1e-5 if dtype == torch.float32 else 1e-2
                assert_close(got.double() / expected.abs().max(), expected / expected.abs().max(), tolerance)
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("change", ["write", "replace", "load"])
    @torch.no_grad()
    def test_packed_weights_follow_the_weights(self, change):
        experts, x, mask = experts_of(CASE, "cpu")
        experts, x = experts.bfloat16(), x.bfloat16()
        before = experts(x, mask)
        if change == "write":
            experts.down_weight.mul_(2)
        elif change == "replace":
            experts.down_weight = nn.Parameter(experts.down_weight * 2)
        else:
            experts.load_state_dict({**experts.state_dict(), "down_weight": experts.down_weight * 2})
        bias = experts.down_bias
        torch.testing.assert_close(experts(x, mask) - bias, 2 * (before - bias), rtol=0.05, atol=0.05)

    def test_packed_weights_are_no_part_of_the_state(self):
        experts, x, mask = experts_of(CASE, "cpu")
        experts = experts.bfloat16()
        names = set(experts.state_dict())
        with torch.no_grad():
            experts(x.bfloat16(), mask)
        assert set(experts.state_dict()) == names

    def test_its_work_space_does_not_grow_with_the_pairs(self):
        """The child's peak memory: the pairs' rows would take 256 MB, the output takes 32."""
        pairs = {**CASE, "tokens": 4096, "num_experts": 8, "expert_dim": 8, "d_model": 2048, "density": 1.0}
        assert cpu.compile_failure() is None
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()

        def child():
            torch.set_num_threads(1)
            for dtype in (torch.float32, torch.bfloat16):
                experts, x, mask = experts_of(pairs, "cpu")
                experts, x = experts.to(dtype), x.to(dtype)
                with torch.no_grad():
                    experts(x[:1], mask[:1])  # packs
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    experts(x, mask)
                queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

        process = context.Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert max(queue.get(), queue.get()) < 64

    def test_refusals(self):
        experts = Experts(make_ffn(6, 12), 3, None, "cpu")
        x = torch.randn(2, 6)
        with pytest.raises(ConfigError, match=r"^backend='cpu': has no gradients; run under torch.no_grad\(\)"):
            experts(x, MASK)
        with torch.no_grad():
            with pytest.raises(
                ConfigError, match=r"^backend='cpu': tokens are torch.float64 and weights torch.float32;"
            ):
                experts(x.double(), MASK)
            with pytest.raises(ConfigError, match=r"^backend='cpu': tokens are on meta$"):
                experts(x.to("meta"), MASK)
            experts.hidden_dropout = nn.Dropout(0.1)
            with pytest.raises(ConfigError, match=r"^backend='cpu': has no dropout, and p=0.1 is active"):
                experts(x, MASK)
            experts.eval()(x, MASK)
            odd = Experts(make_ffn(6, 12, activation=nn.Hardswish), 3, None, "cpu")
            with pytest.raises(ConfigError, match=r"^backend='cpu': the activation Hardswish is not one of relu,"):
                odd(x, MASK)

    @torch.no_grad()
    def test_hooks_inside_and_autocast(self):
        experts, x = Experts(make_ffn(6, 12), 3, None, "cpu").eval(), torch.randn(2, 6)
        message = r"^backend='cpu': autocast is to torch.float16; must be to torch.float32 or torch.bfloat16$"
        with torch.autocast("cpu", torch.float16), pytest.raises(ConfigError, match=message):
            experts(x, MASK)
        handle = experts.activation.register_forward_hook(lambda *_: None)
        with pytest.raises(ConfigError, match=r"^backend='cpu': has no hooks, and there are some on the activation"):
            experts(x, MASK)
        handle.remove()
        experts(x, MASK)

    @torch.no_grad()
    def test_another_activation(self):
        experts, x = Experts(make_ffn(6, 12), 3, None, "cpu").eval(), torch.randn(2, 6)
        experts.activation = nn.Tanh()
        torch.testing.assert_close(experts(x, MASK), reference.reference(experts, x, MASK))

    def test_frozen_experts_need_no_gradients(self):
        experts = Experts(make_ffn(6, 12), 3, None, "cpu").requires_grad_(False)
        assert not experts(torch.randn(2, 6), MASK).requires_grad

    @torch.no_grad()
    def test_a_broken_compiler(self, broken_compiler):
        with pytest.raises(
            ConfigError, match=r"^backend='cpu': the compiler says: /bin/false failed with exit code 1$"
        ):
            Experts(make_ffn(6, 12), 3, None, "cpu")(torch.randn(2, 6), MASK)


class TestAuto:
    def test_what_it_chooses(self):
        experts = Experts(make_ffn(6, 12), 3)
        x = torch.randn(2, 6)
        assert experts.backend == "auto"
        assert auto.choose(experts, x) is reference.reference
        with torch.no_grad():
            assert auto.choose(experts, x) is cpu.cpu
            assert auto.choose(experts.double(), x.double()) is grouped.grouped
            assert auto.choose(experts.float(), x.to("meta")) is reference.reference
            experts.hidden_dropout = nn.Dropout(0.1)
            assert auto.choose(experts, x) is reference.reference
            assert auto.choose(experts.eval(), x) is cpu.cpu
            odd = Experts(make_ffn(6, 12, activation=nn.Hardswish), 3)
            assert auto.choose(odd, x) is grouped.grouped

    @torch.no_grad()
    def test_the_type_under_autocast_is_that_of_the_dense_product(self):
        experts, x = Experts(make_ffn(6, 12), 3).eval(), torch.randn(2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            for backend in ("auto", "cpu", "grouped", "reference"):
                experts.set_backend(backend)
                assert experts(x, MASK).dtype == experts(x).dtype == torch.bfloat16

    @torch.no_grad()
    def test_without_a_compiler_it_says_so_once_and_goes_on(self, broken_compiler):
        experts = Experts(make_ffn(6, 12), 3)
        x = torch.randn(2, 6)
        with pytest.warns(UserWarning, match="experts run by 'grouped'.*the compiler says: /bin/false failed") as said:
            got = experts(x, MASK)
        assert "\n" not in str(said[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            experts(x, MASK)
        torch.testing.assert_close(got, experts(x))


@pytest.mark.parametrize("backend", ["auto", "cpu", "grouped", "reference"])
class TestCompile:
    @torch.no_grad()
    def test_a_layer_has_no_graph_break(self, backend):
        layer = next(iter(moe_layers(tiny.routed()).values()))
        layer.experts.set_backend(backend)
        x = torch.randn(3, 5, 16)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))

    @torch.no_grad()
    def test_a_model_has_no_graph_break_and_can_be_exported(self, backend):
        model = tiny.routed()
        set_backend_(model, backend)
        x = tiny.batch()["pixel_values"]
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(x)
        assert explained.graph_break_count == 0, explained.break_reasons
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))

    def test_gradients_of_a_compiled_layer(self, backend):
        if backend == "cpu":
            return
        layer = next(iter(moe_layers(tiny.routed()).values()))
        layer.experts.set_backend(backend)
        x = torch.randn(3, 5, 16)
        torch._dynamo.reset()
        grads = []
        for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            layer.zero_grad()
            function(x).square().sum().backward()
            grads.append(layer.experts.up_weight.grad.clone())
        torch.testing.assert_close(*grads)


def test_operators_keep_torchs_rules():
    experts, x, mask = experts_of({**CASE, "tokens": 5}, "cpu")
    assert cpu.compile_failure() is None
    weights = [None if weight is None else weight.detach() for weight in experts.weights]
    torch.library.opcheck(torch.ops.d2dmoe_pl.moe_grouped, (x, mask, *weights, "gelu"))
    torch.library.opcheck(torch.ops.d2dmoe_pl.moe_cpu, (x, mask, weights, "gelu"))
    router, tau = (
        [torch.randn(4, x.shape[1]), None, torch.randn(mask.shape[1], 4), None],
        torch.tensor(0.5, dtype=torch.float64),
    )
    real = torch.tensor([True, False, True, True, False])
    stand_in = [torch.randn(3, x.shape[1]), torch.randn(4, x.shape[1])]
    for padding, beside in ((None, None), (real, None), (real, stand_in)):
        layer = (x, padding, router, "dynk_max", tau, 0, beside, weights, "gelu")
        torch.library.opcheck(torch.ops.d2dmoe_pl.moe_layer_cpu, layer)
    linear = (x, torch.randint(-9, 9, (7, x.shape[1]), dtype=torch.int8), torch.rand(7), torch.rand(7))
    torch.library.opcheck(torch.ops.d2dmoe_pl.int8_linear_cpu, linear)
    weights = [torch.randint(-9, 9, (width, x.shape[1]), dtype=torch.int8) for width in (7, 90)]
    linears = (x, weights, [torch.rand(7), torch.rand(90)], [torch.rand(7), None])
    torch.library.opcheck(torch.ops.d2dmoe_pl.int8_linears_cpu, linears)


def test_the_operator_checks_its_arguments():
    assert cpu.compile_failure() is None
    x, weight = torch.randn(2, 6), torch.randn(3, 4, 6)

    def run(x, mask, *rest):
        *weights, activation = rest
        return torch.ops.d2dmoe_pl.moe_cpu(x, mask, weights, activation)

    with pytest.raises(ValueError, match=r"down_weight has shape \[3, 5, 6\], not \[3, 4, 6\]"):
        run(x, MASK, weight, None, None, None, torch.randn(3, 5, 6), None, "relu")
    with pytest.raises(ValueError, match="mask is Float, not bool"):
        run(x, MASK.float(), weight, None, None, None, weight, None, "relu")
    with pytest.raises(ValueError, match="activation='swish': allowed are relu, gelu, gelu_tanh, silu, tanh"):
        run(x, MASK, weight, None, None, None, weight, None, "swish")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_made_in_inference_mode_are_packed_once_and_changes_are_seen(dtype):
    with torch.inference_mode():
        experts = Experts(make_ffn(32, 64), 4).to(dtype).eval()
        for name, parameter in list(experts.named_parameters(recurse=False)):
            setattr(experts, name, nn.Parameter(parameter.clone(), requires_grad=False))
        assert experts.up_weight.is_inference()
        tokens, mask = torch.randn(9, 32, dtype=dtype), torch.rand(9, 4) > 0.5
        for _ in range(2):
            torch.testing.assert_close(
                cpu.cpu(experts, tokens, mask), reference.reference(experts, tokens, mask), rtol=0.05, atol=0.05
            )
            assert not experts.up_weight.is_inference()
            experts.up_weight.mul_(2)
