"""The Wan DiT against tensors of the official code, and against diffusers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema.models import layers
from kinema.models.layers import rotate, sdpa, sinusoid
from kinema.models.wan import Block, Context, Head, WanConfig, WanDiT, pad_texts, stays_float32
from kinema.models.wan_blocks import KVCache
from kinema.tensors import Conditions

PAGE = Path(__file__).parents[2] / "docs/precision.md"

PLAIN = ["dit_t2v", "dit_i2v_a14b", "dit_ti2v_5b"]
CLIP = ["dit_i2v_14b_clip", "dit_flf2v_14b_clip"]
LATENTS = (2, 16, 3, 6, 8)


def load(name: str) -> tuple[WanDiT, Tensor, Tensor, Conditions, Tensor]:
    """Return (model, x, timesteps, conditions, golden velocity) of one golden file, its two entries as a batch."""
    spec, tensors = golden(name)
    given, shapes, salt = spec["config"], spec["inputs"], spec["salt"]
    config = WanConfig(
        given["dim"], given["ffn_dim"], given["num_layers"], given["in_dim"], given["out_dim"], given["text_dim"],
        given["text_len"], given["freq_dim"], "clip_fea" in shapes, num_clip_positions=514 if "flf" in name else 0,
    )  # fmt: skip
    model = WanDiT(config).eval()
    fill(model, salt)

    def pair(key: str) -> tuple[Tensor, Tensor]:
        first, second = (input_tensor(f"{key}{entry}", shapes[f"{key}{entry}"], salt) for entry in (0, 1))
        return first, second

    x = torch.stack(pair("x"))
    clean = x[:, :, :1] if "ti2v" in name else None
    timesteps = torch.tensor([731.25, 731.25] if clean is not None else shapes["t"])
    # The two images of one first-last-frame entry follow each other.
    clip = input_tensor("clip_fea", shapes["clip_fea"], salt).reshape(2, -1, 1280) if "clip_fea" in shapes else None
    concat = torch.stack(pair("y")) if "y0" in shapes else None
    want = torch.stack([tensors["out0"], tensors["out1"]])
    return model, x, timesteps, Conditions(pair("context"), clip, concat, clean), want


def velocity(model: WanDiT, x: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    with torch.no_grad():
        return model(x, timesteps, prepare_as_golden(model, conditions))


def prepare_as_golden(model: WanDiT, conditions: Conditions) -> Context:
    """`prepare`, but for CLIP models cut where the official code cuts: at the last 512 rows, be they text or not.

    The golden models have 24 text rows instead of 512, so their cut falls among the CLIP tokens. With 512 rows the two
    are the same, which test_prepare_cuts_as_the_official_code and the diffusers tests hold.
    """
    if conditions.clip_BVD is None:
        return model.prepare(conditions)
    padded = [F.pad(text, (0, 0, 0, model.config.text_len - len(text))) for text in conditions.text]
    rows = torch.cat([model.img_emb(conditions.clip_BVD), model.text_embedding(torch.stack(padded))], dim=1)
    cut = rows.shape[1] - 512
    return Context(KVCache(rows[:, cut:]), KVCache(rows[:, :cut]), concat_BCFhw=conditions.concat_BCFhw)


@pytest.mark.parametrize("name", PLAIN + CLIP)
def test_golden(name: str):
    model, x, timesteps, conditions, want = load(name)
    got = velocity(model, x, timesteps, conditions)
    assert got.dtype == torch.float32
    assert_golden(got[0], want[0])
    assert_golden(got[1], want[1])


@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_prepare_cuts_as_the_official_code(images: int):
    model, _, _, conditions, _ = load(CLIP[images - 1])
    long = WanDiT(replace(model.config, text_len=512)).eval()
    long.load_state_dict(model.state_dict())
    x, timesteps = torch.randn(LATENTS), torch.tensor([5.0, 995.0])
    ours = long(x, timesteps, long.prepare(conditions))
    assert_golden(ours, long(x, timesteps, prepare_as_golden(long, conditions)), 1e-5)


def test_batch_entries_are_independent():
    model, x, timesteps, conditions, want = load("dit_t2v")
    alone = velocity(model, x[1:], timesteps[1:], Conditions(conditions.text[1:]))
    assert_golden(alone[0], want[1])


# --- planted faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("row", range(5))
def test_swapped_modulation_rows_fail(name: str, row: int):
    model, x, timesteps, conditions, want = load(name)
    with torch.no_grad():
        modulation = model.blocks[1].modulation
        modulation[:, [row, row + 1]] = modulation[:, [row + 1, row]]
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, conditions), want)


def test_swapped_head_rows_fail():
    model, x, timesteps, conditions, want = load("dit_t2v")
    model.head.modulation.data = model.head.modulation.data.flip(1)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, conditions), want)


@pytest.mark.parametrize("name", PLAIN)
def test_masked_text_padding_fails(name: str):
    model, x, timesteps, conditions, want = load(name)
    context = model.prepare(conditions)
    longest = max(len(text) for text in conditions.text)
    bias = context.text_bias_1S.clone()
    bias[:, longest:] = float("-inf")
    with torch.no_grad(), pytest.raises(AssertionError, match="off by"):
        assert_golden(model(x, timesteps, replace(context, text_bias_1S=bias)), want)


def test_clean_frame_at_the_noisy_timestep_fails():
    model, x, timesteps, conditions, want = load("dit_ti2v_5b")
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, replace(conditions, clean_BCFhw=None)), want)


# --- exact savings -----------------------------------------------------------------------------------


def test_merged_padding_is_all_padding():
    """Rows of text that stand for many equal ones give what the many give, to float32 rounding."""
    model, x, timesteps, _, _ = load("dit_t2v")
    long = WanDiT(replace(model.config, text_len=512)).eval()
    long.load_state_dict(model.state_dict())
    for lengths in ((11, 17), (0, 1), (512, 3), (511, 510), (505, 2)):
        texts = tuple(input_tensor(f"text{length}", (length, 40), 5) for length in lengths)
        with torch.no_grad():
            context = long.prepare(Conditions(texts))
            padded = torch.stack([F.pad(text, (0, 0, 0, 512 - len(text))) for text in texts])
            whole = Context(KVCache(long.text_embedding(padded)))
            assert_golden(long(x, timesteps, context), long(x, timesteps, whole), 3e-6)
        assert context.text.rows.shape[1] <= min(512, max(lengths) + 6)


def test_padding_weights_sum_and_are_exact_in_bfloat16():
    for rows in range(513):
        padded, bias = pad_texts((torch.ones(rows, 2),), 512)
        assert not padded[:, rows:].any()
        if bias is None:
            assert padded.shape[1] == 512
        else:
            assert bias.shape[1] == padded.shape[1]
            assert bias.double().exp().sum().item() == pytest.approx(512, rel=1e-6)
            assert torch.equal(bias.bfloat16().float(), bias)
            assert torch.equal(bias.half().float(), bias)


def per_token_velocity(model: WanDiT, x: Tensor, timesteps_BL: Tensor, context: Context) -> Tensor:
    """The forward with one modulation row a token, as the official 2.2 code computes it."""
    stream = model.embed(x, timesteps_BL[:, :1], (timesteps_BL.shape[1],), context)
    time_BLD = model.time_embedding(sinusoid(timesteps_BL, model.config.freq_dim))
    rows_BL6D = model.time_projection(time_BLD).unflatten(-1, (6, -1))
    tokens = stream.tokens_BLD
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = (rows_BL6D + block.modulation).unbind(2)
        tokens = tokens + gate1 * block.self_attn(block.norm1(tokens) * (1 + scale1) + shift1, stream)
        tokens = tokens + block.cross_attn(block.norm3(tokens), context)
        tokens = tokens + gate2 * block.ffn(block.norm2(tokens) * (1 + scale2) + shift2)
    shift, scale = (time_BLD[:, :, None] + model.head.modulation).unbind(2)
    out = model.head.head(model.head.norm(tokens) * (1 + scale) + shift)
    frames, rows, columns = stream.grid
    cells = out.view(len(x), frames, rows, columns, 2, 2, -1)
    return torch.einsum("bfhwpqc->bcfhpwq", cells).reshape(len(x), -1, frames, rows * 2, columns * 2)


@pytest.mark.parametrize("clean_frames", [0, 1, 2, 3])
@torch.no_grad()
def test_one_row_a_timestep_is_one_row_a_token(clean_frames: int):
    model, x, _, conditions, _ = load("dit_ti2v_5b")
    timesteps = torch.tensor([731.25, 40.0])
    context = replace(model.prepare(conditions), clean_frames=clean_frames)
    timesteps_BL = timesteps[:, None].repeat(1, 3 * 12)
    timesteps_BL[:, : clean_frames * 12] = 0
    assert_golden(model(x, timesteps, context), per_token_velocity(model, x, timesteps_BL, context), 5e-6)


# --- casts, gradients, swaps ---------------------------------------------------------------------------


def test_rms_norm_rounds_before_it_weighs():
    x = torch.randn(4, 256).bfloat16() * 3
    norm = layers.RMSNorm(256, 1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    wide = x.float()
    official = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16() * norm.weight.bfloat16()
    late = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight).bfloat16()
    assert torch.equal(norm(x), official)
    assert not torch.equal(norm(x), late)


def test_rotation_of_bfloat16_is_that_of_float64():
    x = torch.randn(1, 12, 2, 128).bfloat16()
    exact = layers.rope_at((range(1), range(3), range(4)), 128, dtype=torch.complex128, device=x.device)
    assert torch.equal(rotate(x, exact), rotate(x, exact.to(torch.complex64)))


@pytest.mark.parametrize("name", ["dit_i2v_14b_clip", "dit_ti2v_5b"])
def test_every_parameter_and_the_text_get_gradients(name: str):
    model, x, timesteps, conditions, _ = load(name)
    texts = tuple(text.requires_grad_() for text in conditions.text)
    model(x, timesteps, model.prepare(replace(conditions, text=texts))).square().mean().backward()
    dead = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not dead
    assert all(text.grad.any() for text in texts)


def test_gradient_is_the_slope():
    """The length of a gradient, against the central difference along it."""
    model, x, timesteps, conditions, _ = load("dit_t2v")
    weight = model.blocks[0].self_attn.q.weight

    def loss() -> Tensor:
        return model(x, timesteps, model.prepare(conditions)).square().mean()

    loss().backward()
    slope = weight.grad.norm().item()
    step = 0.02 * weight.grad / slope
    with torch.no_grad():
        weight += step
        above = loss().item()
        weight -= 2 * step
        below = loss().item()
    assert slope == pytest.approx((above - below) / 0.04, rel=0.02)


def test_attention_and_runner_are_swapped_without_touching_the_model():
    model, x, timesteps, conditions, want = load("dit_t2v")
    seen: list[Any] = []

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(tuple(q.shape))
        return sdpa(q, k, v)

    def runner(blocks, step, state):
        for index, block in enumerate(blocks):
            seen.append(index)
            state = step(block, index, state)
        return state

    model.attention, model.run_blocks = core, runner
    assert_golden(velocity(model, x, timesteps, conditions), want)
    assert seen == [0, (2, 2, 36, 128), 1, (2, 2, 36, 128)], "the context is made on the way"


def test_several_contexts_at_once_give_each_ones_velocity():
    model, x, timesteps, conditions, _ = load("dit_t2v")
    first = model.prepare(conditions)
    second = model.prepare(replace(conditions, text=tuple(reversed(conditions.text))))
    together = model(x, timesteps, first, second)
    assert torch.equal(together, torch.cat([model(x, timesteps, first), model(x, timesteps, second)]))


def test_keys_and_values_beside_the_own_count_as_tokens_of_the_stream():
    model, x, timesteps, conditions, _ = load("dit_t2v")
    context = model.prepare(conditions)
    stream = model.embed(x, timesteps[:, None], (36,), context)
    attention, tokens, half = model.blocks[0].self_attn, stream.tokens_BLD, 20
    left, right = (replace(stream, rope_LK=rope) for rope in (stream.rope_LK[:half], stream.rope_LK[half:]))
    rest = attention.keys_values(tokens[:, half:], right)
    torch.testing.assert_close(attention(tokens[:, :half], left, rest), attention(tokens, stream)[:, :half])

    kept = tuple((torch.randn(2, 2, 5, 128), torch.randn(2, 2, 5, 128)) for _ in model.blocks)
    more = model(x, timesteps, replace(context, more_kv=kept))
    for index in range(len(kept)):
        changed = tuple((k, v + 1) if place == index else (k, v) for place, (k, v) in enumerate(kept))
        assert not torch.allclose(model(x, timesteps, replace(context, more_kv=changed)), more), (
            "each layer reads its own"
        )


def test_wrong_inputs_are_refused():
    model, x, timesteps, conditions, _ = load("dit_i2v_a14b")
    context = model.prepare(conditions)
    with pytest.raises(ValueError, match="36 channels"):
        model(x, timesteps, replace(context, concat_BCFhw=None))
    with pytest.raises(ValueError, match="even height"):
        model(x[..., :7], timesteps, replace(context, concat_BCFhw=context.concat_BCFhw[..., :7]))
    with pytest.raises(ValueError, match="1 latents but conditions for 2"):
        model(x[:1], timesteps[:1], replace(context, concat_BCFhw=context.concat_BCFhw[:1]))
    with pytest.raises(ValueError, match="takes no CLIP"):
        model.prepare(replace(conditions, clip_BVD=torch.zeros(2, 257, 1280)))
    with pytest.raises(ValueError, match=r"25 tokens.*at most 24"):
        model.prepare(Conditions((torch.zeros(25, 40),)))


# --- diffusers -----------------------------------------------------------------------------------------

RENAMES = (
    ("self_attn.", "attn1."), ("cross_attn.", "attn2."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
    (".o.", ".to_out.0."), (".k_img.", ".add_k_proj."), (".v_img.", ".add_v_proj."), (".norm_k_img.", ".norm_added_k."),
    (".norm3.", ".norm2."), ("ffn.0.", "ffn.net.0.proj."), ("ffn.2.", "ffn.net.2."), ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"), ("modulation", "scale_shift_table"),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
)  # fmt: skip


def diffusers_twin(model: WanDiT) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    config = model.config
    twin = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=128, in_channels=config.in_channels,
        out_channels=config.out_channels, text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim,
        num_layers=config.num_layers, image_dim=config.clip_dim if config.has_clip_tokens else None,
        added_kv_proj_dim=config.dim if config.has_clip_tokens else None,
        pos_embed_seq_len=config.num_clip_positions or None,
    )  # fmt: skip
    weights = {}
    for key, tensor in model.state_dict().items():
        for old, new in RENAMES:
            key = key.replace(old, new)
        weights[key] = tensor
    twin.load_state_dict(weights)
    return twin.eval()


@pytest.mark.parametrize("variant", ["t2v", "i2v_clip", "flf2v_clip", "ti2v"])
@torch.no_grad()
def test_diffusers(variant: str):
    clip_rows = {"i2v_clip": 257, "flf2v_clip": 514}.get(variant, 0)
    config = WanConfig(
        256, 320, 2, 36 if clip_rows else 16, 16, text_dim=40, freq_dim=64, has_clip_tokens=bool(clip_rows),
        num_clip_positions=514 if clip_rows == 514 else 0,
    )  # fmt: skip
    model = WanDiT(config).eval()
    fill(model, 3)
    texts = (input_tensor("a", (30, 40), 3), input_tensor("b", (7, 40), 3))
    x, concat = input_tensor("x", LATENTS, 3), input_tensor("y", (2, 20, 3, 6, 8), 3) if clip_rows else None
    clip = input_tensor("clip", (2, clip_rows, 1280), 3) if clip_rows else None
    timesteps = torch.tensor([900.0, 17.0])
    clean = x[:, :, :1] if variant == "ti2v" else None

    theirs = diffusers_twin(model)(
        x if concat is None else torch.cat([x, concat], 1),
        timesteps if clean is None else torch.cat([torch.zeros(2, 12), timesteps[:, None].expand(2, 24)], 1),
        torch.stack([F.pad(text, (0, 0, 0, 512 - len(text))) for text in texts]),
        # diffusers takes the two images of an entry as two entries where there is a learned position.
        clip.reshape(-1, 257, 1280) if clip is not None else None,
        return_dict=False,
    )[0]
    ours = model(x, timesteps, model.prepare(Conditions(texts, clip, concat, clean)))
    assert_golden(ours, theirs, 1e-5)


# --- fast against reference ------------------------------------------------------------------------------


def to_fast(model: WanDiT, dtype: torch.dtype = torch.bfloat16) -> WanDiT:
    for key, parameter in model.named_parameters():
        if not stays_float32(key):
            parameter.data = parameter.data.to(dtype)
    return model


def distance(got: Tensor, want: Tensor) -> float:
    """Root-mean-square difference over the root-mean-square value."""
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()


@pytest.mark.parametrize("name", PLAIN)
def test_distance_of_fast_from_reference(name: str):
    """docs/precision.md shows these figures; `pytest -s` prints them."""
    model, x, timesteps, conditions, _ = load(name)
    exact = velocity(model, x, timesteps, conditions)
    fast = distance(velocity(to_fast(model), x, timesteps, conditions), exact)
    print(f"{name}: fast is {fast:.2%} from reference")
    shown = re.search(rf"`{name}`[^|]*\| ([\d.]+) %", PAGE.read_text())
    assert shown and fast == pytest.approx(float(shown[1]) / 100, rel=0.3)


def diffusers_in_bfloat16(twin: torch.nn.Module) -> torch.nn.Module:
    """As `from_pretrained(torch_dtype=torch.bfloat16)` leaves it: the parts it names stay float32, RoPE too."""
    keep = (*twin._keep_in_fp32_modules, "rope")
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if not any(part in name for part in keep):
            tensor.data = tensor.data.to(torch.bfloat16)
    return twin


@pytest.mark.parametrize(("depth", "bound"), [(2, 0.004), (8, 0.006), (30, 0.008)])
@torch.no_grad()
def test_fast_by_depth_and_against_diffusers_in_bfloat16(depth: int, bound: float):
    model = WanDiT(WanConfig(256, 320, depth, 16, 16, text_dim=40, freq_dim=64)).eval()
    fill(model, 3)
    texts = (input_tensor("a", (30, 40), 3), input_tensor("b", (7, 40), 3))
    padded = torch.stack([F.pad(text, (0, 0, 0, 512 - len(text))) for text in texts]).bfloat16()
    x, timesteps = input_tensor("x", LATENTS, 3), torch.tensor([900.0, 17.0])
    twin = diffusers_in_bfloat16(diffusers_twin(model))
    theirs = twin(x.bfloat16(), timesteps, padded, return_dict=False)[0].float()
    exact = velocity(model, x, timesteps, Conditions(texts))
    fast = velocity(to_fast(model), x, timesteps, Conditions(texts))
    print(f"{depth} blocks: fast {distance(fast, exact):.2%}, diffusers in bfloat16 {distance(theirs, exact):.2%}")
    assert distance(fast, exact) < bound
    assert distance(fast, exact) < distance(theirs, exact)


def test_fast_is_nearer_than_bfloat16_throughout():
    """What the float32 islands are for: a stream or modulation in bfloat16 is farther off."""
    model, x, timesteps, conditions, _ = load("dit_t2v")
    exact = velocity(model, x, timesteps, conditions)
    fast = distance(velocity(to_fast(model), x, timesteps, conditions), exact)

    def rounded(module: Any, args: Any, stream: Any) -> Any:
        return replace(stream, tokens_BLD=stream.tokens_BLD.bfloat16().float())

    def halves(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.bfloat16().float()

    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(rounded)
        elif isinstance(module, layers.LayerNorm | Head):
            module.register_forward_hook(halves)
    model.time_embedding.register_forward_hook(halves)
    model.time_projection.register_forward_hook(halves)
    through = distance(velocity(model, x, timesteps, conditions), exact)
    print(f"fast {fast:.2%}, bfloat16 throughout {through:.2%}")
    assert through > 1.2 * fast
