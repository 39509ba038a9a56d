"""Control pictures: Canny equal to OpenCV's, scribbles, depth equal to transformers' own path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from golden_weights import uniform
from kinema.errors import CheckpointError
from kinema.media.control import canny, scribble
from kinema.models.depth import Depth
from small_depth import small_depth_model

OPENCV = {
    (100, 200): (
        "110111101101111011011110ef0066f719ff99900911111009111110ff09fe7f117e00801111111011111110f7efee67"
        "100809981111111011111110ee7efff7010990901111111011111110ee6eeeef09108908111111101111111011111110"
    ),
    (300, 700): (
        "100001101000011010000110ef0060f019ff98900911101009011010ff09fe7f117e00801111111011111110f7ef8e67"
        "100809981111111011111110ee7efff00109909011011010110110100e00eeef09008908110111101101111011011110"
    ),
    (500, 1200): (
        "00000000000000000000000001006000019f98000101100001011000ff09f800111e00001110000011100000f1ef0000"
        "100800001010000010100000ee7800000108000001000000010000000e00000009000000110000001100000011000000"
    ),
}
"""(low, high) -> cv2.Canny of `mosaic()`, one bit a pixel; opencv-python-headless 4."""


def mosaic() -> torch.Tensor:
    """24 x 32 pixels in coloured cells of 4, and a fainter bar across."""
    cells = ((uniform("canny", (6, 8, 3), 0) + 1) * 127.5).numpy().astype(np.uint8)
    pixels = np.repeat(np.repeat(cells, 4, 0), 4, 1)
    pixels[5:9, 3:20] += 7
    return torch.from_numpy(pixels)


@pytest.mark.parametrize("bounds", OPENCV)
def test_canny_is_that_of_opencv(bounds: tuple[int, int]) -> None:
    want = np.unpackbits(np.frombuffer(bytes.fromhex(OPENCV[bounds]), np.uint8)).reshape(24, 32) * 255
    got = canny(mosaic(), *bounds)
    assert got.shape == (24, 32, 3) and got.dtype == torch.uint8
    assert all(np.array_equal(got[..., channel], want) for channel in range(3))


def test_a_weak_edge_counts_where_it_goes_on_from_a_strong_one() -> None:
    frame = torch.full((20, 40, 3), 100, dtype=torch.uint8)
    frame[10:, :20] = 160  # gradient 4 * 60
    frame[10:, 20:] = 130  # 4 * 30
    assert canny(frame, 100, 200)[:, 5:35].any(dim=2).any(dim=0).all(), "the weak half goes on"
    assert not canny(frame, 100, 300).any(), "nothing begins"
    assert not canny(frame, 150, 200)[:, 24:].any(), "the weak half is below the low bound"


def test_scribbles_follow_outlines_and_leave_detail_out() -> None:
    frame = torch.full((240, 320, 3), 90, dtype=torch.uint8)
    frame[60:180, 80:240] = 210
    frame[::4, :60] = 110  # fine stripes
    strokes = scribble(frame)
    assert strokes.shape == frame.shape and strokes.unique().tolist() == [0, 255]
    on = strokes[..., 0] > 0
    assert on[110:130, 74:86].any(dim=1).all() and on[54:66, 150:170].any(dim=0).all(), "the outline"
    assert not on[100:140, 120:200].any() and not on[:, :60].any(), "inside, and the stripes"
    assert on[120, 74:86].sum() >= 3, "strokes are thick"
    assert not scribble(frame, 600).any(), "the threshold counts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_depth_model(tmp_path_factory.mktemp("depth"))


def picture(width: int = 70, height: int = 50) -> torch.Tensor:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return torch.from_numpy(np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)))


def test_depth_is_that_of_transformers(folder: Path) -> None:
    from transformers import DepthAnythingForDepthEstimation
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    frame = picture(600, 540)
    processor = DPTImageProcessorPil(
        size={"height": 518, "width": 518}, keep_aspect_ratio=True, ensure_multiple_of=14, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    pixels = torch.as_tensor(np.array(processor(Image.fromarray(frame.numpy()))["pixel_values"]))
    depth = Depth(folder)
    assert depth.pixels(frame).shape == pixels.shape
    assert (depth.pixels(frame) - pixels).abs().max() < 0.05, "8-bit rounding of Pillow's resize"
    frame = picture()
    with torch.inference_mode():
        model = DepthAnythingForDepthEstimation.from_pretrained(folder).eval()
        want = torch.nn.functional.interpolate(
            model(pixel_values=depth.pixels(frame)).predicted_depth[None], (50, 70), mode="bilinear", align_corners=True
        )[0, 0]
    got = depth(frame)
    assert got.shape == (50, 70, 3) and got.dtype == torch.uint8 and got.min() == 0 and got.max() == 255
    grey = (want - want.min()) / (want.max() - want.min()) * 255
    assert (got[..., 0].float() - grey).abs().max() <= 0.51


def test_a_folder_that_is_no_depth_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Depth Anything model"):
        Depth(tmp_path)
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    state.pop("head.conv1.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"head\.conv1\.weight"):
        Depth(tmp_path)
