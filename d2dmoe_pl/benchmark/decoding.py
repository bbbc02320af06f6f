"""How fast a causal language model writes, token after token, and how many bytes of weights each token has it read."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from d2dmoe_pl.adapters import MASK, adapter_for
from d2dmoe_pl.adapters._generation import written_by
from d2dmoe_pl.benchmark.compared_modules import Choice, predict_by, uncompiled
from d2dmoe_pl.benchmark.comparison import Comparison, Way
from d2dmoe_pl.benchmark.gguf_runtime import NAME, GGUFRuntime
from d2dmoe_pl.benchmark.result_rows import PYTORCH
from d2dmoe_pl.benchmark.scoring import Scoring
from d2dmoe_pl.benchmark.timing import Contender
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import Gate
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.quantization.int8_layers import Int8Embedding, Int8Module
from d2dmoe_pl.moe.quantization.quantize import quantize_
from d2dmoe_pl.weights_types import floating_type

PROMPT = 32  # tokens of each text, at most
EMBEDDINGS = (nn.Embedding, Int8Embedding)


def check_decodes(model: nn.Module, num_tokens: int) -> None:
    """Raise ``ConfigError`` unless ``model`` can write ``num_tokens`` behind a prompt."""
    head = adapter_for(model).head(model)
    check(
        head == "causal-language-modeling",
        f"decode={num_tokens}: a {type(model).__name__} writes no text; must be 0, or the artifact one of a causal "
        "language model",
    )
    positions = adapter_for(model).num_positions(model)
    check(
        positions is None or num_tokens < positions,
        f"decode={num_tokens}: must be less than {positions}, the positions of the model, for there is a prompt too",
    )


def decoding_comparison(
    dense: nn.Module,
    moes: Mapping[torch.dtype, nn.Module],
    batch: Batch,
    num_tokens: int,
    choices: Mapping[torch.dtype, Sequence[Choice]],
    scoring: Scoring | None = None,
    gguf: str | None = None,
) -> Comparison:
    """``generate`` of a model with experts, in one or more types, against its dense twin's, from the same prompts.

    Args:
        dense: The dense model, in float32 where there is more than one type.
        moes: The same with experts, by type.
        batch: Its texts begin with the prompts.
        num_tokens: That are written behind each, greedily, whatever they are; two at least.
        choices: To be timed, by type.
        scoring: By what predictions are judged; None if they are not.
        gguf: The dense model as a file, which llama.cpp writes from as well; None if it does not.
    """
    positions = adapter_for(dense).num_positions(dense)
    prompts = _prompts(batch, PROMPT if positions is None else min(PROMPT, positions - num_tokens))
    dense_type = next(dense.parameters()).dtype
    dense_bytes = _bytes(dense)
    text = _write(dense, prompts, num_tokens)

    def made(model: nn.Module, name: str, choice: Choice | None, dtype: torch.dtype, share: float, read: float) -> Way:
        context: Callable[[], AbstractContextManager] = nullcontext if choice is None else choice.context
        with context(), uncompiled(model):
            score = None if scoring is None else scoring.score(predict_by(model))
            agreement = _agreement(model, prompts, text)
        return Way(
            name=name,
            router=choice is not None,
            tau=None if choice is None else choice.tau,
            share=share,
            cost=share,
            contender=Contender(partial(_write, model, prompts, num_tokens), context, num_tokens),
            dtype=dtype,
            around=floating_type(model),
            is_dense=choice is None,
            score=score,
            budget=None if choice is None else choice.budget,
            bytes_share=read / dense_bytes,
            agreement=agreement,
        )

    ways = []
    for dtype, moe in moes.items():
        if dtype != dense_type:
            twin = _in_type(dense, dtype, floating_type(moe))
            ways.append(made(twin, PYTORCH, None, dtype, 1.0, _bytes(twin)))
        backend = next(iter(moe_layers(moe).values())).own_experts.backend
        for choice in choices[dtype]:
            share, read = _steps(moe, choice, prompts, num_tokens)
            ways.append(made(moe, backend, choice, dtype, share, read))
    if gguf is not None:
        ways.append(_by_gguf_runtime(gguf, dense, prompts, text))
    itself = made(dense, PYTORCH, None, dense_type, 1.0, dense_bytes)
    batch_size, length = prompts["input_ids"].shape
    return Comparison(
        scope="decode",
        name=type(dense).__name__,
        dtype=dense_type,
        num_experts=next(iter(moe_layers(next(iter(moes.values()))).values())).own_experts.num_experts,
        batch_size=batch_size,
        tokens=batch_size * length,
        dense=itself.contender,
        ways=ways,
        scoring=scoring,
        dense_score=itself.score,
        new_tokens=num_tokens,
    )


def _by_gguf_runtime(file: str, dense: nn.Module, prompts: Batch, text: Tensor) -> Way:
    """The dense model by llama.cpp; ``text``, ``(B, L + N)``, is what PyTorch wrote behind the prompts."""
    ids = prompts["input_ids"].cpu()
    start, num_tokens = ids.shape[1], text.shape[1] - ids.shape[1]
    model = GGUFRuntime(file, *text.shape)
    known = adapter_for(dense).vocabulary_size(dense)
    check(
        model.num_tokens == known,
        f"gguf={file!r}: has a vocabulary of {model.num_tokens}; must be the artifact's model, which has {known}",
    )
    expected = text[:, start:].cpu()
    found = model.likeliest(text[:, :-1].cpu())[:, start - 1 :]
    return Way(
        name=NAME,
        router=False,
        tau=None,
        share=1.0,
        cost=1.0,
        contender=Contender(partial(model.write, ids, num_tokens), nullcontext, num_tokens),
        is_dense=True,
        bytes_share=model.bytes_per_weight / next(dense.parameters()).element_size(),
        agreement=100 * float((found == expected).float().mean()),
        type_name=model.type_name,
    )


def _prompts(batch: Batch, most: int) -> Batch:
    """The first tokens of each text, as many of one as of the other, and at most ``most``."""
    ids, mask = batch["input_ids"], batch.get(MASK)
    length = min([most, ids.shape[1], *([] if mask is None else [int(mask.sum(dim=1).min())])])
    ids = ids[:, :length]
    return {"input_ids": ids, MASK: torch.ones_like(ids)}


@torch.no_grad()
def _write(model: Any, prompts: Batch, num_tokens: int) -> Tensor:
    """The prompts and ``num_tokens`` behind each, the likeliest each time; nothing ends a text before.

    What else the model's own generation config asks for, such as a penalty on repetitions, is left out.
    """
    return written_by(model, GenerationConfig(pad_token_id=0), prompts, num_tokens)


@torch.no_grad()
def _agreement(model: nn.Module, prompts: Batch, text: Tensor) -> float:
    """Of the tokens that the dense model wrote, those that ``model`` would have written there, in percent."""
    start = prompts["input_ids"].shape[1]
    likeliest = adapter_for(model).logits(model, {"input_ids": text[:, :-1]}).argmax(dim=-1)  # (B, L - 1)
    return 100 * float((likeliest[:, start - 1 :] == text[:, start:]).float().mean())


def _steps(model: nn.Module, choice: Choice, prompts: Batch, num_tokens: int) -> tuple[float, float]:
    """What a token that is written behind the first has the model do.

    Returns:
        The share of all (token, expert) pairs that run; and the bytes of weights that are read for a token of each
        text: an expert's, if any of the texts runs it.
    """
    layers = moe_layers(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    with choice.context(), uncompiled(model), hooked(layer.watch(seen[name].append) for name, layer in layers.items()):
        _write(model, prompts, num_tokens)
        idle = sum(map(_idle_bytes, layers.values()))
    masks = {name: torch.stack(some[1:]) for name, some in seen.items()}  # (N - 1, B, E), without the prompts
    unread = sum(
        _bytes_of_experts(layer) * (1 - float(masks[name].any(dim=1).float().mean())) for name, layer in layers.items()
    )
    share = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    return share, _bytes(model) - unread - idle


def _bytes(model: nn.Module) -> int:
    """Of all weights that every token is multiplied by; embeddings, of which it takes a row, are none."""
    tensors = {
        id(tensor): tensor.numel() * tensor.element_size()
        for module in model.modules()
        if not isinstance(module, EMBEDDINGS)
        for tensor in (*module.parameters(recurse=False), *_numbers(module))
    }
    return sum(tensors.values())


def _numbers(module: nn.Module) -> list[Tensor]:
    return list(module.buffers(recurse=False)) if isinstance(module, Int8Module) else []


def _bytes_of_experts(layer: MoELayer) -> int:
    """Of what only experts that run are multiplied by; an oracle multiplies by all first weights to choose."""
    experts = layer.own_experts
    tensors = dict(experts.named_parameters(recurse=False)) | dict(experts.named_buffers(recurse=False))
    is_oracle = getattr(layer.router, "reads_experts", False)
    read = {name for name in tensors if name == "down_bias" or (is_oracle and not name.startswith("down_"))}
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name not in read)


def _idle_bytes(layer: MoELayer) -> int:
    """Of a layer's router and stand-in, where they have nothing to do since every expert runs."""
    gate = layer.gate
    if not (isinstance(gate, Gate) and gate.admits_all(layer.sizes.num_experts, layer.all_above)):
        return 0
    return sum(_bytes(part) for part in (layer.router, layer.stand_in) if part is not None)


def _in_type(dense: nn.Module, dtype: torch.dtype, floating: torch.dtype) -> nn.Module:
    twin = copy.deepcopy(dense)
    if not dtype.is_floating_point:
        quantize_(twin)
    adapter_for(twin).cast_(twin, floating)
    return twin
