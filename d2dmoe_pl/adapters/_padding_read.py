"""Whether what comes of a text in a model depends on what its FFNs give for padding."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters._adapter import MASK, stream_of
from d2dmoe_pl.adapters._ffn_sites import Site
from d2dmoe_pl.adapters._unchanged import nothing_silent, unchanged
from d2dmoe_pl.hooks import hooked


@torch.no_grad()
def reads_padding(
    adapter: Any,
    model: Any,
    sites: Sequence[Site],
    texts: Mapping[str, Tensor],
    whole: Tensor,
    streams: Mapping[str, str],
) -> bool:
    """Whether anything of a text changes if FFNs give zeros for its padding: at its tokens, or what is said of it.

    Args:
        adapter: Of the model.
        model: A model of texts, none of whose FFNs has been replaced.
        sites: Its FFNs.
        texts: A batch of two without padding, of which about one half is taken for padding and then the other.
        whole: Their mask, of ones, ``(2, L)``.
        streams: As of :meth:`Adapter.streams`.
    """
    behind = whole.clone()
    for row, half in zip(behind, (behind.shape[1] // 2, behind.shape[1] // 2 + 1), strict=True):
        row[half:] = 0  # where some pool pairs, one of the two ends within a pair
    for mask in (behind, behind.flip(1)):
        with unchanged(model), nothing_silent(model):
            model.eval()
            kept, silenced = (
                _seen(adapter, model, sites, adapter.masked(model, texts, mask), streams, is_silent)
                for is_silent in (False, True)
            )
        if any(_differ(one, other) for one, other in zip(kept, silenced, strict=True)):
            return True
    return False


def _seen(
    adapter: Any,
    model: Any,
    sites: Sequence[Site],
    batch: Mapping[str, Tensor],
    streams: Mapping[str, str],
    is_silent: bool,
) -> list[Tensor]:
    """What each FFN is given at tokens of texts, and the logits there, or of whole texts."""
    seen: list[Tensor] = []

    def see(mask: Tensor | None, module: nn.Module, args: tuple[Tensor]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])  # (B * L, d)
        seen.append(rows if mask is None else rows[mask.flatten() != 0])

    def silence(mask: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * mask.view(*output.shape[:-1], 1)

    def handles() -> Iterator[RemovableHandle]:
        for site in sites:
            mask = batch.get(stream_of(streams, site.name)[1])
            end = site.name if site.form == "module" else site.down
            yield model.get_submodule(site.up).register_forward_pre_hook(partial(see, mask))
            if is_silent and mask is not None:
                yield model.get_submodule(end).register_forward_hook(partial(silence, mask))

    with hooked(handles()):
        logits = adapter.traced_logits(model, batch)
    mask, dim = batch[MASK], adapter.token_dim(logits)
    if "decoder_input_ids" not in batch and logits.dim() == 3 and logits.shape[dim] == mask.shape[1]:
        return [*seen, logits.movedim(dim, 1)[mask != 0]]
    # a head that reads a certain token is not to find padding in its place
    return seen if bool((mask[:, 0] == 0).any()) and "decoder_input_ids" not in batch else [*seen, logits]


def _differ(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if one.dtype == torch.float32 else 1e-2
    return bool((one - other).abs().max() > tolerance * one.abs().max())
