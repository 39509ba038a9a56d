"""Sounds for tests: a tone with clicks at known times, in real files, and where the clicks are heard."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from torch import Tensor

from kinema.media.audio import _frame

CLICKS = [0.5, 1.0, 1.7, 2.25]
"""Seconds."""


def tone_with_clicks(seconds: float, rate: int, clicks: list[float] = CLICKS) -> np.ndarray:
    """Return samples_CN, float32, two equal channels: a soft tone, and bursts of half a millisecond."""
    time = np.arange(round(seconds * rate)) / rate
    wave = (0.05 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    for click in clicks:
        wave[round(click * rate) : round(click * rate) + max(2, rate // 2000)] = 0.9
    return np.stack([wave, wave])


def save_sound(path: Path, samples_CN: np.ndarray, rate: int, codec: str = "pcm_s16le") -> Path:
    """Write a sound file; its suffix names the container."""
    layout = {1: "mono", 2: "stereo"}[len(samples_CN)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.codec_context.open()
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate, frame_size=size)
        frame = _frame(samples_CN.astype(np.float32), rate)
        frame.pts = 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def clicks_in(wave_N: Tensor, count: int = len(CLICKS), rate: int = 16_000) -> list[float]:
    """Return the times of the `count` loudest moments, in seconds, in order."""
    level, found = wave_N.abs().clone(), []
    for _ in range(count):
        place = int(level.argmax())
        found.append(place / rate)
        level[max(0, place - rate // 20) : place + rate // 20] = 0
    return sorted(found)
