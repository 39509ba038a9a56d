"""Sound of every format to samples and back into videos: nothing moves in time."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from kinema.errors import RequestError
from kinema.media import audio
from kinema.media.audio import audio_facts, read_audio
from kinema.media.video import write
from kinema.schema import SoundPlan
from kinema.tensors import Media
from sounds import CLICKS, clicks_in, save_sound, tone_with_clicks

FORMATS = {
    "wav": ("pcm_s16le", 44_100),
    "mp3": ("libmp3lame", 44_100),
    "flac": ("flac", 22_050),
    "m4a": ("aac", 48_000),
}
FORMATS["ogg"] = ("libopus", 48_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sound")
    for kind, (codec, rate) in FORMATS.items():
        save_sound(made / f"a.{kind}", tone_with_clicks(3.0, rate), rate, codec)
    return made


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_at_the_rate_of_speech(folder: Path, kind: str):
    wave = read_audio(folder / f"a.{kind}")
    facts = audio_facts(folder / f"a.{kind}")
    assert wave.dtype == torch.float32 and wave.ndim == 1
    assert abs(len(wave) / 16_000 - 3.0) < 0.05 and abs(facts.seconds - 3.0) < 0.05
    assert (facts.kind, facts.rate, facts.channels, facts.silent) == ("audio", FORMATS[kind][1], 2, False)
    assert clicks_in(wave) == pytest.approx(CLICKS, abs=0.002)


def test_channels_are_averaged(tmp_path: Path):
    left = tone_with_clicks(1.0, 16_000)[0]
    save_sound(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)]), 16_000, "pcm_s16le")
    assert read_audio(tmp_path / "a.wav").numpy() == pytest.approx(left / 2, abs=2e-4)


def test_mono_at_the_right_rate_is_untouched(tmp_path: Path):
    wave = tone_with_clicks(1.0, 16_000)[:1]
    save_sound(tmp_path / "a.wav", wave, 16_000, "pcm_s16le")
    assert read_audio(tmp_path / "a.wav").numpy() == pytest.approx(wave[0], abs=2e-4)


def test_silence_is_known_as_such(tmp_path: Path):
    save_sound(tmp_path / "a.wav", np.zeros((1, 8000), np.float32), 8000, "pcm_s16le")
    assert audio_facts(tmp_path / "a.wav").silent


@pytest.mark.parametrize("content", [b"", b"RIFF not sound", None])
def test_what_is_no_sound_is_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match="cannot be read as sound"):
        audio_facts(path)


def test_a_video_without_sound_is_refused(tmp_path: Path):
    write(media(4), tmp_path / "a.mp4", "mp4")
    with pytest.raises(RequestError, match="no sound"):
        read_audio(tmp_path / "a.mp4")


# --- into videos -------------------------------------------------------------------------------------


def media(frames: int, sound: SoundPlan | None = None, fps: float = 16.0) -> Media:
    shades = torch.linspace(0, 1, frames)[:, None, None, None].expand(-1, 32, 32, 3)
    return Media(iter(shades.split(7)), frames, 32, 32, fps, {"kinema": "{}"}, sound)


@pytest.mark.parametrize("source", ["wav", "mp3", "m4a"])
@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_sound_is_cut_to_the_sample_and_stays_in_time(folder: Path, tmp_path: Path, kind: str, source: str):
    sound = SoundPlan(path=folder / f"a.{source}", start=3 / 16, seconds=40 / 16)
    write(media(40, sound), tmp_path / f"o.{kind}", kind)
    wave = read_audio(tmp_path / f"o.{kind}")
    assert clicks_in(wave) == pytest.approx([click - 3 / 16 for click in CLICKS], abs=0.003)
    assert abs(len(wave) / 16_000 - 2.5) < 0.03
    with av.open(str(tmp_path / f"o.{kind}")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 40
        assert container.streams.audio[0].rate == (48_000 if kind == "webm" or source == "m4a" else 44_100)


def test_sound_that_ends_early_ends_early(folder: Path, tmp_path: Path):
    write(media(80, SoundPlan(path=folder / "a.wav", seconds=5.0)), tmp_path / "o.mp4", "mp4")
    assert audio_facts(tmp_path / "o.mp4").seconds == pytest.approx(3.0, abs=0.03)


@pytest.mark.parametrize("start", [0.0, 4 / 16])
def test_a_frame_too_few_or_many_is_heard(folder: Path, tmp_path: Path, start: float):
    write(media(40, SoundPlan(path=folder / "a.wav", start=start, seconds=2.5)), tmp_path / "o.mp4", "mp4")
    got = clicks_in(read_audio(tmp_path / "o.mp4"))
    assert got != pytest.approx([click - 3 / 16 for click in CLICKS], abs=1 / 16 - 0.003)


def test_sound_later_than_its_picture_keeps_its_place(tmp_path: Path):
    """A track that begins half a second into the file is read with half a second of silence before it."""
    path, rate = tmp_path / "late.mkv", 16_000
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        track = container.add_stream("flac", rate=rate, layout="mono")
        track.codec_context.open()
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), number * 10, np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        resampler = av.AudioResampler(track.codec_context.format, "mono", rate, frame_size=1024)
        frame = audio._frame(tone_with_clicks(1.0, rate)[:1], rate)
        frame.pts = 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            part.pts += rate // 2
            container.mux(track.encode(part))
        container.mux(track.encode())
    assert clicks_in(read_audio(path), 1) == pytest.approx([1.0], abs=0.01)
