"""A tiny Vision Transformer for digits, and its weights at a moment."""

import tiny

from d2dmoe_pl.adapters import TimmModel

DIGIT_LABELS = [str(digit) for digit in range(10)]


def digits_source(**kwargs):
    return TimmModel("vit_tiny_patch16_224", mlp_ratio=3.0, **{**tiny.DIGITS_VIT, **kwargs})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}
