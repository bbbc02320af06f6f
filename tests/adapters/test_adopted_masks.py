"""What an adopted model calls its attention_mask need not be one of padding: with all experts it is the dense model."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2dmoe_pl.adapters import adopt_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.find_layers import moe_layers

PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
FULL = torch.ones_like(PADDED)


class Texts(nn.Module):
    """Zeros are padding, and no token sees it."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x = x + self.down(F.gelu(self.up(x)))
        x = F.scaled_dot_product_attention(x, x, x, self.seen(attention_mask))
        return self.said(x + self.down(F.gelu(self.up(x))))

    def seen(self, mask):
        return None if mask is None else (mask != 0)[:, None, :]

    def said(self, x):
        return x[:, 0]


class OfPadding(Texts):
    """Ones are padding."""

    def seen(self, mask):
        return (mask == 0)[:, None, :]


class Added(Texts):
    """What is added to scores."""

    def seen(self, mask):
        return mask[:, None, :]


class OfPairs(Texts):
    """Which token sees which, of all texts alike."""

    def seen(self, mask):
        return mask != 0


class Ignored(Texts):
    def seen(self, mask):
        return None


class Pooled(Texts):
    """The mean of all positions."""

    def said(self, x):
        return x.mean(dim=1)


@pytest.mark.parametrize(
    ("kind", "mask", "padded", "tells"),
    [
        (Texts, FULL, PADDED, True),
        (Texts, None, PADDED, True),
        (Texts, PADDED, FULL, False),  # an example without padding would say more
        (OfPadding, 1 - FULL, 1 - PADDED, False),
        (Added, 0.0 * FULL, (PADDED - 1) * 1e9, False),
        (OfPairs, FULL.new_ones(5, 5).tril(), FULL.new_ones(5, 5).tril(), False),
        (Ignored, FULL, PADDED, False),
        (Pooled, FULL, PADDED, False),
    ],
)
@torch.no_grad()
def test_with_all_experts_it_is_the_dense_model(kind, mask, padded, tells, caplog):
    model, ids = kind().eval(), torch.randint(20, (3, 5))
    batches = [{"input_ids": ids, "attention_mask": given} for given in (mask, padded) if given is not None]
    dense = [model(**batch) for batch in batches]
    with caplog.at_level(logging.WARNING, logger="d2dmoe_pl"):
        adopt_(model, {"input_ids": ids} if mask is None else batches[0])
    said = "what is zero in its attention_mask is not only padding, or is read all the same, so that every position is"
    assert (said in caplog.text) is not tells
    convert_to_moe_(model, ExpertsConfig(8))
    for batch, expected in zip(batches, dense, strict=True):
        torch.testing.assert_close(model(**batch), expected, rtol=1e-4, atol=1e-5)
    (layer,) = moe_layers(model).values()
    output = []
    layer.register_forward_hook(lambda module, args, given: output.append(given))
    model(ids, PADDED if mask is None else padded)
    assert bool((output[0][2, 2:] == 0).all()) is (tells and kind is Texts)
