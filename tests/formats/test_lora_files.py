"""LoRA files made of others: every spelling as every other, extracted from two models, merged into one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import TINY, official_state, tiny, write
from kinema.errors import CheckpointError, OutputError, RequestError
from kinema.lora import LoraRef
from kinema.schema import Request
from kinema.weights.lora import convert as convert_module
from kinema.weights.lora.attach import parameter_shapes
from kinema.weights.lora.convert import convert_lora
from kinema.weights.lora.dialects import DIALECTS
from kinema.weights.lora.extract import extract, low_rank
from kinema.weights.lora.file import read_lora
from kinema.weights.lora.fuse import Fusion
from kinema.weights.lora.merge import merge
from kinema.weights.lora.weights import Weights
from lora_files import ALGORITHMS, SPELLINGS, random, write_lora
from lora_files import low_rank as low_rank_lora
from tiny_flux import transformer

CONFIG = {**TINY["dit"], "has_clip_tokens": False, "num_clip_positions": 0, "in_channels": 16}
STATE = official_state("dit", CONFIG)
SHAPES = parameter_shapes(tiny("dit", CONFIG))


def changed(path: Path) -> dict[str, Tensor]:
    """What a LoRA at strength 1 makes of the model's weights."""
    fusion = Fusion([LoraRef(path=path)], SHAPES)
    return {name: fusion(name, tensor) for name, tensor in STATE.items() if name in fusion}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.allclose(got[n], want[n], atol=1e-6) for n in want)


@pytest.mark.parametrize("to", [row.name for row in DIALECTS])
@pytest.mark.parametrize("spelling", ["official", "comfyui with alpha", "kohya", "peft of an adapter", "diffusers"])
def test_every_spelling_becomes_every_other(spelling: str, to: str, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a.safetensors", spelling, low_rank_lora(SHAPES, scale=0.3))
    target = tmp_path / "b.safetensors"
    events = list(convert_lora(source, target, to))
    assert events[-1].done == events[-1].total
    assert read_lora(target).dialect == to
    assert same(changed(target), changed(source))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_algorithms_are_kept_or_refused(algorithm: str, tmp_path: Path) -> None:
    tensors, _ = ALGORITHMS[algorithm]("blocks.0.ffn.0", *SHAPES["blocks.0.ffn.0.weight"])
    source = write(tmp_path / "a.safetensors", {f"diffusion_model.blocks.0.ffn.0.{n}": t for n, t in tensors.items()})
    for row in DIALECTS:
        target = tmp_path / f"{row.name}.safetensors"
        if row.more or algorithm in ("dora", "dora of peft"):
            list(convert_lora(source, target, row.name))
            assert same(changed(target), changed(source)), row.name
        else:
            with pytest.raises(RequestError, match="no place"):
                list(convert_lora(source, target, row.name))
            assert not target.exists()


def test_differences_keep_their_places(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", {
        "diffusion_model.blocks.0.diff_m": random("m", 1, 6, 128),
        "diffusion_model.blocks.0.norm3.diff": random("n", 128),
        "diffusion_model.blocks.0.norm3.diff_b": random("b", 128),
        "diffusion_model.head.diff_m": random("hm", 1, 2, 128),
        "diffusion_model.head.head.diff_b": random("h", 64),
        "diffusion_model.patch_embedding.diff": random("p", *SHAPES["patch_embedding.weight"]),
    })  # fmt: skip
    for to in ("kohya", "official", "lightx2v"):
        target = tmp_path / f"{to}.safetensors"
        list(convert_lora(source, target, to))
        assert same(changed(target), changed(source))


@pytest.mark.parametrize(
    ("scale", "dtype", "written"),
    [
        (0.5, torch.bfloat16, torch.bfloat16),
        (0.3, torch.bfloat16, torch.float32),
        (2**-12, torch.float16, torch.float32),
        (1.0, torch.float16, torch.float16),
    ],
)
def test_a_scale_goes_into_the_matrices_without_rounding(
    scale: float, dtype: torch.dtype, written: torch.dtype, tmp_path: Path
) -> None:
    """Halves are exact in bfloat16; in float16 they leave its range, and other scales are rounded: so float32."""
    source = write_lora(tmp_path / "a.safetensors", "kohya", low_rank_lora(SHAPES, scale=scale))
    halved = {n: t.to(dtype) if n.endswith("weight") else t for n, t in load_file(source).items()}
    save_file(halved, source)
    list(convert_lora(source, tmp_path / "b.safetensors", "peft"))
    made = load_file(tmp_path / "b.safetensors")
    assert {t.dtype for n, t in made.items() if "lora_B" in n} == {written}
    assert same(changed(tmp_path / "b.safetensors"), changed(source))


def test_flux_is_split_for_diffusers_and_joined_again(tmp_path: Path) -> None:
    d = 8
    state = {}
    layers = {"double_blocks.0.img_attn.qkv": (3 * d, d), "double_blocks.0.txt_attn.proj": (d, d),
              "single_blocks.0.linear1": (7 * d, d), "single_blocks.0.linear2": (d, 5 * d)}  # fmt: skip
    for name, (out, into) in layers.items():
        state |= {f"lora_unet_{name.replace('.', '_')}.lora_down.weight": random(name + "a", 2, into),
                  f"lora_unet_{name.replace('.', '_')}.lora_up.weight": random(name + "b", out, 2)}  # fmt: skip
    source = write(tmp_path / "a.safetensors", state)
    list(convert_lora(source, tmp_path / "b.safetensors", "diffusers"))
    split = load_file(tmp_path / "b.safetensors")
    assert split["transformer.transformer_blocks.0.attn.to_v.lora_B.weight"].shape == (d, 2)
    assert split["transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight"].shape == (4 * d, 2)
    list(convert_lora(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "comfyui"))
    joined = load_file(tmp_path / "c.safetensors")
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"):
        key = f"lora_unet_{name.replace('.', '_')}"
        before = state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]
        after = joined[f"diffusion_model.{name}.lora_B.weight"] @ joined[f"diffusion_model.{name}.lora_A.weight"]
        assert torch.allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "onetrainer"])
def test_the_attention_of_xlabs_is_three_parts(to: str, tmp_path: Path) -> None:
    d = 8
    down, up = random("xa", 2, d), random("xb", 3 * d, 2)
    name = "single_blocks.0.processor.qkv_lora"
    source = write(tmp_path / "a.safetensors", {f"{name}.down.weight": down, f"{name}.up.weight": up})
    list(convert_lora(source, tmp_path / "b.safetensors", to))
    made = load_file(tmp_path / "b.safetensors")
    assert {n: t.shape[0] for n, t in made.items() if n.endswith(("lora_B.weight", "lora_up.weight"))} == (
        {"diffusion_model.single_blocks.0.linear1.lora_B.weight": 7 * d}
        if to == "comfyui"
        else {n: d for n in made if "lora_B" in n or "lora_up" in n}
    )
    assert len(made) == (2 if to == "comfyui" else 6)
    weight = torch.zeros(7 * d, d)
    fusion = Fusion([LoraRef(path=tmp_path / "b.safetensors")], {"single_blocks.0.linear1.weight": (7 * d, d)})
    found = fusion("single_blocks.0.linear1.weight", weight)
    assert torch.allclose(found, torch.cat([up @ down, torch.zeros(4 * d, d)]), atol=1e-6)


def test_cores_and_shapes_go_along(tmp_path: Path) -> None:
    core = {"lora_down.weight": random("d", 3, 16, 1, 1, 1), "lora_mid.weight": random("m", 3, 3, 1, 2, 2),
            "lora_up.weight": random("u", 128, 3, 1, 1, 1), "alpha": torch.tensor(1.5)}  # fmt: skip
    state = {f"lora_unet_patch_embedding.{name}": tensor for name, tensor in core.items()}
    state |= {"lora_unet_blocks_0_ffn_0.lora_down.weight": random("a", 2, 128),
              "lora_unet_blocks_0_ffn_0.lora_up.weight": random("b", 96, 2),
              "lora_unet_blocks_0_ffn_0.reshape_weight": torch.tensor([96, 128])}  # fmt: skip
    source = write(tmp_path / "a.safetensors", state)
    list(convert_lora(source, tmp_path / "b.safetensors", "lightx2v"))
    made = load_file(tmp_path / "b.safetensors")
    assert len(made) == 7 and made["diffusion_model.blocks.0.ffn.0.reshape_weight"].tolist() == [96, 128]
    assert same(changed(tmp_path / "b.safetensors"), changed(source))
    with pytest.raises(RequestError, match=r"no place for the Tucker core of patch_embedding\.weight"):
        list(convert_lora(source, tmp_path / "c.safetensors", "peft"))


def test_conversion_refuses_to_lose_and_to_overwrite(tmp_path: Path) -> None:
    state = SPELLINGS["comfyui"](low_rank_lora(SHAPES))
    state["diffusion_model.blocks.0.self_attn.q.lora_C"] = torch.zeros(3)
    odd = write(tmp_path / "odd.safetensors", state)
    with pytest.raises(RequestError, match="would be lost"):
        list(convert_lora(odd, tmp_path / "b.safetensors", "kohya"))
    source = write_lora(tmp_path / "a.safetensors", "comfyui", low_rank_lora(SHAPES))
    for target, to, word in ((source, "kohya", "exists"), (tmp_path / "b.ckpt", "kohya", ".safetensors"),
                             (tmp_path / "b.safetensors", "kohyo", "no dialect")):  # fmt: skip
        with pytest.raises(RequestError, match=word):
            list(convert_lora(source, target, to))


@pytest.mark.parametrize("fault", ["another layer", "another number"])
def test_a_planted_fault_in_writing_is_caught_by_reading_back(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lora(tmp_path / "a.safetensors", "comfyui", low_rank_lora(SHAPES))
    original = convert_module.write_tensors

    def faulty(path, tensors, *rest):
        if fault == "another layer":
            turned = {"self_attn_q": "self_attn_k", "self_attn_k": "self_attn_q"}
            tensors = [
                replace(item, name=re.sub("self_attn_[qk]", lambda found: turned[found[0]], item.name))
                for item in tensors
            ]
        else:
            bad = tensors[5]
            tensors[5] = replace(bad, chunks=lambda: (chunk * 1.01 for chunk in bad.chunks()))
        return original(path, tensors, *rest)

    list(convert_lora(source, tmp_path / "good.safetensors", "kohya"))
    monkeypatch.setattr(convert_module, "write_tensors", faulty)
    with pytest.raises(OutputError, match="not the same change"):
        list(convert_lora(source, tmp_path / "b.safetensors", "kohya"))
    assert not (tmp_path / "b.safetensors").exists() and not list(tmp_path.glob(".*"))


# --- extract -------------------------------------------------------------------------------------------


def run(making):
    while True:
        try:
            next(making)
        except StopIteration as end:
            return end.value


def test_a_lora_comes_back_out_of_the_model_it_was_put_into(tmp_path: Path) -> None:
    lora = low_rank_lora(SHAPES)
    tuned = dict(STATE)
    for name, delta in lora.deltas().items():
        tuned[name] = tuned[name] + delta
    tuned["blocks.0.norm3.weight"] = tuned["blocks.0.norm3.weight"] + 0.1
    tuned["blocks.1.modulation"] = tuned["blocks.1.modulation"] + 0.2
    base, other = write(tmp_path / "base.safetensors", STATE), write(tmp_path / "tuned.safetensors", tuned)
    out = tmp_path / "lora.safetensors"
    found = run(extract(base, other, out, rank=4, dtype=torch.float32))
    assert (found.matrices, found.others) == (20, 2) and found.lost < 1e-5
    made = changed(out)
    assert all(torch.allclose(made[name], tuned[name], atol=1e-5) for name in made) and len(made) == 22
    poor = run(extract(base, other, out, rank=1, to="kohya", overwrite=True))
    assert 0.05 < poor.lost < 1 and read_lora(out).dialect == "kohya" and read_lora(out).ranks == (1,)


def test_low_rank_of_a_large_matrix_is_near_the_best() -> None:
    torch.manual_seed(3)
    matrix = torch.randn(700, 6) @ torch.randn(6, 900) + 1e-3 * torch.randn(700, 900)
    up, down = low_rank(matrix, 6)
    values = torch.linalg.svdvals(matrix)
    best = float(values[6:].norm() / values.norm())
    assert float((matrix - up @ down).norm() / matrix.norm()) < 1.01 * best
    assert torch.equal(low_rank(matrix, 6)[0], up), "the same at every run"


FLUX_CHANGED = (
    "double_blocks.0.img_attn.qkv.w",
    "single_blocks.0.linear1.w",
    "img_in.w",
    "final_layer.adaLN_modulation.1.w",
)


@pytest.mark.parametrize("to", ["comfyui", "kohya", "onetrainer"])
def test_a_lora_of_flux_comes_back_out(to: str, tmp_path: Path) -> None:
    """Fused matrices whole in official names, in three and four parts in diffusers'."""
    state = transformer("dev")
    tuned = {}
    for name, tensor in state.items():
        changes = name.startswith(FLUX_CHANGED)
        delta = random(name + "u", len(tensor), 2) @ random(name + "d", 2, tensor.shape[-1]) if changes else 0
        tuned[name] = tensor + delta
    tuned["single_blocks.0.norm.query_norm.scale"] = tuned["single_blocks.0.norm.query_norm.scale"] + 0.1
    for name in ("double_blocks.0.txt_attn.qkv.bias", "final_layer.adaLN_modulation.1.bias"):
        tuned[name] = tuned[name] + torch.linspace(0, 1, len(tuned[name]))
    base, other = write(tmp_path / "base.safetensors", state), write(tmp_path / "tuned.safetensors", tuned)
    out = tmp_path / "lora.safetensors"
    found = run(extract(base, other, out, rank=4, to=to, dtype=torch.float32))
    assert (found.matrices, found.others) == (4, 3) and found.lost < 1e-5
    assert read_lora(out).dialect == to and read_lora(out).family == "flux"
    fusion = Fusion([LoraRef(path=out)], {name: tuple(tensor.shape) for name, tensor in state.items()})
    changed = [name for name in state if name in fusion]
    assert len(changed) == 7
    assert all(torch.allclose(fusion(name, state[name]), tuned[name], atol=1e-5) for name in changed)
    list(convert_lora(out, tmp_path / "again.safetensors", "onetrainer"))
    again = Fusion([LoraRef(path=tmp_path / "again.safetensors")], {n: tuple(t.shape) for n, t in state.items()})
    assert all(torch.allclose(again(name, state[name]), tuned[name], atol=1e-5) for name in changed)


def test_extract_refuses_what_makes_no_lora(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", STATE)
    twin = write(tmp_path / "twin.safetensors", STATE)
    other = write(tmp_path / "other.safetensors", official_state("dit", {**CONFIG, "in_channels": 36}))
    out = tmp_path / "x.safetensors"
    vae = write(tmp_path / "vae.safetensors", official_state("vae"))
    with pytest.raises(RequestError, match="takes no LoRA"):
        run(extract(vae, vae, out))
    for tuned, word, fields in ((twin, "same numbers", {}), (other, "not built as", {}), (twin, "rank 0", {"rank": 0}),
                                (twin, "no dialect", {"to": "sd"})):  # fmt: skip
        with pytest.raises(RequestError, match=word):
            run(extract(base, tuned, out, **fields))
    broken = STATE["blocks.1.ffn.2.weight"].clone()
    broken[0, 0] = float("nan")
    tuned = write(
        tmp_path / "nan.safetensors", {name: t + 0.1 for name, t in STATE.items()} | {"blocks.1.ffn.2.weight": broken}
    )
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.2\.weight .* not finite"):
        run(extract(base, tuned, out))
    assert not out.exists()


# --- merge ---------------------------------------------------------------------------------------------


def merged(model: Path, out: Path, *loras: str, **fields: object) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    made, found = run(merge(model, Request(lora=loras).lora, out, **fields))
    assert made.facts.config == {**made.facts.config} and out.exists()
    weights = Weights(out)
    return {name: weights.get(name) for name in weights.shapes}, found


def test_merging_is_the_formula_in_every_format(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", STATE)
    lora = low_rank_lora(SHAPES)
    first = write_lora(tmp_path / "a.safetensors", "kohya", lora)
    want = {name: STATE[name] + 0.5 * lora.deltas().get(name, 0) for name in STATE}
    got, found = merged(base, tmp_path / "m.safetensors", f"{first}:0.5")
    assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in STATE)
    squares = [sum(float(x.square().sum()) for x in part) for part in (
        lora.deltas().values(), [STATE[name] for name in lora.deltas()])]  # fmt: skip
    assert found == pytest.approx([(squares[0] / squares[1]) ** 0.5], rel=1e-4)
    for out, to, names, limit in (("d.safetensors", "bfloat16", "diffusers", 0.01), ("q.gguf", "Q8_0", None, 0.02)):
        got, _ = merged(base, tmp_path / out, f"{first}:0.5", to=to, names=names)
        for name in lora.deltas():
            assert float((got[name] - want[name]).norm() / want[name].norm()) < limit, (out, name)


def test_merging_dora_and_several_needs_the_whole_weight(tmp_path: Path) -> None:
    base, name = write(tmp_path / "base.safetensors", STATE), "blocks.0.ffn.0"
    paths, want = [], STATE[f"{name}.weight"]
    for kind in ("dora", "dora by column", "lokr"):
        tensors, apply = ALGORITHMS[kind](name, *want.shape)
        paths.append(
            write(tmp_path / f"{kind}.safetensors", {f"diffusion_model.{name}.{n}": t for n, t in tensors.items()})
        )
        want = want + apply(STATE[f"{name}.weight"]) - STATE[f"{name}.weight"]
    got, _ = merged(base, tmp_path / "m.safetensors", *map(str, paths))
    assert torch.allclose(got[f"{name}.weight"], want, atol=1e-5)
    assert torch.equal(got["blocks.1.ffn.0.weight"], STATE["blocks.1.ffn.0.weight"])


def test_merging_refuses_what_would_be_lost(tmp_path: Path) -> None:
    base = write(tmp_path / "wan_low_noise.safetensors", STATE)
    state = SPELLINGS["comfyui"](low_rank_lora(SHAPES))
    good = write(tmp_path / "style_high_noise.safetensors", state)
    state["diffusion_model.blocks.7.ffn.0.diff_b"] = torch.zeros(96)
    odd = write(tmp_path / "odd.safetensors", state)
    out = tmp_path / "m.safetensors"
    for lora, word in (
        (f"{odd}", "20 of 21"),
        (f"{good}", "high-noise"),
        (f"{good},steps=1-2,allow=expert", "steps"),
        (f"{good}@high,allow=expert", "@high"),
        (f"{good},only=blocks.9,allow=expert", "fits none"),
    ):
        with pytest.raises(RequestError, match=word):
            merged(base, out, lora)
    assert not out.exists()
    merged(base, out, f"{odd},allow=unmatched")
    with pytest.raises(RequestError, match="exists"):
        merged(base, out, f"{good},allow=expert")


def test_weights_are_read_whatever_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {f"model.diffusion_model.{name}": t for name, t in STATE.items()})
    weights = Weights(path)
    assert weights.shapes == SHAPES
    assert all(torch.equal(weights.get(name), STATE[name]) for name in STATE)
