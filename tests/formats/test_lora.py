"""LoRA files of every spelling and algorithm on a small model: matched wholly, and equal to the reference formula."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from checkpoints import TINY, manifest, tiny, write, write_sparse
from golden_weights import input_tensor
from kinema.errors import CheckpointError
from kinema.lora import LoraRef
from kinema.models.wan import WanDiT
from kinema.tensors import Conditions
from kinema.weights.lora import branches
from kinema.weights.lora.attach import attach, detach, parameter_shapes, set_strengths
from kinema.weights.lora.dialects import DIALECTS, WORDS, dotted
from kinema.weights.lora.file import read_lora
from kinema.weights.lora.fuse import Fusion
from kinema.weights.lora.match import match
from lora_files import ALGORITHMS, LINEARS, SPELLINGS, low_rank, random, write_lora

CONFIG = {**TINY["dit"], "has_clip_tokens": False, "num_clip_positions": 0, "in_channels": 16}


@pytest.fixture(scope="module")
def model() -> WanDiT:
    made = tiny("dit", CONFIG)
    assert isinstance(made, WanDiT)
    return made


@pytest.fixture(scope="module")
def shapes(model: WanDiT) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(model)


def velocity(model: nn.Module) -> Tensor:
    assert isinstance(model, WanDiT)
    x = input_tensor("x", (1, 16, 2, 4, 4), 1)
    context = model.prepare(Conditions((input_tensor("text", (5, CONFIG["text_dim"]), 1),)))
    return model(x, torch.tensor([700.0]), context)


def with_weights(model: WanDiT, new: dict[str, Tensor]) -> WanDiT:
    changed = copy.deepcopy(model)
    changed.load_state_dict({**changed.state_dict(), **new})
    return changed


def with_lora(model: WanDiT, *refs: LoraRef) -> Tensor:
    attach(model, refs, torch.float32)
    set_strengths(model, [ref.strength for ref in refs])
    try:
        return velocity(model)
    finally:
        detach(model)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return float((got - want).abs().max() / want.abs().max()) < tolerance


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}


# --- every spelling, every algorithm ---------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_reference_formula(spelling: str, model: WanDiT, shapes, tmp_path: Path) -> None:
    lora = low_rank(shapes)
    path = write_lora(tmp_path / "lora.safetensors", spelling, lora)
    found = match(read_lora(path), shapes)
    assert len(found.changes) == 2 * len(LINEARS) and not found.unmatched
    weights = dict(model.named_parameters())
    reference = velocity(with_weights(model, {n: weights[n] + 0.7 * delta for n, delta in lora.deltas().items()}))
    assert not close(reference, velocity(model), 1e-3), "the LoRA must matter"
    assert close(with_lora(model, LoraRef(path=path, strength=0.7)), reference)
    fusion = Fusion([LoraRef(path=path, strength=0.7)], shapes)
    fused = {name: fusion(name, tensor) for name, tensor in weights.items()}
    assert close(velocity(with_weights(model, fused)), reference)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", ""])
def test_every_algorithm_is_its_formula(algorithm: str, prefix: str, model: WanDiT, shapes, tmp_path: Path) -> None:
    state, new = {}, {}
    weights = dict(model.named_parameters())
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.ffn.2"):
        tensors, apply = ALGORITHMS[algorithm](name, *shapes[f"{name}.weight"])
        key = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
        state |= {f"{key}.{ending}": tensor for ending, tensor in tensors.items()}
        weight = weights[f"{name}.weight"].detach()
        new[f"{name}.weight"] = weight + 0.6 * (apply(weight) - weight)
    path = write(tmp_path / "lora.safetensors", state)
    found = match(read_lora(path), shapes)
    assert len(found.changes) == 3 and not found.unmatched
    reference = velocity(with_weights(model, new))
    assert not close(reference, velocity(model), 1e-3)
    ref = LoraRef(path=path, strength=0.6)
    assert close(with_lora(model, ref), reference)
    fusion = Fusion([ref], shapes)
    assert close(velocity(with_weights(model, {n: fusion(n, t) for n, t in weights.items()})), reference)
    sizes = attach(model, [ref], torch.float32)
    detach(model)
    norm = sum(float((new[n] - weights[n]).square().sum()) for n in new) / 0.36
    assert sizes[0] == pytest.approx((norm / sum(float(weights[n].square().sum()) for n in new)) ** 0.5, rel=1e-4)
    assert fusion.sizes == pytest.approx(sizes)


DIFFS = {
    "blocks.0.norm3.diff": "blocks.0.norm3.weight",
    "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
    "blocks.1.self_attn.o.diff_b": "blocks.1.self_attn.o.bias",
    "blocks.1.diff_m": "blocks.1.modulation",
    "blocks.0.modulation.diff": "blocks.0.modulation",
    "head.diff_m": "head.modulation",
    "head.head.diff": "head.head.weight",
    "head.head.diff_b": "head.head.bias",
    "patch_embedding.diff": "patch_embedding.weight",
    "patch_embedding.diff_b": "patch_embedding.bias",
    "time_projection.1.diff_b": "time_projection.1.bias",
    "text_embedding.0.diff": "text_embedding.0.weight",
    "blocks.1.cross_attn.norm_k.w_norm": "blocks.1.cross_attn.norm_k.weight",
}
"""What LightX2V's distilled files hold besides matrices, and where it belongs."""


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_differences_of_norms_biases_and_modulation(prefix: str, model: WanDiT, shapes, tmp_path: Path) -> None:
    before, weights = snapshot(model), dict(model.named_parameters())
    state = {}
    for name, target in DIFFS.items():
        module, _, ending = name.rpartition(".")
        key = prefix + (module.replace(".", "_") if prefix == "lora_unet_" else module)
        state[f"{key}.{ending}"] = random(name, *shapes[target], scale=0.2)
    path = write(tmp_path / "lora.safetensors", state)
    new = {t: weights[t] + 0.5 * s for t, s in zip(DIFFS.values(), state.values(), strict=True)}
    reference = velocity(with_weights(model, new))
    plain = velocity(model)
    assert not close(reference, plain, 1e-3)
    attach(model, [LoraRef(path=path)], torch.float32)
    assert torch.equal(velocity(model), plain), "at strength 0 it is the model itself"
    set_strengths(model, [0.5])
    assert close(velocity(model), reference)
    set_strengths(model, [0.0])
    assert torch.equal(velocity(model), plain)
    detach(model)
    assert snapshot(model).keys() == before.keys()
    for name, (identity, tensor) in snapshot(model).items():
        assert identity == before[name][0] and torch.equal(tensor, before[name][1]), name
    fusion = Fusion([LoraRef(path=path, strength=0.5)], shapes)
    assert close(velocity(with_weights(model, {n: fusion(n, t) for n, t in weights.items()})), reference)


@pytest.mark.parametrize("alone", range(len(DIFFS)))
def test_each_difference_reaches_its_own_parameter(alone: int, model: WanDiT, shapes, tmp_path: Path) -> None:
    name, target = list(DIFFS.items())[alone]
    path = write(tmp_path / "lora.safetensors", {f"diffusion_model.{name}": random(name, *shapes[target])})
    assert [change.target for change in match(read_lora(path), shapes).changes] == [target]


def test_low_rank_on_the_convolution(model: WanDiT, shapes, tmp_path: Path) -> None:
    """The patch embedding is a convolution: its matrices are down [r, in, 1, 2, 2] and up [out, r, 1, 1, 1]."""
    down, up = random("conv.a", 4, 16, 1, 2, 2), random("conv.b", 128, 4, 1, 1, 1)
    key = "diffusion_model.patch_embedding"
    path = write(tmp_path / "x.safetensors", {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
    delta = torch.einsum("or,richw->oichw", up[:, :, 0, 0, 0], down)
    weight = dict(model.named_parameters())["patch_embedding.weight"]
    reference = velocity(with_weights(model, {"patch_embedding.weight": weight + delta}))
    assert close(with_lora(model, LoraRef(path=path)), reference)


def tucker_lora(name: str) -> tuple[dict[str, Tensor], Tensor]:
    down, mid, up = random("t.d", 3, 16, 1, 1, 1), random("t.m", 3, 3, 1, 2, 2), random("t.u", 128, 3, 1, 1, 1)
    delta = torch.zeros(128, 16, 1, 2, 2)
    for i in range(3):
        for j in range(3):
            delta += up[:, i, None] * mid[i, j] * down[None, j]
    state = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    return state, delta / 2


def tucker_loha(name: str) -> tuple[dict[str, Tensor], Tensor]:
    state, factors = {"alpha": torch.tensor(3.0)}, []
    for w in ("1", "2"):
        core, outward, inward = random(f"h{w}", 3, 3, 1, 2, 2), random(f"o{w}", 3, 128), random(f"i{w}", 3, 16)
        state |= {f"hada_t{w}": core, f"hada_w{w}_a": outward, f"hada_w{w}_b": inward}
        factors.append(torch.tensordot(outward.T, torch.tensordot(inward.T, core, ([1], [1])), ([1], [1])))
    return state, factors[0] * factors[1]


def tucker_lokr(name: str) -> tuple[dict[str, Tensor], Tensor]:
    w1, core, outward, inward = (random("k1", 4, 4), random("kt", 3, 3, 1, 2, 2), random("ka", 3, 32),
                                 random("kb", 3, 4))  # fmt: skip
    small = torch.tensordot(outward.T, torch.tensordot(inward.T, core, ([1], [1])), ([1], [1]))
    state = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": outward, "lokr_w2_b": inward, "alpha": torch.tensor(3.0)}
    return state, kron_of_convolution(w1, small)


def whole_lokr(name: str) -> tuple[dict[str, Tensor], Tensor]:
    w1, w2 = random("w1", 4, 4), random("w2", 32, 4, 1, 2, 2)
    return {"lokr_w1": w1, "lokr_w2": w2}, kron_of_convolution(w1, w2)


def kron_of_convolution(w1: Tensor, w2: Tensor) -> Tensor:
    return torch.cat([torch.cat([w1[i, j] * w2 for j in range(4)], 1) for i in range(4)])


@pytest.mark.parametrize("make", [tucker_lora, tucker_loha, tucker_lokr, whole_lokr])
def test_cores_and_kernels_of_the_convolution(make, model: WanDiT, shapes, tmp_path: Path) -> None:
    """The patch embedding is the only convolution that LyCORIS finds: there alone are Tucker cores."""
    state, delta = make("patch")
    path = write(tmp_path / "x.safetensors", {f"lora_unet_patch_embedding.{n}": t for n, t in state.items()})
    assert not match(read_lora(path), shapes).unmatched
    weight = dict(model.named_parameters())["patch_embedding.weight"]
    reference = velocity(with_weights(model, {"patch_embedding.weight": weight + delta}))
    assert not close(reference, velocity(model), 1e-3)
    assert close(with_lora(model, LoraRef(path=path)), reference)
    assert close(Fusion([LoraRef(path=path)], shapes)("patch_embedding.weight", weight), weight + delta)
    state[next(name for name in state if "_t" in name or "mid" in name or "w2" in name)] = torch.zeros(2, 5, 1, 2, 2)
    broken = write(tmp_path / "y.safetensors", {f"lora_unet_patch_embedding.{n}": t for n, t in state.items()})
    assert match(read_lora(broken), shapes).unmatched


def test_several_at_once_add_up_and_patterns_choose(model: WanDiT, shapes, tmp_path: Path) -> None:
    lora = low_rank(shapes)
    first = write_lora(tmp_path / "a.safetensors", "kohya", lora)
    weights = dict(model.named_parameters())
    new = {}
    for name, delta in lora.deltas().items():
        factor = (0.5 if name.startswith("blocks.0.") else 0.0) + (0.25 if ".ffn." not in name else 0.0)
        new[name] = weights[name] + factor * delta
    refs = [
        LoraRef(path=first, strength=0.5, only=("blocks.0",)),
        LoraRef(path=first, strength=0.25, skip=("*.ffn.*",)),
    ]
    assert close(with_lora(model, *refs), velocity(with_weights(model, new)))


def test_bfloat16_branch_is_as_near_as_fusing(shapes, tmp_path: Path) -> None:
    model = tiny("dit", CONFIG)
    lora = low_rank(shapes)
    path = write_lora(tmp_path / "a.safetensors", "comfyui", lora)
    weights = dict(model.named_parameters())
    exact = velocity(with_weights(model, {n: weights[n] + d for n, d in lora.deltas().items()}))
    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    got = with_lora(model, LoraRef(path=path))
    assert float((got - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("kind", ["fp8", "fp8-64", "int8"])
def test_beside_quantised_weights_it_is_exact(kind: str, shapes, tmp_path: Path) -> None:
    """The quantised model plus the LoRA, to rounding of float32: nothing is rounded again."""
    from kinema.weights.quantised.layers import swap
    from kinema.weights.quantised.packed import ON_LOAD, quantise

    model, plain = tiny("dit", {**CONFIG, "ffn_dim": 128}), tiny("dit", {**CONFIG, "ffn_dim": 128})
    lora = low_rank({name: tuple(t.shape) for name, t in plain.named_parameters()})
    new = {}
    for name in lora.deltas():
        packed = quantise(plain.state_dict()[name], *ON_LOAD[kind])
        swap(model, name, packed, torch.float32)
        new[name] = packed.dequantised(torch.float32)
    quantised = velocity(model)
    assert close(quantised, velocity(with_weights(plain, new)))
    path = write_lora(tmp_path / "x.safetensors", "kohya", lora)
    assert not match(read_lora(path), parameter_shapes(model)).unmatched
    want = velocity(with_weights(plain, {n: new[n] + 0.8 * d for n, d in lora.deltas().items()}))
    assert close(with_lora(model, LoraRef(path=path, strength=0.8)), want)
    assert torch.equal(velocity(model), quantised)


# --- alpha -------------------------------------------------------------------------------------------


def test_alpha_from_pefts_own_record(model: WanDiT, shapes, tmp_path: Path) -> None:
    lora = low_rank(shapes, scale=1.0)
    folder = tmp_path / "adapter"
    write_lora(folder / "adapter_model.safetensors", "peft", lora)
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "use_rslora": false}')
    reading = read_lora(folder)
    assert {reading.scale(change) for change in reading.changes} == {2.0}
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "use_rslora": true}')
    assert {read_lora(folder).scale(change) for change in reading.changes} == {4.0}
    said = '{"transformer.r": 4, "transformer.lora_alpha": 2, "text_encoder.lora_alpha": 64}'
    header = {"lora_adapter_metadata": said}
    path = write_lora(tmp_path / "d.safetensors", "diffusers", lora, header)
    assert {read_lora(path).scale(change) for change in read_lora(path).changes} == {0.5}
    write_lora(path, "diffusers", lora, {"lora_adapter_metadata": "[" * 100_000})
    with pytest.raises(CheckpointError, match="record of its alpha cannot be read"):
        read_lora(path)


# --- what does not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_renaming_one_key_is_seen(spelling: str, shapes, tmp_path: Path) -> None:
    state = SPELLINGS[spelling](low_rank(shapes))
    name = next(name for name in state if "1" in name and "ffn" in name)
    renamed = {(key.replace("ffn", "mlp") if key == name else key): tensor for key, tensor in state.items()}
    found = match(read_lora(write(tmp_path / "x.safetensors", renamed)), shapes)
    assert found.unmatched and len(found.changes) == 2 * len(LINEARS) - 1


READ_BY_NAME = {
    "bundle_emb.style.clip_l": "textual inversion",
    "diffusion_model.blocks.0.self_attn.q.oft_R.weight": "PEFT's OFT",
    "diffusion_model.blocks.0.self_attn.q.a1.weight": "GLoRA",
    "diffusion_model.blocks.0.self_attn.q.oft_blocks": "BOFT",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": "text encoder",
}
"""What is known and not read -> a word of the reason."""


@pytest.mark.parametrize("name", READ_BY_NAME)
def test_what_is_not_read_is_named(name: str, shapes, tmp_path: Path) -> None:
    state = {**SPELLINGS["comfyui"](low_rank(shapes)), name: torch.zeros(2, 8, 16, 16)}
    (left,) = match(read_lora(write(tmp_path / "x.safetensors", state)), shapes).unmatched
    assert left.name == name and READ_BY_NAME[name] in left.why


def test_a_shape_that_is_asked_for_must_be_that_of_the_matrices(shapes, tmp_path: Path) -> None:
    name = "diffusion_model.blocks.0.self_attn.q"
    state = SPELLINGS["comfyui"](low_rank(shapes))
    good = write(tmp_path / "a.safetensors", {**state, f"{name}.reshape_weight": torch.tensor([128, 128])})
    bad = write(tmp_path / "b.safetensors", {**state, f"{name}.reshape_weight": torch.tensor([128, 256])})
    assert not match(read_lora(good), shapes).unmatched
    assert {item.name for item in match(read_lora(bad), shapes).unmatched} >= {f"{name}.reshape_weight"}


PLANTED = {
    "half of a pair": lambda s: s.pop("blocks.0.self_attn.q.lora_A.weight") is None,
    "another width": lambda s: s.update({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 64)}),
    "ranks that differ": lambda s: s.update({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(3, 128)}),
    "a block too many": lambda s: s.update({"blocks.2.ffn.0.lora_A.weight": torch.zeros(4, 128),
                                            "blocks.2.ffn.0.lora_B.weight": torch.zeros(96, 4)}),
    "a tensor nobody knows": lambda s: s.update({"blocks.0.self_attn.q.lora_C.weight": torch.zeros(4)}),
    "blocks of OFT that are no squares": lambda s: s.update({"blocks.0.ffn.0.oft_blocks": torch.zeros(8, 16, 8)}),
    "blocks of OFT for other rows": lambda s: s.update({"blocks.0.norm3.oft_blocks": torch.zeros(4, 16, 16)}),
    "a plain weight": lambda s: s.update({"blocks.0.self_attn.q.weight": torch.zeros(128, 128)}),
    "the text encoder's": lambda s: s.update({"lora_te1_text_model_x.lora_down.weight": torch.zeros(4, 8),
                                              "lora_te1_text_model_x.lora_up.weight": torch.zeros(8, 4)}),
    "an official norm2, which has no weights": lambda s: s.update({"blocks.0.norm2.diff": torch.zeros(128)}),
    "a magnitude of another size": lambda s: s.update({"blocks.0.self_attn.q.dora_scale": torch.zeros(7, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_leaves_something_unmatched(fault: str, shapes, tmp_path: Path) -> None:
    state = SPELLINGS["official"](low_rank(shapes))
    assert not match(read_lora(write(tmp_path / "good.safetensors", state)), shapes).unmatched
    PLANTED[fault](state)
    assert match(read_lora(write(tmp_path / "bad.safetensors", state)), shapes).unmatched


def test_the_norm_that_diffusers_counts_differently(model: WanDiT, shapes, tmp_path: Path) -> None:
    """diffusers' norm2 is the official norm3; its norm3 has no weights, as the official norm2 has none."""
    base = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 128),
            "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.zeros(128, 4)}  # fmt: skip
    good = read_lora(write(tmp_path / "a.safetensors", {**base, "transformer.blocks.0.norm2.diff": torch.ones(128)}))
    assert "blocks.0.norm3.weight" in [change.target for change in match(good, shapes).changes]
    bad = read_lora(write(tmp_path / "b.safetensors", {**base, "transformer.blocks.0.norm3.diff": torch.ones(128)}))
    assert match(bad, shapes).unmatched


def test_the_image_branch_of_wan_21_is_explained(shapes, tmp_path: Path) -> None:
    image = parameter_shapes(tiny("dit"))
    state = SPELLINGS["lightx2v"](low_rank(image))
    for name in ("k_img", "v_img"):
        key = f"diffusion_model.blocks.0.cross_attn.{name}"
        state |= {f"{key}.lora_down.weight": torch.zeros(4, 128), f"{key}.lora_up.weight": torch.zeros(128, 4)}
        state |= {f"{key}.diff_b": torch.zeros(128)}
    state["diffusion_model.img_emb.proj.1.diff_b"] = torch.zeros(48)
    path = write(tmp_path / "x.safetensors", state)
    assert not match(read_lora(path), image).unmatched
    assert {item.kind for item in match(read_lora(path), shapes).unmatched} == {"image branch"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_and_the_model_stays(
    value: float, model: WanDiT, shapes, tmp_path: Path
) -> None:
    before, state = snapshot(model), SPELLINGS["comfyui"](low_rank(shapes))
    state["diffusion_model.blocks.1.ffn.2.lora_B.weight"][3, 1] = value
    state["diffusion_model.blocks.0.norm3.diff"] = torch.ones(128)
    ref = LoraRef(path=write(tmp_path / "x.safetensors", state))
    with pytest.raises(CheckpointError, match=r"ffn\.2\.weight holds values that are not finite"):
        attach(model, [ref], torch.float32)
    for name, (identity, tensor) in snapshot(model).items():
        assert identity == before[name][0] and torch.equal(tensor, before[name][1])
    with pytest.raises(CheckpointError, match="not finite"):
        Fusion([ref], shapes)("blocks.1.ffn.2.weight", torch.zeros(128, 96))


def test_many_swaps_leave_every_bit(model: WanDiT, shapes, tmp_path: Path) -> None:
    before = snapshot(model)
    names = ("blocks.0.self_attn.q", "blocks.1.norm3", "blocks.0")
    endings = ({"lora_A.weight": (4, 128), "lora_B.weight": (128, 4)}, {"diff": (128,)}, {"diff_m": (1, 6, 128)})
    state = {f"diffusion_model.{module}.{ending}": random(ending, *shape)
             for module, tensors in zip(names, endings, strict=True) for ending, shape in tensors.items()}  # fmt: skip
    ref = LoraRef(path=write(tmp_path / "x.safetensors", state))
    for _ in range(200):
        attach(model, [ref], torch.float32)
        set_strengths(model, [1.0])
        detach(model)
    after = snapshot(model)
    assert after.keys() == before.keys() and not any("lora" in type(m).__name__.lower() for m in model.modules())
    assert all(after[n][0] == before[n][0] and torch.equal(after[n][1], before[n][1]) for n in before)


def test_a_pickle_with_its_tensors_under_state_dict(shapes, tmp_path: Path) -> None:
    """The relighting LoRA of Animate is a .ckpt of this shape."""
    path = tmp_path / "relighting_lora.ckpt"
    torch.save({"state_dict": SPELLINGS["peft of an adapter"](low_rank(shapes))}, path)
    assert len(match(read_lora(path), shapes).changes) == 2 * len(LINEARS)


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no LoRA"):
        read_lora(write(tmp_path / "dit.safetensors", {"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}))


# --- names of the full-size models -------------------------------------------------------------------

FULL = ("wan2.1_t2v_14B", "wan2.1_i2v_14B", "wan2.1_flf2v_14B", "wan2.1_vace_14B", "wan2.1_fun_camera_14B",
        "wan2.1_fun_control_14B", "wan2.2_fun_camera_a14B", "wan2.2_fun_control_a14B", "wan2.2_s2v_14B",
        "wan2.2_animate_14B", "wan2.2_ti2v_5B", "flux1_dev")  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_joined_names_of_every_full_size_model_can_be_split(name: str) -> None:
    modules = {key.rpartition(".")[0] for key in manifest(name)}
    assert [module for module in modules if dotted(module.replace(".", "_")) != module] == []
    assert dotted("blocks_0_self_attn_q") != dotted("blocks_0_selfattn_q") and WORDS


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "base_model.model."])
def test_every_matrix_of_every_full_size_model_is_reached(name: str, prefix: str, tmp_path: Path) -> None:
    """Whatever a variant adds, such as VACE's blocks or Animate's face adapter, has its place by its own name."""
    shapes, header = manifest(name), {}
    matrices = [key for key, shape in shapes.items() if len(shape) == 2 and key.endswith(".weight")]
    for key in matrices:
        module = key.removesuffix(".weight")
        spelled = prefix + (module.replace(".", "_") if prefix == "lora_unet_" else module)
        header |= {f"{spelled}.lora_A.weight": (4, shapes[key][1]), f"{spelled}.lora_B.weight": (shapes[key][0], 4)}
    found = match(read_lora(write_sparse(tmp_path / "x.safetensors", header)), shapes)
    assert not found.unmatched and sorted(change.target for change in found.changes) == sorted(matrices)


def test_dialects_have_one_name_each() -> None:
    assert len({row.name for row in DIALECTS}) == len(DIALECTS)


# --- FLUX: fused matrices, headers only ----------------------------------------------------------------

FLUX = {name: shape for name, shape in manifest("flux1_dev").items() if ".1." not in name or "final" in name}
D = 3072
FLUX_PARTS = {
    "transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv.weight", D, D, (0, D)),
    "transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv.weight", D, D, (2 * D, D)),
    "transformer_blocks.0.attn.add_k_proj": ("double_blocks.0.txt_attn.qkv.weight", D, D, (D, D)),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj.weight", D, D, (0, D)),
    "transformer_blocks.0.attn.to_add_out": ("double_blocks.0.txt_attn.proj.weight", D, D, (0, D)),
    "transformer_blocks.0.ff.net.0.proj": ("double_blocks.0.img_mlp.0.weight", D, 4 * D, (0, 4 * D)),
    "transformer_blocks.0.ff_context.net.2": ("double_blocks.0.txt_mlp.2.weight", 4 * D, D, (0, D)),
    "transformer_blocks.0.norm1_context.linear": ("double_blocks.0.txt_mod.lin.weight", D, 6 * D, (0, 6 * D)),
    "single_transformer_blocks.0.attn.to_k": ("single_blocks.0.linear1.weight", D, D, (D, D)),
    "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1.weight", D, 4 * D, (3 * D, 4 * D)),
    "single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2.weight", 5 * D, D, (0, D)),
    "single_transformer_blocks.0.norm.linear": ("single_blocks.0.modulation.lin.weight", D, 3 * D, (0, 3 * D)),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer.weight", 768, D, (0, D)),
    "x_embedder": ("img_in.weight", 64, D, (0, D)),
    "norm_out.linear": ("final_layer.adaLN_modulation.1.weight", D, 2 * D, (0, 2 * D)),
    "proj_out": ("final_layer.linear.weight", D, 64, (0, 64)),
}
"""diffusers' module -> official parameter, in and out of the module, first row and rows of the parameter."""


@pytest.mark.parametrize(("prefix", "joined"), [("transformer.", False), ("lora_transformer_", True)])
def test_flux_in_diffusers_names_reaches_its_rows(prefix: str, joined: bool, tmp_path: Path) -> None:
    header = {}
    for name, (_, into, out, _) in FLUX_PARTS.items():
        key = prefix + (name.replace(".", "_") if joined else name)
        header |= {f"{key}.lora_A.weight": (16, into), f"{key}.lora_B.weight": (out, 16)}
    lora = read_lora(write_sparse(tmp_path / "x.safetensors", header))
    found = match(lora, FLUX)
    assert lora.family == "flux" and not found.unmatched
    assert lora.dialect == ("onetrainer" if joined else "diffusers")
    rows = {(change.target, change.rows(FLUX[change.target][0])) for change in found.changes}
    assert rows == {(target, place) for target, _, _, place in FLUX_PARTS.values()}


@pytest.mark.parametrize("spelling", ["lora_unet_", "diffusion_model.", ""])
def test_flux_in_official_names(spelling: str, tmp_path: Path) -> None:
    header = {}
    linear = [name for name, shape in FLUX.items() if name.endswith(".weight")]
    for name in linear:
        module = name.removesuffix(".weight")
        key = spelling + (module.replace(".", "_") if spelling == "lora_unet_" else module)
        header |= {f"{key}.lora_down.weight": (8, FLUX[name][1]), f"{key}.lora_up.weight": (FLUX[name][0], 8)}
    header |= {
        f"{spelling}single_blocks.0.norm.query_norm.diff".replace(".", "_", 4 * (spelling == "lora_unet_")): (128,)
    }
    found = match(read_lora(write_sparse(tmp_path / "x.safetensors", header)), FLUX)
    assert [item for item in found.unmatched if "query" not in item.name] == []
    assert len(found.changes) >= len(linear)


def test_fused_rows_are_the_reference_formula(tmp_path: Path) -> None:
    """q, k, v of a fused matrix of 3 x 8 rows over 8 columns, each with its own LoRA; halves exchanged in the head."""
    layer = nn.Module()
    layer.double_blocks = nn.ModuleList([nn.Module()])
    layer.double_blocks[0].img_attn = nn.Module()
    layer.double_blocks[0].img_attn.qkv = nn.Linear(8, 24)
    layer.final_layer = nn.Module()
    layer.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(8, 16))
    layer.requires_grad_(False)
    state, delta = {}, torch.zeros(24, 8)
    for n, part in enumerate("qkv"):
        a, b = random(f"{part}a", 2, 8), random(f"{part}b", 8, 2)
        key = f"transformer.transformer_blocks.0.attn.to_{part}"
        state |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        delta[8 * n : 8 * n + 8] = b @ a
    a, b = random("ha", 2, 8), random("hb", 16, 2)
    state |= {"transformer.norm_out.linear.lora_A.weight": a, "transformer.norm_out.linear.lora_B.weight": b}
    path = write(tmp_path / "x.safetensors", state)
    x, head = random("x", 3, 8), torch.cat([(b @ a)[8:], (b @ a)[:8]])
    qkv, last = layer.double_blocks[0].img_attn.qkv, layer.final_layer.adaLN_modulation[1]
    want = qkv(x) + x @ delta.T, last(x) + x @ head.T
    fusion = Fusion([LoraRef(path=path)], parameter_shapes(layer))
    assert torch.allclose(fusion("double_blocks.0.img_attn.qkv.weight", qkv.weight), qkv.weight + delta, atol=1e-6)
    attach(layer, [LoraRef(path=path)], torch.float32)
    set_strengths(layer, [1.0])
    assert torch.allclose(layer.double_blocks[0].img_attn.qkv(x), want[0], atol=1e-6)
    assert torch.allclose(layer.final_layer.adaLN_modulation[1](x), want[1], atol=1e-6)
    detach(layer)
    assert layer.double_blocks[0].img_attn.qkv is qkv


@pytest.mark.parametrize("algorithm", ["dora", "dora by column", "dora of peft", "loha", "lokr", "oft"])
def test_parts_of_a_fused_matrix_are_the_reference_formula(algorithm: str, tmp_path: Path) -> None:
    """Only the keys of a fused matrix change: the lengths of DoRA and the blocks of OFT are those of its rows alone."""
    width = 64
    layer = nn.Module()
    layer.double_blocks = nn.ModuleList([nn.Module()])
    layer.double_blocks[0].img_attn = nn.Module()
    layer.double_blocks[0].img_attn.qkv = qkv = nn.Linear(width, 3 * width)
    layer.requires_grad_(False)
    tensors, apply = ALGORITHMS[algorithm]("keys", width, width)
    key = "transformer.transformer_blocks.0.attn.to_k"
    path = write(tmp_path / "x.safetensors", {f"{key}.{name}": tensor for name, tensor in tensors.items()})
    rows = slice(width, 2 * width)
    new = qkv.weight.clone()
    new[rows] += 0.5 * (apply(qkv.weight[rows]) - qkv.weight[rows])
    x = random("x", 3, width)
    want = nn.functional.linear(x, new, qkv.bias)
    ref = LoraRef(path=path, strength=0.5)
    fused = Fusion([ref], parameter_shapes(layer))("double_blocks.0.img_attn.qkv.weight", qkv.weight)
    assert torch.allclose(fused, new, atol=1e-5)
    attach(layer, [ref], torch.float32)
    set_strengths(layer, [0.5])
    assert torch.allclose(layer.double_blocks[0].img_attn.qkv(x), want, atol=1e-4)
    detach(layer)


def test_loha_is_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    branch = branches.Hadamard(*(random(f"h{i}", *shape) for i, shape in enumerate([(50, 3), (3, 20)] * 2)), 0.5)
    x = random("x", 2, 7, 20)
    whole = branch(x, lambda given: given)
    made: list[int] = []
    seen = branches.Hadamard._rows
    monkeypatch.setattr(branches, "CHUNK", 8 * 20)
    monkeypatch.setattr(branches.Hadamard, "_rows", lambda self, rows: made.append(len(r := seen(self, rows))) or r)
    assert torch.allclose(branch(x, lambda given: given), whole, atol=1e-6)
    assert made == [8] * 6 + [2]
    assert torch.allclose(whole, x @ branch.delta().T, atol=1e-6)
