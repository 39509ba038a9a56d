"""Files that play, carry their plan, and are whole or not there at all."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from kinema.errors import Cancelled, NumericsError, OutputError, RequestError
from kinema.media.metadata import read_metadata
from kinema.media.probe import probe
from kinema.media.reader import read_video
from kinema.media.video import WRITERS, write
from kinema.tensors import Media

WIDTH, HEIGHT, FRAMES, FPS = 96, 64, 17, 16
M_PERTURB = -6  # mallopt(3): what fresh memory is filled with
PLAN = json.dumps({"prompt": "Ein Vögelchen 漢字 🎬 " * 800, "quotes": "\"'\\ \n"}, ensure_ascii=False)
PSNR = {"mp4": 40, "webm": 40, "gif": 27, "webp": 34, "png": 58}
assert len(PLAN.encode()) > 20_000


def clip(frames=FRAMES):
    """A smooth moving pattern in all colours, float32 in [0, 1]."""
    t = torch.arange(frames).view(-1, 1, 1)
    y, x = torch.linspace(0, 1, HEIGHT).view(1, -1, 1), torch.linspace(0, 1, WIDTH).view(1, 1, -1)
    red, blue = 0.5 + 0.5 * torch.sin(6 * x + t / 3), 0.5 + 0.5 * torch.cos(5 * y - t / 4)
    return torch.stack(torch.broadcast_tensors(red, 0.9 * y + 0.05, blue), -1)


def media(video=None, chunks=None, metadata=None, **changed):
    """Media as the decoder gives it: one frame, then four at a time."""
    video = clip() if video is None else video
    chunks = iter([video[:1], *video[1:].split(4)]) if chunks is None else chunks
    given = {"frames": len(video), "width": WIDTH, "height": HEIGHT, "fps": FPS} | changed
    return Media(chunks, metadata={"kinema": PLAN} if metadata is None else metadata, **given)


def decoded(path, kind):
    if kind in ("mp4", "webm", "gif"):
        return torch.stack(list(read_video(path)))
    if kind == "png":
        images = [Image.open(file) for file in sorted(path.iterdir())] if path.is_dir() else [Image.open(path)]
    else:
        images = ImageSequence.Iterator(Image.open(path))
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])


def psnr(got, video):
    error = (got.double() - video.double() * 255).square().mean()
    return (10 * torch.log10(255**2 / error)).item()


@pytest.mark.parametrize("kind", WRITERS)
def test_round_trip(kind, tmp_path):
    path = tmp_path / ("frames" if kind == "png" else f"a: 100%d vidéo.{kind}")
    write(media(), path, kind)
    got = decoded(path, kind)
    assert got.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert psnr(got, clip()) > PSNR[kind]
    assert (got.double().mean((0, 1, 2)) / 255 - clip().double().mean((0, 1, 2))).abs().max() < 0.01, "a colour cast"
    assert read_metadata(path) == {"kinema": PLAN}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("frames", [1, 5])
def test_strip_leaves_no_text(kind, frames, tmp_path):
    path = tmp_path / f"out.{kind}"
    write(media(clip(frames), metadata={}), path, kind)
    assert read_metadata(path) == {}
    files = path.iterdir() if path.is_dir() else [path]
    assert not any(b"kinema" in file.read_bytes().lower() for file in files)


@pytest.mark.parametrize("kind", WRITERS)
def test_one_frame_is_enough(kind, tmp_path):
    path = tmp_path / f"one.{kind}"
    write(media(clip(1)), path, kind)
    assert path.is_file() and decoded(path, kind).shape[0] == 1
    assert psnr(decoded(path, kind), clip(1)) > PSNR[kind] - 2
    assert read_metadata(path) == {"kinema": PLAN}


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "h264"), ("webm", "vp9")])
@pytest.mark.parametrize("fps", [16, 24, 23.976])
def test_what_browsers_need(kind, codec, fps, tmp_path):
    path = tmp_path / f"out.{kind}"
    write(media(fps=fps), path, kind)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == (codec, "yuv420p")
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
    facts = probe(path)
    assert (facts.kind, facts.width, facts.height, facts.frames) == ("video", WIDTH, HEIGHT, FRAMES)
    assert facts.fps == pytest.approx(fps, rel=1e-3) and not facts.has_alpha
    if kind == "mp4":
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat"), "the index must come first, to play while loading"


@pytest.mark.parametrize("quality", [0, 50, 100])
@pytest.mark.parametrize("kind", ["mp4", "webm", "webp"])
def test_quality_trades_size_for_fidelity(kind, quality, tmp_path):
    noisy = (clip() + 0.2 * torch.rand(clip().shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    write(media(noisy, metadata={}), tmp_path / "a", kind, quality)
    write(media(noisy, metadata={}), tmp_path / "b", kind, 25)
    better = quality > 25
    assert ((tmp_path / "a").stat().st_size > (tmp_path / "b").stat().st_size) == better
    assert (psnr(decoded(tmp_path / "a", kind), noisy) > psnr(decoded(tmp_path / "b", kind), noisy)) == better
    if kind == "mp4":
        with av.open(str(tmp_path / "a")) as container:
            assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
            assert "4:4:4" not in (container.streams.video[0].profile or ""), "browsers play no lossless profile"


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations_keep_their_speed(kind, tmp_path):
    write(media(), tmp_path / "a", kind)
    with Image.open(tmp_path / "a") as image:
        shown = 0.0
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            shown = image.info["timestamp"] if kind == "webp" else shown + image.info["duration"]
        played = FRAMES - (kind == "webp")  # webp tells when a frame starts
        assert shown / 1000 == pytest.approx(played / FPS, abs=0.02)
        assert image.info["loop"] == 0


def test_floats_become_the_nearest_level_with_ties_to_even(tmp_path):
    values = torch.tensor([0.0, 0.5 / 255, 1.5 / 255, 2.49 / 255, 127.5 / 255, 254.51 / 255, 1.0]).double()
    row = values.float().view(1, 1, -1, 1).expand(1, 1, -1, 3)
    write(media(row, width=7, height=1), tmp_path / "a.png", "png")
    want = np.round(row.numpy() * np.float32(255)).astype(np.uint8)
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), want[0])
    write(media((want_u8 := torch.from_numpy(want)), width=7, height=1), tmp_path / "b.png", "png")
    assert np.array_equal(np.array(Image.open(tmp_path / "b.png")), want_u8[0])


def test_png_frames_are_named_in_order_and_each_carries_the_plan(tmp_path):
    write(media(clip(3)), tmp_path / "f", "png")
    files = sorted((tmp_path / "f").iterdir())
    assert [file.name for file in files] == ["frame_0001.png", "frame_0002.png", "frame_0003.png"]
    assert all(read_metadata(file) == {"kinema": PLAN} for file in files)


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_large_plans_survive(kind, tmp_path):
    metadata = {"kinema": PLAN * 10, "workflow": "{}"}
    write(media(clip(2), metadata=metadata), tmp_path / "a", kind)
    assert read_metadata(tmp_path / "a") == metadata


@pytest.mark.parametrize("kind", WRITERS)
def test_a_long_video_is_never_held_whole(kind, tmp_path):
    given = []

    def chunks():
        for _ in range(40):
            assert sum(chunk() is not None for chunk in given) <= 2
            chunk = clip(1)
            given.append(weakref.ref(chunk))
            yield chunk

    write(media(chunks=chunks(), frames=40), tmp_path / "out", kind)
    assert len(given) == len(decoded(tmp_path / "out", kind)) == 40, "a still picture keeps its length"


# --- what goes wrong -----------------------------------------------------------------------------


def never():
    raise AssertionError("asked for a frame")
    yield


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "error", [Cancelled("stopped"), MemoryError("planted"), OSError(5, "planted"), KeyboardInterrupt()]
)
def test_a_source_that_fails_midway_leaves_no_file(kind, error, tmp_path):
    def chunks():
        yield clip(5)
        raise error

    path = tmp_path / f"out.{kind}"
    with pytest.raises(type(error)) as caught:
        write(media(chunks=chunks()), path, kind)
    assert caught.value is error, "errors of the source are not errors of the disk"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_a_failure_keeps_the_file_that_was_there(kind, tmp_path):
    path = tmp_path / f"out.{kind}"
    write(media(clip(2)), path, kind)
    with pytest.raises(OutputError, match="only 5 of 17"):
        write(media(chunks=iter([clip(5)])), path, kind)
    assert len(decoded(path, kind)) == 2 and len(list(tmp_path.iterdir())) == 1
    write(media(clip(3)), path, kind)
    assert len(decoded(path, kind)) == 3 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("bad", [float("nan"), -0.01, 1.01, float("inf")])
def test_values_that_are_no_picture_are_refused(kind, bad, tmp_path):
    video = clip(5)
    video[3, 2, 1, 0] = bad
    with pytest.raises(NumericsError, match="within 0 and 1"):
        write(media(video), tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("video", [clip(18), clip(17)[:, :, :90]], ids=["too many", "too narrow"])
def test_frames_other_than_promised_are_refused(video, tmp_path):
    with pytest.raises(OutputError, match="fault of Kinema"):
        write(media(video, frames=17), tmp_path / "out.mp4", "mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "changed", "field"),
    [
        ("mp4", {"width": 95}, "size"),
        ("webm", {"height": 63}, "size"),
        ("webp", {"width": 20000}, "size"),
        ("gif", {"fps": 60}, "fps"),
        ("avi", {}, "output"),
    ],
)
def test_what_a_kind_cannot_hold_is_refused_before_any_frame_is_asked_for(kind, changed, field, tmp_path):
    with pytest.raises(RequestError) as caught:
        write(media(chunks=never(), **changed), tmp_path / "out", kind)
    assert caught.value.details["field"] == field and caught.value.hint


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_is_missing_is_made_and_one_that_is_a_file_is_an_output_error(kind, tmp_path):
    write(media(clip(2)), tmp_path / "missing" / "out", kind)
    assert len(decoded(tmp_path / "missing" / "out", kind)) == 2
    path = tmp_path / "file" / "out"
    path.parent.write_text("")
    with pytest.raises(OutputError) as caught:
        write(media(chunks=never()), path, kind)
    assert caught.value.details["path"] == str(path) and str(path.parent) in caught.value.hint


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="file permissions as on POSIX")
def test_an_unwritable_folder_is_an_output_error(kind, tmp_path):
    tmp_path.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(OutputError, match="Permission denied"):
            write(media(chunks=never()), tmp_path / "out", kind)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)


def test_other_work_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for kind in WRITERS:
        with pytest.raises(OutputError):
            write(media(chunks=never()), tmp_path / "mine", kind)
    with pytest.raises(OutputError):
        write(media(chunks=never()), tmp_path / "mine" / "notes.txt", "png")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


FULL_DISK = """
    import resource, signal, sys, torch
    from pathlib import Path
    from kinema.errors import OutputError
    from kinema.media.video import write
    from kinema.tensors import Media

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = torch.rand(5, 96, 96, 3, generator=torch.Generator().manual_seed(0))
    folder, failures = Path(sys.argv[1]), []
    for kind in sys.argv[2:]:
        media = lambda: Media(iter(noise.split(4)), 5, 96, 96, 16, {"kinema": "x" * 3000})
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        write(media(), folder / "whole", kind)
        whole = folder / "whole"
        size = whole.stat().st_size if whole.is_file() else max(file.stat().st_size for file in whole.iterdir())
        if whole.is_file():
            whole.unlink()
        else:
            whole.rename(folder.parent / "moved")
        for limit in (0, size // 2, size - 4000, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                write(media(), folder / "out", kind)
                failures.append((kind, limit, size, "no error"))
            except OutputError as error:
                if list(folder.iterdir()):
                    failures.append((kind, limit, "left", list(folder.iterdir())))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        write(media(), folder / "out", kind)
        if kind == "png":
            (folder / "out").rename(folder.parent / "moved again")
        else:
            (folder / "out").unlink()
    print(failures)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file size limits")
def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "out"), *WRITERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"hello world, no video here", b"\x89PNG\r\n\x1a\nbroken", b"GIF89a", b"RIFF0000WEBP"]
)
def test_what_is_no_media_file_is_refused_by_every_reader(content, tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    for reader in (probe, read_metadata, lambda path: list(read_video(path))):
        with pytest.raises(RequestError, match=r"x\.mp4"):
            reader(path)
    with pytest.raises(RequestError):
        probe(Path("/no/such/file.mp4"))


def test_a_truncated_video_is_refused(tmp_path):
    write(media(), tmp_path / "a.mp4", "mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 4])
    with pytest.raises(RequestError):
        probe(tmp_path / "cut.mp4")


def turned_video(path, matrix):
    """A video whose four corners are 0, 80, 160 and 240, and which asks to be shown by a display matrix."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        a, b, c, d = (entry << 16 for entry in matrix)
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        image = np.array([[0, 80], [160, 240]], np.uint8).repeat(16, 0).repeat(32, 1)[..., None].repeat(3, 2)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())


TURNS = {
    "as it is": ((1, 0, 0, 1), [[0, 80], [160, 240]]),
    "a quarter to the right": ((0, 1, -1, 0), [[160, 0], [240, 80]]),
    "half": ((-1, 0, 0, -1), [[240, 160], [80, 0]]),
    "a quarter to the left": ((0, -1, 1, 0), [[80, 240], [0, 160]]),
    "mirrored": ((-1, 0, 0, 1), [[80, 0], [240, 160]]),
    "upside down": ((1, 0, 0, -1), [[160, 240], [0, 80]]),
    "rows as columns": ((0, 1, 1, 0), [[0, 160], [80, 240]]),
    "mirrored, a quarter to the right": ((0, -1, -1, 0), [[240, 80], [160, 0]]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_turning_and_mirroring_are_honoured(turn, tmp_path):
    matrix, corners = TURNS[turn]
    turned_video(tmp_path / "a.mp4", matrix)
    facts, frame = probe(tmp_path / "a.mp4"), next(read_video(tmp_path / "a.mp4"))
    assert (facts.width, facts.height, facts.frames) == ((64, 32, 3) if matrix[0] else (32, 64, 3))
    assert tuple(frame.shape) == (facts.height, facts.width, 3)
    rows, columns = facts.height // 4, facts.width // 4
    seen = frame[rows :: 2 * rows, columns :: 2 * columns, 0].int()
    assert (seen - torch.tensor(corners)).abs().max() < 6


def test_sound_alone_is_audio(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
    facts = probe(tmp_path / "a.wav")
    assert (facts.kind, facts.width, facts.frames, facts.fps) == ("audio", 0, 0, None)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_frames_make_the_same_file_whatever_memory_held_before(tmp_path: Path, kind):
    """x264 read memory it never wrote, and then made another B-frame. Noise has it choose between near things."""
    generator = torch.Generator().manual_seed(0)
    noisy = (clip(21) + 0.1 * torch.rand(21, HEIGHT, WIDTH, 3, generator=generator)).clamp(0, 1)
    mallopt = ctypes.CDLL(None).mallopt
    files = []
    for number, filled in enumerate((85, 170, 33)):
        mallopt(M_PERTURB, filled)
        try:
            files.append(tmp_path / f"{number}.{kind}")
            write(media(noisy), files[-1], kind, 80)
        finally:
            mallopt(M_PERTURB, 0)
    first, *others = [packets(file) for file in files]
    assert first and all(other == first for other in others)


def packets(file: Path) -> list[bytes]:
    """What was encoded; containers have identities of their own."""
    if file.is_dir():
        return [path.read_bytes() for path in sorted(file.iterdir())]
    with av.open(str(file)) as container:
        return [bytes(packet) for packet in container.demux(video=0)]
