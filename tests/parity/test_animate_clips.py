"""Whole runs of Animate, clip after clip, against the official loop: noise and inputs in, latents and video out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from golden_weights import assert_golden, fill, golden, input_tensor, uniform
from kinema import ops
from kinema.clips.animate import AnimateClips, Driving, DrivingVideos, reference_channels
from kinema.clips.loop import Branches, make_clips
from kinema.models.wan import WanConfig, WanDiT
from kinema.models.wan_config import AnimateConfig
from kinema.models.wan_vae import WanVAE, WanVAEConfig
from kinema.planning.clips import overlapping_clips
from kinema.sampling.denoiser import sample
from kinema.sampling.schedule import schedule
from kinema.schema import AnimatePlan, Event, Plan, PlanStep, Progress

TOLERANCE = 2e-4
NAMES = ("e2e_animate", "e2e_animate_replace")


class Remembering(nn.Module):
    """A motion encoder that reads each face once: both runs show the same ones, and a face costs a second."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.known: dict[bytes, Tensor] = {}

    def forward(self, faces_BCTHW: Tensor) -> Tensor:
        faces = list(faces_BCTHW.split(1, dim=2))
        keys = [face.numpy().tobytes() for face in faces]
        for key, face in zip(keys, faces, strict=True):
            if key not in self.known:
                self.known[key] = self.encoder(face)
        return torch.cat([self.known[key] for key in keys], dim=1)


@pytest.fixture(scope="module")
def models() -> tuple[WanDiT, WanVAE]:
    spec, _ = golden(NAMES[0])
    config, given = spec["config"]["dit"], spec["config"]["vae"]
    model = WanDiT(
        WanConfig(
            config["dim"], config["ffn_dim"], config["num_layers"], config["in_dim"], config["out_dim"],
            config["text_dim"], config["text_len"], config["freq_dim"], has_clip_tokens=True, animate=AnimateConfig(),
        )
    )  # fmt: skip
    fill(model, spec["config"]["salt_dit"])
    adapter = model.adapters[0]
    adapter.motion_encoder = Remembering(adapter.motion_encoder)
    vae = WanVAE(WanVAEConfig("2.1", given["dim"], None, given["z_dim"], num_res_blocks=given["num_res_blocks"]))
    fill(vae, 1)
    return model.eval(), vae.eval()


def inputs(spec: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs of a golden run, frames first."""
    shapes = spec["inputs"]
    scales = {"context": 1.7, "context_null": 1.7, "clip_fea": 1.7, "noise0": 1.7, "face": 0.5}
    found = {name: input_tensor(name, shape, 1, scales.get(name, 1.0)) for name, shape in shapes.items()}
    found["noise1"] = input_tensor("noise1", shapes["noise0"], 1)
    if "mask" in shapes:
        found["mask"] = (uniform("input.mask", shapes["mask"], 1) > 0).float()
    return found


Change = Callable[[Driving], Driving]


@dataclass
class GoldenVideos:
    """Driving videos that are tensors. `change` plants a fault."""

    given: dict[str, Tensor]
    change: Change

    def take(self, numbers: Sequence[int]) -> Driving:
        def frames(role: str) -> Tensor:
            return self.given[role][list(numbers)].transpose(0, 1)

        driving = Driving(frames("pose"), frames("face"))
        if "mask" in self.given:
            person_THW = self.given["mask"][list(numbers), 0]
            driving = replace(driving, scene_CTHW=frames("bg"), person_THW=person_THW)
        return self.change(driving)


class GoldenClips(AnimateClips):
    """The task with the golden's noise."""

    def noise(self, number: int, seed: int) -> Tensor:
        assert isinstance(self.videos, GoldenVideos)
        return self.videos.given[f"noise{number}"][None]


@torch.inference_mode()
def run(
    name: str, models: tuple[WanDiT, WanVAE], change: Change = lambda driving: driving, history: int = 0, count: int = 2
) -> tuple[list[Tensor], Tensor]:
    """Return (latents of the first `count` clips, video_CTHW in [-1, 1]). `change` and `history` plant faults."""
    spec, _ = golden(name)
    config, given = spec["config"], inputs(spec)
    dit, vae = models
    clips = overlapping_clips(config["real_frames"], config["clip_len"], config["refert_num"])
    plan = Plan.model_construct(
        width=config["width"], height=config["height"], frames=config["real_frames"], clips=clips, chunk=1, tile=None,
        vae=None, animate=AnimatePlan(overlap=config["refert_num"]),
    )  # fmt: skip
    task = GoldenClips(
        plan, lambda _: vae, {"cond": given["context"]}, given["clip_fea"], reference_channels(vae, given["ref"][0]),
        cast(DrivingVideos, GoldenVideos(given, change)),
    )  # fmt: skip
    task.history_frames += history
    grid = schedule(config["solver"], config["steps"], config["shift"])
    steps = [
        PlanStep(sigma=s, timestep=t, expert="model", guidance=config["guide_scale"])
        for s, t in zip(grid.sigmas, grid.timesteps, strict=False)
    ]
    latents: list[Tensor] = []

    def sample_clip(number: int, conditions: Callable[[], Branches]) -> Generator[Event, None, Tensor]:
        velocity = ops.Velocity(lambda _: dit, conditions(), torch.device("cpu"))
        *_, last = sample(steps, config["solver"], task.noise(number, 0), velocity)
        latents.append(last.x[0])
        yield Progress(stage="sample", done=number, total=len(clips))
        return latents[-1]

    made = make_clips(clips[:count], task, sample_clip, lambda _: nullcontext())
    frames = [item for item in made if isinstance(item, Tensor)]
    return latents, torch.cat(frames).permute(3, 0, 1, 2) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
def test_the_run_equals_the_official_one(name: str, models: tuple[WanDiT, WanVAE]) -> None:
    _, want = golden(name)
    latents, video = run(name, models)
    assert len(latents) == 2
    assert_golden(latents[0], want["latent0"], TOLERANCE)
    assert_golden(latents[1], want["latent1"], TOLERANCE)
    assert_golden(video[None], want["video"], TOLERANCE)


FAULTS: dict[str, Change] = {
    "mask inverted": lambda driving: replace(driving, person_THW=1 - driving.person_THW),
    "scene forgotten": lambda driving: replace(driving, scene_CTHW=torch.zeros_like(driving.pose_CTHW)),
    "skeleton a frame late": lambda driving: replace(driving, pose_CTHW=driving.pose_CTHW.roll(1, 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, models: tuple[WanDiT, WanVAE]) -> None:
    _, want = golden(NAMES[1])
    latents, _ = run(NAMES[1], models, FAULTS[fault], count=1)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(latents[0], want["latent0"], TOLERANCE)


def test_another_frame_before_the_clip_is_caught(models: tuple[WanDiT, WanVAE]) -> None:
    _, want = golden(NAMES[1])
    latents, _ = run(NAMES[1], models, history=1)
    assert_golden(latents[0], want["latent0"], TOLERANCE)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(latents[1], want["latent1"], TOLERANCE)
