"""LoRA in planning, without torch and without files: experts, strengths by step, presets, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kinema.catalog.files import load_store
from kinema.catalog.loras import known_lora, load_loras
from kinema.errors import RequestError
from kinema.lora import LoraFacts, LoraMatch, LoraRef, Unmatched
from kinema.schema import Note, Plan, Request
from plan.world import image, plan

KNOWN = load_loras()
TARGETS = tuple(f"blocks.{i}.{name}.weight" for i in range(40) for name in ("self_attn.q", "ffn.0"))
A14B, I2V, T14, TI2V = "wan2.2-t2v-a14b", "wan2.2-i2v-a14b", "wan2.1-t2v-14b", "wan2.2-ti2v-5b"
STYLE = "/loras/style.safetensors"
HIGH = "/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors"
LOW = HIGH.replace("high", "low")
I2V_HIGH = "/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors"
I14 = "wan2.1-i2v-14b-480p"
I2V_64 = "/loras/lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"
LIGHTX2V = "/loras/lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors"


def facts(
    path: Path, unmatched: tuple[Unmatched, ...] = (), targets: tuple[str, ...] = TARGETS, parameters: int = 0
) -> LoraFacts:
    name = path.name.casefold()
    says = "high" if "high_noise" in name else "low" if "low_noise" in name else None
    fits = LoraMatch(targets=targets, unmatched=unmatched)
    return LoraFacts(
        path=path, files=(path,), bytes=1_000_000, parameters=parameters,
        dialect="comfyui", family="wan", algorithms={"lora": len(targets)},
        ranks=(64,), name_suggests=says, total=len(targets) + len(unmatched), matches={"dit": fits, "dit_high": fits},
        known=known_lora(path),
    )  # fmt: skip


def planned(model: str, *loras: Any, found: dict[str, Any] | None = None, **fields: Any) -> Plan:
    refs = Request(lora=loras).lora
    images = {"first": image(1600, 900)} if "i2v" in model and "ti2v" not in model else None
    world = {"loras": tuple(facts(ref.path, **(found or {})) for ref in refs), "known_loras": KNOWN}
    return plan(model, images, world, lora=refs, **fields)


def notes(made: Plan) -> str:
    return "\n".join(note.text for note in made.notes if isinstance(note, Note))


def test_a_lora_of_one_expert_model_is_in_the_recipe_the_report_and_every_step() -> None:
    made = planned(T14, f"{STYLE}:0.8")
    assert made.experts["model"].loras == (LoraRef(path=Path(STYLE), strength=0.8),)
    assert {step.loras for step in made.steps} == {(0.8,)}
    (report,) = made.loras
    assert (report.matched, report.total, report.dialect, report.change) == (80, 80, "comfyui", None)
    assert "80 of 80 parts matched (comfyui names, 80 lora, rank 64), strength 0.8" in report.said
    assert Path(STYLE) in made.files
    assert made.experts["model"].lora_mode == "branch"
    assert planned(T14, STYLE, lora_mode="fuse").experts["model"].lora_mode == "fuse"
    assert Plan.model_validate_json(made.model_dump_json(exclude_none=True)) == made


def test_without_lora_nothing_is_there() -> None:
    made = plan(T14)
    assert made.loras == () and made.preset is None and {step.loras for step in made.steps} == {()}


def test_the_name_chooses_the_expert_and_the_plan_says_so() -> None:
    made = planned(A14B, HIGH, LOW)
    assert [ref.path for ref in made.experts["high"].loras] == [Path(HIGH)]
    assert [ref.path for ref in made.experts["low"].loras] == [Path(LOW)]
    assert "goes to the high-noise expert, as its name says" in notes(made)
    both = planned(A14B, STYLE)
    assert both.experts["high"].loras and both.experts["low"].loras
    assert "goes to both experts" in notes(both)


def test_strength_by_expert_and_by_step() -> None:
    made = planned(A14B, f"{STYLE}:0.9@high", f"{STYLE}:0.4@low,steps=30-35", steps=40)
    for number, step in enumerate(made.steps, 1):
        wanted = 0.9 if step.expert == "high" else 0.4 if 30 <= number <= 35 else 0.0
        assert step.loras == (wanted,), number


def test_a_range_wholly_on_the_other_expert_is_said_to_have_no_effect() -> None:
    made = planned(A14B, f"{STYLE}@low,steps=1-2")
    assert "has no effect on the low-noise expert" in notes(made)


# --- presets ---------------------------------------------------------------------------------------

PRESETS = {
    "lightning t2v": (A14B, (HIGH, LOW), {}, (4, 5.0, "euler", 0.875), [1000.0, 937.5, 833.3333, 625.0], "hhll"),
    "lightning i2v": (I2V, (I2V_HIGH, I2V_HIGH.replace("high", "low")), {}, (4, 5.0, "euler", 0.9),
                      [1000.0, 937.5, 833.3333, 625.0], "hhll"),
    "lightx2v 2.1": (T14, (LIGHTX2V,), {}, (4, 5.0, "euler", None), [1000.0, 937.5, 833.3333, 625.0], "mmmm"),
    "causvid": (T14, ("/l/Wan21_CausVid_14B_T2V_lora_rank32.safetensors",), {}, (4, 8.0, "unipc", None),
                [999.0, 959.0, 888.0, 727.0], "mmmm"),
    "fastwan": (TI2V, ("/l/Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors",), {}, (3, 5.0, "euler", None),
                [1000.0, 757.0, 522.0], "mmm"),
    "fastwan by name": (TI2V, (), {"preset": "fastwan-ti2v-5b"}, (3, 5.0, "euler", None),
                        [1000.0, 757.0, 522.0], "mmm"),
}  # fmt: skip


@pytest.mark.parametrize("case", PRESETS)
def test_a_distilled_lora_brings_its_sampling(case: str) -> None:
    model, loras, fields, (steps, shift, solver, boundary), timesteps, experts = PRESETS[case]
    made = planned(model, *loras, **fields)
    assert (len(made.steps), made.shift, made.solver, made.boundary) == (steps, shift, solver, boundary)
    assert [step.timestep for step in made.steps] == pytest.approx(timesteps, abs=1e-3)
    assert "".join(step.expert[0] for step in made.steps) == experts
    assert {step.guidance for step in made.steps} == {1.0}
    assert made.preset and KNOWN[made.preset].title in notes(made)


def test_what_the_user_says_wins_over_a_preset_and_is_told() -> None:
    made = planned(A14B, HIGH, LOW, steps=8, shift=7.0)
    assert len(made.steps) == 8 and made.shift == 7.0
    assert "changed by you: steps 8, shift 7.0" in notes(made)
    plain = planned(A14B, HIGH, preset="none")
    assert plain.preset is None and len(plain.steps) == 40 and {s.guidance for s in plain.steps} == {4.0, 3.0}


def test_every_preset_and_pair_names_models_and_files() -> None:
    published = set(load_store().published)
    for lora in KNOWN.values():
        assert lora.used_by and lora.files and lora.title
        assert set(lora.used_by) <= published, lora.name
        assert not lora.is_preset or (lora.guidance == 1.0 and lora.source)
    seen = {name: known_lora(Path(name)) for name in PUBLISHED}
    assert seen == PUBLISHED


PUBLISHED = {
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": "lightning-t2v-a14b",
    "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors": "lightning-t2v-a14b",
    "Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_LOW_fp16.safetensors": "lightning-t2v-a14b",
    "Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.safetensors": "lightning-t2v-a14b",
    "wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors": "lightning-t2v-a14b",
    "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/low_noise_model.safetensors": "lightning-i2v-a14b",
    "Wan2.2-Lightning_I2V-A14B-4steps-lora_HIGH_fp16.safetensors": "lightning-i2v-a14b",
    "Wan_2_2_I2V_A14B_HIGH_lightx2v_4step_lora_260412_rank_256_fp16.safetensors": "lightning-i2v-a14b",
    "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors": "lightning-i2v-a14b",
    "Wan2.2_I2V_A14B_HIGH_4steps_lora_rank64_Seko_V1_forKJ.safetensors": "lightning-i2v-a14b",
    "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors": "lightx2v-i2v-14b",
    "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors": "lightx2v-t2v-14b",
    "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors": "lightx2v-t2v-14b",
    "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors": "causvid",
    "WanAnimate_relight_lora_fp16.safetensors": "relight-animate",
    "style.safetensors": None,
    "SVI_Wan2.2-I2V-A14B_high_noise_lora_v2.0_pro.safetensors": None,
}


# --- refused ---------------------------------------------------------------------------------------

ABSENT = (Unmatched(name="blocks.3.selfattn.q.weight", why="the model has no such part", kind="absent"),)
IMAGE = (Unmatched(name="blocks.0.cross_attn.k_img.weight", why="the model has no such part", kind="image branch"),)
PATCH = (Unmatched(name="patch_embedding.weight", why="16, not 36", kind="shape"),)
REFUSED = {
    "high on low": (A14B, (f"{HIGH}@low", LOW), {}, {}, ("high-noise", "low-noise", "@high", "allow=expert")),
    "high on both": (A14B, (f"{HIGH}@both", LOW), {}, {}, ("high-noise", "allow=expert")),
    "an expert of one": (T14, (f"{STYLE}@high",), {}, {}, ("one expert",)),
    "half of a pair on one expert": (T14, ("/l/style_high_noise.safetensors",), {}, {}, ("half", "allow=expert")),
    "unmatched": (T14, (STYLE,), {}, {"unmatched": ABSENT}, ("80 of 81", "blocks.3.selfattn.q", "allow=unmatched")),
    "another shape": (T14, (STYLE,), {}, {"unmatched": PATCH}, ("patch_embedding", "16, not 36")),
    "nothing matches": (T14, (f"{STYLE},allow=unmatched",), {}, {"unmatched": ABSENT, "targets": ()}, ("nothing",)),
    "half a pair": (A14B, (HIGH,), {}, {}, ("low-noise", "pair", "--preset none")),
    "guidance with a distilled one": (T14, (LIGHTX2V,), {"guidance": 5.0}, {}, ("5", "allowed is 1", "--guidance 1")),
    "guidance of one expert": (A14B, (HIGH, LOW), {"guidance_high": 3.5, "guidance": 1.0}, {}, ("3.5", "high-noise")),
    "two distillations": (T14, (LIGHTX2V, "/l/Wan21_CausVid_14B_T2V_lora_rank32.safetensors"), {}, {},
                          ("causvid", "lightx2v-t2v-14b", "mixed")),
    "another preset": (T14, (LIGHTX2V,), {"preset": "causvid"}, {}, ("mixed",)),
    "unknown preset": (T14, (STYLE,), {"preset": "turbo"}, {}, ("'turbo'", "causvid", "none")),
    "preset of another model": (T14, (STYLE,), {"preset": "fastwan-ti2v-5b"}, {}, ("wan2.2-ti2v-5b", T14)),
    "steps that do not exist": (T14, (f"{STYLE},steps=3-60",), {"steps": 50}, {}, ("3-60", "50", "steps=3-50")),
    "a pattern of nothing": (T14, (f"{STYLE},only=blok.*",), {}, {}, ("only=blok.*", "80", "blocks.0.self_attn.q")),
    "patterns that leave nothing": (T14, (f"{STYLE},skip=blocks.*",), {}, {}, ("no layer",)),
    "steps when fused": (T14, (f"{STYLE},steps=1-2",), {"lora_mode": "fuse"}, {}, ("fused", "branch")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case: str) -> None:
    model, loras, fields, found, words = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        planned(model, *loras, found=found, **fields)
    text = f"{caught.value.message}\n{caught.value.hint}"
    assert all(word in text for word in words), text
    assert caught.value.hint


@pytest.mark.parametrize("role", ["high", "low"])
def test_what_is_refused_may_be_allowed(role: str) -> None:
    allowed = planned(T14, f"{STYLE},allow=unmatched", found={"unmatched": ABSENT})
    assert "as allowed, 1 unmatched" in notes(allowed)
    other = "low" if role == "high" else "high"
    crossed = planned(A14B, f"/l/style_{role}_noise.safetensors@{other},allow=expert")
    assert crossed.experts[other].loras and not crossed.experts[role].loras
    assert planned(T14, f"/l/style_{role}_noise.safetensors,allow=expert").experts["model"].loras


def test_what_the_plan_can_explain_is_not_refused() -> None:
    image_branch = planned(I2V, STYLE, found={"unmatched": IMAGE})
    assert "the image branch of Wan 2.1, which wan2.2-i2v-a14b lacks" in notes(image_branch)
    assert image_branch.loras[0].matched == 80 and image_branch.loras[0].total == 81 and image_branch.loras[0].left_out
    official = planned(T14, LIGHTX2V, found={"unmatched": PATCH})
    assert "other input channels" in notes(official)


def test_official_pairs_are_not_refused_and_others_are_told() -> None:
    s2v = KNOWN["lightning-t2v-a14b"]
    assert s2v.one_expert == "high" and "wan2.2-s2v-14b" in s2v.used_by
    assert "wan2.2-animate-14b" in KNOWN["lightx2v-i2v-14b"].used_by
    assert {"wan2.2-fun-inp-a14b", "wan2.2-fun-control-a14b", "wan2.2-fun-camera-a14b"} <= set(
        KNOWN["lightning-i2v-a14b"].used_by
    )
    told = planned(I2V, HIGH, LOW)
    assert f"known to serve {A14B}" in notes(told) and told.preset == "lightning-t2v-a14b"


@pytest.mark.parametrize(
    ("model", "lora", "like"), [("wan2.2-s2v-14b", HIGH, T14), ("wan2.2-animate-14b", I2V_64, I14)]
)
def test_official_pairs_on_models_with_one_expert(
    model: str, lora: str, like: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The high-noise half serves S2V, the low-noise one does not; the 2.1 image LoRA serves Animate."""
    from plan import world

    monkeypatch.setitem(world.CATALOG, model, world.CATALOG[like].model_copy(update={"name": model}))
    images = {"first": image(1600, 900)} if like == I14 else None
    found = {"loras": (facts(Path(lora)),), "known_loras": KNOWN}
    made = plan(model, images, found, lora=(LoraRef(path=Path(lora)),))
    assert made.preset and len(made.steps) == 4 and "known to serve" not in notes(made)
    if lora == HIGH:
        with pytest.raises(RequestError, match="low-noise half"):
            plan(model, images, {**found, "loras": (facts(Path(LOW)),)}, lora=(LoraRef(path=Path(LOW)),))


def test_memory_counts_what_lies_beside_the_weights() -> None:
    plain, beside = plan(T14), planned(T14, STYLE, found={"parameters": 600_000_000})
    fused = planned(T14, STYLE, found={"parameters": 600_000_000}, lora_mode="fuse")
    peaks = {name: {c.stage: c.peak_bytes for c in made.costs}["sample"]
             for name, made in {"plain": plain, "beside": beside, "fused": fused}.items()}  # fmt: skip
    assert beside.experts["model"].lora_bytes == 1_200_000_000
    assert 1.1e9 < peaks["beside"] - peaks["plain"] < 1.3e9 and peaks["fused"] == peaks["plain"]
