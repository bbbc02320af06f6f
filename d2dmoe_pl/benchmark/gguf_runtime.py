"""llama.cpp, which writes from a GGUF file: what users would run a language model on instead, on a CPU.

Its package is optional: ``pip install llama-cpp-python``, which compiles it for this machine.
"""

import ctypes
import logging
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2dmoe_pl.errors import ConfigError, check

NAME = "llama.cpp"


def check_gguf(file: str) -> None:
    """Raise ``ConfigError`` unless llama.cpp is there, and a file that it could read."""
    check(Path(file).is_file(), f"gguf={file!r}: there is no such file")
    with Path(file).open("rb") as opened:
        check(opened.read(4) == b"GGUF", f"gguf={file!r}: is no GGUF file")
    _package(file)


class GGUFRuntime:
    """A model of llama.cpp, and room for texts.

    Args:
        file: In GGUF.
        texts: That are written at a time.
        tokens: Of each text in the end, prompt in.

    Attributes:
        type_name: What llama.cpp calls the type of most weights, such as ``Q4_1``.
        bytes_per_weight: On average.
        num_tokens: In its vocabulary.

    Raises:
        ConfigError: If the package is not there, or cannot read the file.
    """

    def __init__(self, file: str, texts: int, tokens: int) -> None:
        self._api = api = _package(file)
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it tells of each layer otherwise
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(file.encode(), settings)
        check(self._model is not None, f"gguf={file!r}: llama.cpp cannot read it")
        self._context = api.llama_init_from_model(self._model, self._settings(texts, tokens))
        check(self._context is not None, f"gguf={file!r}: llama.cpp has no room for {texts} texts of {tokens} tokens")
        self._batch = api.llama_batch_init(texts * tokens, 0, 1)
        weakref.finalize(self, _free, api, self._batch, self._context, self._model)
        self.num_tokens: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        weights = api.llama_model_n_params(self._model)
        self.bytes_per_weight: float = api.llama_model_size(self._model) / weights
        said = ctypes.create_string_buffer(100)
        api.llama_model_desc(self._model, said, len(said))  # such as "llama 135M Q4_1"
        self.type_name = said.value.decode().split()[-1]

    def _settings(self, texts: int, tokens: int) -> Any:
        settings = self._api.llama_context_default_params()
        settings.n_seq_max = texts
        settings.n_ctx = settings.n_batch = settings.n_ubatch = texts * tokens
        settings.kv_unified = True  # so that the room is for all texts together
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        return settings

    def write(self, prompts: Tensor, num_tokens: int) -> Tensor:
        """The prompts, ``(B, L)``, and ``num_tokens`` behind each, greedily; nothing ends a text before.

        Returns:
            ``(B, L + num_tokens)``.
        """
        texts = prompts.tolist()
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        found = self._read(texts, 0)
        for step in range(num_tokens):
            for text, token in zip(texts, found, strict=True):
                text.append(token)
            if step + 1 < num_tokens:
                found = self._read([text[-1:] for text in texts], len(texts[0]) - 1)
        return torch.tensor(texts)

    def likeliest(self, texts: Tensor) -> Tensor:
        """The likeliest token behind each of ``texts``, ``(B, L)``."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return torch.tensor(self._read(texts.tolist(), 0, every=True)).view(texts.shape)  # (B, L)

    def _read(self, texts: Sequence[Sequence[int]], start: int, every: bool = False) -> list[int]:
        """Read on at position ``start``; the likeliest tokens behind each text, or behind every token."""
        batch, wanted = self._batch, []
        for i, (number, place, token) in enumerate(_tokens(texts)):
            is_wanted = every or place + 1 == len(texts[number])
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + place, is_wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, number
            wanted += [i] * is_wanted
        batch.n_tokens = i + 1
        failed = self._api.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama.cpp: llama_decode returned {failed}")
        return [self._largest(i) for i in wanted]

    def _largest(self, i: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, i)
        return int(np.ctypeslib.as_array(logits, shape=(self.num_tokens,)).argmax())


def _tokens(texts: Sequence[Sequence[int]]) -> Iterable[tuple[int, int, int]]:
    """Number of the text, place in it, and token."""
    return ((number, place, token) for number, text in enumerate(texts) for place, token in enumerate(text))


def _free(api: Any, batch: Any, context: Any, model: Any) -> None:
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)


def _package(file: str) -> Any:
    try:
        return resolve_name("llama_cpp")
    except ImportError as error:
        raise ConfigError(
            f"gguf={file!r}: the package llama-cpp-python is not installed; pip install llama-cpp-python brings it"
        ) from error
