"""Ways to split neurons into experts, one file each: ``split(weight, profile, num_experts, seed) -> assignment``.

``weight`` is ``(d_ff, d_model)``, what decides whether a neuron fires; ``profile`` is ``(d_ff, p)``, which tokens each
neuron fires for, or None; the assignment is ``(d_ff,)`` integers in ``[0, E)``, every expert ``d_ff / E`` times. A
split that needs the profile sets the function's attribute ``needs_profile``.
"""
