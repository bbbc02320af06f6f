"""FLOPs as pure arithmetic: a multiply-add is 2, as in ``torch.utils.flop_counter``.

The published figures of D2DMoE and MoEfication count a multiply-add as 1. Only matrix products count; padding does not.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from d2dmoe_pl.adapters import MASK, adapter_for
from d2dmoe_pl.borrowed_tensors import Borrowing, own_tensors
from d2dmoe_pl.errors import check
from d2dmoe_pl.evaluation_mode import evaluating
from d2dmoe_pl.moe.expert_layer import ExpertLayer, ExpertSizes
from d2dmoe_pl.moe.find_layers import expert_layers
from d2dmoe_pl.sharded_tensors import is_sharded, without_gathering


def pair_flops(experts: ExpertSizes) -> int:
    """FLOPs of one executed (token, expert) pair."""
    return experts.expert_dim * _neuron_flops(experts)


def dense_ffn_flops(experts: ExpertSizes) -> int:
    """FLOPs for one token of the dense FFN that the experts were made from."""
    return experts.dense_dim * _neuron_flops(experts)


def _neuron_flops(experts: ExpertSizes) -> int:
    return 2 * ((2 if experts.is_gated else 1) * experts.d_model + experts.d_out)


SampleSize = tuple[tuple[str, int], ...]


def sample_sizes(batch: Mapping[str, Tensor]) -> list[SampleSize]:
    """What decides the cost of each of ``B`` samples: its real tokens by the mask that tells them from padding.

    Where there is no mask, the samples of a batch are all alike, of the shape that they have.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.metrics.flops import sample_sizes
        >>> sample_sizes({"attention_mask": torch.tensor([[1, 1], [1, 0]]), "labels": torch.zeros(2)})
        [(('attention_mask', 2),), (('attention_mask', 1),)]
    """
    masks = {key: mask.sum(dim=1).tolist() for key, mask in batch.items() if key.endswith(MASK)}
    samples = len(next(iter(batch.values())))
    if not masks:
        shapes = {key: value.shape[1:] for key, value in batch.items()}
        return [tuple((f"{key}[{i}]", size) for key, shape in shapes.items() for i, size in enumerate(shape))] * samples
    return [tuple((key, lengths[i]) for key, lengths in masks.items()) for i in range(samples)]


def sample_inputs(batch: Mapping[str, Tensor], size: SampleSize) -> dict[str, Tensor]:
    """The shapes of one unpadded sample of a batch that is of ``size``, on the meta device."""
    lengths = {key: length for key, length in size if key.endswith(MASK)}

    def cut(key: str, value: Tensor) -> Tensor:
        one = value[:1]  # (1, ...)
        mask = next((mask for mask in lengths if mask != MASK and key.startswith(mask.removesuffix(MASK))), MASK)
        padded = mask in lengths and value.dim() >= 2 and value.shape[1] == batch[mask].shape[1]
        return (one[:, : lengths[mask]] if padded else one).to("meta")

    # a mask that masks nothing is left out: models look into it, and meta tensors have nothing to look at
    return {key: cut(key, value) for key, value in batch.items() if key not in lengths}


def layer_tokens(model: nn.Module, name: str, batch: Mapping[str, Tensor]) -> list[int] | None:
    """Real tokens of each sample that the module ``name`` sees, ``B`` integers; None where all are alike."""
    mask = adapter_for(model).padding_mask(model, name, batch)
    return None if mask is None else mask.sum(dim=1).tolist()


def flops_outside_ffns(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of one call of a converted model, its layers with experts left out: embeddings, attention, head.

    Counted by ``torch.utils.flop_counter``, of shapes alone, without arithmetic; of a model that looks at values as it
    runs, of a real call.

    Args:
        model: A model with experts.
        inputs: A batch on the meta device, as :func:`sample_inputs` makes it.

    Raises:
        ConfigError: If the model looks at values, and its parameters are parted among processes.
    """
    with evaluating(model):
        try:
            return _flops_of_shapes(model, inputs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    check(
        not is_sharded(model),
        f"{type(model).__name__}: its FLOPs cannot be counted from shapes ({reason}), and parts of it cannot be called "
        "alone; must be whole on each process, as with strategy=ddp",
    )
    with evaluating(model):
        return _flops_of_a_call(model, inputs)


def _flops_of_a_call(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    if any(parameter.is_meta for parameter in model.parameters()):
        model = copy.deepcopy(model).to_empty(device="cpu")
        for tensor in own_tensors(model).values():
            tensor.detach().zero_()
    adapter, device = adapter_for(model), next(model.parameters()).device
    noise = {}
    for key, value in inputs.items():
        if value.is_floating_point():
            noise[key] = torch.randn(value.shape, dtype=value.dtype, device=device)
        else:  # ids must be some that there are, of texts which may be of different lengths
            made = adapter.random_inputs(model, 1, value.shape[1] if value.dim() > 1 else 1)
            noise[key] = made.get(key, torch.zeros(value.shape, dtype=value.dtype)).to(device)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the CPU's fused kernel is not counted
    with math, skipped(expert_layers(model).values()), FlopCounterMode(display=False) as counter, torch.no_grad():
        adapter.logits(model, noise)
    return counter.get_total_flops()


def _flops_of_shapes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    # fake, since models look into meta tensors, and do not look into what they take for tracing
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = {
        name: mode.from_tensor(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        for name, tensor in own_tensors(model).items()
    }
    fake_inputs = {key: mode.from_tensor(value) for key, value in inputs.items()}
    experts_left_out = skipped(expert_layers(model).values())
    with mode, experts_left_out, without_gathering(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        borrowing: Any = Borrowing(model, fake)
        adapter_for(model).logits(borrowing, fake_inputs)
    return counter.get_total_flops()


@contextmanager
def skipped(layers: Iterable[ExpertLayer]) -> Iterator[None]:
    """Let ``layers`` with experts hand through what they are given while the body runs.

    One whose output is of another width than its input gives nothing in particular, of the right shape.
    """
    layers = list(layers)
    for layer in layers:
        d_out = layer.sizes.d_out
        layer.forward = lambda x, d_out=d_out: x if x.shape[-1] == d_out else x.new_empty(*x.shape[:-1], d_out)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
