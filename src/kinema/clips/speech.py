"""Speech to video, clip by clip: sound and pose of each clip's time, the reference, the motion of the frames before.

Source: Wan-Video/Wan2.2 wan/speech2video.py (Apache-2.0). Parity: tests/parity/test_speech_clips.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from kinema import ops
from kinema.clips.loop import Branches, Models
from kinema.conditioning import read_planned
from kinema.media.audio import read_audio
from kinema.media.frames import crop_to, to_video_range
from kinema.media.reader import read_video
from kinema.models.wan_vae import WanVAE
from kinema.models.wav2vec import Wav2Vec, encode_audio
from kinema.sampling.denoiser import Branch, noise
from kinema.schema import ClipPlan, Note, Plan
from kinema.tensors import Conditions, SpeechConditions

BLACK, GREY = -1.0, 0.5
"""What stands for frames that a pose video lacks, in [-1, 1]; and for those before the first clip, in [0, 1]."""

REFERENCE_FRAMES = 6
"""How many of the frames before the first clip show the reference, where the video goes on from it."""


@dataclass
class SpeechClips:
    """The task of speech to video.

    texts            rows of the prompt, and of the negative prompt where there is guidance.
    reference_BCFhw  normalised latent of the reference image, and its pixels_HWC in [0, 1].
    audio_LDT        hidden states of the speech encoder, one column a frame of all clips; None where none is sampled.
    """

    plan: Plan
    models: Models
    texts: Mapping[Branch, Tensor]
    reference_BCFhw: Tensor
    reference_HWC: Tensor
    audio_LDT: Tensor | None

    def __post_init__(self) -> None:
        assert self.plan.speech is not None
        self.speech = self.plan.speech
        self.history_frames = self.speech.history_frames
        # The pose video is read on from clip to clip, and opened anew only where a clip was not sampled.
        self._pose_frames: Iterator[Tensor] | None = None
        self._pose_at = 0

    @property
    def vae(self) -> WanVAE:
        # Asked for each time: it may have made room for the DiT in between.
        return cast(WanVAE, self.models(self.plan.vae))

    def opening(self) -> Tensor:
        return torch.full((self.history_frames, self.plan.height, self.plan.width, 3), GREY)

    def before(self, number: int, history_THWC: Tensor) -> Tensor | None:
        """Latents of the frames before the clip; None for a first clip that follows nothing."""
        if number == 0 and not self.speech.from_reference:
            return None
        if number == 0:
            shown_THWC = self.reference_HWC.expand(REFERENCE_FRAMES, -1, -1, -1)
            history_THWC = torch.cat([history_THWC[:-REFERENCE_FRAMES], shown_THWC])
        return self._encode(history_THWC.permute(3, 0, 1, 2) * 2 - 1)

    def conditions(self, number: int, clip: ClipPlan, before: Tensor | None) -> Branches:
        assert self.audio_LDT is not None, "the sound is encoded where a clip has to be sampled"
        audio_BLDT = self.audio_LDT[None, :, :, clip.start : clip.start + clip.frames].float()
        told = SpeechConditions(
            audio_BLDT=audio_BLDT,
            reference_BCFhw=self.reference_BCFhw,
            motion_BCFhw=before,
            pose_BCFhw=self._pose(clip),
            history_frames=(self.history_frames + 3) // 4,
        )
        # Guidance pushes away from silence, not only from the negative prompt.
        silent = replace(told, audio_BLDT=torch.zeros_like(audio_BLDT))
        both: Mapping[Branch, SpeechConditions] = {"cond": told, "uncond": silent}
        return {branch: Conditions((rows,), speech=both[branch]) for branch, rows in self.texts.items()}

    def notes(self) -> Iterable[Note]:
        return ()

    def noise(self, number: int, seed: int) -> Tensor:
        drawn = noise((seed + number) % 2**63, (1, *self.plan.latent))
        # The official code draws S2V's noise, and no other model's, in bfloat16.
        return drawn if self.plan.precision == "reference" else drawn.bfloat16().float()

    def decode(self, clip: ClipPlan, latents_CFhw: Tensor, before: Tensor | None) -> Iterator[Tensor]:
        """The VAE is causal: it sees the frames before, or the reference, and of these nothing is passed on."""
        lead_BCFhw = self.reference_BCFhw if before is None else before
        whole_CFhw = torch.cat([lead_BCFhw[0].to(latents_CFhw), latents_CFhw], dim=1)
        skip = 4 * whole_CFhw.shape[1] - 3 - clip.frames
        for frames_THWC in ops.decode_frames(self.vae, whole_CFhw, self.plan):
            if len(frames_THWC) > skip:
                yield frames_THWC[skip:]
            skip = max(0, skip - len(frames_THWC))

    def pose_pixels(self, clip: ClipPlan) -> Tensor | None:
        """Return video_CTHW in [-1, 1] of the clip's part of the pose video, black after its end; None without one."""
        plan = self.plan
        if self.speech.pose is None:
            return None
        if clip.start != self._pose_at or self._pose_frames is None:
            self._pose_frames = read_video(self.speech.pose, fps=plan.fps, start=clip.start)
        self._pose_at = clip.start + clip.frames
        frames = islice(self._pose_frames, clip.frames)
        given = [crop_to(to_video_range(frame), plan.width, plan.height, "antialiased") for frame in frames]
        given += [torch.full((3, plan.height, plan.width), BLACK)] * (clip.frames - len(given))
        return torch.stack(given, dim=1)

    def _pose(self, clip: ClipPlan) -> Tensor | None:
        """Latents of the clip's poses. The first is encoded twice, so that 4n frames make whole latent frames."""
        pose_CTHW = self.pose_pixels(clip)
        if pose_CTHW is None:
            return None
        return self._encode(torch.cat([pose_CTHW[:, :1], pose_CTHW], dim=1))[:, :, 1:]

    def _encode(self, video_CTHW: Tensor) -> Tensor:
        # From the host, chunk by chunk: whole clips would take gigabytes of a card.
        return self.vae.encode(video_CTHW[None], chunk=self.plan.chunk, tile=self.plan.tile).cpu()


@torch.inference_mode()
def speech_clips(plan: Plan, models: Models, texts: Mapping[Branch, Tensor], stop: Callable[[], None]) -> SpeechClips:
    """Return the task of a plan, its reference encoded, and its sound where there are texts: to sample by.

    stop   called now and then; may raise.
    """
    assert plan.speech is not None and plan.audio_encoder is not None
    image = next(image for image in plan.images if image.role == "reference")
    pixels_CHW = read_planned(image)
    vae = cast(WanVAE, models(plan.vae))
    reference_BCFhw = vae.encode(pixels_CHW[None, :, None], tile=plan.tile).cpu()
    audio_LDT = None
    if texts:
        encoder = cast(Wav2Vec, models(plan.audio_encoder))
        frames = plan.clips[-1].start + plan.clips[-1].frames
        audio_LDT = encode_audio(encoder, read_audio(plan.speech.audio), frames, plan.fps, stop=stop)
        if plan.precision == "fast":
            audio_LDT = audio_LDT.bfloat16()  # as officially; it is most of what is kept
    reference_HWC = (pixels_CHW.permute(1, 2, 0) + 1) / 2
    return SpeechClips(plan, models, texts, reference_BCFhw, reference_HWC, audio_LDT)
