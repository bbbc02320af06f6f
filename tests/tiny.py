"""Tiny random models of every family, batches for them, and shortcuts to later stages."""

import copy
import dataclasses
import functools

import pytest
import torch
import transformers
from tiny_configs import (  # noqa: F401 (for the tests, which take all that is tiny from here)
    BORN_SPARSE,
    CONFIGS,
    DIGITS_VIT,
    ENCODER_DECODERS,
    IMAGE,
    SHAPE,
    WIDTH,
    bert_config,
    decoder_config,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode

from d2dmoe_pl.adapters import HEADS, HuggingFaceModel, TimmModel, adapter_for, adapter_named
from d2dmoe_pl.data import Classification, TaskData
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import (
    ExpertsConfig,
    add_routers_,
    convert_to_moe_,
    set_gate_,
)
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.projections import ProjectionConfig, projection_mlps, replace_projections_
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.moebert.conversion import convert_to_moebert_
from d2dmoe_pl.moebert.layer import MoEBERTConfig

LABELS = ["cat", "dog", "eel"]
MOEBERT = MoEBERTConfig(num_experts=4, expert_dim=12, num_shared=5)


def family_of(kind):
    return kind.partition("-")[0]


def _kinds():
    """Name, task and source of a model of every architecture and task; the first task goes without saying."""
    for name, make in CONFIGS.items():
        tasks = adapter_named(family_of(name)).tasks
        if name != family_of(name) and not name.startswith("any_"):  # a variant has the heads of its family
            tasks = [task for task in tasks if task in (tasks[0], "causal-language-modeling", "text-to-text")]
        for task in tasks:
            of_others = name.endswith("pictures") and task != "image-classification"
            of_others |= name.endswith("encoder") and task == "causal-language-modeling"
            if of_others or type(make()) not in HEADS[task][1]._model_mapping:
                continue
            head = HEADS[task][0]
            suffix = "" if head == "classification" else f"-{head}"
            yield name + suffix, task, lambda make=make, task=task: HuggingFaceModel(task, config=make())
    for suffix, architecture, kwargs in [
        ("", "vit_tiny_patch16_224", {}),
        ("-deit", "deit_tiny_distilled_patch16_224", {}),
        ("-dropout", "vit_tiny_patch16_224", {"proj_drop_rate": 0.1}),
        ("-packed", "vit_giant_patch14_dinov2", {"mlp_ratio": 6.0}),
        ("-gated", "aimv2_large_patch14_224", {}),
    ]:
        shape = {"mlp_ratio": 3.0, **DIGITS_VIT, **kwargs}
        make = lambda architecture=architecture, shape=shape: TimmModel(architecture, **shape)  # noqa: E731
        yield f"timm_vit{suffix}", "image-classification", make
    for suffix, architecture, kwargs in [
        ("", "eva02_tiny_patch14_224", {}),
        ("-rope", "vit_pe_spatial_tiny_patch16_512", {}),
        ("-dinov3", "vit_small_patch16_dinov3", {}),
        ("-dinov3_gated", "vit_small_plus_patch16_dinov3", {}),
    ]:
        shape = {"mlp_ratio": 3.0, **DIGITS_VIT, **kwargs}
        make = lambda architecture=architecture, shape=shape: TimmModel(architecture, **shape)  # noqa: E731
        yield f"timm_eva{suffix}", "image-classification", make
    yield "any_timm", "image-classification", lambda: TimmModel("beit_base_patch16_224", mlp_ratio=3.0, **DIGITS_VIT)


# the contract test runs over all of them
SOURCES = {kind: source for kind, _, source in _kinds()}
TASKS = {kind: task for kind, task, _ in _kinds()}
OTHER_HEADS = {
    kind for kind in SOURCES for first in SOURCES if kind.startswith(f"{first}-") and TASKS[kind] != TASKS[first]
}
# for what depends on the head little
HEADS_ARE_THOROUGH = [
    pytest.param(kind, marks=pytest.mark.thorough) if kind in OTHER_HEADS else kind for kind in SOURCES
]


def is_of_texts(kind):
    """Whether a model of ``kind`` takes texts."""
    return TASKS[kind] not in ("image-classification", "audio-classification")


def labels_of(kind):
    """Names of the outputs of a model of ``kind``."""
    known = {
        "embeddings": [str(i) for i in range(24)],
        "text-regression": ["similarity"],
        "question-answering": ["start", "end"],
    }
    tokens = [str(token) for token in range(40)]
    return tokens if TASKS[kind].endswith(("language-modeling", "text-to-text")) else known.get(TASKS[kind], LABELS)


def dense(kind="timm_vit", activation="relu"):
    """A dense model of one of ``SOURCES``, in evaluation mode; what it draws goes by the generator's state."""
    state = torch.get_rng_state()
    around = (torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled())
    model, after = _made(kind, activation, state.numpy().tobytes(), around)
    torch.set_rng_state(after)
    return copy.deepcopy(model)


@functools.lru_cache(maxsize=400)
def _made(kind, activation, state, around):
    """The model, and the generator's state behind it: thousands of tests begin with the same."""
    model = SOURCES[kind]().build(labels_of(kind)).eval()
    # freshly initialised timm heads and norms give tiny logits
    _spread(model)
    if activation is not None:
        swap_activation_(model, ActivationConfig(activation))
    return model, torch.get_rng_state()


def routed(kind="timm_vit", num_experts=8, tau=0.5, rule="dynk_max"):
    """A model with experts, routers and a gate."""
    return route_(dense(kind), num_experts, tau, rule)


@torch.no_grad()
def _spread(module):
    """Make parameters differ, so that differences show."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)


def with_projections(kind="timm_vit", residual=False):
    """A dense model with MLPs in the place of its attention projections, which 4 experts divide."""
    model = dense(kind)
    replace_projections_(model, ProjectionConfig(multiple_of=4, residual=residual))
    for mlp in projection_mlps(model).values():
        _spread(mlp)
    return model


def route_(model, num_experts=8, tau=0.5, rule="dynk_max"):
    """Give a dense model experts, routers and a gate."""
    convert_to_moe_(model, ExpertsConfig(num_experts, 4))
    add_routers_(model, RouterConfig(8))
    set_gate_(model, GateConfig(rule, tau))
    return model


def moebert(routing="hash_random", seed=0, kind="bert"):
    """A model like BERT whose FFNs are four experts each, in evaluation mode."""
    model = dense(kind, "gelu")
    importance = {ffn.name: torch.rand(WIDTH) for ffn in select_ffns(model)}
    convert_to_moebert_(model, dataclasses.replace(MOEBERT, routing=routing, seed=seed), importance=importance)
    return model.eval()


def batch(kind="timm_vit", size=3):
    """A batch for a model of ``kind``; texts are padded to different lengths."""
    labels = torch.arange(size) % len(LABELS)
    if TASKS[kind] == "audio-classification":
        shapes = {"whisper": (4, 12), "any_audio": (70,), "any_audio-spectrogram": (16, 8)}
        name = "input_features" if kind == "whisper" else "input_values"
        return {name: torch.randn(size, *shapes[kind]), "labels": labels}
    if is_of_texts(kind):
        length = 7
        lengths = torch.tensor([length, 4, 2, 1] * size)[:size]
        mask = (torch.arange(length) < lengths[:, None]).long()
        ids = torch.randint(5, 40, (size, length)) * mask
        if TASKS[kind] == "token-classification":
            labels = (ids % len(LABELS)).masked_fill(mask == 0, -100)
        if TASKS[kind] == "embeddings":
            labels = torch.randn(size, 24)
        if TASKS[kind] == "multi-label-classification":
            labels = (torch.arange(size)[:, None] % 2 == torch.arange(len(LABELS)) % 2).float()
        if TASKS[kind] == "question-answering":
            labels = torch.zeros(size, 2, dtype=torch.long)
        if TASKS[kind] == "text-to-text":
            answers = torch.tensor([1, 3, 5, 2] * size)[:size]
            answered = (torch.arange(5) < answers[:, None]).long()
            labels = torch.randint(5, 40, (size, 5)).masked_fill(answered == 0, -100)
            decoder_ids = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1].clamp(min=0)], dim=1)
            decoder = {"decoder_input_ids": decoder_ids, "decoder_attention_mask": answered}
            return {"input_ids": ids, "attention_mask": mask, "labels": labels, **decoder}
        if family_of(kind) in ENCODER_DECODERS:  # its classifier reads the one token that ends a text
            ids[torch.arange(size), lengths - 1] = 2
        if "language-modeling" in TASKS[kind]:
            labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"pixel_values": torch.randn(size, 1, 8, 8), "labels": labels}


def tokenizer(folder, words, special=("[PAD]", "[UNK]")):
    """Save a tokenizer of whole words to ``folder``; with ``[CLS]`` and ``[SEP]``, it puts them where BERT has them.

    ``[MASK]`` and ``<eos>``, if among ``special``, are the mask and the end of a text.
    """
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if "[CLS]" in special:
        ends = (("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
        core.post_processor = processors.BertProcessing(*ends)
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {key: token for key, token in {"mask_token": "[MASK]", "eos_token": "<eos>"}.items() if token in special}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    fast.save_pretrained(folder)
    return str(folder)


def logits(model, inputs):
    return adapter_for(model).logits(model, inputs)


def logits_of_tokens(model, inputs):
    """The logits, 0 where they are those of padding, which mean nothing."""
    result = logits(model, inputs)
    if result.dim() < 3:
        return result
    if "decoder_attention_mask" in inputs:
        return result * inputs["decoder_attention_mask"].unsqueeze(2)  # (B, L, V)
    return result * inputs["attention_mask"].unsqueeze(1 if result.shape[1] == 2 else 2)  # (B, 2, L) or (B, L, V)


class Logits(torch.nn.Module):
    """A model of texts that takes tensors by place and gives one, for what traces and exports."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).logits


class TextData(TaskData):
    """Random texts of different lengths, with labels, for the tiny BERT."""

    def load(self):
        generator = torch.Generator().manual_seed(0)
        samples = [
            {"input_ids": torch.randint(5, 40, (length,), generator=generator), "labels": length % len(LABELS)}
            for length in (1 + torch.arange(48) % 9).tolist()
        ]
        return {"train": samples[:32], "validation": samples[32:40], "test": samples[40:]}, Classification(LABELS)

    def collate(self, samples, augment):
        ids = torch.nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
        labels = torch.tensor([sample["labels"] for sample in samples])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(sorted(tensor.shape)))
        return result


class Doubled(torch.nn.Module):
    """Gives twice what a module gives."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return 2 * self.module(*inputs)
