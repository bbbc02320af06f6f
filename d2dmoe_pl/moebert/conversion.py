"""In-place conversion of a dense model to MoEBERT (arXiv 2204.07675), and the parts of its routing that are set up."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import FFN, adapter_for
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.find_layers import FilterFn, select_ffns
from d2dmoe_pl.moe.lost_hooks import check_not_hooked, replaced_modules
from d2dmoe_pl.moe.token_streams import shared_context_
from d2dmoe_pl.moebert.experts import ImportanceExperts, check_expert_sizes, expert_neurons
from d2dmoe_pl.moebert.layer import MoEBERTConfig, MoEBERTLayer, moebert_layers
from d2dmoe_pl.moebert.routing import ROUTINGS, HashRouting, RoutingSizes, check_table


def convert_to_moebert_(
    model: nn.Module,
    config: MoEBERTConfig,
    filter_fn: FilterFn | None = None,
    *,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace dense FFNs, with the LayerNorm after their residual, by MoEBERT layers.

    Args:
        model: A model whose adapter names that LayerNorm.
        config: The experts and their routing.
        filter_fn: ``(ffn, name) -> bool``; which FFNs to convert, all if not given.
        importance: Of the neurons of each FFN, ``(d_ff,)``, by the FFN's name; all equal if not given.

    Raises:
        ConfigError: If an FFN is too narrow for the experts, of another kind than they are made for, or not among those
            in ``importance``, or the routing needs token ids of a model that has none. The model is then as it was.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl import MoEBERTConfig, convert_to_moebert_
        >>> shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
        >>> model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=9, hidden_size=8, **shape))
        >>> convert_to_moebert_(model, MoEBERTConfig(num_experts=2, expert_dim=8, num_shared=4))
        >>> model.bert.encoder.layer[0].intermediate.experts.num_experts
        2
    """
    adapter = adapter_for(model)
    ffns = select_ffns(model, filter_fn)
    check_not_hooked(replaced_modules(model, ffns))
    vocabulary_size = adapter.vocabulary_size(model)
    routing_class = ROUTINGS.find(config.routing, "routing")
    check(
        vocabulary_size is not None or not routing_class.needs_ids,
        f"routing={config.routing!r}: goes by token ids, which a {adapter.family} has not",
    )
    for ffn in ffns:
        _check_ffn(ffn, config, importance)
    for position, ffn in enumerate(ffns):
        scores = torch.zeros(ffn.d_ff, device="cpu") if importance is None else importance[ffn.name]
        neurons = expert_neurons(scores, config.num_experts, config.expert_dim, config.num_shared)
        experts = ImportanceExperts(ffn, neurons, config.expert_dropout)
        sizes = RoutingSizes(config.num_experts, ffn.d_model, vocabulary_size, config.seed + position)
        routing = routing_class(sizes).to(ffn.up.weight.device, ffn.up.weight.dtype)
        context = shared_context_(model, ffn.name)
        layer = MoEBERTLayer(experts, routing, context, config).train(model.get_submodule(ffn.name).training)
        adapter.put_with_residual_(model, ffn, layer)
    adapter.mark_converted_(model)


def set_hash_table_(model: nn.Module, table: Tensor, argument: str = "table") -> None:
    """Give every MoEBERT layer of ``model`` that routes by a hash table the entries of ``table``.

    Args:
        model: A converted model.
        table: Expert of each token id, ``(vocabulary,)`` integers.
        argument: What the user calls the table, for the errors.

    Raises:
        ConfigError: If the table's length is not the vocabulary's, an entry is no expert, or the model's routing goes
            by no table.

    Example:
        >>> import torch, transformers
        >>> from d2dmoe_pl import MoEBERTConfig, convert_to_moebert_, set_hash_table_
        >>> shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
        >>> model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=9, hidden_size=8, **shape))
        >>> convert_to_moebert_(model, MoEBERTConfig(num_experts=2, expert_dim=8, num_shared=4))
        >>> set_hash_table_(model, torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0]))
        >>> model.bert.encoder.layer[0].intermediate.routing.table[:3]
        tensor([0, 1, 0])
    """
    routings = []
    for name, layer in moebert_layers(model).items():
        routing = layer.routing
        if not isinstance(routing, HashRouting):
            raise ConfigError(
                f"{argument}: {name} routes by {layer.config.routing}; allowed with hash_random and hash_balance only"
            )
        check_table(table, len(routing.table), layer.experts.num_experts, argument)
        routings.append(routing)
    for routing in routings:
        routing.table.copy_(table)


def _check_ffn(ffn: FFN, config: MoEBERTConfig, importance: Mapping[str, Tensor] | None) -> None:
    check(
        ffn.residual_norm is not None and ffn.gate_proj is None,
        f"{ffn.name}: MoEBERT's experts replace an FFN without a gate and the LayerNorm after its residual, as BERT "
        "has; this one is of another kind",
    )
    parts = {"up": ffn.up, "down": ffn.down, "its LayerNorm": ffn.residual_norm}
    bare = [part for part, module in parts.items() if module is not None and module.bias is None]
    check(not bare, f"{ffn.name}: MoEBERT's experts have biases of their own; must have some in {', '.join(bare)}")
    check_expert_sizes(config.num_experts, config.expert_dim, config.num_shared, ffn.d_ff, ffn.name)
    if importance is not None:
        scores = importance.get(ffn.name)
        check(
            scores is not None and scores.shape == (ffn.d_ff,),
            f"importance of {ffn.name}: {'missing' if scores is None else tuple(scores.shape)}; must be one score for "
            f"each of its {ffn.d_ff} neurons",
        )


def restore_moebert_(model: nn.Module, name: str, made: Mapping[str, Any]) -> None:
    """Give the dense FFN ``name`` the structure that :meth:`MoEBERTLayer.describe` recorded."""
    config = MoEBERTConfig(**{key: value for key, value in made.items() if key != "method"})
    convert_to_moebert_(model, config, lambda ffn, candidate: candidate == name)
