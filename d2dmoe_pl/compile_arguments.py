"""The arguments of ``compile``, apart from what runs it, so that its help needs no import of that."""

from jsonargparse import ArgumentParser

DTYPES = ("float32", "bfloat16", "int8")
AROUND = ("float32", "bfloat16")


def compile_parser() -> ArgumentParser:
    """The arguments of the ``compile`` subcommand."""
    parser = ArgumentParser(
        exit_on_error=False,
        description="Compile a model ahead of time, for processors like this one; load_compiled(FOLDER) loads it.",
        allow_abbrev=False,
    )
    parser.add_argument("--artifact", type=str | None, default=None, help="Folder artifact that a phase left.")
    parser.add_argument("--output_dir", type=str, default="runs/compiled", help="Gets the model and its programs.")
    parser.add_argument(
        "--dtype", type=str | None, default=None, help=f"Of {', '.join(DTYPES)}; as it was saved if not given."
    )
    parser.add_argument(
        "--around", type=str, default="float32", help=f"Type around int8 in a model in int8: {', '.join(AROUND)}."
    )
    parser.add_argument("--tau", type=float | None, default=None, help="In [0, 1]; can be set later too.")
    parser.add_argument(
        "--budget", type=float | None, default=None, help="Of a calibrated model, a share of the dense FFNs' FLOPs."
    )
    return parser
