"""Importance scores and hash lists as MoEBERT (arXiv 2204.07675) publishes them: pickles, read but not executed."""

import io
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moebert._plain_pickles import PlainUnpickler, plain


def read_plain_pickle(path: str | Path, argument: str) -> Any:
    """The value in the pickle file ``path``, which cannot run anything.

    Args:
        path: The file.
        argument: What the user calls this setting, for the error.

    Raises:
        ConfigError: If the file cannot be read, is no pickle, or asks for any class or function but NumPy's numbers and
            arrays of numbers.
    """
    where = f"{argument}={str(path)!r}"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from None
    try:
        return plain(PlainUnpickler(io.BytesIO(content), where).load())
    except ConfigError:
        raise
    except Exception as error:  # a broken pickle can raise nearly anything
        raise ConfigError(f"{where}: is no whole pickle ({' '.join(str(error).split())})") from None


def read_importance(paths: str | Path | Sequence[str | Path], argument: str = "importance_file") -> Tensor:
    """The scores in published ``importance_*.pkl`` files, summed.

    A file holds what one process found, scores of layers x ``d_ff``; or what MoEBERT makes of all of them, a dict:
    ``importance``, scores in descending order, and ``idx``, the neurons that they belong to, each layers x ``d_ff``.

    Args:
        paths: A file, several, or a pattern for several such as ``importance_*.pkl``.
        argument: What the user calls this setting, for the error.

    Returns:
        Scores by neuron, ``(layers, d_ff)`` float64.

    Raises:
        ConfigError: If there is no file, one is not such a pickle, or they have different shapes.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    files = [file for path in given for file in (sorted(glob(str(path))) or [str(path)])]
    check(bool(files), f"{argument}={given}: must be one file at least")
    scores = [_scores(file, argument) for file in files]
    for file, one in zip(files, scores, strict=True):
        check(
            one.shape == scores[0].shape,
            f"{argument}={file!r}: has scores of {tuple(one.shape)}; must be {tuple(scores[0].shape)}, as {files[0]}",
        )
    return torch.stack(scores).sum(dim=0)


def _scores(path: str, argument: str) -> Tensor:
    """The scores in one file, by neuron."""
    value = read_plain_pickle(path, argument)
    where = f"{argument}={path!r}"
    if isinstance(value, (list, tuple)):
        return _tensor(value, torch.float64, 2, where)
    check(
        isinstance(value, dict) and {"importance", "idx"} <= value.keys(),
        f"{where}: must hold lists of scores, layers x d_ff, or a dict with the keys importance and idx",
    )
    scores = _tensor(value["importance"], torch.float64, 2, f"{where}: importance")
    order = _tensor(value["idx"], torch.int64, 2, f"{where}: idx")
    neurons = torch.arange(order.shape[1]).expand_as(order)
    check(
        scores.shape == order.shape and torch.equal(order.sort(dim=1).values, neurons),
        f"{where}: idx must hold every neuron of a layer once, as importance has scores",
    )
    return torch.empty_like(scores).scatter(1, order, scores)


def read_hash_list(path: str | Path, argument: str = "hash_list_file") -> Tensor:
    """The expert of each token id in a published hash list, ``(vocabulary,)`` int64.

    Raises:
        ConfigError: If the file is not a pickled list of integers.
    """
    value = read_plain_pickle(path, argument)
    return _tensor(value, torch.int64, 1, f"{argument}={str(path)!r}: the hash list")


def _tensor(value: Any, dtype: torch.dtype, dimensions: int, name: str) -> Tensor:
    """``value``, numbers in nested lists, as a tensor."""
    kind = "integers" if dtype == torch.int64 else "numbers"
    message = f"{name}: must be {'a list of lists' if dimensions == 2 else 'a list'} of {kind}, of equal lengths"
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(message) from None
    check(
        isinstance(value, (list, tuple))
        and tensor.dim() == dimensions
        and tensor.numel() > 0
        and tensor.dtype != torch.bool
        and (dtype.is_floating_point or not tensor.dtype.is_floating_point),
        message,
    )
    strange = tensor[~torch.isfinite(tensor)].flatten()[:1].tolist()
    check(not strange, f"{name}: has {', '.join(map(str, strange))}; must be finite numbers")
    return torch.tensor(value, dtype=dtype)
