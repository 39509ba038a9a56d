"""What inputs become, against the formulas of the official codes written out step by step, on a small VAE."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from checkpoints import tiny
from kinema.conditioning import media_conditions, read_frames
from kinema.errors import RequestError
from kinema.media.camera import Rays, camera_poses
from kinema.media.frames import to_video_range
from kinema.media.image import image_facts, read_image
from kinema.media.probe import probe
from kinema.models.wan_vae import WanVAE
from kinema.schema import Plan
from kinema.tensors import Conditions
from plan.world import plan
from tiny_world import film, picture

T, SIDE = 5, 32
Inputs = Callable[..., Plan]


@cache
def vae() -> WanVAE:
    return cast(WanVAE, tiny("vae"))


def encode(video_CTHW: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae().encode(video_CTHW[None])[0]


def conditions(made: Plan) -> Conditions:
    return media_conditions(made, lambda ref: vae())


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """inputs(model, role=path, ...) -> plan of 5 frames of 32x32."""

    def make(model: str, frames: int = T, **media: Any) -> Plan:
        given = {role: media.pop(role) for role in list(media) if isinstance(media[role], Path)}
        images = {"first", "last", "reference"}
        facts = {role: (image_facts if role in images else probe)(path) for role, path in given.items()}
        return plan(model, images=facts, size=f"{SIDE}x{SIDE}", frames=frames, fps=8, **media)

    return make


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return film(tmp_path / "video.mp4", seed=1)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return film(tmp_path / "control.mp4", seed=2)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[5:20, 11:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def frames_of(made: Plan, role: str) -> Tensor:
    (found,) = (item for item in made.videos if item.role == role)
    return torch.stack([frame for frame, _ in read_frames(found)], dim=1)


def official_mask() -> Tensor:
    mask = torch.zeros(1, T, SIDE, SIDE)
    mask[:, :, 5:20, 11:] = 1
    return mask


def official_vace(video: Tensor, mask: Tensor, references: tuple[Tensor, ...] = ()) -> Tensor:
    """vace_encode_frames, vace_encode_masks and vace_latent of Wan 2.1's vace.py, in their order."""
    inactive, reactive = encode(video * (1 - mask) + 0 * mask), encode(video * mask + 0 * (1 - mask))
    latents = torch.cat([inactive, reactive])
    cells = mask[0].view(T, SIDE // 8, 8, SIDE // 8, 8).permute(2, 4, 0, 1, 3).reshape(64, T, SIDE // 8, SIDE // 8)
    small = F.interpolate(cells[None], size=((T + 3) // 4, SIDE // 8, SIDE // 8), mode="nearest-exact")[0]
    for image in reversed(references):
        latent = encode(image[:, None])
        latents = torch.cat([torch.cat([latent, torch.zeros_like(latent)]), latents], dim=1)
    small = torch.cat([torch.zeros_like(small[:, :1]).repeat(1, len(references), 1, 1), small], dim=1)
    return torch.cat([latents, small])


def context(made: Plan) -> Tensor:
    found = conditions(made).vace
    assert found is not None and found.scale == 1
    return found.context_BCFhw[0]


# --- VACE --------------------------------------------------------------------------------------------


def test_vace_control_alone(inputs: Inputs, control: Path):
    made = inputs("wan2.1-vace-1.3b", control=control)
    want = official_vace(frames_of(made, "control"), torch.ones(1, T, SIDE, SIDE))
    assert context(made).shape == (96, 2, 4, 4)
    assert torch.allclose(context(made), want, atol=1e-5)


def test_vace_control_and_mask_are_the_official_source_and_mask(inputs: Inputs, control: Path, mask: Path):
    made = inputs("wan2.1-vace-1.3b", control=control, mask=mask)
    want = official_vace(frames_of(made, "control"), official_mask())
    assert torch.allclose(context(made), want, atol=1e-5)
    whole = official_vace(frames_of(made, "control"), torch.ones(1, T, SIDE, SIDE))
    assert not torch.allclose(context(made), whole, atol=1e-2)


def test_vace_inpainting_has_grey_under_the_mask(inputs: Inputs, video: Path, mask: Path):
    made = inputs("wan2.1-vace-1.3b", video=video, mask=mask)
    want = official_vace(frames_of(made, "video") * (1 - official_mask()), official_mask())
    assert torch.allclose(context(made), want, atol=1e-5)


def test_vace_video_outside_and_control_inside_of_the_mask(inputs: Inputs, video: Path, control: Path, mask: Path):
    made = inputs("wan2.1-vace-1.3b", video=video, control=control, mask=mask)
    m = official_mask()
    source = frames_of(made, "video") * (1 - m) + frames_of(made, "control") * m
    assert torch.allclose(context(made), official_vace(source, m), atol=1e-5)


def test_vace_without_anything_is_grey_and_all_to_be_made(inputs: Inputs):
    want = official_vace(torch.zeros(3, T, SIDE, SIDE), torch.ones(1, T, SIDE, SIDE))
    assert torch.allclose(context(inputs("wan2.1-vace-1.3b")), want, atol=1e-5)


def test_vace_first_frame_stays_beside_a_control(inputs: Inputs, control: Path, tmp_path: Path):
    image = picture(tmp_path / "first.png", SIDE, SIDE)
    made = inputs("wan2.1-vace-1.3b", control=control, first=image)
    source, m = frames_of(made, "control"), torch.ones(1, T, SIDE, SIDE)
    source[:, 0], m[:, 0] = to_video_range(read_image(image)[0]), 0
    assert torch.allclose(context(made), official_vace(source, m), atol=1e-5)


def test_vace_references_are_white_framed_and_in_order(inputs: Inputs, control: Path, tmp_path: Path):
    paths = tuple(picture(tmp_path / f"{n}.png", 40, 64, seed=n) for n in range(2))
    made = inputs("wan2.1-vace-1.3b", control=control, reference=paths[0])
    images = tuple(made.images[0].model_copy(update={"path": path}) for path in paths)
    made = made.model_copy(update={"images": images, "reference_frames": 2, "latent": (16, 4, 4, 4)})
    canvases = []
    for path in paths:
        canvas = torch.ones(3, SIDE, SIDE)
        shown = to_video_range(read_image(path)[0])[None]
        canvas[:, :, 6:26] = F.interpolate(shown, size=(32, 20), mode="bilinear", align_corners=False)[0]
        canvases.append(canvas)
    whole = torch.ones(1, T, SIDE, SIDE)
    want = official_vace(frames_of(made, "control"), whole, tuple(canvases))
    assert torch.allclose(context(made), want, atol=1e-5)
    swapped = official_vace(frames_of(made, "control"), whole, tuple(reversed(canvases)))
    assert not torch.allclose(context(made), swapped, atol=1e-3)


def test_outpainting_masks_the_bars_and_keeps_the_rest(inputs: Inputs, tmp_path: Path):
    tall = film(tmp_path / "tall.mp4", width=16, height=32, seed=4)
    made = inputs("wan2.1-vace-1.3b", video=tall, outpaint=True)
    m = torch.ones(1, T, SIDE, SIDE)
    m[..., 8:24] = 0
    assert torch.allclose(context(made), official_vace(frames_of(made, "video"), m), atol=1e-5)


def test_extension_keeps_what_is_there(inputs: Inputs, video: Path):
    made = inputs("wan2.1-vace-1.3b", frames=9, video=video)
    masks = context(made)[32:]
    assert made.videos[0].frames == 5 and masks.shape == (64, 3, 4, 4)
    assert not masks[:, :2].any() and masks[:, 2].all()


# --- Fun ---------------------------------------------------------------------------------------------


def official_inpainting(video: Tensor, mask: Tensor) -> Tensor:
    """mask4 + masked latents as VideoX-Fun's inpainting pipelines make them; mask is 1 where it is made anew."""
    if mask.all():
        return torch.zeros(20, 2, 4, 4)
    latents = encode(video * (mask < 0.5))
    repeated = torch.cat([mask[:, :1].repeat_interleave(4, 1), mask[:, 1:]], 1)
    packed = 1 - repeated.view(1, repeated.shape[1] // 4, 4, SIDE, SIDE).transpose(1, 2)
    first = F.interpolate(packed[:, :, :1], size=(1, 4, 4), mode="trilinear", align_corners=False)
    rest = F.interpolate(packed[:, :, 1:], size=(1, 4, 4), mode="trilinear", align_corners=False)
    return torch.cat([torch.cat([first, rest], 2)[0], latents])


def concat(made: Plan) -> Tensor:
    found = conditions(made.model_copy(update={"clip_vision": None})).concat_BCFhw
    assert found is not None
    return found[0]


def test_fun_inpainting(inputs: Inputs, video: Path, mask: Path):
    made = inputs("wan2.2-fun-inp-a14b", video=video, mask=mask)
    assert torch.allclose(concat(made), official_inpainting(frames_of(made, "video"), official_mask()), atol=1e-5)


def test_fun_inpainting_of_nothing_known_is_zeros(inputs: Inputs):
    assert not concat(inputs("wan2.2-fun-inp-a14b")).any()


def test_fun_first_and_last(inputs: Inputs, tmp_path: Path):
    paths = [picture(tmp_path / f"{n}.png", SIDE, SIDE, seed=n) for n in range(2)]
    made = inputs("wan2.2-fun-inp-a14b", first=paths[0], last=paths[1])
    known, m = torch.zeros(3, T, SIDE, SIDE), torch.ones(1, T, SIDE, SIDE)
    for place, path in zip((0, -1), paths, strict=True):
        known[:, place], m[:, place] = to_video_range(read_image(path)[0]), 0
    assert torch.allclose(concat(made), official_inpainting(known, m), atol=1e-5)


def test_fun_control_21_has_the_start_in_frame_0_alone(inputs: Inputs, control: Path, tmp_path: Path):
    image = picture(tmp_path / "first.png", SIDE, SIDE)
    made = inputs("wan2.1-fun-control-1.3b", control=control, first=image)
    start = torch.zeros(16, 2, 4, 4)
    start[:, :1] = encode(to_video_range(read_image(image)[0])[:, None])
    want = torch.cat([encode(frames_of(made, "control")), start])
    assert torch.allclose(concat(made), want, atol=1e-5)
    bare = concat(inputs("wan2.1-fun-control-1.3b", control=control))
    assert not bare[16:].any() and torch.equal(bare[:16], concat(made)[:16])


def test_fun_control_22_orders_control_mask_masked(inputs: Inputs, control: Path, tmp_path: Path):
    image = picture(tmp_path / "first.png", SIDE, SIDE)
    made = inputs("wan2.2-fun-control-a14b", control=control, first=image)
    known, m = torch.zeros(3, T, SIDE, SIDE), torch.ones(1, T, SIDE, SIDE)
    known[:, 0], m[:, 0] = to_video_range(read_image(image)[0]), 0
    want = torch.cat([encode(frames_of(made, "control")), official_inpainting(known, m)])
    assert torch.allclose(concat(made), want, atol=1e-5)


def test_a_model_with_a_reference_gets_zeros_without_one(inputs: Inputs, control: Path, tmp_path: Path):
    none = conditions(inputs("wan2.2-fun-control-a14b", control=control)).reference
    image = picture(tmp_path / "reference.png", SIDE, SIDE)
    some = conditions(inputs("wan2.2-fun-control-a14b", control=control, reference=image)).reference
    assert none is not None and none.latent_BChw.shape == (1, 16, 4, 4) and not none.latent_BChw.any()
    want = encode(to_video_range(read_image(image)[0])[:, None])[:, 0]
    assert some is not None and torch.allclose(some.latent_BChw[0], want, atol=1e-5)


def test_a_camera_path_moves_as_its_poses_and_gives_its_frames_again(inputs: Inputs):
    made = inputs("wan2.2-fun-camera-a14b", frames=9, camera="pan left 3; roll, dolly in")
    assert made.camera is not None
    found = conditions(made).to("meta").camera
    assert found is not None and all(frame.is_meta for frame in found.frames), "rays are made where they are used"
    camera = conditions(made).camera
    assert camera is not None
    frames = list(camera.frames)
    assert [frame.shape for frame in frames] == [(1, 24, SIDE, SIDE)] * 3
    assert all(torch.equal(*pair) for pair in zip(frames, camera.frames, strict=True)), "for every branch of guidance"
    whole = Rays.of(camera_poses(made.camera), SIDE, SIDE).of_frames([0, 0, 0, *range(9)]).unflatten(0, (3, 4))
    assert torch.equal(torch.cat(frames), whole.permute(0, 4, 1, 2, 3).flatten(1, 2))


def test_videos_are_cropped_at_the_centre_and_held_to_their_length(inputs: Inputs, tmp_path: Path):
    wide = film(tmp_path / "wide.mp4", width=64, height=32, seed=5)
    made = inputs("wan2.1-fun-control-1.3b", control=wide)
    (item,) = made.videos
    plain = list(read_frames(item.model_copy(update={"width": 64})))
    assert torch.equal(frames_of(made, "control")[:, 0], plain[0][0][:, :, 16:48])
    with pytest.raises(RequestError, match="ends after 5 frames"):
        list(read_frames(item.model_copy(update={"frames": 6})))


@pytest.mark.parametrize(
    ("frames", "stored", "read"), [(7, 12, 16), (30, 30, 16), (9, 8, 24), (25, 25, 24), (5, 16, 8)]
)
def test_as_many_frames_are_planned_as_are_read(tmp_path: Path, frames: int, stored: float, read: float):
    path = film(tmp_path / "film.mp4", frames=frames, fps=stored)
    made = plan("wan2.1-vace-1.3b", {"control": probe(path)}, size="32x32", frames=81, fps=read)
    (item,) = made.videos
    assert len(list(read_frames(item))) == item.frames
    with pytest.raises(RequestError, match=f"ends after {item.frames} frames"):
        list(read_frames(item.model_copy(update={"frames": item.frames + 1})))
