"""Reading image files: orientation, transparency, depth, and files that must be refused."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.errors import RequestError
from kinema.media.image import MAX_PIXELS, image_facts, read_image


def picture(width: int = 40, height: int = 24, mode: str = "RGB") -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 5, rows * 9, (columns + rows) * 3, 255 - columns], axis=2).astype(np.uint8)
    return Image.fromarray(pixels, "RGBA" if mode == "RGBA" else None).convert(mode)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_pixels_and_facts(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    picture().save(path, **({"lossless": True} if suffix == "webp" else {}))
    frame, facts = read_image(path)
    assert frame.dtype == torch.uint8 and torch.equal(frame, torch.from_numpy(np.array(picture())))
    assert (facts.kind, facts.width, facts.height, facts.frames, facts.has_alpha) == ("image", 40, 24, 1, False)
    assert image_facts(path) == facts


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    """However a camera stores it, the picture and its size come out upright."""
    stored = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    }[orientation](picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    frame, facts = read_image(tmp_path / "a.png")
    assert (facts.width, facts.height) == (40, 24)
    assert torch.equal(frame, torch.from_numpy(np.array(picture())))


def test_transparency_is_reported_and_dropped(tmp_path):
    picture(mode="RGBA").save(tmp_path / "a.png")
    frame, facts = read_image(tmp_path / "a.png")
    assert facts.has_alpha and torch.equal(frame, torch.from_numpy(np.array(picture())))
    picture().convert("P").save(tmp_path / "p.png", transparency=0)
    assert image_facts(tmp_path / "p.png").has_alpha


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture().convert(mode).save(path)
    assert read_image(path)[0].shape == (24, 40, 3)


def test_deep_grey_is_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 128, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    frame, _ = read_image(tmp_path / "a.png")
    assert frame[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert torch.equal(frame[..., 0], frame[..., 2])


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(RequestError, match="not 8 or 16 bit"):
        read_image(tmp_path / "a.tiff")


def test_frames_of_an_animation_are_counted(tmp_path):
    shades = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:])
    frame, facts = read_image(tmp_path / "a.gif")
    assert facts.frames == 3 and frame.max() == 0


def test_a_truncated_file_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / f"a.{suffix}"
        noise.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(RequestError, match="cannot be read") as caught:
            image_facts(path)
        assert str(path) in caught.value.message


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for read in (image_facts, read_image):
        with pytest.raises(RequestError, match=r"a\.png cannot be read"):
            read(tmp_path / "a.png")


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(RequestError, match="does not exist"):
        image_facts(tmp_path / "none.png")
    with pytest.raises(RequestError, match="is a folder"):
        read_image(tmp_path)


def test_a_bomb_is_refused_without_decoding(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")

    (tmp_path / "bomb.png").write_bytes(png(MAX_PIXELS // 1000 + 1, 1000))
    with pytest.raises(RequestError, match="more than 178,956,970 pixels"):
        image_facts(tmp_path / "bomb.png")


def test_a_large_image_is_read_without_a_warning(tmp_path, monkeypatch):
    """Pillow warns at half of the limit at which it refuses; nobody reads that."""
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_facts(tmp_path / "a.png").width == 40
