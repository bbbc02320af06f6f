"""The arguments of ``compress``; what runs it is imported when it runs."""

from jsonargparse import ArgumentParser

from d2dmoe_pl.compile_arguments import DTYPES

EFFORTS = ("minutes", "hours")


def compress_parser() -> ArgumentParser:
    """The arguments of the ``compress`` subcommand."""
    parser = ArgumentParser(
        description="Make a model cost what you say: writes a recipe for it, runs it, and reports.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="Folder or hub name of a Hugging Face model, name of a timm model, or artifact; scikit-learn's digits and "
        "a small ViT for them if neither this nor --data is given.",
    )
    parser.add_argument(
        "--data",
        type=str | dict | None,
        default=None,
        help="A file or a folder of files (CSV, TSV, JSON lines, Parquet, pictures or recordings in a folder a class), "
        "a dataset on the hub, or what a recipe's data says.",
    )
    parser.add_argument(
        "--task",
        type=str | None,
        default=None,
        help="text-classification, text-regression, multi-label-classification, token-classification, text-to-text, "
        "question-answering, causal-language-modeling, masked-language-modeling, embeddings, image-classification or "
        "audio-classification; if not given, the data's columns tell, and what labels are, but for embeddings and "
        "masked-language-modeling, which have to be named.",
    )
    parser.add_argument(
        "--target",
        type=str,
        default="ffn_flops=25%",
        help="ffn_flops=10% or flops=45% of the dense model's; speed=2x on this machine, by measurement; drop=0.5 "
        "points of the task's metric.",
    )
    parser.add_argument(
        "--dtype",
        type=str | None,
        default=None,
        help=f"Of {', '.join(DTYPES)}, that the model is to run in: it is saved, tested and timed so; as it is if not "
        "given.",
    )
    parser.add_argument(
        "--optimize", type=bool, default=False, help="Time it compiled, as load_model(FOLDER, optimize=True) gives it."
    )
    parser.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="What runs the dense model that times are told beside, of onnxruntime, onnxruntime-int8, openvino, "
        "openvino-int8, torch-int8, compile; PyTorch, layer by layer, if not given.",
    )
    parser.add_argument(
        "--effort", type=str, default="minutes", help="minutes trains nothing but routers; hours the model as well."
    )
    parser.add_argument(
        "--output_dir", type=str, default="runs/compress", help="Gets the recipe, the model, the report."
    )
    parser.add_argument(
        "--text_columns", type=list[str] | str | None, default=None, help="One, or a list, if names do not tell."
    )
    parser.add_argument("--label_column", type=str | None, default=None, help="If its name does not tell it.")
    parser.add_argument("--image_column", type=str | None, default=None, help="If its name does not tell it.")
    parser.add_argument("--audio_column", type=str | None, default=None, help="If its name does not tell it.")
    parser.add_argument(
        "--tokenizer", type=str | None, default=None, help="Folder or hub name, if not the model's own."
    )
    parser.add_argument("--batch_size", type=int, default=32, help="Of training, and of the times that are measured.")
    parser.add_argument("--seed", type=int, default=0, help="Of every phase.")
    parser.add_argument("--from", type=str | None, default=None, help="Redo from this phase of the recipe on.")
    parser.add_argument(
        "--print_config",
        type=str | None,
        nargs="?",
        const="",
        default=None,
        help="Print the recipe and do nothing else.",
    )
    return parser
