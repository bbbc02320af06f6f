"""``python -m d2dmoe_pl.harness``: EleutherAI's evaluation harness, lm_eval, which knows converted models.

It takes lm_eval's own arguments; those of ``--model_args`` are what its ``hf`` models have, and ``tau``, ``budget`` and
``optimize``.
"""

import sys
from collections.abc import Sequence
from functools import cache
from inspect import Parameter, signature
from pkgutil import resolve_name
from typing import Any

import torch
from transformers import AutoTokenizer

from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.failures import failure_of
from d2dmoe_pl.moe.budgets.budget_path import set_budget_
from d2dmoe_pl.moe.conversion import set_tau_

MODEL = "d2dmoe"  # as ``--model`` calls it
OWN = ("tau", "budget", "dtype", "optimize")  # settings
EXTRA = 'pip install -e ".[evaluation]"'


def evaluated_model(
    pretrained: str,
    tau: float | None = None,
    budget: float | None = None,
    dtype: str | None = None,
    optimize: bool = False,
    **kwargs: Any,
) -> Any:
    """A converted language model as lm_eval takes it.

    Args:
        pretrained: Folder of an artifact, or a name on the hub; it has a tokenizer.
        tau: In [0, 1]; as it was saved if not given.
        budget: Of a calibrated model, a share of the dense FFNs' FLOPs, instead of a ``tau``.
        dtype: As :func:`d2dmoe_pl.load_model` takes it, ``int8`` too; ``auto`` is as it was saved.
        optimize: Whether it is compiled.
        kwargs: As lm_eval's ``HFLM`` takes them, ``batch_size`` and ``device`` among them; ``revision``, of a name on
            the hub, is the weights' and the tokenizer's.

    Raises:
        ConfigError: If lm_eval is not installed, there is no such artifact or tokenizer, it writes no text, or there is
            no such setting.
    """
    hflm = _harness("lm_eval.models.huggingface:HFLM")
    check(tau is None or budget is None, f"tau={tau}, budget={budget}: must be one of them")
    check(budget is None or isinstance(budget, float | int), f"budget={budget!r}: must be a share, such as 0.3")
    check(isinstance(optimize, bool), f"optimize={optimize!r}: must be true or false")
    settings = [name for name, each in signature(hflm).parameters.items() if each.kind is not Parameter.VAR_KEYWORD]
    for name, value in kwargs.items():  # which it would take, and do nothing
        check(name in settings, f"{name}={value!r}: no such setting; allowed are {', '.join([*OWN, *settings])}")
    if kwargs.get("revision") is not None:  # lm_eval makes a number of it where it can
        kwargs["revision"] = str(kwargs["revision"])
    model: Any = load_model(pretrained, kwargs.get("revision"), None if dtype == "auto" else dtype, optimize)
    check(
        hasattr(model, "can_generate") and model.can_generate(),
        f"pretrained={pretrained!r}: a {type(model).__name__} writes no text; must be a language model",
    )
    tokenizer = kwargs.pop("tokenizer", None) or pretrained
    if isinstance(tokenizer, str):  # for the line that says what is wrong with it
        load_pretrained(AutoTokenizer, tokenizer, "tokenizer", revision=kwargs.get("revision"))
    if tau is not None:
        set_tau_(model, tau)
    if budget is not None:
        set_budget_(model, ffn_flops=budget)
    model.to(kwargs.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
    return hflm(pretrained=model, tokenizer=tokenizer, **kwargs)


def register() -> None:
    """Make converted models known to lm_eval, by the name ``d2dmoe``.

    Raises:
        ConfigError: If it is not installed.
    """
    _harness("lm_eval:simple_evaluate")  # whatever of it is loaded
    _harness("lm_eval.api.registry:register_model")(MODEL)(_evaluated_class())


@cache  # a name may be registered again for the same class only
def _evaluated_class() -> type:
    class Evaluated(_harness("lm_eval.models.huggingface:HFLM")):  # type: ignore[misc] # optional, hence found late
        def __new__(cls, **kwargs: Any) -> Any:
            check("pretrained" in kwargs, "pretrained=None: must be given in --model_args, the folder of an artifact")
            return evaluated_model(**kwargs)

    return Evaluated


def main(args: Sequence[str] | None = None) -> None:
    """Run lm_eval's command line, whose model is a converted one if no other is named.

    Args:
        args: Arguments, those of the process if not given.
    """
    given = list(sys.argv[1:] if args is None else args)
    names = {argument.partition("=")[0] for argument in given}
    if given[:1] and given[0].startswith("-") and not names & {"--model", "-h", "--help"}:
        given = ["--model", MODEL, *given]
    try:
        register()
        before, sys.argv = sys.argv, ["lm_eval", *given]
        try:
            _harness("lm_eval.__main__:cli_evaluate")()
        finally:
            sys.argv = before
    except ConfigError as error:
        failure = failure_of(error)
        print(f"error: {failure.line}", file=sys.stderr)
        sys.exit(failure.code)


def _harness(name: str) -> Any:
    try:
        return resolve_name(name)
    except ImportError as error:
        package = error.name or "lm_eval"
        raise ConfigError(f"lm_eval: the package {package} is not installed; {EXTRA} brings it") from None


if __name__ == "__main__":
    main()
