"""Plans without torch: the official defaults of every model, what is decided for the user, what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from kinema.errors import CheckpointError, MachineError, RequestError
from kinema.planning import sidecars
from kinema.planning.geometry import nearest_frames, nearest_multiples, size_by_area, size_by_area_wan22
from kinema.schema import AREAS, Machine, Plan
from plan.world import CATALOG, MACHINE, VAE_CONFIG, file, files_of, image, plan, sound, video

FIXTURES = Path(__file__).parent / "fixtures.json"
FIRST = {"first": image(1600, 900)}
CASES = {
    "wan2.1-t2v-1.3b": {},
    "wan2.1-t2v-14b": {},
    "wan2.1-i2v-14b-480p": {"images": FIRST},
    "wan2.1-i2v-14b-720p": {"images": FIRST},
    "wan2.1-flf2v-14b": {"images": {**FIRST, "last": image(1000, 1000, "last.png")}},
    "wan2.2-t2v-a14b": {},
    "wan2.2-i2v-a14b": {"images": FIRST},
    "wan2.2-animate-14b": {
        "prompt": None,
        "images": {
            "reference": image(720, 1280, "me.png"),
            "pose": video(1280, 720, 200, 30, "pose.mp4"),
            "face": video(512, 512, 200, 30, "face.mp4"),
        },
    },
    "wan2.2-ti2v-5b": {},
    "flux.1-dev": {},
    "flux.1-schnell": {},
    "flux.1-krea-dev": {},
    "flux.1-kontext-dev": {"images": {"reference": image(1600, 900, "room.png")}},
    "flux.1-fill-dev": {"images": {**FIRST, "mask": image(800, 600, "mask.png")}},
    "flux.1-canny-dev": {"images": {"control": image(1024, 768, "edges.png")}},
    "flux.1-depth-dev": {"images": {"control": image(1024, 768, "depth.png")}},
    "flux.1-redux-dev": {"images": {"reference": image(640, 640, "room.png")}},
    "wan2.1-vace-1.3b": {"images": {"control": video()}},
    "wan2.1-vace-14b": {"images": {"video": video(1280, 720), "mask": image(1280, 720, "mask.png")}},
    "wan2.2-vace-fun-a14b": {"images": {"reference": image(400, 800)}},
    "wan2.1-fun-inp-1.3b": {"images": FIRST},
    "wan2.1-fun-inp-14b": {"images": {**FIRST, "last": image(1600, 900, "last.png")}},
    "wan2.2-fun-inp-a14b": {"images": FIRST},
    "wan2.2-fun-inp-5b": {"images": FIRST},
    "wan2.1-fun-control-1.3b": {"images": {"control": video()}},
    "wan2.1-fun-control-14b": {"images": {"control": video(), "reference": image(400, 800)}},
    "wan2.2-fun-control-a14b": {"images": {"control": video(), "reference": image(400, 800)}},
    "wan2.2-fun-control-5b": {"images": {"control": video(1280, 704, 121, 24), **FIRST}},
    "wan2.1-fun-camera-1.3b": {"images": FIRST, "camera": "pan left"},
    "wan2.1-fun-camera-14b": {"images": FIRST, "camera": "zoom in"},
    "wan2.2-fun-camera-a14b": {"images": FIRST, "camera": "static"},
    "wan2.2-fun-camera-5b": {"images": FIRST, "camera": "roll"},
    "wan2.2-s2v-14b": {"images": {"reference": image(1200, 1600, "face.png"), "audio": sound(12.0)}},
}


def summary(made: Plan) -> dict[str, object]:
    """The decisions of a plan, without what depends on versions or on cost arithmetic."""
    kept = made.model_dump(
        mode="json",
        exclude_none=True,
        exclude={"kinema", "request", "costs", "versions", "hashes", "output", "notes", "steps"},
    )
    steps = made.steps
    return {
        **kept,
        "timesteps": [step.timestep for step in steps],
        "experts_by_step": "".join(step.expert[0] for step in steps),
        "guidance_by_step": sorted({(step.expert, step.guidance) for step in steps}),
        "notes": [f"{note.about}: {note.text}" for note in made.notes],
    }


@pytest.mark.parametrize("model", CASES)
def test_default_plan_is_the_recorded_one(model: str) -> None:
    """fixtures.json is written by `python tests/plan/record.py` and reviewed by eye against the official defaults."""
    recorded = json.loads(FIXTURES.read_text("utf-8"))[model]
    assert json.loads(json.dumps(summary(plan(model, **CASES[model])))) == recorded


def test_every_catalog_model_has_a_recorded_plan() -> None:
    assert set(CATALOG) - {"demo"} == set(CASES)


# Source: Wan-Video/Wan2.1 and Wan2.2 wan/configs, generate.py; aigc-apps/VideoX-Fun examples/wan2.1_fun,
# wan2.2_fun and wan2.2_vace_fun; black-forest-labs/flux src/flux/cli*.py. Guidance of two experts is (low, high).
FLUX_SHIFT = math.exp(1.15)
OFFICIAL = {
    "wan2.1-t2v-1.3b": (50, 5, 5, None, 81, 16, (832, 480), "wan"),
    "wan2.1-t2v-14b": (50, 5, 5, None, 81, 16, (1280, 720), "wan"),
    "wan2.1-i2v-14b-480p": (40, 3, 5, None, 81, 16, (832, 464), "i2v"),
    "wan2.1-i2v-14b-720p": (40, 5, 5, None, 81, 16, (1280, 720), "i2v"),
    "wan2.1-flf2v-14b": (50, 16, 5, None, 81, 16, (1280, 720), "flf2v"),
    "wan2.2-t2v-a14b": (40, 12, (3, 4), 0.875, 81, 16, (1280, 720), "wan"),
    "wan2.2-i2v-a14b": (40, 5, (3.5, 3.5), 0.9, 81, 16, (1280, 720), "wan"),
    "wan2.2-ti2v-5b": (50, 5, 5, None, 121, 24, (1280, 704), "wan"),
    "wan2.2-animate-14b": (20, 5, 1, None, 200, 30, (1280, 720), "wan"),
    "wan2.2-s2v-14b": (40, 3, 4.5, None, 12 * 16 - 3, 16, (704, 960), "s2v"),
    "wan2.1-vace-1.3b": (50, 16, 5, None, 81, 16, (832, 480), "wan"),
    "wan2.1-vace-14b": (50, 16, 5, None, 81, 16, (1280, 720), "wan"),
    "wan2.2-vace-fun-a14b": (50, 12, (5, 5), 0.875, 81, 16, (832, 480), "wan"),
    "wan2.1-fun-inp-1.3b": (50, 3, 6, None, 81, 16, (832, 464), "wan"),
    "wan2.1-fun-inp-14b": (50, 3, 6, None, 81, 16, (832, 464), "wan"),
    "wan2.2-fun-inp-a14b": (50, 5, (6, 6), 0.9, 81, 16, (832, 464), "wan"),
    "wan2.2-fun-inp-5b": (50, 5, 6, None, 121, 24, (1248, 704), "wan"),
    "wan2.1-fun-control-1.3b": (50, 3, 6, None, 81, 16, (832, 480), "wan"),
    "wan2.1-fun-control-14b": (50, 3, 6, None, 81, 16, (832, 480), "wan"),
    "wan2.2-fun-control-a14b": (50, 5, (6, 6), 0.9, 81, 16, (832, 480), "wan"),
    "wan2.2-fun-control-5b": (40, 5, 6, None, 121, 24, (1248, 704), "wan"),
    "wan2.1-fun-camera-1.3b": (50, 3, 6, None, 81, 16, (832, 464), "wan"),
    "wan2.1-fun-camera-14b": (50, 3, 6, None, 81, 16, (832, 464), "wan"),
    "wan2.2-fun-camera-a14b": (50, 5, (6, 6), 0.9, 81, 16, (832, 464), "wan"),
    "wan2.2-fun-camera-5b": (50, 5, 6, None, 121, 24, (1248, 704), "wan"),
    "flux.1-dev": (50, FLUX_SHIFT, 3.5, None, 1, 16, (1024, 1024), ""),
    "flux.1-schnell": (4, 1, None, None, 1, 16, (1024, 1024), ""),
    "flux.1-krea-dev": (28, FLUX_SHIFT, 4.5, None, 1, 16, (1024, 1024), ""),
    "flux.1-kontext-dev": (30, None, 2.5, None, 1, 16, None, ""),
    "flux.1-fill-dev": (50, None, 30, None, 1, 16, None, ""),
    "flux.1-canny-dev": (50, None, 30, None, 1, 16, None, ""),
    "flux.1-depth-dev": (50, None, 10, None, 1, 16, None, ""),
    "flux.1-redux-dev": (50, FLUX_SHIFT, 2.5, None, 1, 16, (1024, 1024), ""),
}
"""Model -> steps, shift, guidance, boundary, frames, fps, size, negative prompt; None where the input decides."""

NEGATIVES = {
    "wan": "ce96e0324e4b54ce",
    "i2v": "412753d092bcf370",
    "flf2v": "43885bed372496a7",
    "s2v": "98afffdba82fbb1f",
}
"""Start of the sha256 of each official negative prompt."""


@pytest.mark.parametrize("model", CASES)
def test_defaults_are_the_official_ones(model: str) -> None:
    made = plan(model, **CASES[model])
    steps, shift, guidance, boundary, frames, fps, size, negative = OFFICIAL[model]
    by_expert = {step.expert: step.guidance for step in made.steps}
    got = made.flux.guidance if made.flux else by_expert.get("model", (by_expert.get("low"), by_expert.get("high")))
    assert (len(made.steps), got, made.boundary, made.frames, made.fps) == (steps, guidance, boundary, frames, fps)
    assert shift in (None, made.shift) and size in (None, (made.width, made.height))
    assert NEGATIVES[negative] == sha256(made.negative.encode()).hexdigest()[:16] if negative else not made.negative


@pytest.mark.parametrize(("model", "high"), [("wan2.2-t2v-a14b", 26), ("wan2.2-i2v-a14b", 15)])
def test_high_noise_expert_runs_the_official_number_of_steps_first(model: str, high: int) -> None:
    made = plan(model, **CASES[model])
    assert [step.expert for step in made.steps] == ["high"] * high + ["low"] * (40 - high)


def test_a_single_guidance_goes_to_both_experts_and_says_so() -> None:
    made = plan("wan2.2-t2v-a14b", guidance=1.0)
    assert {step.guidance for step in made.steps} == {1.0}
    assert any(note.about == "guidance" for note in made.notes)
    apart = plan("wan2.2-t2v-a14b", guidance=1.0, guidance_high=2.0)
    assert {(step.expert, step.guidance) for step in apart.steps} == {("low", 1.0), ("high", 2.0)}


@pytest.mark.parametrize(
    ("image_size", "area", "size"),
    [((1600, 900), "720p", (1280, 720)), ((900, 1600), "720p", (720, 1280)), ((1000, 1000), "480p", (624, 624)),
     ((4000, 1000), "480p", (1248, 304))],
)  # fmt: skip
def test_size_by_area_keeps_the_aspect_and_stays_within(
    image_size: tuple[int, int], area: str, size: tuple[int, int]
) -> None:
    got = size_by_area(*image_size, AREAS[area])
    assert got == size
    assert got[0] % 16 == got[1] % 16 == 0 and got[0] * got[1] <= AREAS[area]


@pytest.mark.parametrize(
    ("image_size", "size"), [((1600, 900), (1248, 704)), ((1000, 1000), (960, 928)), ((704, 1280), (704, 1280))]
)
def test_ti2v_size_follows_the_official_rule(image_size: tuple[int, int], size: tuple[int, int]) -> None:
    got = size_by_area_wan22(*image_size, 1280 * 704)
    assert got[0] % 32 == got[1] % 32 == 0 and got[0] * got[1] <= 1280 * 704
    assert got == size


def test_nearest_values() -> None:
    assert nearest_frames(80) == (81, 77) and nearest_frames(81) == (81,) and nearest_frames(2) == (1, 5)
    assert nearest_multiples(725, 16) == (720, 736) and nearest_multiples(3, 16) == (16,)


def test_seconds_become_frames_and_say_so() -> None:
    made = plan("wan2.1-t2v-1.3b", seconds=5)
    assert made.frames == 81 and any("81 frames" in note.text for note in made.notes)
    assert made.latent == (16, 21, 60, 104) and made.tokens == 32_760


def test_one_frame_is_an_image() -> None:
    made = plan("wan2.1-t2v-14b", frames=1, size="1024x1024")
    assert made.task == "text to image" and made.output.kinds == ("png",) and not made.notes
    assert made.output.paths[0][0].name == "a-cat-walks-on-grass-7.png"


def test_so_short_a_time_is_an_image_too() -> None:
    assert plan("wan2.1-t2v-14b", seconds=0.01).task == "text to image"


@pytest.mark.parametrize("steps", [3, 9, 30, 50])
def test_the_strength_that_is_named_leaves_a_step(steps: int) -> None:
    with pytest.raises(RequestError, match="leaves none to run") as caught:
        plan("wan2.1-t2v-1.3b", {"video": video()}, steps=steps, strength=0.001)
    made = plan("wan2.1-t2v-1.3b", {"video": video()}, steps=steps, strength=caught.value.details["nearest"])
    assert len(made.steps) == 1


def test_seeds_count_up_and_have_their_own_files() -> None:
    made = plan("wan2.1-t2v-1.3b", count=3, save=Path("out/cat.mp4"))
    assert made.seeds == (7, 8, 9)
    assert [paths[0].name for paths in made.output.paths] == ["cat-7.mp4", "cat-8.mp4", "cat-9.mp4"]


def test_a_random_seed_is_drawn_and_recorded() -> None:
    drawn = {plan("wan2.1-t2v-1.3b", seed=None).seeds for _ in range(8)}
    assert len(drawn) > 1 and all(0 <= seeds[0] < 2**32 for seeds in drawn)


def test_generated_names_never_overwrite() -> None:
    taken = frozenset({"a-cat-walks-on-grass-7.mp4", "a-cat-walks-on-grass-7-2.mp4"})
    made = plan("wan2.1-t2v-1.3b", facts={"existing": taken})
    assert made.output.paths[0][0].name == "a-cat-walks-on-grass-7-3.mp4"
    with pytest.raises(RequestError, match="exists already"):
        plan("wan2.1-t2v-1.3b", save=Path("x/cat.mp4"), facts={"existing": frozenset({"cat.mp4"})})
    with pytest.raises(RequestError, match=r"cat\.json exists already"):
        plan("wan2.1-t2v-1.3b", save=Path("x/cat.mp4"), facts={"existing": frozenset({"cat.json"})})
    assert plan("wan2.1-t2v-1.3b", save=Path("x/cat.mp4"), strip=True, facts={"existing": frozenset({"cat.json"})})
    assert plan("wan2.1-t2v-1.3b", save=Path("x/cat.mp4"), overwrite=True, facts={"existing": frozenset({"cat.mp4"})})


def test_the_plan_beside_a_folder_of_frames_has_its_whole_name() -> None:
    for save, beside in (("v1.5.png", "v1.5-frames.json"), ("v1.5.mp4", "v1.5.json")):
        made = plan("wan2.1-t2v-1.3b", save=Path(save))
        assert [path.name for path in sidecars(made.output.paths[0], strip=False)] == [beside]


def test_stripped_latents_keep_their_plan_and_it_is_said() -> None:
    made = plan("wan2.1-t2v-1.3b", strip=True, output="mp4,latents")
    assert [note.about for note in made.notes] == ["strip"]
    assert not plan("wan2.1-t2v-1.3b", strip=True).notes


def test_precision_decides_dtypes() -> None:
    fast, reference = plan("wan2.2-ti2v-5b"), plan("wan2.2-ti2v-5b", precision="reference")
    assert fast.experts["model"].dtype == "bfloat16" and fast.vae.dtype == "float32"
    assert {reference.experts["model"].dtype, reference.text_encoder.dtype, reference.vae.dtype} == {"float32"}
    old_cpu = plan("wan2.1-t2v-1.3b", facts={"machine": MACHINE.model_copy(update={"bfloat16": False})})
    assert old_cpu.experts["model"].dtype == "float32"


def test_decisions_about_images_are_noted() -> None:
    notes = [
        note.text for note in plan("wan2.2-i2v-a14b", {"first": image(500, 900, alpha=True)}, size="832x480").notes
    ]
    assert any("cropped at its centre" in text for text in notes) and any("transparency" in text for text in notes)


REFUSED = [
    ("wan2.1-t2v-1.3b", {"frames": 80}, "frames 80 is not 4n.1; nearest are 77 and 81"),
    ("wan2.1-t2v-1.3b", {"size": "830x480"}, "size 830x480 .* nearest is 832x480"),
    ("wan2.2-ti2v-5b", {"size": "1280x720"}, "multiples of 32; nearest is 1280x704"),
    ("wan2.1-t2v-1.3b", {"images": {"first": image(8, 8)}}, "takes no first"),
    ("wan2.2-i2v-a14b", {}, "needs an image for frame 0"),
    ("wan2.1-flf2v-14b", {"images": {"first": image(8, 8)}}, "needs an image for the last frame"),
    ("wan2.1-t2v-1.3b", {"audio": "a.wav"}, "takes no audio"),
    ("wan2.1-t2v-1.3b", {"guidance_high": 3}, "one expert"),
    ("wan2.1-t2v-1.3b", {"boundary": 0.9}, "one expert"),
    ("wan2.1-t2v-1.3b", {"prompt": "  "}, "no prompt"),
    ("wan2.1-t2v-1.3b", {"frames": 81, "seconds": 5}, "both say how long"),
    ("wan2.1-t2v-1.3b", {"seed": None, "seeds": (1, 2), "count": 2}, "already says which"),
    ("wan2.1-t2v-1.3b", {"save": Path("a.mov")}, "ends in .mov"),
    ("wan2.1-t2v-1.3b", {"save": Path("a.mp4"), "output": "gif"}, "is a mp4 file but output asks for gif"),
    ("wan2.1-t2v-1.3b", {"output": "gif,gif"}, "names a kind twice"),
    ("wan2.1-t2v-1.3b", {"tile": 100}, "tile 100 is not a multiple of 16 from 64 up; nearest is 96"),
    ("wan2.2-ti2v-5b", {"tile": 96}, "tile 96 is not a multiple of 32 from 128 up; nearest is 128"),
    ("wan2.2-i2v-a14b", {"images": FIRST, "frames": 1}, "leaves nothing to make"),
    ("wan2.2-i2v-a14b", {"images": {"middle": image(1600, 900)}, "frames": 1}, "leaves nothing to make"),
]


@pytest.mark.parametrize(("model", "fields", "words"), REFUSED)
def test_what_cannot_mean_anything_is_refused(model: str, fields: dict, words: str) -> None:
    fields = {key: value for key, value in fields.items() if value is not None or key != "seed"}
    with pytest.raises(RequestError, match=words) as caught:
        plan(model, **{"seed": None, **fields} if "seeds" in fields else fields)
    assert caught.value.hint and caught.value.details["field"]


def test_files_that_do_not_belong_together_are_refused() -> None:
    entry = CATALOG["wan2.2-t2v-a14b"]
    files = files_of(entry)
    with pytest.raises(RequestError, match="same file"):
        plan(entry.name, facts={"files": {**files, "dit_high": files["dit"]}})
    with pytest.raises(CheckpointError, match="needs the wan2"):
        plan(entry.name, facts={"files": {**files, "vae": file("vae", "vae", VAE_CONFIG["wan2.2"])}})
    with pytest.raises(CheckpointError, match="text rows of 768"):
        plan(entry.name, facts={"files": {**files, "text_encoder": file("t", "text_encoder", {"dim": 768})}})
    with pytest.raises(CheckpointError, match="in_channels is 16, expected 36"):
        plan("wan2.2-i2v-a14b", FIRST, facts={"files": files})
    swapped = {
        **files,
        "dit": files["dit"].model_copy(update={"name_suggests": "high"}),
        "dit_high": files["dit_high"].model_copy(update={"name_suggests": "low"}),
    }
    with pytest.raises(RequestError, match="named as the high-noise expert"):
        plan(entry.name, facts={"files": swapped})


def test_a_job_that_cannot_fit_is_refused_before_it_starts() -> None:
    small = Machine(device="cuda", name="Card", memory_total=8_000_000_000, memory_free=8_000_000_000)
    with pytest.raises(MachineError, match="needs about"):
        plan("wan2.2-t2v-a14b", facts={"machine": small})
    with pytest.raises(MachineError, match="MB free"):
        plan("wan2.1-t2v-1.3b", facts={"output_free": 1_000_000})


def test_a_plan_survives_json() -> None:
    made = plan("wan2.2-i2v-a14b", FIRST)
    assert Plan.model_validate_json(made.model_dump_json()) == made
    assert Plan.model_validate_json(made.model_dump_json(exclude_none=True)) == made


def test_planning_needs_no_torch() -> None:
    code = "import sys, kinema.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- control, masks, references ----------------------------------------------------------------------


def notes_of(made: Plan, about: str) -> str:
    return "; ".join(note.text for note in made.notes if note.about == about)


def test_the_length_is_that_of_the_control_up_to_the_model_s_own() -> None:
    made = plan("wan2.1-vace-1.3b", {"control": video(frames=50)})
    assert made.frames == 49 and "49: as long as video.mp4" in notes_of(made, "frames")
    long = plan("wan2.1-vace-1.3b", {"control": video(frames=300)})
    assert long.frames == 81 and "of the 300 frames of video.mp4 at 16 fps the first 81 are used" in notes_of(
        long, "control"
    )
    assert plan("wan2.1-vace-1.3b", {"control": video(frames=50)}, frames=81).frames == 81


def test_a_control_that_ends_early_is_refused_by_fun_and_noted_by_vace() -> None:
    with pytest.raises(RequestError, match="has 50 frames at 16 fps; the video has 81") as caught:
        plan("wan2.2-fun-control-a14b", {"control": video(frames=50)}, frames=81)
    assert "--frames 49" in caught.value.hint
    made = plan("wan2.1-vace-1.3b", {"control": video(frames=50)}, frames=81)
    assert "ends with frame 50 of 81" in notes_of(made, "control")


@pytest.mark.parametrize(("fps", "frames", "counted"), [(16, 81, 81), (25, 100, 64), (30, 150, 80), (8, 40, 80)])
def test_frames_are_counted_at_the_model_s_rate(fps: float, frames: int, counted: int) -> None:
    made = plan("wan2.1-vace-1.3b", {"control": video(frames=frames, fps=fps)}, frames=81)
    assert made.videos[0].frames == counted and made.videos[0].fps == 16
    assert ("read at 16 fps" in notes_of(made, "control")) == (fps != 16)


def test_a_source_that_could_be_a_result_keeps_its_pixels() -> None:
    def size(**media: object) -> tuple[int, int]:
        made = plan("wan2.1-vace-1.3b", media)  # type: ignore[arg-type]
        return made.width, made.height

    assert size(control=video(832, 480)) == (832, 480)
    assert size(control=video(640, 480)) == (640, 480)
    assert size(control=video(1920, 1080)) == (832, 464)
    assert size(control=video(320, 240)) == (720, 544), "a small one is enlarged to the model's area"
    assert size(control=video(832, 480), first=image(480, 832)) == (480, 832), "the first image decides"


def test_references_cost_a_latent_frame_each() -> None:
    made = plan("wan2.1-vace-14b", {"reference": image(400, 800)}, size="832x480")
    assert made.reference_frames == 1 and made.latent == (16, 22, 60, 104) and made.frames == 81
    assert made.images[0].pad and "shown whole on white" in notes_of(made, "reference")


def test_what_is_written_of_clip() -> None:
    control, first, reference = video(), image(832, 480), image(400, 800)
    seen = [
        [image.role for image in plan("wan2.1-fun-control-14b", {"control": control, **given}).images if image.clip]
        for given in ({}, {"first": first}, {"first": first, "reference": reference})
    ]
    assert seen == [[], ["first"], ["reference"]]


def test_5b_models_overwrite_a_first_frame_that_is_known_whole() -> None:
    def made(**given: object) -> str:
        fields = {name: value for name, value in given.items() if not hasattr(value, "path")}
        media = {name: value for name, value in given.items() if hasattr(value, "path")}
        return plan("wan2.2-fun-inp-5b", media, **fields).first_frame  # type: ignore[arg-type]

    clip = video(1280, 704, 49, 24)
    assert made(first=image(1280, 704)) == "overwrite" and made(video=clip) == "overwrite"
    assert made(video=clip, mask=image(1280, 704)) == "concat" and made() == "concat"
    assert made(video=video(704, 704, 49, 24), outpaint=True, size="1280x704") == "concat"


@pytest.mark.parametrize("model", ["wan2.1-vace-14b", "wan2.1-fun-control-1.3b", "wan2.2-animate-14b"])
def test_sound_alone_shows_nothing(model: str) -> None:
    role = "pose" if "animate" in model else "control"
    media = {**CASES["wan2.2-animate-14b"]["images"], role: sound(5.0)} if role == "pose" else {role: sound(5.0)}
    with pytest.raises(RequestError, match=f"{role} .*voice.mp3 has sound but no picture"):
        plan(model, media)


@pytest.mark.parametrize(
    ("model", "more"), [("wan2.2-i2v-a14b", {}), ("flux.1-fill-dev", {"mask": image(832, 480, "mask.png")})]
)
def test_of_a_video_the_last_frame_is_the_first_image(model: str, more: dict) -> None:
    made = plan(model, {"first": video(), **more})
    assert made.images[0].from_video and "the last of the 81 frames of video.mp4" in notes_of(made, "first")


def test_outpainting_and_extension_are_told() -> None:
    made = plan("wan2.1-vace-14b", {"video": video(720, 1280)}, outpaint=True, size="1280x720", frames=81)
    assert made.videos[0].fit == "whole" and "shown whole inside 1280x720" in notes_of(made, "video")
    made = plan("wan2.1-vace-14b", {"video": video(1280, 720, 33)})
    assert made.frames == 81 and "frames 34 to 81 follow on video.mp4" in notes_of(made, "video")
    with pytest.raises(RequestError, match="nothing is left to make"):
        plan("wan2.1-vace-14b", {"video": video(1280, 720, 81)}, outpaint=True)


def test_names_of_files_end_with_a_whole_word() -> None:
    prompt = "a small red circle moves left on a navy background, slowly"
    assert plan("wan2.1-t2v-1.3b", prompt=prompt).output.paths[0][0].stem == "a-small-red-circle-moves-left-on-a-navy-7"
    assert plan("wan2.1-t2v-1.3b", prompt="猫" * 60).output.paths[0][0].stem == "猫" * 48 + "-7"
