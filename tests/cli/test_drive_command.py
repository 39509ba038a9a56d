"""`kinema drive`, kinema.drive, `kinema control pose`: from a raw video to what Animate takes, in files that play."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import kinema
from conftest import Cli
from kinema.errors import RequestError
from kinema.media.metadata import read_metadata
from kinema.media.probe import probe
from kinema.media.reader import read_video
from kinema.media.video import write
from kinema.pose.skeleton import draw
from kinema.tensors import Media
from onnx_files import body_points, person_detector, segmenter
from tiny_world import TinyWorld

FRAMES, EMPTY = 8, (2, 3)
NETWORKS = "Wan-AI/Wan2.2-Animate-14B/process_checkpoint"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the two networks where the official repository has them."""
    root = tmp_path_factory.mktemp("models")
    person_detector(root / NETWORKS / "det/yolov10m.onnx", [(160, 80, 480, 600, 0.9, 0)])
    body_points(root / NETWORKS / "pose2d/vitpose_h_wholebody.onnx/end2end.onnx")
    return root


def glow(width: int, height: int, x: float, y: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (
        (255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 300)).round().astype(np.uint8)[..., None].repeat(3, 2)
    )


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A light that moves through the dark, and is out in two frames: the networks see a person where it is."""
    frames = np.stack([glow(96, 64, 30 + 4 * n, 32) * (n not in EMPTY) for n in range(FRAMES)])
    path = tmp_path / "clip.mp4"
    write(Media(iter([torch.from_numpy(frames)]), FRAMES, 96, 64, 30, {}), path, "mp4", 100)
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "me.png"
    Image.fromarray(glow(50, 80, 25, 40)).save(path)
    return path


def frames(path: Path) -> Tensor:
    return torch.stack(list(read_video(path)))


def test_animation(cli: Cli, clip: Path, reference: Path, networks: Path) -> None:
    ran = cli(
        "drive",
        clip,
        "--reference",
        reference,
        "--models-dir",
        networks,
        "--size",
        "64x80",
        "--save",
        "driving",
        "--json",
    )
    assert ran.code == 0, ran.err
    result = ran.events[-1]
    assert set(result) == {"event", "paths", "pose", "face"}
    pose, face = probe(Path(result["pose"])), probe(Path(result["face"]))
    assert (pose.width, pose.height, pose.frames, pose.fps) == (64, 80, FRAMES, 30), "about the reference's shape"
    assert (face.width, face.height, face.frames) == (512, 512, FRAMES)
    notes = [event["text"] for event in ran.events if event["event"] == "note"]
    assert any("2 of 8 frames show no person, the first at 0.07 s" in text for text in notes)
    assert any("limbs take the reference's lengths" in text for text in notes)
    drawn = frames(Path(result["pose"])).float().amax((1, 2, 3))
    assert all((drawn[n] < 20) == (n in EMPTY) for n in range(FRAMES)), drawn


def test_replacement(cli: Cli, clip: Path, networks: Path) -> None:
    ran = cli("drive", clip, "--replace", "--models-dir", networks, "--size", "96x64", "--save", "driving")
    assert ran.code == 0, ran.err
    words = shlex.split(ran.out.strip())
    assert words[:4] == ["kinema", "generate", "--model", "wan2.2-animate-14b"]
    assert {"--pose", "--face", "--mask", "--background"} < set(words)
    made = {role: frames(Path("driving") / f"{role}.mp4") for role in ("pose", "face", "mask", "background")}
    assert all(len(video) == FRAMES for video in made.values()) and made["mask"].shape == made["pose"].shape
    height, width = made["mask"].shape[1:3]
    on = made["mask"][0, :, :, 0] > 127
    ys, xs = torch.nonzero(on, as_tuple=True)
    box = (int(xs.min()) / width, int(ys.min()) / height, (int(xs.max()) + 1) / width, (int(ys.max()) + 1) / height)
    grown_by = (9 / width, 9 / height)
    assert box == pytest.approx(
        (0.25 - grown_by[0], max(0.125 - grown_by[1], 0), 0.75 + grown_by[0], min(0.9375 + grown_by[1], 1)), abs=0.03
    )
    assert int(made["background"][0][on].max()) < 30, "the person is cut out"
    assert not (made["mask"][EMPTY[0]] > 127).any()
    assert "2 of 8 frames show no person" in ran.err and "the box around the person" in ran.err
    assert "empty in 2 of 8 frames" in ran.err


def test_a_given_mask_is_grown_and_made_of_blocks(cli: Cli, clip: Path, networks: Path, tmp_path: Path) -> None:
    mask = np.zeros((FRAMES, 64, 96, 3), np.uint8)
    mask[:, 30:34, 40:44] = 255
    path = tmp_path / "mask.mp4"
    write(Media(iter([torch.from_numpy(mask)]), FRAMES, 96, 64, 30, {}), path, "mp4", 100)
    ran = cli("drive", clip, "--replace", "--mask", path, "--models-dir", networks, "--size", "96x64", "--save", "x")
    assert ran.code == 0, ran.err
    on = frames(Path("x/mask.mp4"))[EMPTY[0], :, :, 0] > 127
    ys, xs = torch.nonzero(on, as_tuple=True)
    assert abs(int(xs.max() - xs.min()) + 1 - (4 + 18)) <= 2 and abs(int(ys.max() - ys.min()) + 1 - (4 + 18)) <= 2
    assert "the box around" not in ran.err
    Image.fromarray(mask[0]).save(tmp_path / "mask.png")
    words = ["drive", clip, "--replace", "--models-dir", networks, "--size", "96x64"]
    ran = cli(*words, "--mask", tmp_path / "mask.png", "--save", "z")
    assert ran.code == 0 and "mask.png says where the person is, the same in every frame" in ran.err, ran.err
    assert torch.equal(frames(Path("z/mask.mp4"))[-1, :, :, 0] > 127, on)
    short = tmp_path / "short.mp4"
    write(Media(iter([torch.from_numpy(mask[:3])]), 3, 96, 64, 30, {}), short, "mp4", 100)
    tall = tmp_path / "tall.mp4"
    write(Media(iter([torch.from_numpy(mask.swapaxes(1, 2))]), FRAMES, 64, 96, 30, {}), tall, "mp4", 100)
    for bad, message in ((short, "it shows 3 of 8 frames"), (tall, "of another shape than the video")):
        ran = cli("drive", clip, "--replace", "--mask", bad, "--models-dir", networks, "--size", "96x64", "--save", "y")
        assert ran.code == 2 and message in ran.err and not Path("y").exists(), "before anything is read"


def test_the_outline_is_sam_2_s_where_its_files_are(cli: Cli, clip: Path, networks: Path, tmp_path: Path) -> None:
    """The light itself, grown, and not the box around the person; it goes with the light."""
    encoder = segmenter(tmp_path / "more/sam2")
    words = ["drive", clip, "--replace", "--models-dir", networks, "--size", "96x64", "--columns", "9", "--rows", "9"]
    ran = cli(*words, "--models-dir", tmp_path / "more", "--save", "found")
    assert ran.code == 0, ran.err
    assert "by sam2_hiera_tiny.encoder.onnx from the skeleton" in ran.err and "the box around" not in ran.err
    on = frames(Path("found/mask.mp4"))[..., 0] > 127
    for number in (0, 1, 4, 7):
        centre = torch.nonzero(on[number])[:, 1].float().mean()
        assert centre == pytest.approx(30 + 4 * number, abs=3)
    assert not on[list(EMPTY)].any() and "empty in 2 of 8 frames" in ran.err
    given = cli(*words, "--sam2", encoder, "--save", "given")
    assert given.code == 0 and torch.equal(frames(Path("given/mask.mp4"))[..., 0] > 127, on)


def test_sam_2_is_two_files_for_one_mask(cli: Cli, clip: Path, networks: Path, reference: Path, tmp_path: Path) -> None:
    encoder = segmenter(tmp_path / "sam2")
    words = ["drive", clip, "--models-dir", networks, "--save", "y"]
    ran = cli(*words, "--reference", reference, "--sam2", encoder)
    assert ran.code == 2 and "belongs to replacement" in ran.err
    ran = cli(*words, "--replace", "--sam2", encoder, "--mask", clip)
    assert ran.code == 2 and "both say where the person is" in ran.err
    ran = cli(*words, "--replace", "--sam2", tmp_path / "none.onnx")
    assert ran.code == 3 and "no such file" in ran.err and "--sam2 sam2_hiera_large.encoder.onnx" in ran.err
    encoder.with_name("sam2_hiera_tiny.decoder.onnx").unlink()
    for more in (["--sam2", encoder], ["--models-dir", tmp_path]):
        ran = cli(*words, "--replace", *more)
        assert ran.code == 3 and "there is no sam2_hiera_tiny.decoder.onnx" in ran.err


def test_limbs_are_measured_in_pictures_in_a_neutral_pose(
    cli: Cli, clip: Path, reference: Path, networks: Path, flux_world: TinyWorld
) -> None:
    words = ["drive", clip, "--reference", reference, "--size", "64x80", "--models-dir", networks, "--save", "driving"]
    words += ["--models-dir", flux_world.root, "--catalog", flux_world.settings.catalogs[0], "--seed", "1"]
    ran = cli(*words, "--neutral", "tiny-kontext")
    assert ran.code == 0, ran.err
    made = {path.name for path in Path("driving").iterdir()}
    assert {"pose.mp4", "face.mp4", "driver.png", "driver-neutral.png", "reference-neutral.png"} <= made
    assert "measured in driving/driver-neutral.png and driving/reference-neutral.png" in ran.err
    assert np.abs(np.array(Image.open("driving/driver.png")).astype(int) - glow(96, 64, 30, 32)).max() < 30
    plans = [json.loads(read_metadata(Path(f"driving/{who}-neutral.png"))["kinema"]) for who in ("driver", "reference")]
    assert [len(plan["steps"]) for plan in plans] == [28, 28] and [plan["seeds"] for plan in plans] == [[1], [1]]
    assert "T-pose" in plans[0]["prompt"] and "straight down" in plans[1]["prompt"], "by the shape of each"
    assert [Path(plan["images"][0]["path"]).name for plan in plans] == ["driver.png", "me.png"]
    ran = cli(*words, "--neutral", "tiny-kontext")
    assert ran.code == 2 and "exists already" in ran.err


@pytest.mark.parametrize(
    ("model", "more", "code", "message"),
    [
        ("flux.1-kontext-dev", [], 3, "flux.1-kontext-dev"),
        ("tiny-kontext", ["--replace"], 2, "keep their lengths in replacement"),
        ("tiny-kontext", ["--no-retarget"], 2, "keep their lengths without retargeting"),
        ("tiny-redux", [], 2, "edits no pictures by a sentence"),
    ],
)
def test_a_neutral_pose_is_refused_before_anything_is_read(
    cli: Cli,
    clip: Path,
    reference: Path,
    networks: Path,
    flux_world: TinyWorld,
    model: str,
    more: list[str],
    code: int,
    message: str,
) -> None:
    words = ["drive", clip, "--reference", reference, "--models-dir", networks, "--save", "y", "--neutral", model]
    words += ["--models-dir", flux_world.root, "--catalog", flux_world.settings.catalogs[0]]
    ran = cli(*words, *more)
    assert ran.code == code and message in ran.err and not Path("y").exists(), ran.err


def test_from_python(clip: Path, reference: Path, networks: Path, tmp_path: Path) -> None:
    detector = networks / NETWORKS / "det/yolov10m.onnx"
    points = networks / NETWORKS / "pose2d/vitpose_h_wholebody.onnx"
    with pytest.warns(UserWarning, match="frames show no person") as told:
        made = kinema.drive(
            clip,
            reference=reference,
            retarget=False,
            detector=detector,
            points=points,
            size="64x80",
            save=tmp_path / "out",
            fps=15,
        )
    assert {Path(one.filename).name for one in told} == {Path(__file__).name}, "where it was asked for"
    assert list(made) == ["pose", "face"] and probe(made["pose"]).fps == 15
    assert probe(made["pose"]).frames == FRAMES / 2
    with pytest.raises(RequestError, match="exists already"):
        kinema.drive(clip, reference=reference, detector=detector, points=points, save=tmp_path / "out")


def test_a_pose_control_video(cli: Cli, clip: Path, networks: Path) -> None:
    ran = cli("control", "pose", clip, "--models-dir", networks, "--save", "skeleton.mp4")
    assert ran.code == 0, ran.err
    video = frames(Path("skeleton.mp4"))
    assert video.shape == (FRAMES, 64, 96, 3) and not (video[EMPTY[0]] > 20).any()
    assert (video[0] > 100).any() and draw(None, 96, 64).shape == video[0].shape


def test_what_cannot_mean_anything(cli: Cli, clip: Path, reference: Path, networks: Path) -> None:
    ran = cli("drive", clip, "--models-dir", networks)
    assert ran.code == 2 and "no reference image" in ran.err
    ran = cli("drive", clip, "--models-dir", networks, "--reference", reference, "--mask", clip)
    assert ran.code == 2 and "belongs to replacement" in ran.err
    ran = cli("drive", clip, "--models-dir", networks, "--reference", reference, "--reference", reference)
    assert ran.code == 2 and "2 reference images" in ran.err
    ran = cli("drive", clip, "--models-dir", networks, "--replace", "--save", reference)
    assert ran.code == 2 and "cannot be a folder" in ran.err
    ran = cli("drive", clip, "--models-dir", networks, "--replace", "--columns", "0")
    assert ran.code == 2 and "cut into one cell or more" in ran.err
    ran = cli("drive", clip, "--models-dir", networks, "--replace", "--frames", "9")
    assert ran.code == 2 and "shows 8 at 30 fps" in ran.err
    words = ["drive", clip, "--replace", "--models-dir", networks, "--save", "made", "--overwrite"]
    Path("made").mkdir()
    mask = Path("made/mask.mp4")
    mask.write_bytes(clip.read_bytes())
    ran = cli(*words, "--mask", mask)
    assert ran.code == 2 and "mask.mp4 is read, and would be written over" in ran.err
    assert mask.read_bytes() == clip.read_bytes()


def test_a_device_that_onnxruntime_does_not_know_is_told(cli: Cli, clip: Path, networks: Path) -> None:
    words = ["drive", clip, "--replace", "--models-dir", networks, "--size", "96x64", "--save", "x"]
    ran = cli(*words, "--device", "mps")
    assert ran.code == 0 and "read on the CPU: onnxruntime as it is installed does not know mps" in ran.err, ran.err


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", "1"), ("precision", "reference"), ("quantise", "fp8"), ("vram", "8GB"), ("ram", "8GB")],
)
def test_what_is_for_neutral_poses_alone_is_refused_without_them(
    cli: Cli, clip: Path, reference: Path, networks: Path, tmp_path: Path, field: str, value: str
) -> None:
    words = ["drive", clip, "--reference", reference, "--models-dir", networks, "--save", "y"]
    ran = cli(*words, f"--{field}", value)
    assert ran.code == 2 and f"{field} is for the pictures in a neutral pose" in ran.err and "--neutral" in ran.err
    assert not Path("y").exists(), "before anything is read"
    config = tmp_path / "kinema.toml"
    config.write_text(f'[defaults]\n{field} = "{value}"\n' if field != "seed" else "[defaults]\nseed = 1\n")
    ran = cli(*words, "--size", "64x80", "--config", config)
    assert ran.code == 0, "a default of the configuration is not meant for every verb: " + ran.err


def test_a_video_of_nobody(cli: Cli, networks: Path, tmp_path: Path) -> None:
    dark = tmp_path / "dark.mp4"
    write(Media(iter([torch.zeros(4, 64, 64, 3, dtype=torch.uint8)]), 4, 64, 64, 30, {}), dark, "mp4", 100)
    ran = cli("drive", dark, "--replace", "--models-dir", networks)
    assert ran.code == 2 and "no person was found in any of the 4 frames" in ran.err


def test_a_reference_of_nobody(cli: Cli, clip: Path, networks: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    words = ["drive", clip, "--reference", tmp_path / "black.png", "--models-dir", networks, "--size", "64x64"]
    ran = cli(*words)
    assert ran.code == 2 and "no person was found in the reference" in ran.err and "--no-retarget" in ran.err
    assert cli(*words, "--no-retarget").code == 0


def test_without_the_networks(cli: Cli, clip: Path, reference: Path, tmp_path: Path) -> None:
    ran = cli("drive", clip, "--reference", reference, "--models-dir", tmp_path)
    assert ran.code == 3 and "yolov10m.onnx" in ran.err and "--detector FILE" in ran.err
