"""Whether a request, a model and its files belong together. Raises with what would; decides nothing."""

from __future__ import annotations

from collections.abc import Iterator

from kinema.errors import CheckpointError, RequestError
from kinema.planning.flux import check_flux
from kinema.planning.geometry import LATENT_CHANNELS
from kinema.planning.inputs import makes_its_own
from kinema.planning.speech import check_speech
from kinema.schema import COMPONENTS, CatalogEntry, Facts, FileFacts, Request, flag

VAE_FILES = {"wan2.1": "wan_2.1_vae.safetensors", "wan2.2": "wan2.2_vae.safetensors", "flux": "ae.safetensors"}


def _group(name: str) -> tuple[str, ...]:
    """The Request fields of one group of options."""
    return tuple(field for field, info in Request.model_fields.items() if info.json_schema_extra == {"group": name})


MEDIA_FIELDS, SPEECH_FIELDS = _group("media"), _group("speech")


def check_request(request: Request, entry: CatalogEntry) -> None:
    """Raise RequestError for what the model does not take, what it needs and was not given, and what contradicts."""
    for field in MEDIA_FIELDS:
        value = getattr(request, field)
        if value and field not in entry.takes:
            given = value[0] if isinstance(value, tuple) else value
            takes = ", ".join(map(flag, entry.takes)) or "text only"
            raise RequestError(
                f"{entry.name} takes no {field.replace('_', ' ')}, got {given}; it takes {takes}",
                _who_takes(field),
                field=field,
                got=str(given),
                allowed=list(entry.takes),
            )
    for field in entry.needs:
        if not getattr(request, field) and not _stands_in(field, request, entry):
            what, word = NEEDED.get(field, (field, "FILE"))
            both = bool(entry.structure.get("num_clip_positions"))
            raise RequestError(
                f"{entry.name} needs {what}" + (": it reads both ends through CLIP" if both else ""),
                f"pass --{field} {word}, or take {'wan2.1-i2v-14b-720p, which takes one' if both else 'another model'}",
                field=field,
                got=None,
            )
    for fields, why, hint in _idle(entry):
        for field in fields:
            value = getattr(request, field)
            if value is not None and value is not False:
                said = "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"
                message = f"{entry.name} {why}: {flag(field)}{said} means nothing to it"
                raise RequestError(message, hint, field=field, got=str(value))
    if entry.structure.get("speech"):
        check_speech(request, entry)
    _check_together(request, entry)


def _stands_in(field: str, request: Request, entry: CatalogEntry) -> bool:
    """Whether something was given in place of an input the model needs: another frame, words to speak, controls."""
    if request.one_frame and "one_frame" in entry.takes:
        return True
    if field == "audio" and request.speech_text:
        return True
    return field == "first" and "middle" in entry.takes and bool(request.last or request.middle)


def _idle(entry: CatalogEntry) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Request fields that mean nothing to a model: they, why, and what to do."""
    if not entry.structure.get("vace"):
        yield ("control_scale",), "has no control to weigh", "leave it out, or take a VACE model"
    if "motion_bucket_id" not in entry.takes:
        hint = "leave it out, or take wan2.1-t2v-1.3b, the one model it was trained for"
        yield ("motion_bucket_id", "motion_controller"), "has no motion controller", hint
    if "high" not in entry.experts:
        hint = "leave it out, or take a two-expert model such as wan2.2-t2v-a14b"
        yield ("dit_high", "guidance_high", "boundary"), "has one expert", hint
    if entry.family != "flux":
        yield ("clip_text", "clip_tokenizer", "redux"), "is no FLUX model", "leave it out"
        yield ("true_guidance",), "is no FLUX model", "leave it out; --guidance runs the negative prompt"
    if not entry.structure.get("speech"):
        yield SPEECH_FIELDS, "is not driven by sound", "leave it out, or take wan2.2-s2v-14b"
    if not entry.structure.get("animate"):
        hint = "leave it out, or take wan2.2-animate-14b"
        yield ("overlap", "keep_audio"), "is not made of a driving video", hint


def _check_together(request: Request, entry: CatalogEntry) -> None:
    """Raise for what means nothing without, or beside, something else."""
    vace = bool(entry.structure.get("vace"))
    if request.mask and not makes_its_own(entry) and not (request.video or (vace and request.control)):
        raise RequestError(
            f"mask {request.mask} masks nothing: no video was given",
            f"pass --video VIDEO{' or --control VIDEO' if vace else ''} as well",
            field="mask",
            got=str(request.mask),
        )
    if request.outpaint and not request.video:
        raise RequestError(
            "outpaint has nothing to show: no video was given",
            "pass --video VIDEO" if "video" in entry.takes else "take a VACE or Fun InP model, and pass --video VIDEO",
            field="outpaint",
            got=True,
        )
    if len(request.reference) > 1 and entry.structure.get("reference"):
        raise RequestError(
            f"{entry.name} takes one reference image, got {len(request.reference)}",
            "pass one, or take a VACE model, which takes several",
            field="reference",
            got=len(request.reference),
            allowed=1,
        )
    if request.frames is not None and request.seconds is not None:
        raise RequestError(
            f"frames {request.frames} and seconds {request.seconds} both say how long; give one",
            "leave out --frames or --seconds",
            field="seconds",
            got=request.seconds,
        )
    if request.motion_controller and request.motion_bucket_id is None:
        raise RequestError(
            f"motion_controller {request.motion_controller} is not told how much is to move",
            "pass --motion-bucket-id, 0 (slow) to 100 (fast)",
            field="motion_bucket_id",
            got=None,
        )


NEEDED = {
    "first": ("an image for frame 0", "IMAGE"),
    "last": ("an image for the last frame", "IMAGE"),
    "reference": ("a reference image", "IMAGE"),
    "control": ("something to control it", "FILE"),
    "pose": ("a skeleton video, such as kinema drive makes", "VIDEO"),
    "face": ("a face video, such as kinema drive makes", "VIDEO"),
    "camera": ("a camera move or pose file", '"pan left"'),
    "audio": ("speech or music, or --speech-text", "FILE"),
}


def _who_takes(field: str) -> str:
    vace, inpaint = "wan2.1-vace-14b, wan2.2-vace-fun-a14b", "wan2.2-fun-inp-a14b"
    models = {
        "first": "wan2.2-i2v-a14b, wan2.2-ti2v-5b or wan2.1-i2v-14b-720p",
        "last": "wan2.2-i2v-a14b or wan2.1-flf2v-14b",
        "control": f"{vace} or wan2.2-fun-control-a14b",
        "reference": f"{vace} or wan2.2-fun-control-a14b",
        "video": f"{vace} or {inpaint}",
        "mask": f"{vace} or {inpaint}",
        "middle": f"wan2.2-i2v-a14b, {inpaint} or {vace}",
        "one_frame": "wan2.1-i2v-14b-720p or wan2.1-flf2v-14b",
        "camera": "wan2.2-fun-camera-a14b or wan2.1-fun-camera-14b",
        "audio": "wan2.2-s2v-14b",
        "pose": "wan2.2-animate-14b or wan2.2-s2v-14b",
        "face": "wan2.2-animate-14b",
        "background": "wan2.2-animate-14b",
    }
    return f"models that take one: {models[field]}" if field in models else "no model of this version takes one"


def check_components(request: Request, entry: CatalogEntry, facts: Facts) -> None:
    """Raise unless the files found are the parts of this model and fit each other and the inputs."""
    for role, file in facts.files.items():
        wanted = COMPONENTS[entry.family].get(role)
        if file.component != wanted:
            hint = f"pass the {role.replace('_', ' ')} of {entry.name} with {flag(role)}"
            raise CheckpointError(
                f"{file.path} is no part of {entry.name}: {file.structure}",
                hint if wanted else f"leave {flag(role)} out",
                path=str(file.path),
                expected=wanted,
                found=file.component,
            )
    if entry.family == "flux":
        check_flux(request, entry, facts)
    for role in entry.dit_roles:
        _check_dit(entry, facts.files[role], role)
    if "high" in entry.experts:
        _check_pair(facts.files["dit"], facts.files["dit_high"])
    _check_inputs(request, entry, facts)
    _check_widths(request, entry, facts)


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


def _check_pair(low: FileFacts, high: FileFacts) -> None:
    """Raise for one file given as both experts, and for one that is named as the other."""
    if low.files == high.files:
        raise RequestError(
            f"high-noise and low-noise expert are the same file: {low.path}",
            "they are two halves of one run: pass the low-noise file to --dit and the high-noise file to --dit-high",
            field="dit_high",
            got=str(high.path),
        )
    for role, file, other in (("dit", low, "high"), ("dit_high", high, "low")):
        if file.name_suggests == other:
            raise RequestError(
                f"{file.path} is named as the {other}-noise expert but given as {flag(role)}",
                "swap --dit and --dit-high (--dit is the low-noise expert), or rename the file",
                field=role,
                got=str(file.path),
            )


def _check_inputs(request: Request, entry: CatalogEntry, facts: Facts) -> None:
    """Raise for sound where a picture should be, and for a reference image to a file that takes none."""
    for role, media in ((role, media) for role, found in facts.media.items() for media in found):
        if media.kind == "audio" and role != "audio":
            raise RequestError(
                f"{role} {media.path} has sound but no picture", "pass a video", field=role, got=str(media.path)
            )
    dit, adapters = facts.files["dit"], ("vace", "reference", "animate", "speech")
    if request.reference and entry.family == "wan" and not any(map(dit.config.get, adapters)):
        raise RequestError(
            f"{dit.path} takes no reference image: {dit.structure}",
            "leave --reference out, or take the V1.1 files of this model",
            field="reference",
            got=str(request.reference[0]),
        )


def _check_widths(request: Request, entry: CatalogEntry, facts: Facts) -> None:
    """Raise for parts that hand on rows or channels which the next one does not take."""
    dit, text, vae = facts.files["dit"], facts.files["text_encoder"], facts.files["vae"]
    motion = facts.files.get("motion_controller") if request.motion_bucket_id is not None else None
    width = dit.config.get("dim")
    if motion and motion.config.get("dim") != width:
        raise CheckpointError(
            f"{motion.path} moves a DiT {motion.config.get('dim')} wide; {dit.path} is {width}",
            "take the motion controller that belongs to the model",
            path=str(motion.path),
            expected=width,
            found=motion.config.get("dim"),
        )
    if text.config.get("dim") != dit.config.get("text_dim"):
        raise CheckpointError(
            f"{text.path} gives text rows of {text.config.get('dim')}, the DiT takes {dit.config.get('text_dim')}",
            "take the text encoder that belongs to the model",
            path=str(text.path),
            expected=dit.config.get("text_dim"),
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
