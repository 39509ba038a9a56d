"""Control, masks, references and camera moves from the command line, to a file that plays."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Cli
from kinema.media.video import probe
from tiny_world import film, picture

COMMANDS = {
    "control and reference": "--model tiny-vace --control D/control.mp4 --reference D/a.png --control-scale 0.8",
    "inpainting": "--model tiny-inp --video D/video.mp4 --mask D/mask.png",
    "outpainting": "--model tiny-vace --video D/video.mp4 --outpaint --size 64x32",
    "fun control": "--model tiny-control22 --control D/control.mp4 --first D/a.png",
    "camera": "--model tiny-camera22 --first D/a.png --camera static",
}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    film(tmp_path / "control.mp4", seed=1)
    film(tmp_path / "video.mp4", seed=2)
    picture(tmp_path / "a.png", 32, 32)
    picture(tmp_path / "mask.png", 32, 32, seed=3)
    return tmp_path


def words(line: str, media: Path) -> list[str]:
    return [word.replace("D/", f"{media}/") for word in line.split()] + ["--device", "cpu", "--seed", "1"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_makes_a_video(tiny: Cli, media: Path, name: str):
    out = media / "out.mp4"
    ran = tiny("generate", "a cat", *words(COMMANDS[name], media), "--steps", "1", "-o", out)
    assert ran.code == 0, ran.err
    assert ran.paths == [out] and probe(out).frames == 5


def test_a_plan_tells_of_its_inputs(tiny: Cli, media: Path):
    ran = tiny("plan", "a cat", *words(COMMANDS["outpainting"], media))
    assert ran.code == 0, ran.err
    for told in ("outpainting", "video.mp4, 5 frames", "shown whole inside 64x32"):
        assert told in " ".join(ran.out.split()), ran.out
    ran = tiny("plan", "a cat", "--camera", "pan left", *words("--model tiny-camera22", media))
    assert ran.code == 0 and "pan left" in ran.out
