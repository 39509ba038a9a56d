"""Whether a request, a model and its files belong together. Raises with what would; decides nothing."""

from __future__ import annotations

from kinema.errors import CheckpointError, RequestError
from kinema.planning.flux import PARTS as FLUX_PARTS
from kinema.planning.flux import check_flux
from kinema.planning.geometry import LATENT_CHANNELS
from kinema.schema import CatalogEntry, Facts, FileFacts, Request

VAE_FILES = {"wan2.1": "wan_2.1_vae.safetensors", "wan2.2": "wan2.2_vae.safetensors", "flux": "ae.safetensors"}

MEDIA_FIELDS = tuple(
    name
    for name, field in Request.model_fields.items()
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("group") == "media"
)


def check_media(request: Request, entry: CatalogEntry) -> None:
    """Raise RequestError for a medium the model does not take, or one it needs and was not given."""
    for field in MEDIA_FIELDS:
        value = getattr(request, field)
        if value and field not in entry.takes:
            given = value[0] if isinstance(value, tuple) else value
            takes = ", ".join(f"--{name}" for name in entry.takes) or "text only"
            raise RequestError(
                f"{entry.name} takes no {field.replace('_', ' ')}, got {given}; it takes {takes}",
                _who_takes(field),
                field=field,
                got=str(given),
                allowed=list(entry.takes),
            )
    for field in entry.needs:
        if not getattr(request, field):
            raise RequestError(
                f"{entry.name} needs {'an image for frame 0' if field == 'first' else 'an image for the last frame'}",
                f"pass --{field} IMAGE, or take a text-to-video model",
                field=field,
                got=None,
            )
    if request.last and not request.first and entry.takes:
        raise RequestError(
            f"{entry.name} takes a last image only together with a first one, got only --last {request.last}",
            "pass --first IMAGE as well",
            field="first",
            got=None,
        )


def _who_takes(field: str) -> str:
    models = {
        "first": "wan2.2-i2v-a14b, wan2.2-ti2v-5b or wan2.1-i2v-14b-720p",
        "last": "wan2.2-i2v-a14b or wan2.1-flf2v-14b",
    }
    return f"models that take one: {models[field]}" if field in models else "no model of this version takes one"


def check_components(request: Request, entry: CatalogEntry, facts: Facts) -> None:
    """Raise unless the files found are the parts of this model and fit each other."""
    _check_family(request, entry, facts)
    two = "high" in entry.experts
    for field in ("dit_high", "guidance_high", "boundary"):
        value = getattr(request, field)
        if not two and value is not None:
            raise RequestError(
                f"{entry.name} has one expert: --{field.replace('_', '-')} {value} means nothing to it",
                "leave it out, or take a two-expert model such as wan2.2-t2v-a14b",
                field=field,
                got=str(value),
            )
    for role in ("dit", "dit_high") if two else ("dit",):
        _check_dit(entry, facts.files[role], role)
    if two and facts.files["dit"].files == facts.files["dit_high"].files:
        raise RequestError(
            f"high-noise and low-noise expert are the same file: {facts.files['dit'].path}",
            "they are two halves of one run: pass the low-noise file to --dit and the high-noise file to --dit-high",
            field="dit_high",
            got=str(facts.files["dit_high"].path),
        )
    for role in ("dit", "dit_high"):
        other = "low" if role == "dit_high" else "high"
        file = facts.files.get(role)
        if two and file and file.name_suggests == other:
            raise RequestError(
                f"{file.path} is named as the {other}-noise expert but given as --{role.replace('_', '-')}",
                "swap --dit and --dit-high (--dit is the low-noise expert), or rename the file",
                field=role,
                got=str(file.path),
            )
    dit, text, vae = facts.files["dit"].config, facts.files["text_encoder"], facts.files["vae"]
    if text.config.get("dim") != dit.get("text_dim"):
        raise CheckpointError(
            f"{text.path} gives text rows of {text.config.get('dim')}, the DiT takes {dit.get('text_dim')}",
            "take the text encoder that belongs to the model",
            path=str(text.path),
            expected=dit.get("text_dim"),
            found=text.config.get("dim"),
        )
    if vae.config.get("z_dim") != LATENT_CHANNELS[entry.vae]:
        raise CheckpointError(
            f"{entry.name} needs the {entry.vae} VAE ({LATENT_CHANNELS[entry.vae]} latent channels); "
            f"{vae.path} has {vae.config.get('z_dim')}",
            f"pass --vae {VAE_FILES[entry.vae]}",
            path=str(vae.path),
            expected=LATENT_CHANNELS[entry.vae],
            found=vae.config.get("z_dim"),
        )


def _check_family(request: Request, entry: CatalogEntry, facts: Facts) -> None:
    """Raise for parts of FLUX in a Wan model and the other way about, and for fields of the other family."""
    if entry.family == "flux":
        check_flux(request, entry, facts)
        return
    for role, file in facts.files.items():
        if file.component in FLUX_PARTS.values():
            raise CheckpointError(
                f"{file.path} is no part of {entry.name}: {file.structure}",
                f"pass the {role.replace('_', ' ')} of {entry.name} with --{role.replace('_', '-')}",
                path=str(file.path),
                found=file.component,
            )
    for field in ("clip_text", "clip_tokenizer", "redux", "true_guidance"):
        value = getattr(request, field)
        if value is not None:
            raise RequestError(
                f"{entry.name} is no FLUX model: --{field.replace('_', '-')} {value} means nothing to it",
                "leave it out" + ("; --guidance runs the negative prompt" if field == "true_guidance" else ""),
                field=field,
                got=str(value),
            )


def _check_dit(entry: CatalogEntry, file: FileFacts, role: str) -> None:
    field = entry.misfit(file.config)
    if field is not None:
        found, expected = file.config.get(field), entry.structure.get(field)
        raise CheckpointError(
            f"{file.path} is not {entry.name}: {field} is {found}, expected {expected} ({file.structure})",
            f"pass the {role.replace('_', '-')} file of {entry.name}, or --model with the model of this file",
            path=str(file.path),
            key=field,
            expected=expected,
            found=found,
        )
