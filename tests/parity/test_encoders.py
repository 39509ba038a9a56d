"""umT5 and CLIP vision against the golden tensors of the official code and against transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema.errors import CheckpointError, NumericsError, RequestError
from kinema.models.encoders import (
    UMT5,
    ClipVision,
    ClipVisionConfig,
    TextEncoderConfig,
    check_encoder,
    distance_buckets,
    encode_prompts,
)
from kinema.models.tokenizer import Tokens

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


@torch.no_grad()
def test_no_second_copy_of_the_weights():
    """bfloat16 weights stay mapped: no operation returns a float32 tensor of the shape of a weight matrix."""

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                self.seen.add(tuple(out.shape))
            return out

    encoder = small_umt5().bfloat16()
    weights = {tuple(p.shape) for p in encoder.parameters() if p.ndim > 1 and p.shape != (32, 4)}
    with Shapes() as shapes:
        encoder.encode(torch.arange(7)[None])
    assert shapes.seen and not shapes.seen & weights
    with Shapes() as shapes:
        encoder.token_embedding.weight.float()
    assert shapes.seen & weights, "the probe is blind"


# --- prompts -------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token a character, enough for the encoder."""

    def encode(self, prompt: str, text_len: int = 512) -> Tokens:
        return Tokens((*[ord(c) % 290 for c in prompt][: text_len - 1], 1), 0)


def test_prompts_are_encoded_at_true_length():
    encoder = small_umt5()
    short, long = encode_prompts(encoder, Letters(), ["ab", "a long prompt"])
    assert short.shape == (3, 48) and long.shape == (14, 48) and short.dtype == torch.float32
    assert not short.requires_grad
    ids = torch.tensor([[*Letters().encode("ab").ids] + [0] * 5])
    masked = encoder.encode(ids, ids != 0)[0, :3]
    assert_golden(short, masked.detach(), 1e-5)


def test_padding_that_is_attended_counts():
    encoder = small_umt5()
    (padded,) = encode_prompts(encoder, Letters(), ["ab"], 8, padded=True)
    ids = torch.tensor([[*Letters().encode("ab").ids] + [0] * 5])
    assert torch.equal(padded, encoder.encode(ids)[0].detach())
    assert not torch.allclose(padded[:3], encode_prompts(encoder, Letters(), ["ab"])[0])


def test_a_token_the_encoder_lacks_is_an_error():
    class Strange(Letters):
        def encode(self, prompt: str, text_len: int = 512) -> Tokens:
            return Tokens((300, 1), 0)

    for padded in (False, True):
        with pytest.raises(RequestError, match="token 300"):
            encode_prompts(small_umt5(), Strange(), ["a"], padded=padded)


def test_features_that_are_not_finite_are_an_error():
    encoder = small_umt5()
    with torch.no_grad():
        encoder.norm.weight[3] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        encode_prompts(encoder, Letters(), ["a"])


# --- CLIP vision -----------------------------------------------------------------------------------

SMALL_CLIP = ClipVisionConfig(image_size=56, patch_size=14, dim=64, num_heads=4, num_layers=4)


def small_clip(salt: int = 1) -> ClipVision:
    encoder = ClipVision(SMALL_CLIP).eval()
    fill(encoder, salt)
    return encoder


@torch.no_grad()
def test_clip_vision_matches_the_official_code():
    spec, want = golden("clip_vision")
    pixels = input_tensor("pixels", spec["inputs"]["pixels"], spec["salt"], 2.0)
    assert_golden(small_clip(spec["salt"])(pixels), want["out"])


@torch.no_grad()
def test_one_block_more_is_caught():
    spec, want = golden("clip_vision")
    encoder = ClipVision(replace(SMALL_CLIP, num_layers=5)).eval()
    fill(encoder, spec["salt"])
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(encoder(input_tensor("pixels", (2, 3, 56, 56), spec["salt"], 2.0)), want["out"])


def test_clip_vision_has_the_keys_of_the_official_file():
    with torch.device("meta"):
        encoder = ClipVision(ClipVisionConfig(224, 14, 1280, 16, 32))
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert len(shapes) == 5 + 31 * 12
    assert shapes["pos_embedding"] == (1, 257, 1280)
    assert shapes["transformer.30.attn.to_qkv.weight"] == (3840, 1280)
    assert "transformer.31.norm1.weight" not in shapes


def transformers_clip(encoder: ClipVision) -> CLIPVisionModel:
    """The same weights in transformers' spelling; its last block stays random, for its output is not used."""
    config = encoder.config
    oracle = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.dim * config.mlp_ratio,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
        )
    )
    state = encoder.state_dict()
    theirs = {
        "embeddings.class_embedding": state["cls_embedding"][0, 0],
        "embeddings.patch_embedding.weight": state["patch_embedding.weight"],
        "embeddings.position_embedding.weight": state["pos_embedding"][0],
    }
    for end in ("weight", "bias"):
        theirs[f"pre_layrnorm.{end}"] = state[f"pre_norm.{end}"]
        for i in range(config.num_layers - 1):
            ours, layer = f"transformer.{i}", f"encoder.layers.{i}"
            q, k, v = state[f"{ours}.attn.to_qkv.{end}"].chunk(3)
            theirs |= {
                f"{layer}.self_attn.q_proj.{end}": q,
                f"{layer}.self_attn.k_proj.{end}": k,
                f"{layer}.self_attn.v_proj.{end}": v,
                f"{layer}.self_attn.out_proj.{end}": state[f"{ours}.attn.proj.{end}"],
                f"{layer}.layer_norm1.{end}": state[f"{ours}.norm1.{end}"],
                f"{layer}.layer_norm2.{end}": state[f"{ours}.norm2.{end}"],
                f"{layer}.mlp.fc1.{end}": state[f"{ours}.mlp.0.{end}"],
                f"{layer}.mlp.fc2.{end}": state[f"{ours}.mlp.2.{end}"],
            }
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in oracle.state_dict()) else ""
    left = oracle.load_state_dict({prefix + key: value for key, value in theirs.items()}, strict=False)
    last = f"{prefix}encoder.layers.{config.num_layers - 1}."
    assert not left.unexpected_keys
    assert all(key.startswith((last, f"{prefix}post_layernorm")) or "position_ids" in key for key in left.missing_keys)
    return oracle.eval()


@torch.no_grad()
def test_clip_vision_matches_transformers():
    encoder = small_clip(7)
    pixels = input_tensor("pixels", (3, 3, 56, 56), 7)
    want = transformers_clip(encoder)(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert_golden(encoder(pixels), want, 1e-5)


@torch.no_grad()
def test_clip_vision_squashes_and_normalises():
    """A wide image is squashed, not cropped, and each channel is brought to the statistics CLIP was trained with."""
    encoder = small_clip()
    wide = input_tensor("image", (1, 3, 40, 130), 3, 1.0)
    square = F.interpolate(wide, (56, 56), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    assert_golden(encoder.encode(wide), encoder(((square + 1) / 2 - mean) / std), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype, allowed", [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_clip_vision_runs_in_the_dtype_of_its_weights(dtype, allowed):
    encoder = small_clip()
    image = input_tensor("image", (1, 3, 60, 80), 3, 1.0)
    want = encoder.encode(image)
    got = encoder.to(dtype).encode(image)
    assert got.dtype == torch.float32
    assert_golden(got, want, allowed)


# --- after loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [small_umt5(), small_clip()], ids=["umt5", "clip"])
def test_sound_encoders_pass_the_check(encoder):
    check_encoder(encoder, "file")


@torch.no_grad()
@pytest.mark.parametrize(
    "damage, fault",
    [
        (lambda e: e.token_embedding.weight.zero_(), "token_embedding is zero"),
        (lambda e: e.token_embedding.weight.copy_(torch.ones(300, 48)), "same everywhere"),
        (lambda e: e.norm.weight.zero_(), "same features"),
        (lambda e: e.blocks[1].ffn.fc1.weight.fill_(float("inf")), "not finite"),
    ],
)
def test_a_damaged_umt5_is_caught(damage, fault):
    encoder = small_umt5()
    damage(encoder)
    with pytest.raises(CheckpointError, match=fault):
        check_encoder(encoder, "file")


@torch.no_grad()
@pytest.mark.parametrize(
    "damage, fault",
    [
        (lambda e: e.patch_embedding.weight.zero_(), "patch_embedding is zero"),
        (lambda e: e.pre_norm.weight.zero_(), "same features"),
        (lambda e: e.pos_embedding.fill_(float("nan")), "not finite"),
    ],
)
def test_a_damaged_clip_vision_is_caught(damage, fault):
    encoder = small_clip()
    damage(encoder)
    with pytest.raises(CheckpointError, match=fault):
        check_encoder(encoder, "file")
