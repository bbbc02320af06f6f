"""The arguments of ``benchmark``, apart from what runs it, so that its help needs no import of that."""

import json
from collections.abc import Callable
from typing import Any, Literal

from jsonargparse import ActionConfigFile, ArgumentParser

from d2dmoe_pl.errors import check
from d2dmoe_pl.recipe import is_recipe, read_recipe

DEFAULT_BACKEND = "auto"
SCOPES = ("layer", "model")
AHEAD_OF_TIME = "ahead_of_time"  # of --optimize
DTYPES = ("float32", "bfloat16", "float16", "int8")  # of torch
AROUND = ("float32", "bfloat16")


class CommaSeparated:
    """A parser's type: ``1,2,3`` on the command line, that or a list in YAML."""

    def __init__(self, kind: Callable[[str], Any]) -> None:
        self.kind = kind
        self.__name__ = f"comma-separated {kind.__name__}"

    def __call__(self, given: object) -> list:
        return [self.kind(part) for part in (given if isinstance(given, list) else str(given).split(","))]

    def __repr__(self) -> str:
        return self.__name__


class DataConfigFile(ActionConfigFile):
    """``--config`` of a benchmark: YAML with its settings, or a recipe for its data."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take what the recipe's phases share for data as if it had been written on the command line."""
        if is_recipe(values):
            shared = read_recipe(values).get("shared", {})
            check("data" in shared, f"config={values!r}: is a recipe whose phases share no data")
            values = json.dumps({"data": shared["data"]})
        super().__call__(parser, cfg, values, option_string)


def benchmark_arguments(data: type | None = None) -> ArgumentParser:
    """The parser of the ``benchmark`` subcommand.

    Args:
        data: What data is of; without it, the parser is good for its help alone, and needs no library that data needs.
    """
    parser = ArgumentParser(
        exit_on_error=False,
        description="Time a converted model, or a shape, against its dense twin: latency, throughput, memory.",
        allow_abbrev=False,
    )
    numbers, shares, words = CommaSeparated(int), CommaSeparated(float), CommaSeparated(str)
    parser.add_argument(
        "-c", "--config", action=DataConfigFile, help="YAML with the settings below, or a recipe, for its data."
    )
    parser.add_argument("--output_dir", type=str, default="runs/benchmark", help="Gets benchmark.csv, benchmark.png.")
    parser.add_argument("--scope", type=words, default=["model"], help="model: whole models; layer: FFNs alone.")
    parser.add_argument("--dtype", type=words, default=["float32"], help=f"Some of {', '.join(DTYPES)}.")
    parser.add_argument(
        "--around", type=str, default="float32", help=f"Type around int8 in models in int8: {', '.join(AROUND)}."
    )
    parser.add_argument("--batch_size", type=numbers, default=[1, 8], help="Samples a call of a whole model.")
    parser.add_argument("--backend", type=str, default=DEFAULT_BACKEND, help="Name of a file in moe/execution.")
    parser.add_argument(
        "--compare",
        type=words,
        default=[],
        help="Whole models: what to run the dense model on, of onnxruntime, onnxruntime-int8, openvino, openvino-int8, "
        "torch-int8, compile. Layers: other ways to run experts, loop, grouped_mm, or files in moe/execution.",
    )
    parser.add_argument(
        "--optimize",
        type=bool | Literal["ahead_of_time"],
        default=False,
        help="Have models with experts compiled; ahead_of_time: as compile does.",
    )
    parser.add_argument(
        "--scored_samples", type=int, default=2000, help="Test samples that predictions are judged on; 0 for none."
    )
    parser.add_argument(
        "--decode", type=int, default=0, help="Tokens that whole causal language models write instead; 0 for none."
    )
    parser.add_argument(
        "--gguf",
        type=str | None,
        default=None,
        help="The dense model's GGUF file, which llama.cpp (package llama-cpp-python) writes from too.",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto (a GPU if there is one), cpu or cuda.")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; PyTorch's choice if not given.")
    parser.add_argument("--rounds", type=int, default=11, help="Samples of each time, whose median is shown.")

    artifact = parser.add_argument_group("a converted model")
    artifact.add_argument(
        "--artifact", type=str | None, default=None, help="Folder artifact of a phase that leaves routers and a gate."
    )
    artifact.add_argument("--tau", type=shares, default=[0.5, 0.7, 0.8, 0.9, 1.0], help="In [0, 1]; 1 is dense.")
    artifact.add_argument(
        "--budget", type=shares, default=[], help="Of a calibrated model, shares of the dense FFNs' FLOPs, not taus."
    )
    artifact.add_argument("--length", type=int, default=128, help="Tokens of each text, if no data is given.")
    data_help = "Whose test samples are run. Noise otherwise, of which routers make what they will."
    if data is None:
        parser.add_argument("--data", metavar="CONFIG | CLASS_PATH_OR_NAME | .INIT_ARG_NAME VALUE", help=data_help)
    else:
        parser.add_subclass_arguments(data, "data", required=False, help=data_help)

    shape = parser.add_argument_group("a shape of random weights and forced random choices, without an artifact")
    shape.add_argument("--d_model", type=int, default=768, help="Width of the tokens.")
    shape.add_argument("--d_ff", type=int, default=3072, help="Neurons of an FFN.")
    shape.add_argument("--num_experts", type=numbers, default=[96], help="Each must divide d_ff.")
    shape.add_argument("--gated", type=bool, default=False, help="Gated FFNs; only with --scope layer.")
    shape.add_argument("--activation", type=str, default="relu", help="relu, gelu, silu or tanh.")
    shape.add_argument("--router_width", type=int, default=128, help="Measured with routers too; 0 for none.")
    shape.add_argument("--tokens", type=numbers, default=[1, 197, 1024, 4096], help="That an FFN alone is given.")
    shape.add_argument("--share", type=shares, default=[0.1, 0.2, 0.4, 1.0], help="Of the experts, those that run.")
    shape.add_argument("--layers", type=int, default=12, help="Depth of the whole model.")
    shape.add_argument(
        "--architecture",
        type=str,
        default="vit_base_patch16_224",
        help="timm model that gives the whole model all but its widths and depth.",
    )
    return parser
