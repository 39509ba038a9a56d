"""Sound in any container to samples, and back into a video file, cut to the sample.

Owns decoding, resampling and the encoders of mp4 and webm. What is cut and why is decided by the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import torch
from torch import Tensor

from kinema.errors import RequestError
from kinema.schema import MediaFacts, SoundPlan

RATE = 16_000
"""Samples a second that speech encoders hear."""

CODECS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "mp4": ("aac", 96_000, (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)),
    "webm": ("libopus", 64_000, (8000, 12000, 16000, 24000, 48000)),
}
"""By container: encoder, bits a second and channel, and the sample rates it takes."""

LAYOUTS = {1: "mono", 2: "stereo"}
"""What sound is kept as; more channels are mixed down to two."""


def audio_facts(path: Path) -> MediaFacts:
    """Return length, rate and channels of a sound file, or of the sound of a video, having decoded all of it:
    containers do not always know their length, and damage is found out now, not after an hour.

    Raises RequestError for a file that is missing, cannot be decoded or has no sound.
    """
    path = Path(path)
    samples, rate, channels, loudest = 0, 0, 0, 0.0
    with _opened(path) as container:
        for block_CN, rate in _blocks(container):  # noqa: B007, the same each time
            samples, channels = samples + block_CN.shape[1], container.streams.audio[0].channels
            loudest = max(loudest, float(np.abs(block_CN).max(initial=0.0)))
    if not samples:
        raise _unreadable(path, "its sound is empty")
    return MediaFacts(
        path=path, kind="audio", frames=0, seconds=samples / rate, rate=rate, channels=channels, silent=loudest == 0.0
    )


def read_audio(path: Path) -> Tensor:
    """Return waveform_N: the sound of a file or a video, float32, its channels averaged, at RATE.

    Takes what ffmpeg reads: wav, mp3, flac, m4a, ogg, mp4 ... Memory: 4 bytes a sample of the result.
    Raises RequestError as audio_facts does.
    """
    path = Path(path)
    resampler: av.AudioResampler | None = None
    parts: list[np.ndarray] = []
    with _opened(path) as container:
        for block_CN, stored in _blocks(container):
            resampler = resampler or av.AudioResampler("flt", "mono", RATE)
            frame = _frame(block_CN.mean(axis=0, keepdims=True), stored)
            parts += [out.to_ndarray()[0] for out in resampler.resample(frame)]
    if resampler is not None:
        parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
    if not parts:
        raise _unreadable(path, "its sound is empty")
    return torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))


class SoundTrack:
    """The sound of a video being written: a stream of its container, encoded up to a given time at each call."""

    def __init__(self, container: av.container.OutputContainer, kind: str, sound: SoundPlan) -> None:
        codec, bits, rates = CODECS[kind]
        self._container, self._sound = container, sound
        with _opened(sound.path) as source:
            stream = source.streams.audio[0]
            rate, channels = stream.rate or RATE, min(2, stream.channels or 1)
        # The rate it was recorded at, where the codec has it; else the next higher one, so that nothing is cut off.
        rate = min((known for known in rates if known >= rate), default=rates[-1])
        options: Any = {"rate": rate, "layout": LAYOUTS[channels]}
        self._stream = cast(av.AudioStream, container.add_stream(codec, **options))
        self._stream.bit_rate = bits * channels
        self._stream.codec_context.open()  # only then does it say how many samples it takes at once
        self._layout, self._rate = LAYOUTS[channels], rate
        self._seconds = 0.0
        self._packets = self._encoded()

    def until(self, seconds: float) -> None:
        """Mux the sound up to `seconds` into the video; all that is left for infinity."""
        while self._seconds <= seconds:
            packet = next(self._packets, None)
            if packet is None:
                self._seconds = float("inf")
                return
            self._container.mux(packet)
            if packet.pts is not None and packet.time_base is not None:
                self._seconds = float(packet.pts * packet.time_base)

    def _encoded(self) -> Iterator[av.Packet]:
        size = self._stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(self._stream.codec_context.format, self._layout, self._rate, frame_size=size)
        done = 0
        for block_CN, rate in _cut(self._sound):
            frame = _frame(block_CN, rate)
            # Told that sample 0 is at time 0, an encoder dates what it puts before it back, and players leave it out.
            frame.pts, done = done, done + block_CN.shape[1]
            for part in resampler.resample(frame):
                yield from self._stream.encode(part)
        with suppress(av.EOFError):
            for frame in resampler.resample(None):
                yield from self._stream.encode(frame)
        yield from self._stream.encode(None)


def _cut(sound: SoundPlan) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (block_CN, rate) of the part of a sound that a plan names, exact to the sample; ends with the sound."""
    done = 0
    with _opened(sound.path) as container:
        for block_CN, rate in _blocks(container):
            first, last = round(sound.start * rate), round((sound.start + sound.seconds) * rate)
            begin, end = max(first - done, 0), min(last - done, block_CN.shape[1])
            done += block_CN.shape[1]
            if begin < end:
                yield np.ascontiguousarray(block_CN[:, begin:end]), rate
            if done >= last:
                return


def _blocks(container: av.container.InputContainer) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (block_CN, rate), float32 in [-1, 1], mono or stereo, at the rate of the first frame.

    Sound that begins after the picture of its file gets silence in front, so that time stays the file's.
    """
    stream = container.streams.audio[0]
    resampler: av.AudioResampler | None = None
    for frame in container.decode(stream):
        if resampler is None:
            channels = min(2, frame.layout.nb_channels)
            resampler = av.AudioResampler("fltp", LAYOUTS[channels], frame.rate)
            if late := _late_samples(container, frame):
                yield np.zeros((channels, late), np.float32), frame.rate
        rate = resampler.rate
        frame.pts = None
        for part in resampler.resample(frame):
            yield part.to_ndarray(), rate
    if resampler is not None:
        for part in resampler.resample(None):
            yield part.to_ndarray(), resampler.rate


def _late_samples(container: av.container.InputContainer, frame: av.AudioFrame) -> int:
    videos = container.streams.video
    if not videos or frame.time is None or videos[0].start_time is None or videos[0].time_base is None:
        return 0
    return max(0, round((frame.time - float(videos[0].start_time * videos[0].time_base)) * frame.rate))


def _frame(block_CN: np.ndarray, rate: int) -> av.AudioFrame:
    samples = np.ascontiguousarray(block_CN, np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=LAYOUTS[len(samples)])
    frame.rate = rate
    frame.time_base = Fraction(1, rate)
    return frame


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    try:
        with av.open(str(path.resolve())) as container:
            if not container.streams.audio:
                raise _unreadable(path, "it has no sound")
            yield container
    except (OSError, av.FFmpegError) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or str(error)) from error


def _unreadable(path: Path, why: str) -> RequestError:
    return RequestError(
        f"{path} cannot be read as sound: {why}",
        "give a wav, mp3, flac, m4a or ogg file, or a video with sound, that plays elsewhere",
        field="audio",
        got=str(path),
    )
