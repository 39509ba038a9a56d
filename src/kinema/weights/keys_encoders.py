"""From transformers' names of text and image encoders, and llama.cpp's of T5, to those of our modules.

Source: huggingface/transformers UMT5EncoderModel, T5EncoderModel, CLIPVisionModel, CLIPTextModel, SiglipVisionModel,
Wav2Vec2Model; ggml-org/llama.cpp gguf-py tensor names of T5 encoders.
"""

from __future__ import annotations

from kinema.weights.dialect import WB, Rule

T5_BLOCK, T5_ATTENTION = r"encoder\.block\.(\d+)", r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention"

TEXT_TRANSFORMERS = (
    Rule(r"shared\.weight", "token_embedding.weight"),
    Rule(r"encoder\.embed_tokens\.weight", "token_embedding.weight", copy=True),
    Rule(rf"{T5_ATTENTION}\.(q|k|v|o)\.weight", r"blocks.\1.attn.\2.weight"),
    Rule(rf"{T5_ATTENTION}\.relative_attention_bias\.weight", r"blocks.\1.pos_embedding.embedding.weight"),
    Rule(rf"{T5_BLOCK}\.layer\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    Rule(rf"{T5_BLOCK}\.layer\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    Rule(rf"{T5_BLOCK}\.layer\.1\.DenseReluDense\.wi_0\.weight", r"blocks.\1.ffn.gate.0.weight"),
    Rule(rf"{T5_BLOCK}\.layer\.1\.DenseReluDense\.wi_1\.weight", r"blocks.\1.ffn.fc1.weight"),
    Rule(rf"{T5_BLOCK}\.layer\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.ffn.fc2.weight"),
    Rule(r"encoder\.final_layer_norm\.weight", "norm.weight"),
)

T5_GGUF = r"enc\.blk\.(\d+)"

TEXT_GGUF = (
    Rule(r"token_embd\.weight", "token_embedding.weight"),
    Rule(rf"{T5_GGUF}\.attn_(q|k|v|o)\.weight", r"blocks.\1.attn.\2.weight"),
    Rule(rf"{T5_GGUF}\.attn_rel_b\.weight", r"blocks.\1.pos_embedding.embedding.weight"),
    Rule(rf"{T5_GGUF}\.attn_norm\.weight", r"blocks.\1.norm1.weight"),
    Rule(rf"{T5_GGUF}\.ffn_norm\.weight", r"blocks.\1.norm2.weight"),
    Rule(rf"{T5_GGUF}\.ffn_gate\.weight", r"blocks.\1.ffn.gate.0.weight"),
    Rule(rf"{T5_GGUF}\.ffn_up\.weight", r"blocks.\1.ffn.fc1.weight"),
    Rule(rf"{T5_GGUF}\.ffn_down\.weight", r"blocks.\1.ffn.fc2.weight"),
    Rule(r"enc\.output_norm\.weight", "norm.weight"),
)

CLIP_LAYER = r"vision_model\.encoder\.layers\.(\d+)"

CLIP_TRANSFORMERS = (
    Rule(r"vision_model\.embeddings\.class_embedding", "cls_embedding", lead=2),
    Rule(r"vision_model\.embeddings\.position_embedding\.weight", "pos_embedding", lead=1),
    Rule(r"vision_model\.embeddings\.patch_embedding\.weight", "patch_embedding.weight"),
    Rule(rf"vision_model\.pre_layrnorm{WB}", r"pre_norm.\1"),  # spelt so in every file
    Rule(rf"vision_model\.post_layernorm{WB}", r"post_norm.\1"),
    Rule(rf"{CLIP_LAYER}\.self_attn\.q_proj{WB}", r"transformer.\1.attn.to_qkv.\2", part=0),
    Rule(rf"{CLIP_LAYER}\.self_attn\.k_proj{WB}", r"transformer.\1.attn.to_qkv.\2", part=1),
    Rule(rf"{CLIP_LAYER}\.self_attn\.v_proj{WB}", r"transformer.\1.attn.to_qkv.\2", part=2),
    Rule(rf"{CLIP_LAYER}\.self_attn\.out_proj{WB}", r"transformer.\1.attn.proj.\2"),
    Rule(rf"{CLIP_LAYER}\.layer_norm1{WB}", r"transformer.\1.norm1.\2"),
    Rule(rf"{CLIP_LAYER}\.layer_norm2{WB}", r"transformer.\1.norm2.\2"),
    Rule(rf"{CLIP_LAYER}\.mlp\.fc1{WB}", r"transformer.\1.mlp.0.\2"),
    Rule(rf"{CLIP_LAYER}\.mlp\.fc2{WB}", r"transformer.\1.mlp.2.\2"),
)

CLIP_UNUSED = (r"post_norm\.(weight|bias)", r"head", r"transformer\.LAST\..+")
"""Official names that Wan never runs: it takes the features before the last block."""

CLIP_TEXT = (Rule(r"text_model\.((?:embeddings|encoder|final_layer_norm)\..+)", r"\1"),)
CLIP_TEXT_UNUSED = (r".*text_model\.embeddings\.position_ids", r".*text_projection\.weight", r".*logit_scale")
SIGLIP = (Rule(r"vision_model\.((?:embeddings|encoder|post_layernorm)\..+)", r"\1"),)

WAV2VEC2_POSITIONS = (
    Rule(r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0", "encoder.pos_conv_embed.conv.weight_g"),
    Rule(r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1", "encoder.pos_conv_embed.conv.weight_v"),
    Rule(r"(.+)", r"\1"),
)
"""Newer versions of torch spell the two parts of a normed weight so."""

WAV2VEC2_MARKS = ("feature_extractor.conv_layers.0.conv.weight", "encoder.layers.0.attention.q_proj.weight")
WAV2VEC2_UNUSED = (r"(wav2vec2\.)?masked_spec_embed", r"lm_head\.(weight|bias)")
"""The word head and the mask of training."""
