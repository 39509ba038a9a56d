"""Control, masks, references and camera moves from the command line, to a file that plays."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Cli
from kinema.media.probe import probe
from tiny_world import film, picture

COMMANDS = {
    "control and reference": "--model tiny-vace --control D/control.mp4 --reference D/a.png --control-scale 0.8",
    "vace, two experts": "--model tiny-vace-two --control D/control.mp4 --reference D/a.png --reference D/mask.png",
    "extension": "--model tiny-vace --video D/video.mp4 --frames 9",
    "inpainting": "--model tiny-inp --video D/video.mp4 --mask D/mask.png",
    "inpainting, 5B": "--model tiny-inp5 --video D/video.mp4 --mask D/mask.png",
    "inpainting, two experts": "--model tiny-inp-two --first D/a.png --last D/mask.png",
    "outpainting": "--model tiny-vace --video D/video.mp4 --outpaint --size 64x32",
    "fun control": "--model tiny-control22-two --control D/control.mp4 --first D/a.png",
    "fun control 2.1": "--model tiny-control21ref --control D/control.mp4 --reference D/a.png",
    "fun control, 5B": "--model tiny-control5 --control D/control.mp4 --reference D/a.png",
    "camera": "--model tiny-camera22-two --first D/a.png --camera static",
    "camera 2.1": "--model tiny-camera21 --first D/a.png --camera roll",
    "camera, 5B": "--model tiny-camera5 --first D/a.png --camera static",
    "first, middle, last": "--model tiny-i2v-two --first D/a.png --middle D/mask.png@2 --last D/a.png",
    "last frame alone": "--model tiny-clip --last D/a.png",
    "first and last of 2.1": "--model tiny-flf --first D/a.png --last D/mask.png",
    "video to video": "--model tiny-ti2v --video D/video.mp4 --strength 0.5",
    "going on from a clip": "--model tiny-clip --first D/video.mp4",
    "how much moves": "--model tiny-t2v --motion-bucket-id 90",
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
    ran = tiny("generate", "a cat", *words(COMMANDS[name], media), "--steps", "2", "-o", out)
    assert ran.code == 0, ran.err
    assert ran.paths == [out] and probe(out).frames == (9 if "--frames 9" in COMMANDS[name] else 5)


def test_commands_that_make_one_picture(tiny: Cli, media: Path):
    edit = "--model tiny-clip --control-image D/a.png --one-frame target_index=1,control_index=0"
    for line in (edit, "--model tiny-t2v --frames 1"):
        ran = tiny("generate", "a cat", *words(line, media), "--steps", "1", "-o", media / "one.png", "--overwrite")
        assert ran.code == 0, ran.err
        assert ran.paths == [media / "one.png"] and probe(media / "one.png").frames == 1


def test_a_plan_tells_of_its_inputs(tiny: Cli, media: Path):
    ran = tiny("plan", "a cat", *words(COMMANDS["outpainting"], media))
    assert ran.code == 0, ran.err
    for told in ("outpainting", "video.mp4, 5 frames", "shown whole inside 64x32"):
        assert told in " ".join(ran.out.split()), ran.out
    ran = tiny("plan", "a cat", "--camera", "pan left", *words("--model tiny-camera22", media))
    assert ran.code == 0 and "pan left" in ran.out
