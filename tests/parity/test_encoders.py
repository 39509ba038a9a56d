"""umT5 against the golden tensors of the official code and against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from golden_weights import assert_golden, fill, golden
from kinema.models.encoders import UMT5, TextEncoderConfig, distance_buckets

SMALL = TextEncoderConfig(vocab=300, dim=48, dim_attn=32, num_heads=4, ffn_dim=64, num_layers=3)


def small_umt5(salt: int = 1) -> UMT5:
    encoder = UMT5(SMALL).eval()
    fill(encoder, salt)
    return encoder


def golden_umt5() -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor]:
    """spec, ids, mask, out; the file holds ids and mask as float32."""
    spec, want = golden("umt5")
    return spec, want["ids"].long(), want["mask"].bool(), want["out"]


def test_umt5_matches_the_official_code():
    spec, ids, mask, out = golden_umt5()
    config = spec["config"]
    encoder = UMT5(
        TextEncoderConfig(
            config["vocab"], config["dim"], config["dim_attn"], config["num_heads"], config["dim_ffn"], 3, 32
        )
    )
    fill(encoder, spec["salt"])
    assert_golden(encoder.encode(ids, mask)[mask], out[mask])


def test_true_length_equals_a_masked_batch():
    encoder = small_umt5()
    _, *rows = golden_umt5()
    for ids, mask, out in zip(*rows, strict=True):
        assert_golden(encoder.encode(ids[mask][None])[0], out[mask])


def test_a_forgotten_mask_is_caught():
    _, ids, mask, out = golden_umt5()
    assert not mask.all(), "the golden has no padding to forget"
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(small_umt5().encode(ids)[mask], out[mask])


TRANSFORMERS_NAMES = (
    ("token_embedding", "shared"),
    (".attn.", ".layer.0.SelfAttention."),
    (".norm1", ".layer.0.layer_norm"),
    (".norm2", ".layer.1.layer_norm"),
    (".ffn.gate.0", ".layer.1.DenseReluDense.wi_0"),
    (".ffn.fc1", ".layer.1.DenseReluDense.wi_1"),
    (".ffn.fc2", ".layer.1.DenseReluDense.wo"),
    (".pos_embedding.embedding", ".layer.0.SelfAttention.relative_attention_bias"),
    ("blocks.", "encoder.block."),
)


def transformers_umt5(encoder: UMT5) -> UMT5EncoderModel:
    config = encoder.config
    oracle = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab,
            d_model=config.dim,
            d_kv=config.dim_attn // config.num_heads,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu",
        )
    )
    state = {}
    for name, tensor in encoder.state_dict().items():
        for official, theirs in TRANSFORMERS_NAMES:
            name = name.replace(official, theirs)
        state["encoder.final_layer_norm.weight" if name == "norm.weight" else name] = tensor
    left = oracle.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"encoder.embed_tokens.weight"}
    oracle.encoder.embed_tokens.weight = oracle.shared.weight
    return oracle.eval()


@torch.no_grad()
def test_umt5_matches_transformers_over_long_prompts():
    encoder = small_umt5()
    ids = torch.randint(0, 300, (2, 400), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 321:] = 0
    want = transformers_umt5(encoder)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert_golden(encoder.encode(ids, mask)[mask.bool()], want[mask.bool()], 1e-5)


def test_distance_buckets_match_transformers():
    attention = transformers_umt5(small_umt5()).encoder.block[0].layer[0].SelfAttention
    position = torch.arange(700)
    want = attention._relative_position_bucket(position[None, :] - position[:, None])
    assert torch.equal(distance_buckets(700, 32, 128), want)


@torch.no_grad()
@pytest.mark.parametrize("dtype, allowed", [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_umt5_runs_in_the_dtype_of_its_weights(dtype, allowed):
    """bfloat16 and float16 files are used as they are; the result stays float32 and near the float32 one."""
    encoder = small_umt5()
    ids = torch.arange(2, 40)[None]
    want = encoder.encode(ids)
    got = encoder.to(dtype).encode(ids)
    assert got.dtype == torch.float32
    assert_golden(got, want, allowed)


def test_float16_weights_do_not_overflow():
    encoder = small_umt5()
    with torch.no_grad():
        encoder.blocks[0].ffn.gate[0].weight.mul_(400)
        encoder.blocks[0].ffn.fc1.weight.mul_(400)
        hidden = encoder.blocks[0].ffn
        x = torch.ones(1, 1, 48)
        assert (hidden.gate(x) * hidden.fc1(x)).abs().max() > 65504, "the case does not overflow"
        assert encoder.half().encode(torch.arange(2, 9)[None]).isfinite().all()


def test_every_parameter_of_umt5_receives_a_gradient():
    encoder = UMT5(SMALL)
    encoder.encode(torch.arange(30)[None]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_a_fresh_umt5_is_not_saturated():
    """Features of a new encoder have unit scale and tell tokens apart: the state training starts from."""
    torch.manual_seed(0)
    encoder = UMT5(TextEncoderConfig(500, 256, 256, 4, 512, 4)).eval()
    rows = encoder.encode(torch.arange(20)[None])[0].detach()
    assert 0.9 < rows.square().mean().sqrt() < 1.1
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.9
