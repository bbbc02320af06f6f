"""A model that is done changing, made as fast as it can be on the machine at hand."""

from torch import nn

from d2dmoe_pl.errors import check


def optimize_(model: nn.Module) -> None:
    """Have ``model`` compiled by ``torch.compile``, for inference and any number of samples and tokens.

    The first calls compile, for about a minute each: one for a batch of one sample, one for all others. ``set_tau_``
    can be called as before; a gate, router, backend or type that changes is compiled for anew. Nothing can be trained
    any more, and what is saved is the model as it was.

    Args:
        model: A model at any stage, in the type that it is to run in.

    Raises:
        ConfigError: If it is optimised already.

    Example:
        >>> import timm, torch
        >>> from d2dmoe_pl import ExpertsConfig, convert_to_moe_, optimize_
        >>> model = timm.create_model("vit_tiny_patch16_224", embed_dim=12, depth=1, num_heads=1)
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> optimize_(model)
        >>> model.training, any(parameter.requires_grad for parameter in model.parameters())
        (False, False)
    """
    check(model._compiled_call_impl is None, f"{type(model).__name__}: is optimised already")
    model.eval().requires_grad_(False)  # without gradients, experts run on compiled kernels
    model.compile(dynamic=True)
