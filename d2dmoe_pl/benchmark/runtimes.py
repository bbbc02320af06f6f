"""What users would run the dense model on instead: ONNX Runtime, OpenVINO, PyTorch's own int8 and its compiler.

Each takes the dense model in float32 and says how to get logits of a batch from it. Their packages are optional:
``pip install -e ".[benchmark]"``.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.benchmark.scoring import Predict, placed
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import ConfigError

CALIBRATION = 300  # samples at most
EXTRA = 'pip install -e ".[benchmark]"'


class _Logits(nn.Module):
    """A model called by position, for exporters: tensors in, logits out."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *values: Tensor) -> Tensor:
        return adapter_for(self.model).traced_logits(self.model, dict(zip(self.names, values, strict=True)))


def export_onnx(model: nn.Module, batch: Mapping[str, Tensor], file: Path) -> list[str]:
    """Write ``model`` to ``file`` in ONNX, for any number of samples and tokens.

    Args:
        model: A dense model; of one with experts, every expert is computed and masked.
        batch: A batch for it, of at least two tokens a sample.
        file: Is written.

    Returns:
        What of ``batch`` the model takes, in the order that it takes it.
    """
    taken = {name: value for name, value in batch.items() if name in _arguments(model)}
    # of one sample alone, a model that was traced may remember the number
    inputs = {name: torch.cat([value, value]) if len(value) == 1 else value for name, value in taken.items()}
    dynamic = torch.export.Dim.DYNAMIC
    is_text = {name: value.dim() == 2 for name, value in inputs.items()}
    sizes = tuple({0: dynamic, 1: dynamic} if text else {0: dynamic} for text in is_text.values())
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        if cached:  # what is remembered of a text for the next token is no output here
            config.use_cache = False
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Logits(model, list(inputs)),
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=(sizes,),
                input_names=list(inputs),
                output_names=["logits"],
                verbose=False,
            )
    finally:
        if cached:
            config.use_cache = cached
    assert program is not None
    program.save(str(file))
    return list(inputs)


def on_onnxruntime(dense: nn.Module, batches: Sequence[Batch], int8: bool = False) -> Predict:
    """ONNX Runtime; in int8 by its dynamic quantisation."""
    runtime = _optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    with TemporaryDirectory() as folder:
        file = Path(folder) / "dense.onnx"
        names = export_onnx(dense, batches[0], file)
        if int8:
            quantization = _optional("onnxruntime.quantization")
            small = Path(folder) / "int8.onnx"
            kind = quantization.QuantType.QInt8
            quantization.quantize_dynamic(str(_without_shapes(file)), str(small), weight_type=kind)
            file = small
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(values: dict[str, Any]) -> Tensor:
        return torch.from_numpy(session.run(None, values)[0])

    return _by_name(dense, names, run)


def on_openvino(dense: nn.Module, batches: Sequence[Batch], int8: bool = False) -> Predict:
    """OpenVINO, which computes in bfloat16 where the CPU has it; in int8 by NNCF, calibrated on batches."""
    openvino = _optional("openvino")
    core = openvino.Core()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "dense.onnx"
        names = export_onnx(dense, batches[0], file)
        model = core.read_model(str(file))
        if int8:
            nncf = _optional("nncf")
            samples = [
                {name: batch[name][i : i + 1].numpy() for name in names}
                for batch in batches
                for i in range(len(batch[names[0]]))
            ]
            given = nncf.Dataset(samples[:CALIBRATION])
            model = nncf.quantize(model, given, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
    return _by_name(dense, names, lambda values: torch.from_numpy(request.infer(values)[0].copy()))


def on_torch_int8(dense: nn.Module, batches: Sequence[Batch]) -> Predict:
    """PyTorch's dynamic quantisation of linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, yet nothing else in torch alone does it
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear}, dtype=torch.qint8)
    return lambda batch: adapter_for(quantized).logits(quantized, batch)


def on_compiler(dense: nn.Module, batches: Sequence[Batch]) -> Predict:
    """``torch.compile``, in bfloat16."""
    model = copy.deepcopy(dense)
    adapter_for(model).cast_(model, torch.bfloat16)
    compiled: Any = torch.compile(model, dynamic=True)
    device = next(model.parameters()).device

    def predict(batch: Batch) -> Tensor:
        adapter = adapter_for(model)
        behind, back = adapter.in_order(placed(batch, device, torch.bfloat16))
        return back(adapter.traced_logits(compiled, behind))

    return predict


# by the name that ``--compare`` gives
RUNTIMES: dict[str, Callable[[nn.Module, Sequence[Batch]], Predict]] = {
    "onnxruntime": on_onnxruntime,
    "onnxruntime-int8": lambda dense, batches: on_onnxruntime(dense, batches, int8=True),
    "openvino": on_openvino,
    "openvino-int8": lambda dense, batches: on_openvino(dense, batches, int8=True),
    "torch-int8": on_torch_int8,
    "compile": on_compiler,
}


def check_runtimes(names: Iterable[str], argument: str = "compare") -> None:
    """Raise ``ConfigError`` unless the packages of the runtimes called ``names`` are there."""
    needed = {"onnxruntime": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["onnx", "onnxscript", "openvino"]}
    for name in names:
        runtime, _, int8 = name.partition("-")
        for package in needed.get(runtime, []) + (["nncf"] if (runtime, int8) == ("openvino", "int8") else []):
            _optional(package, name, argument)


def _optional(package: str, runtime: str | None = None, argument: str = "compare") -> Any:
    try:
        return resolve_name(package)
    except ImportError as error:
        name = runtime or package.partition(".")[0]
        raise ConfigError(f"{argument}={name!r}: the package {package} is not installed; {EXTRA} brings it") from error


def _arguments(model: nn.Module) -> Collection[str]:
    return {*inspect.signature(model.forward).parameters, "pixel_values"} - {"labels"}


def _without_shapes(file: Path) -> Path:
    """The same model without the shapes of what is between its operators, which keep ONNX Runtime from int8."""
    onnx = _optional("onnx")
    model = onnx.load(str(file))
    del model.graph.value_info[:]
    onnx.save(model, str(file))
    return file


def _by_name(dense: nn.Module, names: Sequence[str], run: Callable[[dict[str, Any]], Tensor]) -> Predict:
    adapter = adapter_for(dense)

    def predict(batch: Batch) -> Tensor:
        behind, back = adapter.in_order(batch)
        return back(run({name: behind[name].numpy() for name in names}))

    return predict
