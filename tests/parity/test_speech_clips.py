"""The clip loop of speech to video against whole runs of the official one: two clips, noise in, frames out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema import ops
from kinema.clips.loop import Branches, make_clips
from kinema.clips.speech import SpeechClips
from kinema.models.wan import WanConfig, WanDiT
from kinema.models.wan_config import SpeechConfig
from kinema.models.wan_vae import WanVAE, WanVAEConfig
from kinema.sampling.denoiser import Branch, sample
from kinema.sampling.schedule import schedule
from kinema.schema import ClipPlan, Event, Plan, PlanStep, SpeechPlan
from kinema.tensors import Conditions

GOLDENS = ["e2e_s2v", "e2e_s2v_first_frame_pose"]
TOLERANCE = 2e-4


@dataclass
class GoldenClips(SpeechClips):
    """The task with noise and poses of the golden file, which no file of a user could hold exactly."""

    inputs: Mapping[str, Tensor] | None = None

    def noise(self, number: int, seed: int) -> Tensor:
        assert self.inputs is not None
        return self.inputs[f"noise{number}"][None]

    def pose_pixels(self, clip: ClipPlan) -> Tensor | None:
        assert self.inputs is not None
        pose = self.inputs.get(f"pose{clip.start // clip.frames}")
        return None if pose is None else pose[0]


@dataclass
class Run:
    """One golden run: its models, task and plan."""

    dit: WanDiT
    task: GoldenClips
    clips: tuple[ClipPlan, ...]
    steps: list[PlanStep]
    solver: Any
    want: dict[str, Tensor]


def load(name: str) -> Run:
    spec, want = golden(name)
    config, given = spec["config"], spec["config"]["dit"]
    dit = WanDiT(
        WanConfig(
            given["dim"], given["ffn_dim"], given["num_layers"], given["in_dim"], given["out_dim"], given["text_dim"],
            given["text_len"], given["freq_dim"],
            speech=SpeechConfig(tuple(given["audio_inject_layers"]), given["audio_dim"]),
        )
    ).eval()  # fmt: skip
    fill(dit, config["salt_dit"])
    vae = WanVAE(WanVAEConfig("2.1", config["vae"]["dim"], None, 16)).eval()
    fill(vae, spec["salt"])
    scales = {"context": 1.7, "context_null": 1.7, "audio": 1.7, "noise0": 1.7, "noise1": 1.7}
    shapes = {**spec["inputs"], "noise1": spec["inputs"]["noise0"]}
    inputs = {key: input_tensor(key, shape, spec["salt"], scales.get(key, 1.0)) for key, shape in shapes.items()}
    frames = config["infer_frames"]
    skips = [3 if config["drop_first_motion"] else 0, 0]
    clips = tuple(
        ClipPlan(start=frames * number, frames=frames, skip=skip, shown=frames - skip)
        for number, skip in enumerate(skips)
    )
    speech = SpeechPlan(
        audio=Path("none"), history_frames=config["motion_frames"], from_reference=config["init_first_frame"]
    )
    plan = Plan.model_construct(
        width=config["width"], height=config["height"], clips=clips, speech=speech, chunk=1, tile=None, vae=None, fps=16
    )
    models: Callable[[object], nn.Module] = lambda _: vae  # noqa: E731
    texts: dict[Branch, Tensor] = {"cond": inputs["context"], "uncond": inputs["context_null"]}
    with torch.inference_mode():
        reference = vae.encode(inputs["ref"])
    pixels = (inputs["ref"][0, :, 0].permute(1, 2, 0) + 1) / 2
    task = GoldenClips(plan, models, texts, reference, pixels, inputs["audio"][0], inputs)
    grid = schedule(config["solver"], config["steps"], config["shift"])
    steps = [
        PlanStep(sigma=sigma, timestep=timestep, expert="model", guidance=config["guide_scale"])
        for sigma, timestep in zip(grid.sigmas, grid.timesteps, strict=False)
    ]
    return Run(dit, task, clips, steps, config["solver"], want)


def make(run: Run, known: int = 0) -> tuple[list[Tensor], Tensor]:
    """Return the latents of each clip, and the video in [-1, 1], [1, 3, T, H, W].

    known   so many clips, from the first on, are not sampled: their latents are the golden ones.
    """
    latents: list[Tensor] = []

    def sample_clip(number: int, conditions: Callable[[], Branches]) -> Generator[Event, None, Tensor]:
        if number < known:
            latents.append(run.want[f"latent{number}"])
            return latents[-1]
        told: dict[Branch, Conditions] = dict(conditions())
        velocity = ops.Velocity(lambda _: run.dit, told, torch.device("cpu"))
        *_, last = sample(run.steps, run.solver, run.task.noise(number, 0), velocity)
        latents.append(last.x[0])
        return latents[-1]
        yield

    with torch.inference_mode():
        frames = [
            item
            for item in make_clips(run.clips, run.task, sample_clip, lambda _: nullcontext())
            if isinstance(item, Tensor)
        ]
    return latents, (torch.cat(frames).permute(3, 0, 1, 2)[None]) * 2 - 1


@pytest.mark.parametrize("name", GOLDENS)
def test_two_clips(name: str):
    run = load(name)
    latents, video = make(run)
    for number, made in enumerate(latents):
        assert_golden(made, run.want[f"latent{number}"], TOLERANCE)
    assert_golden(video, run.want["video"], TOLERANCE)


# --- planted faults --------------------------------------------------------------------------------


def test_frames_rounded_to_a_byte_between_clips_fail():
    """What a clip goes on from is not what a file holds: the second clip drifts."""
    run = load("e2e_s2v")
    exact = run.task.before
    run.task.before = lambda number, history: exact(number, (history * 255).round() / 255)  # type: ignore[method-assign]
    latents, _ = make(run, known=1)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(latents[1], run.want["latent1"], TOLERANCE)


def test_guidance_that_keeps_the_sound_fails():
    run = load("e2e_s2v")
    told = run.task.conditions

    def loud(number: int, clip: ClipPlan, before: Tensor | None) -> Branches:
        both = told(number, clip, before)
        return {**both, "uncond": replace(both["uncond"], speech=both["cond"].speech)}

    run.task.conditions = loud  # type: ignore[method-assign]
    run.clips = run.clips[:1]
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(make(run)[0][0], run.want["latent0"], TOLERANCE)


def test_a_first_clip_that_follows_grey_fails():
    run = load("e2e_s2v")
    run.task.speech = run.task.speech.model_copy(update={"from_reference": True})
    run.task.reference_HWC = torch.full((64, 64, 3), 0.5)
    run.clips = run.clips[:1]
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(make(run)[0][0], run.want["latent0"], TOLERANCE)


def test_too_few_frames_left_out_fail():
    run = load("e2e_s2v")
    first = run.clips[0]
    run.clips = (first.model_copy(update={"skip": 2, "shown": first.shown + 1}), run.clips[1])
    with pytest.raises(AssertionError, match="is not"):
        assert_golden(make(run, known=2)[1], run.want["video"], TOLERANCE)
