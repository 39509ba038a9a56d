"""Video to video, frames given anywhere, going on from a clip, one-frame inference: plans, numbers, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.conditioning import media_conditions
from kinema.engine import Engine
from kinema.errors import RequestError
from kinema.media.frames import crop_to, to_video_range
from kinema.media.image import read_image
from kinema.media.probe import probe
from kinema.media.reader import read_video
from kinema.media.video import write
from kinema.ops import read_latents
from kinema.residents import Residents
from kinema.sampling.denoiser import noised
from kinema.schema import Plan, Request, Result
from kinema.tensors import Media
from tiny_world import TinyWorld, picture

FRAMES, SIDE = 9, 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine different smooth frames at the tiny models' rate, without loss."""
    path = tmp_path_factory.mktemp("clip") / "frames"
    frames = [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (4, 4, 3), np.uint8)).resize((SIDE, SIDE))
        for n in range(FRAMES)
    ]
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames])
    write(Media(iter([pixels]), FRAMES, SIDE, SIDE, 8, {}), path, "png")
    return path


@pytest.fixture(scope="module")
def movie(clip: Path) -> Path:
    """The same as mp4."""
    pixels = torch.stack(list(read_video(clip)))
    write(Media(iter([pixels]), FRAMES, SIDE, SIDE, 8, {}), clip.parent / "clip.mp4", "mp4", 100)
    return clip.parent / "clip.mp4"


def request(model: str, folder: Path, **fields: Any) -> Request:
    return Request(**{"prompt": "a cat", "model": model, "device": "cpu", "seed": 3, "save": folder} | fields)


def planned(world: TinyWorld, model: str, folder: Path, **fields: Any) -> Plan:
    with Engine(world.settings) as engine:
        return engine.plan(request(model, folder, **fields))


def made(world: TinyWorld, model: str, folder: Path, **fields: Any) -> Result:
    with Engine(world.settings) as engine:
        plan = engine.plan(request(model, folder, **fields))
        return next(event for event in engine.run(plan) if isinstance(event, Result))


def latents(world: TinyWorld, model: str, folder: Path, **fields: Any) -> torch.Tensor:
    result = made(world, model, folder, output="latents", **fields)
    return read_latents(result.paths[0])[0]


# --- video to video --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny-t2v", "tiny-ti2v"])
def test_a_small_strength_stays_near_the_video(model: str, clip: Path, tiny_world: TinyWorld, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"video": clip, "frames": FRAMES, "steps": 20, "shift": 1.0, "guidance": 1.0}
    plan = planned(tiny_world, model, tmp_path, strength=0.1, **fields)
    source = media_conditions(plan, Residents().get).source_BCFhw
    assert source is not None and source.shape[2] == 3

    def distance(strength: float) -> float:
        folder = tmp_path / f"at{strength * 100:.0f}"
        got = latents(tiny_world, model, folder, strength=strength, **fields)
        return (got - source[0].cpu()).norm().item() / source.norm().item()

    near, far = distance(0.1), distance(1.0)
    assert near < far / 5, (near, far)


def test_which_steps_are_run_is_in_the_plan(clip: Path, tiny_world: TinyWorld, tmp_path: Path) -> None:
    whole = planned(tiny_world, "tiny-t2v", tmp_path, steps=10)
    plan = planned(tiny_world, "tiny-t2v", tmp_path, steps=10, video=clip, strength=0.55, frames=5)
    assert plan.steps == whole.steps[-5:] and plan.task == "video to video" and plan.strength == 0.55
    assert any("last 5 of 10 steps" in note.text for note in plan.notes)
    assert (plan.videos[0].role, plan.videos[0].frames) == ("source", 5)
    default = planned(tiny_world, "tiny-t2v", tmp_path, steps=10, video=clip)
    assert len(default.steps) == 8 and any("0.8" in note.text for note in default.notes)
    all_ = planned(tiny_world, "tiny-t2v", tmp_path, steps=10, video=clip, strength=1, solver="euler")
    assert len(all_.steps) == 10 and any("nothing of the source" in note.text for note in all_.notes)


def test_noise_is_mixed_by_the_first_sigma() -> None:
    clean, noise = torch.full((1, 1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1, 1), -4.0)
    assert noised(clean, noise, 0.25).item() == 0.75 * 2 - 0.25 * 4
    assert noised(clean, noise, 0).item() == 2 and noised(clean, noise, 1).item() == -4


def test_the_source_is_read_by_time(movie: Path, tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has 9 frames at 8 fps; 13 are to be made"):
        planned(tiny_world, "tiny-t2v", tmp_path, video=movie, frames=13)
    plan = planned(tiny_world, "tiny-t2v", tmp_path, video=movie, frames=17, fps=16)
    source = media_conditions(plan, Residents().get).source_BCFhw
    assert source is not None and source.shape[2] == 5, "at twice the rate each frame is shown twice"


# --- given frames ----------------------------------------------------------------------------------


def test_a_frame_may_be_given_anywhere(tiny_world: TinyWorld, tmp_path: Path) -> None:
    one, two = picture(tmp_path / "a.png", SIDE, SIDE, 1), picture(tmp_path / "b@2.png", SIDE, SIDE, 2)
    fields: dict[str, Any] = {"middle": [f"{one}@3", f"{two}@75%"], "frames": FRAMES, "size": "32x32"}
    plan = planned(tiny_world, "tiny-i2v-two", tmp_path, **fields)
    assert [(image.role, image.frame) for image in plan.images] == [("middle", 3), ("middle", 6)]
    models = Residents()
    concat = media_conditions(plan, models.get).concat_BCFhw
    assert concat is not None
    mask = concat[0, :4, :, 0, 0]
    assert mask.nonzero().tolist() == [[1, 2], [2, 1]], "frame 3 is the third of latent frame 1, 6 the second of 2"
    video = torch.zeros(1, 3, FRAMES, SIDE, SIDE)
    video[0, :, 3], video[0, :, 6] = (to_video_range(read_image(path)[0]) for path in (one, two))
    vae: Any = models.get(plan.vae)
    assert torch.allclose(concat[:, 4:], vae.encode(video), atol=1e-5)


@pytest.mark.parametrize("model", ["tiny-i2v-two", "tiny-clip"])
@pytest.mark.parametrize("given", [("last",), ("first", "middle", "last"), ("middle",)])
def test_any_of_first_middle_and_last_makes_a_video(
    given: tuple[str, ...], model: str, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    image = picture(tmp_path / "a.png", SIDE, SIDE)
    result = made(tiny_world, model, tmp_path, size="32x32", **dict.fromkeys(given, image))
    assert probe(result.paths[0]).frames == 5
    assert {image.role for image in result.plan.images} == set(given)
    assert [image.role for image in result.plan.images if image.clip] == ([given[0]] if model == "tiny-clip" else [])
    assert any(note.about == "last" for note in result.plan.notes) == (given == ("last",))


def test_a_last_image_alone_is_what_the_channels_know(tiny_world: TinyWorld, tmp_path: Path) -> None:
    plan = planned(tiny_world, "tiny-clip", tmp_path, last=picture(tmp_path / "a.png", SIDE, SIDE), size="32x32")
    models = Residents()
    conditions = media_conditions(plan, models.get)
    assert conditions.concat_BCFhw is not None and conditions.clip_BVD is not None
    assert conditions.concat_BCFhw[0, :4, :, 0, 0].nonzero().tolist() == [[3, 1]], "the last of its latent frame"
    video = torch.zeros(1, 3, 5, SIDE, SIDE)
    video[0, :, 4] = to_video_range(read_image(tmp_path / "a.png")[0])
    vae: Any = models.get(plan.vae)
    assert torch.allclose(conditions.concat_BCFhw[:, 4:], vae.encode(video), atol=1e-5)
    assert conditions.clip_BVD.abs().max() > 0
    inpaint = planned(tiny_world, "tiny-inp", tmp_path, last=tmp_path / "a.png", size="32x32")
    told = media_conditions(inpaint, models.get).clip_BVD
    assert told is not None and told.abs().max() == 0, "Fun models see zeros where nothing is first"


def test_a_model_that_reads_both_ends_says_so(tiny_world: TinyWorld, tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png", SIDE, SIDE)
    for given, word in (("last", "frame 0"), ("first", "the last frame")):
        with pytest.raises(RequestError, match=f"an image for {word}: it reads both ends through CLIP"):
            planned(tiny_world, "tiny-flf", tmp_path, **{given: image})
    with pytest.raises(RequestError, match="makes one picture: last"):
        one_frame(tiny_world, tmp_path, last=image)


def test_a_clip_as_first_image_goes_on_from_its_last_frame(movie: Path, tiny_world: TinyWorld, tmp_path: Path) -> None:
    *_, last = read_video(movie)
    Image.fromarray(last.numpy()).save(tmp_path / "last.png")
    models = Residents()
    for model in ("tiny-i2v-two", "tiny-ti2v", "tiny-clip"):
        plans = [planned(tiny_world, model, tmp_path, first=path) for path in (movie, tmp_path / "last.png")]
        assert any("goes on from" in note.text for note in plans[0].notes) and movie in plans[0].files
        on, still = (media_conditions(plan, models.get) for plan in plans)
        for field in ("concat_BCFhw", "clean_BCFhw", "clip_BVD"):
            a, b = getattr(on, field), getattr(still, field)
            assert (a is None and b is None) or torch.equal(a, b)


# --- one frame ---------------------------------------------------------------------------------------


def one_frame(world: TinyWorld, folder: Path, **fields: Any) -> tuple[Plan, Any, Residents]:
    image = picture(folder / "girl.png", SIDE, SIDE, 5)
    fields = {"one_frame": "target_index=1,control_index=0", "control_image": [image]} | fields
    plan = planned(world, fields.pop("model", "tiny-clip"), folder, size="32x32", **fields)
    models = Residents()
    return plan, media_conditions(plan, models.get), models


def test_one_frame_channels_follow_the_formula(tiny_world: TinyWorld, tmp_path: Path) -> None:
    plan, conditions, models = one_frame(tiny_world, tmp_path)
    assert (plan.frames, plan.latent[1], plan.task) == (1, 2, "image edit")
    assert conditions.positions == (0, 1)
    vae: Any = models.get(plan.vae)
    image = crop_to(to_video_range(read_image(tmp_path / "girl.png")[0]), SIDE, SIDE, "lanczos")
    wanted = torch.cat([vae.encode(image[None, :, None]), vae.encode(torch.zeros(1, 3, 1, SIDE, SIDE))], dim=2)
    assert torch.allclose(conditions.concat_BCFhw[:, 4:], wanted, atol=1e-5)
    assert conditions.concat_BCFhw[0, :4, 0].min() == 1 and conditions.concat_BCFhw[0, :4, 1].max() == 0


def test_controls_keep_the_order_they_are_given_in(tiny_world: TinyWorld, tmp_path: Path) -> None:
    a, b = picture(tmp_path / "a.png", SIDE, SIDE, 1), picture(tmp_path / "b.png", SIDE, SIDE, 2)
    forth = one_frame(tiny_world, tmp_path, one_frame="target_index=1,control_index=0;7", control_image=[a, b])
    back = one_frame(tiny_world, tmp_path, one_frame="control_index=7;0 , target_index=1", control_image=[b, a])
    assert forth[1].positions == back[1].positions == (0, 1, 7) and forth[0].one_frame.target == 1
    assert torch.equal(forth[1].concat_BCFhw, back[1].concat_BCFhw)
    assert forth[1].clip_BVD.shape == back[1].clip_BVD.shape and not torch.equal(forth[1].clip_BVD, back[1].clip_BVD)


def test_a_control_mask_hides_what_is_black(tiny_world: TinyWorld, tmp_path: Path) -> None:
    half = np.zeros((SIDE, SIDE, 3), np.uint8)
    half[:, : SIDE // 2] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    _, conditions, _ = one_frame(tiny_world, tmp_path, control_mask=[tmp_path / "mask.png"])
    mask = conditions.concat_BCFhw[0, :4, 0]
    assert (mask[:, :, 0] == 1).all() and (mask[:, :, -1] == 0).all()
    white = Image.new("RGB", (SIDE, SIDE), "white")
    white.save(tmp_path / "white.png")
    _, all_, _ = one_frame(tiny_world, tmp_path, control_mask=[tmp_path / "white.png"])
    _, plain, _ = one_frame(tiny_world, tmp_path)
    assert torch.equal(all_.concat_BCFhw, plain.concat_BCFhw)


def test_positions_turn_the_rotary_embedding(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Attention sees differences of time: a shift of all changes nothing, a wider gap does."""
    from dataclasses import replace

    plan, conditions, models = one_frame(tiny_world, tmp_path)
    dit: Any = models.get(plan.experts["model"].model_copy(update={"dtype": "float32"}))
    x = torch.randn(1, *plan.latent, generator=torch.Generator().manual_seed(0))
    given = replace(conditions, text=(torch.randn(3, dit.config.text_dim, generator=torch.Generator().manual_seed(1)),))

    def velocity(positions: tuple[int, ...] | None) -> torch.Tensor:
        context = dit.prepare(replace(given, positions=positions))
        with torch.inference_mode():
            return dit(x, torch.tensor([500.0]), context)

    plain = velocity(None)
    assert torch.equal(velocity((0, 1)), plain)
    assert torch.allclose(velocity((40, 41)), plain, atol=1e-4 * plain.abs().max().item())
    assert (velocity((0, 9)) - plain).abs().max() > 1e-3 * plain.abs().max()
    with pytest.raises(ValueError, match="3 positions for 2 latent frames"):
        velocity((0, 1, 2))


@pytest.mark.parametrize("model", ["tiny-clip", "tiny-flf"])
def test_one_frame_makes_a_picture(model: str, tiny_world: TinyWorld, tmp_path: Path) -> None:
    a, b = picture(tmp_path / "a.png", SIDE, SIDE, 1), picture(tmp_path / "b.png", SIDE, SIDE, 2)
    fields: dict[str, Any] = {"one_frame": "target_index=1,control_index=0;2", "control_image": [a, b]}
    result = made(tiny_world, model, tmp_path, size="32x32", **fields)
    assert result.paths[0].suffix == ".png" and Image.open(result.paths[0]).size == (SIDE, SIDE)
    assert result.plan.latent[1] == 3 and {a, b} <= set(result.plan.files)
    assert sum(image.clip for image in result.plan.images) == (2 if model == "tiny-flf" else 1)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        ("tiny-t2v", {"strength": 0.5}, "no video to start from"),
        ("tiny-t2v", {"video": "CLIP", "strength": 0.01, "steps": 10}, "leaves none to run"),
        ("tiny-clip", {"video": "CLIP", "first": "IMAGE"}, "takes no video"),
        ("tiny-i2v-two", {"middle": ["IMAGE@0"]}, "not between the first and the last of 5"),
        ("tiny-i2v-two", {"middle": ["IMAGE@4"]}, "not between"),
        ("tiny-i2v-two", {"middle": ["IMAGE@2", "IMAGE"]}, "frame 2 is taken already"),
        ("tiny-i2v-two", {"middle": ["nowhere.png@2"]}, "no such file"),
        ("tiny-ti2v", {"middle": ["IMAGE"], "first": "IMAGE"}, "takes no middle"),
        ("tiny-clip", {"one_frame": "target_index=1"}, "needs target_index and control_index"),
        ("tiny-clip", {"one_frame": "target_index=1,control_index=0"}, "1 control times (0) for 0 control images"),
        (
            "tiny-clip",
            {"one_frame": "target_index=0,control_index=0", "control_image": ["IMAGE"]},
            "names a time twice",
        ),
        ("tiny-clip", {"one_frame": "target_index=a,control_index=0", "control_image": ["IMAGE"]}, "takes one number"),
        (
            "tiny-clip",
            {"one_frame": "no_2x,control_index=0", "control_image": ["IMAGE"]},
            "'no_2x' is not target_index",
        ),
        (
            "tiny-clip",
            {"one_frame": "target_index=9999,control_index=0", "control_image": ["IMAGE"]},
            "times go from 0 to 1023",
        ),
        (
            "tiny-clip",
            {"one_frame": "target_index=1,control_index=0", "control_image": ["IMAGE"], "frames": 5},
            "one-frame inference makes one picture",
        ),
        ("tiny-clip", {"control_image": ["IMAGE"], "first": "IMAGE"}, "belongs to one-frame inference"),
        (
            "tiny-clip",
            {
                "one_frame": "target_index=1,control_index=0",
                "control_image": ["IMAGE"],
                "control_mask": ["IMAGE", "IMAGE"],
            },
            "2 control masks for 1 control images",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_loads(
    model: str, fields: dict[str, Any], words: str, clip: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    image = picture(tmp_path / "image.png", SIDE, SIDE)

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return value.replace("CLIP", str(clip)).replace("IMAGE", str(image)) if isinstance(value, str) else value

    with pytest.raises(RequestError) as caught:
        planned(tiny_world, model, tmp_path, **{name: filled(value) for name, value in fields.items()})
    assert words in str(caught.value) and caught.value.hint
