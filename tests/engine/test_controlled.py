"""VACE and the Fun models on real files of small models: what is asked for, together and alone, becomes a video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kinema.engine import Engine
from kinema.errors import RequestError
from kinema.media.metadata import read_metadata
from kinema.media.probe import probe
from kinema.schema import Plan, Request, Result
from tiny_world import film, picture

CONTROL, VIDEO, MASK = "control", "video", "mask"
CASES = {
    "vace control": ("tiny-vace", ("control",), {}),
    "vace inpaint": ("tiny-vace", ("video", "mask"), {}),
    "vace masked control": ("tiny-vace", ("control", "mask"), {}),
    "vace extend": ("tiny-vace", ("video",), {"frames": 9}),
    "vace outpaint": ("tiny-vace", ("video",), {"outpaint": True, "size": "64x32"}),
    "vace one reference": ("tiny-vace", ("reference",), {}),
    "vace last frame alone": ("tiny-vace", ("last",), {}),
    "vace everything": ("tiny-vace", ("control", "video", "mask", "reference", "first", "last"), {"references": 2}),
    "vace nothing": ("tiny-vace", (), {}),
    "vace, two experts": ("tiny-vace-two", ("control", "mask", "reference"), {}),
    "inp first and last": ("tiny-inp", ("first", "last"), {}),
    "inp nothing": ("tiny-inp", (), {}),
    "inp mask, two experts": ("tiny-inp-two", ("video", "mask"), {}),
    "control 2.1": ("tiny-control21", ("control", "first"), {}),
    "control 2.1 with reference": ("tiny-control21ref", ("control", "reference"), {}),
    "control 2.2": ("tiny-control22", ("control", "first", "reference"), {}),
    "control 2.2, two experts": ("tiny-control22-two", ("control", "last", "reference"), {}),
    "camera 2.2, two experts": ("tiny-camera22-two", ("first",), {"camera": "pan left"}),
    "camera 2.1": ("tiny-camera21", ("first",), {"camera": "pan left"}),
    "camera 2.2": ("tiny-camera22", ("first", "last"), {"camera": "zoom in 2, roll"}),
    "camera 2.2 from text": ("tiny-camera22", (), {"camera": "static"}),
    "inp 5B": ("tiny-inp5", ("first", "last"), {}),
    "inp 5B extend": ("tiny-inp5", ("video",), {"frames": 9}),
    "control 5B": ("tiny-control5", ("control", "first", "reference"), {}),
    "camera 5B": ("tiny-camera5", ("first",), {"camera": "dolly out"}),
}


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    def request(model: str, roles: tuple[str, ...] = (), references: int = 1, **fields: Any) -> Request:
        given: dict[str, Any] = {}
        for seed, role in enumerate(roles):
            if role in ("control", "video"):
                given[role] = film(tmp_path / f"{role}.mp4", seed=seed)
            elif role == "mask":
                given[role] = half_white(tmp_path / "mask.png")
            elif role == "reference":
                given[role] = tuple(picture(tmp_path / f"ref{n}.png", 40, 64, seed=9 + n) for n in range(references))
            else:
                given[role] = picture(tmp_path / f"{role}.png", seed=seed)
        defaults = {"prompt": "a cat walks", "seed": 3, "save": tmp_path / "out.mp4", "precision": "reference"}
        return Request(**{**defaults, "device": "cpu", "overwrite": True, **given, "model": model, **fields})

    return request


def half_white(path: Path, width: int = 32, height: int = 32) -> Path:
    """Write a mask whose right half is made anew."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    Image.fromarray(pixels).save(path)
    return path


def finish(engine: Engine, request: Request) -> Result:
    (result,) = (event for event in engine.run(engine.plan(request)) if isinstance(event, Result))
    return result


def latents(engine: Engine, request: Request, tmp_path: Path) -> torch.Tensor:
    request = request.model_copy(update={"save": tmp_path / "x.latents.safetensors"})
    return load_file(finish(engine, request).paths[0])["latents"]


@pytest.mark.parametrize("name", CASES)
def test_every_input_makes_a_video(engine: Engine, ask: Any, name: str) -> None:
    model, roles, fields = CASES[name]
    result = finish(engine, ask(model, roles, **fields))
    facts = probe(result.paths[0])
    width, height = (int(side) for side in fields.get("size", "32x32").split("x"))
    assert (facts.width, facts.height, facts.frames) == (width, height, fields.get("frames", 5))
    carried = Plan.model_validate_json(read_metadata(result.paths[0])["kinema"])
    assert carried == result.plan
    inputs = {item.path for item in (*carried.images, *carried.videos)}
    assert inputs <= set(carried.files) and set(carried.hashes) == {str(file) for file in carried.files}


# Each input of a model, and the model: without it, the result is another.
MATTERS = [
    ("tiny-vace", ("control", "reference"), "control", {}),
    ("tiny-vace", ("control", "mask"), "mask", {}),
    ("tiny-vace", ("control", "video", "mask"), "control", {}),
    ("tiny-vace", ("control", "video", "mask"), "video", {}),
    ("tiny-vace", ("video", "mask", "reference"), "mask", {"frames": 9}),
    ("tiny-vace", ("video", "mask", "reference"), "reference", {}),
    ("tiny-vace", ("video", "mask", "last"), "last", {}),
    ("tiny-inp", ("first", "last"), "first", {}),
    ("tiny-inp", ("first", "last"), "last", {}),
    ("tiny-inp-two", ("video", "mask"), "mask", {"frames": 9}),
    ("tiny-control21", ("control", "first"), "first", {}),
    ("tiny-control21ref", ("control", "reference"), "reference", {}),
    ("tiny-control22", ("control", "first", "reference"), "first", {}),
    ("tiny-control22", ("control", "first", "reference"), "reference", {}),
    ("tiny-camera21", ("first",), "first", {"camera": "pan left"}),
    ("tiny-camera5", ("first",), "first", {"camera": "pan left"}),
]


@pytest.mark.parametrize(("model", "roles", "left_out", "fields"), MATTERS)
def test_every_input_matters(
    engine: Engine, ask: Any, tmp_path: Path, model: str, roles: tuple[str, ...], left_out: str, fields: dict[str, Any]
) -> None:
    fields = {**fields, "steps": 1}
    fewer = tuple(role for role in roles if role != left_out)
    whole = latents(engine, ask(model, roles, **fields), tmp_path)
    assert not torch.equal(whole, latents(engine, ask(model, fewer, **fields), tmp_path))
    assert torch.equal(whole, latents(engine, ask(model, roles, **fields), tmp_path))


def test_moves_and_scales_matter(engine: Engine, ask: Any, tmp_path: Path) -> None:
    left, right = (
        latents(engine, ask("tiny-camera22", ("first",), camera=f"pan {side}", steps=1), tmp_path)
        for side in ("left", "right")
    )
    assert not torch.equal(left, right)
    none, some, same = (
        latents(engine, ask("tiny-vace", ("control",), control_scale=scale, steps=1), tmp_path)
        for scale in (0.0, 0.7, None)
    )
    assert not torch.equal(none, some) and not torch.equal(some, same)


def test_references_are_trimmed_and_none_of_the_noise_is_lost(engine: Engine, ask: Any, tmp_path: Path) -> None:
    request = ask("tiny-vace", ("reference",), references=2, frames=9)
    plan = engine.plan(request)
    assert plan.latent == (16, 5, 4, 4) and plan.reference_frames == 2
    assert latents(engine, request, tmp_path).shape == (16, 3, 4, 4)


def test_the_clean_first_frame_of_a_5b_model_stays(engine: Engine, ask: Any, tmp_path: Path) -> None:
    from kinema.conditioning import media_conditions

    for roles, fields in ((("first",), {}), (("video",), {"frames": 9})):
        request = ask("tiny-inp5", roles, **fields)
        plan = engine.plan(request)
        assert plan.first_frame == "overwrite"
        clean = media_conditions(plan, engine._models.get).clean_BCFhw
        assert clean is not None and clean.shape == (1, 48, 1, 2, 2)
        assert torch.allclose(latents(engine, request, tmp_path)[:, :1], clean[0], atol=1e-5)
    assert engine.plan(ask("tiny-inp5", ("video", "mask"))).first_frame == "concat"


def test_a_reference_needs_files_that_take_one(engine: Engine, ask: Any) -> None:
    with pytest.raises(RequestError, match="takes no reference image"):
        engine.plan(ask("tiny-control21", ("control", "reference")))


def test_a_film_that_ends_before_it_said_is_refused(engine: Engine, ask: Any, tmp_path: Path) -> None:
    plan = engine.plan(ask("tiny-control21", ("control",)))
    film(tmp_path / "control.mp4", frames=3)
    with pytest.raises(RequestError, match="ends after 3 frames at 8 fps, not the 5 planned"):
        list(engine.run(plan))


def test_folders_of_frames_are_videos(engine: Engine, ask: Any, tmp_path: Path) -> None:
    for name in ("frames", "masks"):
        (tmp_path / name).mkdir()
        for number in range(5):
            picture(tmp_path / name / f"frame_{number}.png", 32, 32, seed=number)
    result = finish(engine, ask("tiny-vace", video=tmp_path / "frames", mask=tmp_path / "masks", frames=5))
    assert {video.frames for video in result.plan.videos} == {5}
    assert set(result.plan.hashes) >= {str(tmp_path / "frames" / f"frame_{number}.png") for number in range(5)}
