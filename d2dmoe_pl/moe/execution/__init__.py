"""Backends: ways to run the experts that a mask selects, one file each, whose ``BACKEND`` is a function.

``backend(experts, tokens, mask)`` takes ``tokens``, ``(N, d)``, and ``mask``, boolean ``(N, E)``; the output is
``(N, d_out)`` and includes the output bias. Further arguments are None or tensors without dimensions, ``cutoff``:
activations of a smaller magnitude are left out of the second product, and ``gate_cutoff``: so are, as a whole, neurons
for whose gate the activation function gives a smaller one. All backends compute the same function; ``reference`` is the
plain twin that the others are tested against. Compiled ones are for inference: operators
``torch.ops.d2dmoe_pl.moe_<name>(tokens, mask, *experts.weights, activation, cutoff, gate_cutoff)`` of
``torch.library``, which ``torch.compile`` and ``torch.export`` take as they are. ``auto`` chooses call by call.
"""

from d2dmoe_pl.moe.execution._backend import BACKENDS, Backend, register_backend, taken_cutoffs

__all__ = ["BACKENDS", "Backend", "register_backend", "taken_cutoffs"]
