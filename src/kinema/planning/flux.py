"""What only FLUX.1 plans: its second text encoder, its guidance input, and the images it is given.

Pure Python. Source of sizes and roles: black-forest-labs/flux src/flux/cli_fill.py, cli_control.py, cli_kontext.py,
cli_redux.py, sampling.py (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kinema.errors import CheckpointError, RequestError
from kinema.planning.inputs import plan_image
from kinema.schema import (
    CatalogEntry,
    Facts,
    FileFacts,
    FluxPlan,
    ImagePlan,
    ModelRef,
    Note,
    Plan,
    Request,
    flag,
)

MULTIPLE = 16
"""Pixels a token spans, each way."""

KONTEXT_SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip
"""Sizes Kontext was trained on; an image is brought to the one nearest to its aspect."""

FULL_AREA = 900_000
"""Pixels from which a picture counts as of Kontext's own size; below it, images follow the picture's area."""

OF_VIDEO = ("ffn_tokens", "vae_cache", "chunk", "outpaint")
"""Fields that say how videos are made, and would change nothing here."""

OF_REDUX = ("redux", "clip_vision")


def check_flux(request: Request, entry: CatalogEntry, facts: Facts) -> None:
    """Raise unless the pooled text fits the transformer, and the request asks only what images have."""
    dit, pooled = facts.files["dit"], facts.files["clip_text"]
    if pooled.config["dim"] != dit.config["vector_dim"]:
        raise CheckpointError(
            f"{pooled.path} gives rows of {pooled.config['dim']}, the transformer takes {dit.config['vector_dim']}",
            "take the encoder that belongs to FLUX.1: clip_l",
            path=str(pooled.path),
            expected=dit.config["vector_dim"],
            found=pooled.config["dim"],
        )
    for field in ("seconds", "fps", "frames"):
        value = getattr(request, field)
        if value is not None and (field, value) != ("frames", 1):
            raise RequestError(
                f"{entry.name} makes single images: --{field} {value:g} means nothing to it",
                "leave it out; --then MODEL makes a video of the image",
                field=field,
                got=value,
            )
    idle = (*OF_VIDEO, *(() if entry.redux else OF_REDUX))
    for field in (field for field in idle if getattr(request, field)):
        raise RequestError(
            f"{entry.name} has no use for {flag(field)} {getattr(request, field)}",
            "leave it out" + ("; flux.1-redux-dev takes it" if field in OF_REDUX else ""),
            field=field,
            got=str(getattr(request, field)),
        )
    if request.guidance is not None and not dit.config["has_guidance"]:
        raise RequestError(
            f"{entry.name} has no guidance input: --guidance {request.guidance:g} would change nothing",
            "leave it out, or take flux.1-dev; --true-guidance runs the negative prompt beside the prompt",
            field="guidance",
            got=request.guidance,
        )


def plan_flux(request: Request, entry: CatalogEntry, facts: Facts, ref: Callable[[FileFacts], ModelRef]) -> FluxPlan:
    """Return how FLUX is told of the prompt and of images. `ref` makes the recipe of a small model, in float32."""
    has_guidance = facts.files["dit"].config["has_guidance"]
    guidance = request.guidance if request.guidance is not None else entry.guidance
    redux = facts.files.get("redux") if request.reference else None
    return FluxPlan(
        clip_text=ref(facts.files["clip_text"]).model_copy(update={"tokenizer": facts.clip_tokenizer}),
        guidance=guidance if has_guidance else None,
        redux=redux and ref(redux),
        siglip=redux and ref(facts.files["clip_vision"]),
    )


def flux_images(
    request: Request, entry: CatalogEntry, facts: Facts, size: tuple[int, int], notes: list[Note]
) -> tuple[ImagePlan, ...]:
    """Return how each given image is brought to a size: the picture's own, but for images Kontext looks at."""
    plans = []
    for role in ("first", "mask", "control", "reference"):
        for media in facts.media.get(role, ()):
            width, height = size
            if role == "reference" and entry.kontext:
                width, height = kontext_size(media.width, media.height, size)
                notes.append(Note(about=role, text=f"{media.path.name} is looked at as {width}x{height}"))
            elif media.width * height != media.height * width:
                shape = f"{media.path.name} ({media.width}x{media.height})"
                notes.append(Note(about=role, text=f"{shape} is stretched to {width}x{height}"))
            plans.append(plan_image(role, media, (width, height), notes, crop=False, filter="lanczos"))
    return tuple(plans)


def rows_beside(plan: Plan) -> int:
    """Return how many rows an image's tokens attend to beside their own: of text, and of the reference images."""
    flux, shown = plan.flux, [image for image in plan.images if image.role == "reference"]
    if flux is not None and flux.siglip is not None:
        side = flux.siglip.config["image_size"] // flux.siglip.config["patch_size"]
        return plan.text_len + len(shown) * int(side) ** 2
    return plan.text_len + sum(image.width * image.height // MULTIPLE**2 for image in shown)


def kontext_size(width: int, height: int, picture: tuple[int, int]) -> tuple[int, int]:
    """Return the size at which Kontext looks at an image: a trained one, or of a small picture's area."""
    aspect = width / height
    if picture[0] * picture[1] >= FULL_AREA:
        return min(KONTEXT_SIZES, key=lambda size: abs(size[0] / size[1] - aspect))
    return area_size(width, height, picture[0] * picture[1])


def area_size(width: int, height: int, area: int) -> tuple[int, int]:
    """Return (width, height) of about `area` pixels at the image's aspect, both multiples of 16."""
    aspect = width / height

    def near(length: float) -> int:
        return max(MULTIPLE, round(length / MULTIPLE) * MULTIPLE)

    return near(math.sqrt(area * aspect)), near(math.sqrt(area / aspect))
