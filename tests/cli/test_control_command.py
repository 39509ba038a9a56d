"""`kinema control` and kinema.control: from a clip to a control video that plays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kinema
from conftest import Cli
from kinema.errors import RequestError
from kinema.media.control import canny
from kinema.media.metadata import read_metadata
from kinema.media.probe import probe
from kinema.media.reader import read_video
from kinema.media.video import write
from kinema.tensors import Media
from small_depth import small_depth_model

FRAMES = 7


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A square that moves over a coloured ground, at 12 frames a second."""
    coarse = np.random.default_rng(0).integers(60, 200, (3, 4, 3), np.uint8)
    ground = np.array(Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC))
    frames = np.repeat(ground[None], FRAMES, 0)
    for index in range(FRAMES):
        frames[index, 20:44, 10 + 8 * index : 34 + 8 * index] = (250, 20, 20)
    path = tmp_path / "clip.mp4"
    write(Media(iter([torch.from_numpy(frames)]), FRAMES, 96, 64, 12, {}), path, "mp4", 100)
    return path


def test_canny_keeps_rate_and_length_and_is_what_it_says(cli: Cli, clip: Path, tmp_path: Path) -> None:
    ran = cli("control", "canny", clip, "--save", tmp_path / "edges.mp4")
    assert ran.code == 0 and ran.paths == [tmp_path / "edges.mp4"]
    facts = probe(ran.paths[0])
    assert (facts.width, facts.height, facts.frames, facts.fps) == (96, 64, FRAMES, 12)
    assert json.loads(read_metadata(ran.paths[0])["kinema-control"])["kind"] == "canny"
    for edges, frame in zip(read_video(ran.paths[0]), read_video(clip), strict=True):
        on = canny(frame)[..., 0] > 0
        assert on.any() and edges[on].float().mean() > 200 and edges[~on].float().mean() < 30


def test_rate_size_and_length_can_be_changed(cli: Cli, clip: Path) -> None:
    ran = cli(
        "control", "scribble", clip, "--fps", "24", "--frames", "5", "--size", "64*64", "--save", "out.webm", "--json"
    )
    assert ran.code == 0 and ran.events[-1] == {"event": "result", "paths": ["out.webm"]}
    assert [event["done"] for event in ran.events[:-1]] == [0, 1, 2, 3, 4, 5]
    facts = probe(Path("out.webm"))
    assert (facts.width, facts.height, facts.frames, facts.fps) == (64, 64, 5, 24)


def test_a_folder_of_frames_and_one_picture_are_clips_too(cli: Cli, clip: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for index, frame in enumerate(read_video(clip)):
        Image.fromarray(frame.numpy()).save(frames / f"{index}.png")
    assert cli("control", "canny", frames, "--fps", "8", "--save", "a.gif").code == 0
    assert probe(Path("a.gif")).frames == FRAMES
    assert cli("control", "canny", frames / "0.png", "--save", "a.png").code == 0
    assert Image.open("a.png").size == (96, 64)


def test_depth_from_python_and_the_command_line(cli: Cli, clip: Path, tmp_path: Path) -> None:
    folder = small_depth_model(tmp_path / "depth")
    path = kinema.control("depth", clip, save="a.mp4", frames=2, weights=folder)
    assert path == Path("a.mp4") and probe(path).frames == 2
    assert cli("control", "depth", clip, "--frames", "2", "--weights", folder, "--save", "b.mp4").code == 0
    pulled = tmp_path / "models/depth-anything/Depth-Anything-V2-Small-hf"
    small_depth_model(pulled)
    assert cli("control", "depth", clip, "--frames", "2", "--models-dir", tmp_path / "models", "-o", "c.mp4").code == 0
    a, b, c = (torch.stack(list(read_video(name))) for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert torch.equal(a, b) and torch.equal(a, c)


def test_what_is_too_fine_for_a_smaller_size_leaves_no_edges(cli: Cli, tmp_path: Path) -> None:
    """Stripes three pixels apart, of which only some would be met without averaging."""
    stripes = np.zeros((300, 300, 3), np.uint8)
    stripes[:, ::3] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert cli("control", "canny", tmp_path / "stripes.png", "--size", "96x96", "--save", "a.png").code == 0
    assert not np.array(Image.open("a.png")).any()


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ("cany CLIP", 2, ("'cany'", "canny, scribble, depth", "kinema control canny VIDEO")),
        ("canny none.mp4", 2, ("none.mp4", "no such file")),
        ("canny CLIP --save CLIP", 2, ("exists already", "--overwrite")),
        ("canny CLIP --save CLIP --overwrite", 2, ("the clip itself",)),
        ("canny CLIP --save a.mov", 2, ("ends in .mov", "a.mp4")),
        ("canny CLIP --save a.mp4 --size 33x33", 2, ("33x33", "even")),
        ("canny CLIP --save ../clip.mp4/a.mp4", 8, ("clip.mp4/a.mp4 could not be written",)),
        ("canny CLIP --frames 8", 2, ("frames 8: clip.mp4 shows 7 at 12 fps", "--frames 7")),
        ("canny CLIP --low 300", 2, ("low 300 and high 200",)),
        ("scribble CLIP --threshold 0", 2, ("threshold 0",)),
        ("depth CLIP", 3, ("Depth Anything V2", "--weights FOLDER")),
        ("depth CLIP --weights empty", 3, ("empty", "--weights FOLDER")),
        ("canny CLIP --steps 3", 2, ("--steps is no flag of kinema control",)),
    ],
)
def test_bad_input_is_told(cli: Cli, clip: Path, argv: str, code: int, words: tuple[str, ...]) -> None:
    ran = cli("control", *(str(clip) if word == "CLIP" else word for word in argv.split()))
    assert ran.code == code
    assert all(word in ran.err for word in words), ran.err
    assert not list(Path().glob("*.mp4")) and clip.exists()


def test_a_clip_that_breaks_off_leaves_nothing(clip: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size * 6 // 10])
    with pytest.raises(RequestError, match=r"cut\.mp4"):
        kinema.control("canny", cut, save=tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob(".*.partial"))
