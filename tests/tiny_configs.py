"""Configurations of tiny models, one a Hugging Face family and notable variant."""

import transformers

WIDTH = 48
DIGITS_VIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
BORN_SPARSE = ("opt",)
ENCODER_DECODERS = ("t5", "bart", "any_encoder_decoder")
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": WIDTH}


def bert_config(**kwargs):
    """The tiny BERT."""
    return transformers.BertConfig(**{"vocab_size": 40, "max_position_embeddings": 16, **SHAPE, **kwargs})


def decoder_config(make, **kwargs):
    """A tiny Llama or Gemma."""
    heads = {"num_key_value_heads": 1, "head_dim": 12}
    return make(**{**SPECIAL, "vocab_size": 40, "max_position_embeddings": 64, **SHAPE, **heads, **kwargs})


def _gpt2_config():
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_inner": WIDTH, "n_positions": 64}
    return transformers.GPT2Config(vocab_size=40, **SPECIAL, **shape)


def _t5_config(ffn, make=transformers.T5Config):
    shape = {"d_model": 24, "num_layers": 2, "num_heads": 2, "d_kv": 12, "d_ff": WIDTH}
    return make(vocab_size=40, feed_forward_proj=ffn, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **shape)


def _distilbert_config():
    shape = {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": WIDTH}
    return transformers.DistilBertConfig(vocab_size=40, max_position_embeddings=16, **shape)


# one configuration a Hugging Face family and notable variant, under the family's name first
CONFIGS = {
    "bert": bert_config,
    "roberta": lambda: transformers.RobertaConfig(vocab_size=40, max_position_embeddings=16, **SHAPE),
    "distilbert": _distilbert_config,
    "gpt2": _gpt2_config,
    "llama": lambda: decoder_config(transformers.LlamaConfig),
    "llama-bias": lambda: decoder_config(transformers.LlamaConfig, mlp_bias=True),
    "gemma": lambda: decoder_config(transformers.GemmaConfig),
    "gemma-2": lambda: decoder_config(transformers.Gemma2Config, sliding_window=4),
    "gemma-3": lambda: decoder_config(transformers.Gemma3TextConfig, sliding_window=4),
    "t5": lambda: _t5_config("gelu"),
    "t5-gated": lambda: _t5_config("gated-gelu"),
    "whisper": lambda: transformers.WhisperConfig(
        vocab_size=40,
        d_model=24,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=WIDTH,
        decoder_ffn_dim=WIDTH,
        num_mel_bins=4,
        max_source_positions=6,
        max_target_positions=16,
        classifier_proj_size=8,
        **SPECIAL,
        decoder_start_token_id=1,
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=40,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=WIDTH,
        decoder_ffn_dim=WIDTH,
        max_position_embeddings=64,
        activation_dropout=0.1,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **SPECIAL,
    ),
    "mistral": lambda: decoder_config(transformers.MistralConfig, sliding_window=4),
    "qwen2": lambda: decoder_config(transformers.Qwen2Config),
    "qwen3": lambda: decoder_config(transformers.Qwen3Config),
    "smollm3": lambda: decoder_config(transformers.SmolLM3Config),
    "phi": lambda: decoder_config(transformers.PhiConfig, num_key_value_heads=2),
    "phi3": lambda: decoder_config(transformers.Phi3Config),
    "gpt_neox": lambda: decoder_config(transformers.GPTNeoXConfig),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=40, ffn_dim=WIDTH, max_position_embeddings=64, word_embed_proj_dim=24, **SPECIAL, **SHAPE
    ),
    "opt-after": lambda: transformers.OPTConfig(
        vocab_size=40,
        ffn_dim=WIDTH,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
        do_layer_norm_before=False,
        **SPECIAL,
        **SHAPE,
    ),
    "electra": lambda: transformers.ElectraConfig(vocab_size=40, max_position_embeddings=16, **SHAPE),
    "xlm_roberta": lambda: transformers.XLMRobertaConfig(vocab_size=40, max_position_embeddings=16, **SHAPE),
    "camembert": lambda: transformers.CamembertConfig(vocab_size=40, max_position_embeddings=16, **SHAPE),
    "mpnet": lambda: transformers.MPNetConfig(vocab_size=40, max_position_embeddings=16, **SHAPE),
    "deberta_v2": lambda: transformers.DebertaV2Config(
        vocab_size=40,
        max_position_embeddings=16,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        **SHAPE,
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        vocab_size=40,
        max_position_embeddings=16,
        local_attention=4,
        mlp_dropout=0.1,
        cls_token_id=1,
        sep_token_id=2,
        **SPECIAL,
        **SHAPE,
    ),
    "dinov2": lambda: transformers.Dinov2Config(mlp_ratio=2, **IMAGE, **SHAPE),
    "beit": lambda: transformers.BeitConfig(**IMAGE, **SHAPE),
    "clip": lambda: transformers.CLIPConfig(text_config={"vocab_size": 40, **SHAPE}, vision_config={**IMAGE, **SHAPE}),
    "siglip": lambda: transformers.SiglipConfig(
        text_config={"vocab_size": 40, **SHAPE}, vision_config={**IMAGE, **SHAPE}
    ),
    "any_transformer": lambda: decoder_config(transformers.Starcoder2Config),
    "any_transformer-encoder": lambda: transformers.RoFormerConfig(
        vocab_size=40, max_position_embeddings=16, embedding_size=24, **SHAPE
    ),
    "any_transformer-pictures": lambda: transformers.ViTMSNConfig(**IMAGE, **SHAPE),
    "any_audio": lambda: transformers.Wav2Vec2Config(
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=12,
        mask_time_prob=0.0,
        **SHAPE,
    ),
    "any_audio-spectrogram": lambda: transformers.ASTConfig(
        max_length=16, num_mel_bins=8, patch_size=4, time_stride=4, frequency_stride=4, **SHAPE
    ),
    "any_encoder_decoder": lambda: transformers.PegasusConfig(
        vocab_size=40,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=WIDTH,
        decoder_ffn_dim=WIDTH,
        max_position_embeddings=64,
        forced_eos_token_id=None,
        decoder_start_token_id=0,
        **SPECIAL,
    ),
    "any_encoder_decoder-mt5": lambda: _t5_config("gated-gelu", transformers.MT5Config),
    "vit": lambda: transformers.ViTConfig(**IMAGE, **SHAPE),
    "deit": lambda: transformers.DeiTConfig(**IMAGE, **SHAPE),
    "deit-distilled": lambda: transformers.DeiTConfig(
        **IMAGE, **SHAPE, architectures=["DeiTForImageClassificationWithTeacher"]
    ),
}
