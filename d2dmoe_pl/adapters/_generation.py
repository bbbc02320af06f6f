"""A converted model that generates texts: its padding mask says all that is padding, whatever the cache."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

TAIL = "_d2dmoe_tail"  # of the token ids: how many of each row's last ones stand behind a text that is finished


@torch.no_grad()
def written_by(model: Any, config: GenerationConfig, inputs: Mapping[str, Tensor], num_tokens: int) -> Tensor:
    """What ``generate`` gives by ``config`` alone: of the model's own, such as a least length, nothing counts.

    Args:
        model: That can generate.
        config: Without it, the likeliest token is written each time.
        inputs: Of the model.
        num_tokens: At most so many are written.
    """
    own, model.generation_config = model.generation_config, config
    try:
        written: Tensor = model.generate(**inputs, max_new_tokens=num_tokens)
    finally:
        model.generation_config = own
    return written


class PreparesInputs:
    """What a converted model has for ``prepare_inputs_for_generation``: its class's own, with a mask of padding.

    ``generate`` goes on with padding behind texts of a batch that are finished, and its mask has ones there; for caches
    of a fixed size it makes a mask of four dimensions of it. The model is given one of two dimensions, which is zero
    there: nothing that comes of it is ever read.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's own, by which transformers tells which arguments it may be given."""
        return inspect.signature(type(self._model).prepare_inputs_for_generation.__get__(self._model))

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's arguments, as transformers wants them."""
        inputs = type(self._model).prepare_inputs_for_generation(self._model, input_ids, *args, **kwargs)
        key = "decoder_attention_mask" if self._model.config.is_encoder_decoder else "attention_mask"
        made, tail = inputs.pop(key, None), getattr(input_ids, TAIL, None)
        is_padding = made is None or (isinstance(made, Tensor) and made.dim() == 2)
        mask = made if is_padding else kwargs.get(key)
        if tail is not None:
            mask = torch.ones_like(input_ids) if mask is None else mask
            places = torch.arange(mask.shape[1], 0, -1, device=mask.device)  # from behind, the last is 1
            mask = mask * (places > tail[:, None].to(mask.device))
        if mask is not None:
            inputs[key] = mask
        return inputs


class GetsStoppingCriteria:
    """What a converted model has in the place of the method that gathers what ends a text.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """The class's own criteria, which are the same, and mark what stands behind finished texts."""
        return _Marking(type(self._model)._get_stopping_criteria(self._model, *args, **kwargs))


class _Marking(StoppingCriteriaList):
    """Criteria that leave at the token ids how many of each row's last ones are behind its end.

    Rows are told by what ended them, not by the id of padding, which may be a token of a text, or the one that ends it.
    Beams go on as they are: their ids are not those that the criteria were asked about.
    """

    _tail: Tensor | None = None
    _ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)  # (B,)
        if not any(hasattr(criterion, "eos_token_id") for criterion in self):
            return done  # texts that nothing but other criteria can end are written on
        if len(done) == 1:
            return done  # it ends with the call; and assisted generation asks about tokens that it may take back
        if self._tail is None or self._ended is None:
            self._tail, self._ended = torch.zeros_like(done, dtype=torch.long), torch.zeros_like(done)
        self._tail = torch.where(self._ended, self._tail + 1, 0)
        self._ended = self._ended | done
        if bool(self._tail.any()):
            setattr(input_ids, TAIL, self._tail)
        return done
