"""Videos as they come: rates that vary, turned, transparent, oblong pixels, every container; at the time asked for."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from kinema.errors import RequestError
from kinema.media.probe import probe
from kinema.media.reader import Picture, image_files, on_display, read_video
from kinema.media.video import write
from kinema.planning.geometry import frames_shown
from kinema.tensors import Media

WIDTH, HEIGHT = 64, 48
LEVELS = 12
"""A clip tells its frames apart by their grey: frame n is n * LEVELS."""


def grey(index: int, alpha: bool = False) -> np.ndarray:
    pixels = np.full((HEIGHT, WIDTH, 4 if alpha else 3), index % 21 * LEVELS, np.uint8)
    if alpha:
        pixels[..., 3] = 255
        pixels[:, WIDTH // 2 :, 3] = 0
        pixels[..., :3] = (200, 100, 50)
    return pixels


CONTAINERS = {
    "a.mp4": ("libx264", "yuv420p"),
    "a.mkv": ("libx264", "yuv420p"),
    "a.mov": ("mpeg4", "yuv420p"),
    "a.webm": ("libvpx-vp9", "yuv420p"),
    "a.avi": ("mpeg4", "yuv420p"),
    "a.gif": ("gif", "rgb8"),
}
ALPHA = {
    "a.webm": ("libvpx-vp9", "yuva420p"),
    "b.mov": ("qtrle", "argb"),
    "c.mov": ("prores_ks", "yuva444p10le"),
    "d.mov": ("png", "rgba"),
}


def video(path: Path, codec: str, pixels: str, times: list[int], rate: int = 1000, alpha: bool = False) -> Path:
    """Write greys 0, 1, 2 ... at `times`, in units of 1/rate seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        stream.codec_context.time_base = Fraction(1, rate)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(grey(index, alpha), format="rgba" if alpha else "rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(path: Path, **how: object) -> list[int]:
    return [round(frame.float().mean().item() / LEVELS) for frame in read_video(path, **how)]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_at_its_own_rate_gives_its_own_frames(name: str, tmp_path: Path) -> None:
    codec, pixels = CONTAINERS[name]
    path = video(tmp_path / name, codec, pixels, list(range(12)), rate=10)
    facts = probe(path)
    assert (facts.kind, facts.width, facts.height, facts.frames, facts.fps) == ("video", WIDTH, HEIGHT, 12, 10)
    assert facts.seconds == pytest.approx(1.2, abs=0.03) and not facts.variable_rate and not facts.has_alpha
    assert greys(path) == greys(path, fps=10) == list(range(12))
    assert all(frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == torch.uint8 for frame in read_video(path))


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
@pytest.mark.parametrize("fps", [16, 24, 30, 23.976, 29.97])
def test_a_rounded_clock_neither_repeats_nor_drops_a_frame(name: str, fps: float, tmp_path: Path) -> None:
    frames = [torch.from_numpy(grey(index % 20)) for index in range(20)]
    write(Media(iter([torch.stack(frames)]), 20, WIDTH, HEIGHT, fps, {}), tmp_path / name, name[2:])
    assert greys(tmp_path / name, fps=fps) == list(range(20))


def test_a_variable_rate_is_resampled_by_time(tmp_path: Path) -> None:
    times = [0, 40, 80, 500, 1000, 1040]  # milliseconds
    path = video(tmp_path / "v.mkv", "libx264", "yuv420p", times)
    facts = probe(path)
    assert facts.variable_rate and facts.frames == 6 and facts.fps == pytest.approx(5 / 1.04)
    assert greys(path) == [0, 1, 2, 3, 4, 5], "stored frames are not resampled"
    shown = greys(path, fps=10)
    assert shown[:11] == [0, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4]
    assert greys(path, fps=25)[:3] == [0, 1, 2]


def test_rates_are_changed_by_what_is_on_display(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4", "libx264", "yuv420p", list(range(12)), rate=24)
    assert greys(path, fps=12) == [0, 2, 4, 6, 8, 10]
    assert greys(path, fps=48) == [n for n in range(12) for _ in range(2)]
    assert greys(path, fps=16) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert greys(path, fps=16, start=2, frames=3) == [3, 4, 6]
    assert greys(path, start=10, frames=5) == [10, 11], "it ends where the video ends"
    assert greys(path, start=20) == []


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("rate", [8, 24, 25, 30, 50])
def test_how_many_frames_there_will_be_is_known_beforehand(name: str, rate: int, tmp_path: Path) -> None:
    codec, pixels = CONTAINERS[name]
    facts = probe(video(tmp_path / name, codec, pixels, list(range(7)), rate=rate))
    for fps in (8, 12.5, 16, 23.976, 24, 25, 29.97, 30, 60):
        assert frames_shown(facts, fps) == len(greys(tmp_path / name, fps=fps)), fps


def test_the_last_frame_is_shown_to_its_end() -> None:
    def clip(durations: list[int]) -> list[Picture]:
        starts = [sum(durations[:n]) for n in range(len(durations))]
        return [
            Picture(Fraction(t, 10), Fraction(d, 10), Fraction(1, 1000), lambda n=n: np.array(n))
            for n, (t, d) in enumerate(zip(starts, durations, strict=True))
        ]

    assert [int(n) for n in on_display(iter(clip([1, 1, 3])), Fraction(10))] == [0, 1, 2, 2, 2]
    assert [int(n) for n in on_display(iter(clip([1])), Fraction(1))] == [0], "a clip is never empty"


@pytest.mark.parametrize("name", ALPHA)
def test_transparency_is_laid_over_black(name: str, tmp_path: Path) -> None:
    codec, pixels = ALPHA[name]
    path = video(tmp_path / name, codec, pixels, list(range(3)), rate=10, alpha=True)
    assert probe(path).has_alpha
    frame = next(read_video(path)).float()
    seen, hidden = frame[:, : WIDTH // 2 - 8].mean((0, 1)), frame[:, WIDTH // 2 + 8 :].mean((0, 1))
    assert (seen - torch.tensor([200, 100, 50])).abs().max() < 6 and hidden.max() < 3


def test_oblong_pixels_are_made_square(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(3))))
        container.mux(stream.encode())
    assert probe(tmp_path / "v.mkv").width == 96
    assert next(read_video(tmp_path / "v.mkv")).shape == (HEIGHT, 96, 3)


def test_animated_webp_and_folders_of_images_are_videos(tmp_path: Path) -> None:
    frames = torch.stack([torch.from_numpy(grey(index)) for index in range(12)])
    write(Media(iter([frames]), 12, WIDTH, HEIGHT, 10, {}), tmp_path / "a.webp", "webp")
    facts = probe(tmp_path / "a.webp")
    assert (facts.frames, facts.fps, facts.seconds) == (12, 10, 1.199)
    assert greys(tmp_path / "a.webp", fps=10) == list(range(12))
    assert greys(tmp_path / "a.webp", fps=5) == [0, 2, 4, 6, 8, 10]
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(grey(index)).save(folder / f"shot_{index}.png")
    facts = probe(folder)
    assert (facts.kind, facts.frames, facts.fps, facts.width) == ("video", 12, None, WIDTH)
    assert greys(folder) == greys(folder, fps=16) == list(range(12)), "shot_10 comes after shot_9"


def test_a_digit_that_is_no_number_is_a_letter_of_a_name(tmp_path: Path) -> None:
    for name in ("1\u00b22.png", "1\u00b210.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [path.name for path in image_files(tmp_path)] == ["1\u00b22.png", "1\u00b210.png"]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no image"):
        next(read_video(tmp_path / "empty"))
    with pytest.raises(RequestError, match="No such file"):
        next(read_video(tmp_path / "none.mp4"))
    odd = tmp_path / "odd"
    odd.mkdir()
    Image.new("RGB", (8, 8)).save(odd / "1.png")
    Image.new("RGB", (8, 9)).save(odd / "2.png")
    with pytest.raises(RequestError, match="from 8x8 to 8x9"):
        list(read_video(odd))
    clip = torch.randint(0, 255, (8, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    write(Media(iter([clip]), 8, WIDTH, HEIGHT, 10, {}), tmp_path / "w.mp4", "mp4", 100)
    data = (tmp_path / "w.mp4").read_bytes()
    (tmp_path / "short.mp4").write_bytes(data[: len(data) * 9 // 10])
    for read in (probe, lambda path: list(read_video(path))):
        with pytest.raises(RequestError, match=r"breaks off after \d of its 8 frames"):
            read(tmp_path / "short.mp4")
    whole = video(tmp_path / "v.mp4", "mpeg4", "yuv420p", list(range(30)), rate=10).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=r"cut\.mp4"):
        list(read_video(tmp_path / "cut.mp4"))


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    peaks = []
    for count in (20, 200):
        path = video(tmp_path / f"{count}.mkv", "mpeg4", "yuv420p", list(range(count)), rate=25)
        tracemalloc.start()
        assert sum(1 for _ in read_video(path, fps=25)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 10 * WIDTH * HEIGHT * 3


PROBED = """
import sys
from pathlib import Path
from kinema.media.probe import probe
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
small, large = map(Path, sys.argv[1:])
probe(small)
before = peak()
assert probe(large).frames == 48
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_file_is_probed_without_being_held(tmp_path: Path) -> None:
    for count in (2, 48):
        with av.open(str(tmp_path / f"{count}.mkv"), "w") as container:
            stream = container.add_stream("rawvideo", rate=24)
            stream.width, stream.height, stream.pix_fmt = 1024, 1024, "yuv420p"
            for index in range(count):
                frame = av.VideoFrame(1024, 1024, "yuv420p")
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    assert (size := (tmp_path / "48.mkv").stat().st_size) > 70_000_000
    command = [sys.executable, "-c", PROBED, str(tmp_path / "2.mkv"), str(tmp_path / "48.mkv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert int(done.stdout) < size / 3, done.stderr
