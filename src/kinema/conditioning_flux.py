"""From a plan to what FLUX.1 is told: text rows, pooled text, channels and further images.

What is made of which input is written in the plan; which models stay loaded is the caller's.
Source: black-forest-labs/flux src/flux/sampling.py prepare, prepare_fill, prepare_control, prepare_kontext,
prepare_redux (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.conditioning import read_planned
from kinema.media.image import read_image
from kinema.models.clip_text import ClipText
from kinema.models.flux_vae import FluxVAE
from kinema.models.siglip import Redux, Siglip
from kinema.models.tokenizer import ClipTokenizer
from kinema.sampling.denoiser import Branch
from kinema.schema import FluxPlan, ImagePlan, ModelRef, Plan
from kinema.tensors import Conditions, FluxConditions

Get = Callable[[ModelRef], nn.Module]
"""get(ref) -> the loaded model of a recipe."""


def flux_conditions(
    plan: Plan, rows: Mapping[Branch, Tensor], pooled: Mapping[Branch, Tensor], get: Get
) -> dict[Branch, Conditions]:
    """Return the conditions of each branch, whose prompt has these rows [S, D] and this pooled text [1, D]."""
    flux = cast(FluxPlan, plan.flux)
    concat, images, source = _channels(plan, get), _looked_at(plan, get), _source(plan, get)
    told = {
        branch: Conditions(
            (text,),
            concat_BCFhw=concat,
            source_BCFhw=source,
            flux=FluxConditions(pooled[branch], flux.guidance, images),
        )
        for branch, text in rows.items()
    }
    if flux.redux is not None:
        text, shown = rows["cond"], _redux_rows(plan, flux, get)
        told["cond"] = replace(told["cond"], text=(torch.cat([text, shown.to(text)]),))
    return told


def pooled_texts(plan: Plan, branches: Iterable[Branch], get: Get) -> dict[Branch, Tensor]:
    """Return the pooled text [1, D] of each branch."""
    ref = cast(FluxPlan, plan.flux).clip_text
    assert ref.tokenizer is not None
    tokenizer = ClipTokenizer.from_path(ref.tokenizer)
    encoder = cast(ClipText, get(ref))
    prompts: dict[Branch, str] = {"cond": plan.prompt, "uncond": plan.negative}
    return {
        branch: encoder.encode(tokenizer.encode(prompts[branch], encoder.config.num_positions).ids)
        for branch in branches
    }


def _of_role(plan: Plan, role: str) -> list[ImagePlan]:
    return [image for image in plan.images if image.role == role]


def _encoded(image_CHW: Tensor, plan: Plan, get: Get) -> Tensor:
    vae = cast(FluxVAE, get(plan.vae))
    return vae.encode(image_CHW[None, :, None], tile=plan.tile)


def _channels(plan: Plan, get: Get) -> Tensor | None:
    """Latents of the control image; or of the picture with a hole, and the mask of the hole, 64 values a cell."""
    for control in _of_role(plan, "control"):
        return _encoded(read_planned(control), plan, get)
    masks, pictures = _of_role(plan, "mask"), _of_role(plan, "first")
    if not masks or not pictures:
        return None
    hole_HW = read_hole(masks[0])
    latents_BCFhw = _encoded(read_planned(pictures[0]) * (1 - hole_HW), plan, get)
    cells_Chw = F.pixel_unshuffle(hole_HW[None], plan.height // plan.latent[2])
    return torch.cat([latents_BCFhw, cells_Chw[None, :, None].to(latents_BCFhw)], dim=1)


def _source(plan: Plan, get: Get) -> Tensor | None:
    """Latents of the picture that sampling starts from."""
    return _encoded(read_planned(_of_role(plan, "first")[0]), plan, get) if plan.strength is not None else None


def read_hole(mask: ImagePlan) -> Tensor:
    """Return hole_HW: 1 where a mask image is nearer to white, and the picture is made anew; 0 where it is kept."""
    grey_CHW = read_image(mask.path)[0].float().mean(dim=-1)[None, None] / 255
    return (F.interpolate(grey_CHW, (mask.height, mask.width), mode="nearest-exact")[0, 0] > 0.5).float()


def _looked_at(plan: Plan, get: Get) -> tuple[Tensor, ...]:
    flux = cast(FluxPlan, plan.flux)
    if flux.redux is not None:
        return ()
    return tuple(_encoded(read_planned(image), plan, get) for image in _of_role(plan, "reference"))


def _redux_rows(plan: Plan, flux: FluxPlan, get: Get) -> Tensor:
    """Rows of the text's width that stand for the reference images, one image after the other."""
    assert flux.siglip is not None and flux.redux is not None
    siglip, redux = cast(Siglip, get(flux.siglip)), cast(Redux, get(flux.redux))
    rows = [redux(siglip.encode(read_planned(image)[None]))[0] for image in _of_role(plan, "reference")]
    return torch.cat(rows)
