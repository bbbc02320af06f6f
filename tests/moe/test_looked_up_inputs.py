"""What an exported model looks up: ids by themselves, however they are given on, and positions that it computes."""

import pytest
import tiny
import torch
from torch import nn

from d2dmoe_pl.compiled_artifact import noise_for
from d2dmoe_pl.moe.ahead_of_time import _described, _exported
from d2dmoe_pl.moe.looked_up_inputs import looked_up_inputs
from d2dmoe_pl.moe.observed_call import observed_call


class Tables(nn.Module):
    """Every kind of lookup, of inputs as they are and of what is computed."""

    def __init__(self):
        super().__init__()
        self.words, self.few, self.places = nn.Embedding(50, 4), nn.Embedding(20, 4), nn.Embedding(30, 4)
        self.register_buffer("table", torch.arange(40))

    def forward(self, words, hashed, kinds, mask, flags):
        found = self.words(words.view(-1)).view(*words.shape, 4) + self.few(words.to(torch.int32).long()[:, None])[:, 0]
        found = found + self.table[hashed.clone()][..., None]
        found = found + self.words.weight.index_select(1, kinds)[0, 0]
        found = found + self.places(mask.cumsum(1) - 1)
        return found[flags]


def test_each_input_has_the_smallest_of_its_tables():
    words, hashed, mask = torch.ones(3, 2, 3, dtype=torch.int64).clone().unbind()
    kinds = torch.ones(2, dtype=torch.int64)
    program = torch.export.export(Tables(), (words.clone(), hashed.clone(), kinds, mask.clone(), mask > 0))
    rows, of_computed = looked_up_inputs(program)
    assert {node.name: size for node, size in rows.items()} == {"words": 20, "hashed": 40, "kinds": 4}
    assert of_computed == 30


# of the second size, which is that of a text
@pytest.mark.parametrize(
    ("kind", "below", "longest"),
    [
        ("bert", {"input_ids": 40, "token_type_ids": 2}, 16),
        ("roberta", {"input_ids": 40}, 14),  # its positions begin after padding's
        ("opt", {"input_ids": 40}, 64),
        ("gpt2", {"input_ids": 40}, 64),
        ("bart", {"input_ids": 40}, 64),
        ("llama", {"input_ids": 40}, None),
        ("t5", {"input_ids": 40}, None),
    ],
)
def test_of_models_ids_and_positions(kind, below, longest):
    model = tiny.routed(kind).eval().requires_grad_(False)
    call = observed_call(model, noise_for(model))
    program, _ = _described(_exported(model, call, 2), call, model)
    assert {given.name: given.below for given in program.inputs if given.below is not None} == below
    most = next(given for given in program.inputs if given.name == "input_ids").sizes[1][2]
    assert most == (torch.iinfo(torch.int64).max if longest is None else longest)
