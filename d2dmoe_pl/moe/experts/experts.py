"""The neurons of one FFN as ``E`` experts of ``s`` neurons each."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.adapters import FFN, holder_of
from d2dmoe_pl.errors import check, said_of
from d2dmoe_pl.moe.cutoffs.cutoffs import cut
from d2dmoe_pl.moe.execution import BACKENDS, taken_cutoffs
from d2dmoe_pl.moe.experts.activation_kinds import activation_kind
from d2dmoe_pl.moe.experts.ffn_math import hidden_activations


def check_assignment(assignment: Any, d_ff: int, num_experts: int, name: str) -> None:
    """Raise ``ConfigError`` unless ``assignment``, ``(d_ff,)``, gives every expert exactly ``d_ff / E`` neurons."""
    check(
        num_experts > 0 and d_ff % num_experts == 0,
        f"num_experts={num_experts}: must divide the FFN width, which is {d_ff} in {name}",
    )
    is_balanced = (
        isinstance(assignment, Tensor)
        and not (assignment.is_floating_point() or assignment.dtype == torch.bool)
        and assignment.shape == (d_ff,)
        and bool((assignment >= 0).all())
        and torch.bincount(assignment, minlength=num_experts).tolist() == [d_ff // num_experts] * num_experts
    )
    check(
        is_balanced,
        f"assignment of {name}: must give each of the {num_experts} experts exactly {d_ff // num_experts} neurons, as "
        f"a tensor of {d_ff} integers; is {said_of(assignment)}",
    )


Weights = list[Any]  # tensors, and None where there is none


WEIGHTS = ("up_weight", "up_bias", "gate_weight", "gate_bias", "down_weight", "down_bias")


@torch.inference_mode(False)
def leave_inference_mode_(module: nn.Module) -> None:
    """Have tensors that were made in inference mode as others are, whose changes kernels can tell; a copy, once."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    copied: Any = tensor.clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(copied, requires_grad=False) if is_parameter else copied


def own_tensors(module: nn.Module, names: Iterable[str]) -> Weights:
    """Parameters and buffers of ``module`` by name, past nn.Module's lookup, which takes as long as a token's products.

    Where something else stands for them, as a parametrisation does, it is asked.
    """
    parameters, buffers = module._parameters, module._buffers
    return [
        parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(module, name)
        for name in names
    ]


def to_pack(module: Any, weights: Weights) -> Weights:
    """The weights of experts or a router as kernels may take them that keep a packed copy until they see a change."""
    if not torch.compiler.is_compiling() and weights[0].is_inference():
        leave_inference_mode_(module)
        weights = module.weights
    if not module.is_gathered:
        return weights
    with torch.inference_mode(False):  # copies are gone after the call; what was packed of them is of no other's
        return [None if weight is None else weight.clone() for weight in weights]


class Experts(nn.Module):
    """``E`` experts that together are one dense FFN: ``y = b2 + sum_e expert_e(x)``.

    Neurons are stored expert by expert, so that views of the weights with ``E`` and ``s`` merged are the dense FFN
    with its neurons permuted.

    Args:
        ffn: The dense FFN to take weights, activation and inner dropout from.
        num_experts: ``E``; divides ``d_ff``.
        assignment: Expert of each neuron, ``(d_ff,)`` integers in ``[0, E)``, every expert ``s`` times; in order of
            the neurons if not given.
        backend: Name of a backend, e.g. of a file in ``moe/execution``.

    Attributes:
        is_gathered: Whether weights become whole from parts for each pass, in the same memory, where autograd's counts
            of changes say nothing.

    Shapes: ``up_weight`` and ``gate_weight`` are ``(E, s, d_model)``, ``down_weight`` is ``(E, s, d_out)``, ``up_bias``
    and ``gate_bias`` ``(E, s)``, ``down_bias`` ``(d_out,)``. Only in the place of an attention projection can ``d_out``
    be another width than ``d_model``.
    """

    is_quantized = False
    is_gathered = False

    num_experts: int
    up_weight: nn.Parameter
    up_bias: nn.Parameter | None
    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None
    down_weight: nn.Parameter
    down_bias: nn.Parameter | None
    activation: nn.Module
    hidden_dropout: nn.Module

    def __init__(self, ffn: FFN, num_experts: int, assignment: Tensor | None = None, backend: str = "auto") -> None:
        super().__init__()
        if assignment is None:
            assignment = torch.arange(ffn.d_ff, device="cpu") * num_experts // ffn.d_ff
        check_assignment(assignment, ffn.d_ff, num_experts, ffn.name)
        order = assignment.argsort(stable=True).to(ffn.up.weight.device)  # (d_ff,): neurons, expert by expert
        self.num_experts = num_experts
        self.set_backend(backend)

        def kept(values: Tensor, linear: Any, name: str) -> nn.Parameter:
            is_trained = getattr(holder_of(linear), name).requires_grad
            return nn.Parameter(values.contiguous(), is_trained)

        def grouped(linear: Any, name: str) -> nn.Parameter:
            rows = getattr(linear, name).detach()  # (d_ff[, d])
            return kept(rows[order].unflatten(0, (num_experts, -1)), linear, name)  # (E, s[, d])

        up, gate, down = ffn.up, ffn.gate_proj, ffn.down
        columns = down.weight.detach().t()[order].unflatten(0, (num_experts, -1))  # (E, s, d_out)
        self.up_weight = grouped(up, "weight")
        self.up_bias = None if up.bias is None else grouped(up, "bias")
        self.gate_weight = None if gate is None else grouped(gate, "weight")
        self.gate_bias = None if gate is None or gate.bias is None else grouped(gate, "bias")
        self.down_weight = kept(columns, down, "weight")
        self.down_bias = None if down.bias is None else kept(down.bias.detach().clone(), down, "bias")
        self.activation = ffn.activation
        self._kind = (ffn.activation, activation_kind(ffn.activation))
        self.hidden_dropout = ffn.hidden_dropout

    @property
    def activation_kind(self) -> str | None:
        """What :func:`activation_kind` says of the activation function, found once for each that is set."""
        activation: Any = self._modules["activation"]
        known = self._kind[0]
        # where modules are shared, torch.export has proxies for all of them, each with the __dict__ of its own
        if known is not activation and known.__dict__ is not activation.__dict__:
            self._kind = (activation, activation_kind(activation))
        return self._kind[1]

    @property
    def expert_dim(self) -> int:
        """``s``, the neurons of one expert."""
        return self.up_weight.shape[1]

    @property
    def dense_dim(self) -> int:
        """Neurons of the dense FFN."""
        return self.num_experts * self.expert_dim

    @property
    def d_model(self) -> int:
        return self.up_weight.shape[2]

    @property
    def d_out(self) -> int:
        return self.down_weight.shape[2]

    @property
    def is_gated(self) -> bool:
        return self.gate_weight is not None

    @property
    def input_weight(self) -> Tensor:
        """What decides whether neurons fire, ``(E, s, d_model)``."""
        return self.up_weight if self.gate_weight is None else self.gate_weight

    @property
    def weights(self) -> Weights:
        """All parameters, in the order that kernels registered with ``torch.library`` take them."""
        return own_tensors(self, WEIGHTS)

    def weights_in(self, dtype: torch.dtype) -> Weights:
        """The same as they are multiplied in ``dtype``: as they are, unless they are packed in a narrower type."""
        return self.weights

    def set_backend(self, backend: str) -> None:
        """Choose how the experts run, by the name of a file in ``moe/execution``."""
        self.backend = backend
        self.measured: dict[Hashable, Any] = {}  # what ``auto`` found fastest
        self._run = BACKENDS.find(backend, "backend")
        self._taken_cutoffs = taken_cutoffs(self._run)

    def hidden(self, tokens: Tensor, gate_cutoff: Tensor | None = None) -> Tensor:
        """What the activation (times the gated product) gives, before dropout: ``(N, E, s)``; see ``forward``."""
        up_weight: Any
        up_weight, up_bias, gate_weight, gate_bias = (  # (E * s[, d])
            None if rows is None else rows.flatten(0, 1) for rows in self.weights_in(tokens.dtype)[:4]
        )
        hidden = hidden_activations(self.activation, tokens, up_weight, up_bias, gate_weight, gate_bias, gate_cutoff)
        return hidden.unflatten(1, (self.num_experts, -1))  # (N, E, s)

    def gates(self, tokens: Tensor) -> Tensor:
        """What the activation gives for the gates of a gated FFN's neurons: ``(N, E * s)``."""
        weight, bias = (None if rows is None else rows.flatten(0, 1) for rows in self.weights_in(tokens.dtype)[2:4])
        assert weight is not None
        gates: Tensor = self.activation(F.linear(tokens, weight, bias))
        return gates

    def combine(self, hidden: Tensor) -> Tensor:
        """The output of the experts from their activations ``(N, E, s)``: ``(N, d_out)``."""
        down_weight, down_bias = self.weights_in(hidden.dtype)[4:6]
        kept = self.hidden_dropout(hidden.flatten(1))  # (N, E * s)
        return F.linear(kept, down_weight.flatten(0, 1).t(), down_bias)  # (N, E * s) @ (E * s, d_out)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cutoff: Tensor | None = None,
        gate_cutoff: Tensor | None = None,
        instead: Callable[["Experts", Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run the experts that ``mask`` selects, all of them if there is none.

        Args:
            tokens: ``(N, d_model)``.
            mask: Boolean ``(N, E)``.
            cutoff: Magnitude below which an activation is left out, without dimensions; None for nothing.
            gate_cutoff: The same of what the activation gives for the gate of a neuron, which is then left out as a
                whole.
            instead: What is to be run in the place of all that, with these experts and what is given as ``tokens``.
                What adapts weights from outside (PEFT) does so for calls alone, so that others are to be made in one.

        Returns:
            ``(N, d_out)``; or what ``instead`` gives.

        Raises:
            ConfigError: If there are cutoffs that the backend, which is from outside of the package, does not take.
        """
        if instead is not None:
            return instead(self, tokens)
        if mask is None:
            hidden = self.hidden(tokens, gate_cutoff)
            return self.combine(hidden if cutoff is None else cut(hidden, cutoff))
        given = {"cutoff": cutoff, "gate_cutoff": gate_cutoff}
        cutoffs = {name: value for name, value in given.items() if value is not None}
        for name in cutoffs:
            check(
                name in self._taken_cutoffs,
                f"backend={self.backend!r}: takes no {name}, and the layer has one; must have a further argument, "
                f"{name}, or fit shares of 1 by CutoffFitting, which takes them away",
            )
        return self._run(self, tokens, mask, **cutoffs)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, expert_dim={self.expert_dim}, d_model={self.d_model}"
