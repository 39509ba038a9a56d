"""What drives a speech-driven video, and the clips it is made of: from the length of the sound, before anything loads.

Source: Wan-Video/Wan2.2 wan/speech2video.py, wan/modules/s2v/audio_encoder.py (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kinema.errors import CheckpointError, RequestError
from kinema.planning.geometry import frames_shown
from kinema.planning.inputs import plan_image
from kinema.schema import (
    CatalogEntry,
    ClipPlan,
    Facts,
    ImagePlan,
    MediaFacts,
    Note,
    OutputKind,
    Request,
    SoundPlan,
    SpeechPlan,
)

LOST_FRAMES = 3
"""Frames at the start of a first clip that follows nothing: they are not good, and not shown."""

HEARING_RATE, HEARING_FIELD, HEARING_HOP = 16_000, 400, 320
"""Samples a second the speech encoder hears, that one feature is made of, and from one to the next."""

LONGEST_WHOLE = 600
"""Seconds of sound that the speech encoder hears in one pass; longer sound in overlapping windows."""

SHORT_CLIP = 0.5
"""Seconds: a last clip that shows less is worth a word."""

SOUND_KINDS: tuple[OutputKind, ...] = ("mp4", "webm")


class Driven(NamedTuple):
    """What a speech-driven plan has besides the others'; `latent_frames` are those of one clip."""

    speech: SpeechPlan
    clips: tuple[ClipPlan, ...]
    sound: SoundPlan
    latent_frames: int


def check_speech(request: Request, entry: CatalogEntry) -> None:
    """Raise RequestError for what contradicts in a request to a speech-driven model."""
    if request.speech_text and request.audio:
        raise RequestError(
            f"audio {request.audio} and speech_text both say what is heard",
            "leave out --audio or --speech-text",
            field="speech_text",
            got=request.speech_text,
        )
    if request.speech_text and not request.speech_url:
        raise RequestError(
            "speech_text needs a service that speaks it",
            "pass --speech-url http://localhost:8880/v1, or any other that speaks as OpenAI's does",
            field="speech_url",
            got=None,
        )
    if len(request.reference) > 1:
        raise RequestError(
            f"{entry.name} takes one reference image, got {len(request.reference)}",
            f"pass --reference {request.reference[0]}",
            field="reference",
            got=[str(path) for path in request.reference],
        )
    for name in ("frames", "seconds", "fps"):
        if getattr(request, name) is not None and (name != "fps" or request.fps != entry.fps):
            raise RequestError(
                f"{name} {getattr(request, name):g}: the sound says how long the video is, and it plays at "
                f"{entry.fps:g} fps, in time with it",
                f"leave out --{name}; --clips 1 makes the first {(entry.clip_frames or 0) / entry.fps:g} s",
                field=name,
                got=getattr(request, name),
            )


def _check_audio_encoder(facts: Facts) -> None:
    """Raise CheckpointError unless the speech encoder is the one the DiT was trained with."""
    speech, encoder = facts.files["dit"].config["speech"], facts.files["audio_encoder"]
    found = (encoder.config["num_layers"] + 1, encoder.config["dim"])
    expected = (speech["audio_layers"], speech["audio_dim"])
    if found != expected:
        raise CheckpointError(
            f"{encoder.path} gives {found[0]} hidden states {found[1]} wide; "
            f"the DiT reads {expected[0]} of {expected[1]}",
            "take wav2vec2-large-xlsr-53-english, or wav2vec2_large_english_fp16.safetensors",
            path=str(encoder.path),
            expected=expected,
            found=found,
        )


def plan_speech(request: Request, entry: CatalogEntry, facts: Facts, notes: list[Note]) -> Driven:
    """Return the clips that cover the sound, or the first `request.clips` of them, and which of it is heard."""
    _check_audio_encoder(facts)
    assert entry.clip_frames is not None, "a speech-driven model's row says how long a clip is"
    heard, per_clip = facts.media["audio"][0], entry.clip_frames
    seconds = heard.seconds or 0.0
    total = math.ceil(seconds * entry.fps)
    lost = 0 if request.start_from_reference else LOST_FRAMES
    count = _count(request, seconds, per_clip, entry.fps, notes)
    clips = []
    for number in range(count):
        skip = 0 if number else lost
        shown = min(per_clip, total - per_clip * number) - skip
        clips.append(ClipPlan(start=per_clip * number, frames=per_clip, skip=skip, shown=shown))
    if clips[0].shown < 1:
        raise RequestError(
            f"{heard.path} lasts {seconds:.2f} s; at least {(lost + 1) / entry.fps:.2f} s are needed",
            "give a longer sound",
            field="audio",
            got=seconds,
        )
    frames = sum(clip.shown for clip in clips)
    last = clips[-1].shown / entry.fps
    if count > 1 and last < SHORT_CLIP:
        text = f"the last of {count} clips is made for {last:.2f} s of sound; --clips {count - 1} leaves it out"
        notes.append(Note(about="clips", text=text))
    if lost:
        text = (
            f"the first {lost} frames, which follow nothing, are left out, and {lost / entry.fps:.2f} s of sound with "
            "them, so that it stays in time; --start-from-reference keeps both"
        )
        notes.append(Note(about="sound", text=text))
    notes += _sound_notes(heard)
    speech = SpeechPlan(
        audio=heard.path,
        pose=_pose(facts, frames + lost, entry.fps, notes),
        history_frames=entry.history_frames,
        from_reference=request.start_from_reference,
    )
    sound = SoundPlan(path=heard.path, start=lost / entry.fps, seconds=frames / entry.fps)
    return Driven(speech, tuple(clips), sound, per_clip // 4)


def _count(request: Request, seconds: float, per_clip: int, fps: float, notes: list[Note]) -> int:
    """Clips that the sound fills, the last one in part, as the official code counts them; no more than asked for."""
    features = max(0, (round(seconds * HEARING_RATE) - HEARING_FIELD) // HEARING_HOP + 1)
    whole = int(int(features / 50 * 30) / (per_clip * 30 / fps)) + 1
    if request.clips is not None and request.clips > whole:
        raise RequestError(
            f"clips {request.clips}: {whole} of {per_clip / fps:g} s cover the sound, which lasts {seconds:.2f} s",
            f"pass --clips {whole}, or leave it out",
            field="clips",
            got=request.clips,
            allowed=f"1 to {whole}",
            nearest=whole,
        )
    count = request.clips or whole
    asked = f"the first {count} of {whole}" if count < whole else f"{count}"
    text = f"{asked} clips of {per_clip / fps:g} s, for {min(seconds, count * per_clip / fps):.2f} s of sound"
    notes.append(Note(about="clips", text=text))
    return count


def _sound_notes(heard: MediaFacts) -> list[Note]:
    texts = []
    if heard.silent:
        texts.append(f"{heard.path.name} is silent: nobody will speak")
    if heard.channels > 2:
        texts.append(f"{heard.path.name} has {heard.channels} channels, which are mixed down to two")
    if (heard.seconds or 0) > LONGEST_WHOLE:
        texts.append(
            f"{heard.path.name} lasts over {LONGEST_WHOLE // 60} min: the speech encoder hears it in overlapping "
            "windows, where the official code would hear it whole; far parts no longer influence each other"
        )
    return [Note(about="audio", text=text) for text in texts]


def _pose(facts: Facts, frames: int, fps: float, notes: list[Note]) -> Path | None:
    """The pose video, with words on its rate and length."""
    pose = next(iter(facts.media.get("pose", ())), None)
    if pose is None:
        return None
    there = frames_shown(pose, fps)
    if pose.fps and abs(pose.fps - fps) > 0.01:
        notes.append(Note(about="pose", text=f"{pose.path.name} ({pose.fps:g} fps) is read at {fps:g} fps, by time"))
    if there < frames:
        text = f"{pose.path.name} lasts {there / fps:.2f} s; after it there is no pose to follow"
        notes.append(Note(about="pose", text=text))
    return pose.path


def plan_reference(facts: Facts, size: tuple[int, int], notes: list[Note]) -> ImagePlan:
    """Return how the reference image is brought to the video's size: scaled until it covers it, and cropped.

    The official code scales by the shorter side alone, and leaves black bars where rounding made the longer one longer.
    """
    return plan_image("reference", facts.media["reference"][0], size, notes, crop=True, filter="antialiased")


def note_mute_outputs(kinds: Sequence[OutputKind], notes: list[Note]) -> None:
    """Say where the sound is lost."""
    for kind in kinds:
        if kind not in (*SOUND_KINDS, "latents"):
            notes.append(Note(about="output", text=f"{kind} holds no sound: only {' and '.join(SOUND_KINDS)} do"))
