"""Ways to choose one expert a token, one file each: ``routing(sizes) -> module``. MoEBERT (arXiv 2204.07675).

``sizes`` is a :class:`d2dmoe_pl.moe.chosen.RoutingSizes`. The module takes tokens ``(N, d_model)`` without padding and
the running :class:`d2dmoe_pl.moe.context.TokenContext`, and gives a :class:`d2dmoe_pl.moe.chosen.Chosen`; its method
``flops(tokens, sentences)`` says what that costs. The contract, held by one test over this package:

- every token gets one expert, the same whether its sentence comes alone or in a padded batch;
- forward hooks on the module see every decision.

A routing that needs to know how often each token id occurs sets the function's attribute ``needs_counts``, one that
needs the model to be given token ids ``needs_ids``.
"""
