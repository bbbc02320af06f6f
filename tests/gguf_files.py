"""A tiny random model in a GGUF file, as llama.cpp writes them: some tensors in blocks of 8 bits."""

import string

import gguf
import numpy as np
import transformers

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
    **{f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")},
}
TOKENS = ["<unk>", "<s>", "</s>", "Ġ", ".", *string.ascii_lowercase, "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]


def llama(**changed):
    """A dense model, whose config is what a GGUF file says of it."""
    settings = {
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changed)).eval()


def permuted(rows, heads):
    """The rows of queries or keys in llama.cpp's order: halves of a head's rotation side by side."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model, path, architecture="llama", tokens=TOKENS, raw_type=None, extra=None, keys=None):
    """Write ``model`` to ``path``, and into it what the file holds; returns the path.

    Args:
        model: As :func:`llama` gives it.
        path: The file.
        architecture: Its name in the file.
        tokens: Of the tokenizer.
        raw_type: A type to write the last layer's down projection in, as zeros.
        extra: Further tensors.
        keys: Further texts and numbers of the file.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A tiny model of a test")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3 if token[0] == "<" else 1 for token in tokens])
    for add, token in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(token)
    for key, value in (keys or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(key, value)
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        values, is_matrix = tensor.numpy().copy(), tensor.dim() == 2
        for key, value in NAMES.items():
            name = name.replace(key, value)
        if ".attn_q." in name or ".attn_k." in name:
            heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
            values = permuted(values, heads)
        if is_matrix and "token_embd" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quantize(values, kind)
            tensor.copy_(type(tensor)(unpermuted(gguf.dequantize(blocks, kind), name, config)))
            if raw_type is not None and name == f"blk.{config.num_hidden_layers - 1}.ffn_down.weight":
                block, size = gguf.GGML_QUANT_SIZES[raw_type]
                blocks, kind = np.zeros((values.shape[0], values.shape[1] // block * size), np.uint8), raw_type
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unpermuted(rows, name, config):
    """What :func:`permuted` was given."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return rows
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
