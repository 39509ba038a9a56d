"""The verbs as functions: encode, sample, decode, finish. Each takes models and tensors and returns tensors or files.

What they do is written in the Plan; in which order, and what stays loaded, is the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from kinema.errors import CheckpointError, NumericsError
from kinema.models.flux import FluxDiT
from kinema.models.flux_vae import FluxVAE
from kinema.models.wan import WanDiT
from kinema.models.wan_vae import WanVAE
from kinema.planning.outputs import PLAN_KEY, parse_plan
from kinema.sampling.denoiser import Branch
from kinema.schema import Expert, Plan, PlanStep
from kinema.tensors import Conditions, on_device
from kinema.weights.files import open_tensors
from kinema.weights.lora.attach import set_strengths

DiT = WanDiT | FluxDiT
"""The models that give a velocity. Each has its own context, made by its `prepare`."""

VAE = WanVAE | FluxVAE


# --- sample --------------------------------------------------------------------------------------


@dataclass
class LastCall:
    """What the DiT was last asked, so that a non-finite answer can be traced to a layer."""

    model: DiT
    x_BCFhw: Tensor
    timestep: float
    contexts: tuple[Any, ...]


class Velocity:
    """The velocity the denoiser asks for, by expert and branch; contexts are prepared once each.

    load        expert -> loaded model.
    conditions  by branch.
    together    run all branches of a step through a block before the next block: for weights that have to be brought.
                It costs the tokens of one more branch.
    steps       all that are to come, and `bring(expert, following)`, called before the last forward of an expert that
                another follows: so that the first weights of that one may come while it runs.
    """

    def __init__(
        self,
        load: Callable[[Expert], DiT],
        conditions: Mapping[Branch, Conditions],
        device: torch.device,
        together: bool = False,
        steps: Sequence[PlanStep] = (),
        bring: Callable[[Expert, Expert], None] = lambda *_: None,
    ) -> None:
        self._load, self._conditions, self._device, self._together = load, conditions, device, together
        self._bring = bring
        self._following = {step: then.expert for step, then in pairwise(steps) if then.expert != step.expert}
        self._contexts: dict[Branch, Any] = {}
        self._current: tuple[Expert, tuple[float, ...], DiT] | None = None
        self.last: LastCall | None = None

    def __call__(self, step: PlanStep, branches: Sequence[Branch], x_BCFhw: Tensor) -> list[Tensor]:
        model = self._model(step)
        contexts = self._prepared(model, branches)
        self.last = LastCall(model, x_BCFhw, step.timestep, contexts)
        timesteps = torch.full((x_BCFhw.shape[0],), step.timestep, device=self._device)
        if step in self._following:
            self._bring(step.expert, self._following[step])
        if self._together:
            return list(model(x_BCFhw, timesteps, *contexts).chunk(len(contexts)))
        return [model(x_BCFhw, timesteps, context) for context in contexts]

    def _prepared(self, model: DiT, branches: Sequence[Branch]) -> tuple[Any, ...]:
        """The context of each branch: all prepared together, so that weights are brought, and what is alike held, once.

        They are prepared again where one joins those that were asked for before.
        """
        if not self._contexts.keys() >= set(branches):
            self._contexts, self.last = {}, None
            told = on_device([self._conditions[branch] for branch in branches], self._device)
            self._contexts = dict(zip(branches, model.prepare_branches(told), strict=True))
        return tuple(self._contexts[branch] for branch in branches)

    def _model(self, step: PlanStep) -> DiT:
        """The step's model with its LoRAs as strong as the step has them; what was prepared by another is dropped."""
        if self._current is None or self._current[:2] != (step.expert, step.loras):
            # A run crosses the boundary once, and changes strengths seldom: what is dropped is not asked for again.
            # It has to be let go of before the next model asks for its room.
            self._contexts, self._current, self.last = {}, None, None
            model = self._load(step.expert)
            set_strengths(model, step.loras)
            self._current = (step.expert, step.loras, model)
        return self._current[2]


def of_video(plan: Plan, latents_CFhw: Tensor) -> Tensor:
    """Return the latent frames that are decoded: without those of reference or control images beside them."""
    if plan.one_frame is not None:
        return latents_CFhw[:, plan.one_frame.target : plan.one_frame.target + 1]
    return latents_CFhw[:, plan.reference_frames :]


# --- decode and keep -----------------------------------------------------------------------------


@torch.inference_mode()
def decode_frames(vae: VAE, latents_CFhw: Tensor, plan: Plan) -> Iterator[Tensor]:
    """Yield frames_THWC, float32 in [0, 1], in order, `plan.chunk` latent frames at a time.

    Raises NumericsError for values that are not finite, and at the end for a video of one single colour:
    a black video is never delivered.
    """
    lowest, highest = 1.0, 0.0
    device = next(vae.parameters()).device
    for video_BCTHW in vae.decode_chunks(latents_CFhw[None].to(device), chunk=plan.chunk, tile=plan.tile):
        if not bool(torch.isfinite(video_BCTHW).all()):
            raise NumericsError(
                "the VAE decoded values that are not finite",
                "run again with --precision reference; if it stays, check the VAE with: kinema inspect FILE",
                stage="decode",
            )
        frames_THWC = video_BCTHW[0].clamp(-1, 1).add(1).div(2).permute(1, 2, 3, 0).cpu()
        lowest, highest = min(lowest, frames_THWC.min().item()), max(highest, frames_THWC.max().item())
        yield frames_THWC
    if highest - lowest < 1 / 255:
        raise NumericsError(
            f"every pixel of the video has the same value ({lowest:.3f})",
            "the weights or the settings are wrong; check the files with: kinema inspect FILE",
            stage="decode",
        )


def latents_bytes(latents_CFhw: Tensor, plan: Plan, more: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Return a safetensors file of the latents, carrying the plan that made them, and `more` metadata."""
    return save(
        {"latents": latents_CFhw.contiguous().cpu().float()},
        metadata={PLAN_KEY: plan.model_dump_json(exclude_none=True), **more},
    )


def read_latents(path: Path) -> tuple[Tensor, Plan]:
    """Return (latents_CFhw, plan) of a file that `latents_bytes` made; CheckpointError for any other."""
    file = open_tensors(path)
    if PLAN_KEY not in file.metadata or "latents" not in file:
        raise CheckpointError(
            f"{path} holds no latents of Kinema: it needs the tensor `latents` and the metadata `{PLAN_KEY}`",
            "pass a file that `kinema generate --output latents` wrote",
            path=str(path),
        )
    return file.get("latents").float(), parse_plan(file.metadata[PLAN_KEY], path)


# --- preview -------------------------------------------------------------------------------------


def preview_factors(plan: Plan) -> Tensor | None:
    """Return the linear latent-to-RGB factors a VAE's file brings along, None to take the official ones.

    Raises CheckpointError for what is no table of numbers.
    """
    file = open_tensors(plan.vae.files)
    if "preview_rgb" not in file.metadata:
        return None
    try:
        return torch.tensor(json.loads(file.metadata["preview_rgb"]), dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{file.path}: its metadata preview_rgb is no table of numbers", "leave --preview out", path=str(file.path)
        ) from error


def enlarged(frame_THWC: Tensor, height: int, width: int) -> Tensor:
    """Return a small frame at the video's size, each cell a square."""
    frame_TCHW = frame_THWC.permute(0, 3, 1, 2).float()
    return torch.nn.functional.interpolate(frame_TCHW, (height, width), mode="nearest").permute(0, 2, 3, 1)
