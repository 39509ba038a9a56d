"""Find out everything a plan depends on: which model is meant, where its files are, what the inputs are.

Reads headers only; loads no weight. The result, Facts, is all that planning sees of the world.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from kinema.catalog import find_entry, load_catalog, matching_entries
from kinema.catalog.choice import Card, tokenizer_of
from kinema.catalog.files import load_store
from kinema.catalog.folders import Folders
from kinema.catalog.installed import Chosen, Need, find_files, missing
from kinema.catalog.loras import known_lora, load_loras
from kinema.catalog.sources import fetched, parse_source
from kinema.errors import CatalogError, RequestError
from kinema.lora import LORA_SYNTAX, LoraFacts, LoraRef
from kinema.media.audio import audio_facts
from kinema.media.camera import pose_facts
from kinema.media.image import read_image
from kinema.media.probe import probe
from kinema.media.speaking import speak
from kinema.models.tokenizer import ClipTokenizer, Tokenizer
from kinema.planning import MEDIA_FIELDS, check_request, output_folder
from kinema.planning.camera import is_pose_file
from kinema.planning.inputs import split_place
from kinema.provision import judge, lacking, provide
from kinema.runtime.machine import probe_machine
from kinema.schema import COMPONENTS, CatalogEntry, Facts, FileFacts, Machine, MediaFacts, Note, Request, Settings, flag
from kinema.weights.detect import components_in, inspect
from kinema.weights.folders import (
    CLIP_FILES,
    CLIP_FOLDERS,
    T5_FOLDERS,
    TOKENIZER_FILES,
    TOKENIZER_FOLDERS,
    find_tokenizer,
    resolve_folder,
)
from kinema.weights.load import load_tokenizer
from kinema.weights.lora.attach import parameter_shapes
from kinema.weights.lora.file import read_lora
from kinema.weights.lora.match import lora_facts
from kinema.weights.structure import build

KINDS = {
    role: tuple(parts[role] for parts in COMPONENTS.values() if role in parts)
    for role in dict.fromkeys(chain.from_iterable(COMPONENTS.values()))
}
"""The kinds of model each role asks for, Wan's first."""

IMAGE_FIELDS = ("first", "last", "middle", "reference", "control_image", "control_mask")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")
"""Of a first image: what is a video, whose last frame is meant."""


def survey(
    request: Request, settings: Settings, promised: Mapping[Path, MediaFacts] = MappingProxyType({})
) -> tuple[CatalogEntry, Facts]:
    """Return the model that is meant and all facts about files, inputs, machine and output folder.

    promised  inputs that are not there yet, and what they will be.

    Raises CatalogError for what is not there, CheckpointError for files that are not what they are used
    as, RequestError for inputs that cannot be read and for a model that cannot be told from its files.
    """
    catalog = load_catalog(settings.catalogs)
    named = find_entry(request.model, catalog) if request.model and not _is_folder(request.model) else None
    if named is not None:
        check_request(request, named)
    machine = probe_machine(request.device, settings.cache / "calibration.json" if settings.cache else None)
    paths, notes = _locate(request, named, settings, machine)
    files = {role: _inspect(role, path) for role, path in paths.items() if role in KINDS}
    entry = named or _identify(request, files, catalog)
    lacks = missing(entry, paths, _also(request))
    if lacks:
        flags = ", ".join(f"{flag(role)} FILE" for role in lacks)
        raise CatalogError(
            f"{entry.name} lacks its {', '.join(role.replace('_', ' ') for role in lacks)}",
            f"pass {flags}",
            name=entry.name,
            missing=lacks,
        )
    check_request(request, entry)
    folder = output_folder(request)
    if request.save and request.save.suffix:
        _check_no_folder("save", request.save, "video.mp4")
    if request.preview:
        _check_no_folder("preview", request.preview, "preview.png")
        _free(request.preview.parent, "preview")
    files, widened = _with_room(request, entry, files, settings)
    text = files["text_encoder"]
    tokenizer = _tokenizer(request, paths, text, settings)
    clip_tokenizer, cut_by_clip = None, {}
    if clip := files.get("clip_text"):
        clip_tokenizer = _clip_tokenizer(paths, clip, settings)
        cut_by_clip = _cut(request, ClipTokenizer.from_path(clip_tokenizer), clip.config["num_positions"])
    media = {
        field: tuple(promised.get(path) or _media(field, path, entry) for path in _given(request, field))
        for field in MEDIA_FIELDS
    }
    if request.keep_audio and (heard := request.video or request.pose):
        _check_sound(heard)
    facts = Facts(
        files=files,
        loras=_loras(request, files, settings),
        known_loras=load_loras(),
        tokenizer=tokenizer,
        clip_tokenizer=clip_tokenizer,
        media=media | _spoken(request, settings),
        machine=machine,
        notes=notes + widened,
        cut=_cut(request, load_tokenizer(text.files, tokenizer, text.component), entry.text_len),
        cut_by_clip=cut_by_clip,
        existing=existing_names(folder),
        output_free=_free(folder),
    )
    return entry, facts


# --- which files ---------------------------------------------------------------------------------


def _is_folder(model: str) -> bool:
    return os.sep in model or model.startswith((".", "~")) or Path(model).is_dir()


def _also(request: Request) -> tuple[str, ...]:
    """Roles that this request needs besides those of its model."""
    return () if request.motion_bucket_id is None else ("motion_controller",)


def _locate(
    request: Request, named: CatalogEntry | None, settings: Settings, machine: Machine
) -> tuple[dict[str, Path], tuple[Note, ...]]:
    """Paths by role, and what was chosen: flags win over the folder or the installed files of the named model."""
    roles = (*KINDS, "tokenizer", "clip_tokenizer")
    flags = {role: _here(getattr(request, role), settings) for role in roles if getattr(request, role)}
    for role, path in flags.items():
        if not path.exists():
            raise CatalogError(f"{flag(role)} {path}: no such file", _near(path), name=str(path))
    flags = _with_parts_inside(flags)
    if named is None and not request.model:
        if not flags:
            raise RequestError(
                "no model: neither a name nor files were given",
                "pass --model NAME (see `kinema models`), --model FOLDER, or --dit, --vae and --text-encoder",
                field="model",
                got=None,
            )
        return flags, ()
    if named is None:
        folder = _here(request.model, settings).expanduser()
        if not folder.is_dir():
            raise CatalogError(f"--model {folder}: no such folder", _near(folder), name=str(folder))
        return {**resolve_folder(folder, given=flags), **flags}, ()
    if not missing(named, flags, _also(request)):
        return flags, ()
    chosen = _installed(named, request, settings, Card.of(machine, request.vram, request.ram), flags)
    return {**chosen.files, **flags}, (Note(about="files", text=chosen.note),) if chosen.note else ()


def _with_parts_inside(paths: dict[str, Path]) -> dict[str, Path]:
    """The same paths, and where the DiT's file holds other parts of the model as well, those that were not given."""
    if "dit" not in paths:
        return paths
    held = components_in(paths["dit"])
    inside = {role for role, kinds in KINDS.items() if len(held) > 1 and set(kinds) & set(held)}
    return {**dict.fromkeys(sorted(inside), paths["dit"]), **paths}


def _here(place: Path | str | None, settings: Settings) -> Path:
    """Return a path as given; of an address hf:OWNER/NAME:PATTERN where it was pulled to."""
    source = parse_source(str(place))
    return Path(str(place)) if source is None else fetched(source, Folders.of(settings))


def _installed(entry: CatalogEntry, request: Request, settings: Settings, card: Card, given: Collection[str]) -> Chosen:
    """Return the best installed files of a model for a card; CatalogError says what to pull where some lack."""
    store, folders = load_store(settings.catalogs), Folders.of(settings)
    how = judge(entry, store, card)
    need = Need(card, how) if how else None
    try:
        return find_files(entry, store, folders, need=need, given=given, also=_also(request))
    except CatalogError as error:
        if how is None or "missing" not in error.details:
            raise
        name, files = entry.name, lacking(provide(entry, store, card), error.details["missing"])
        limits = (("vram", card.vram), ("ram", card.ram)) if request.vram or request.ram else ()
        options = "".join(f" --{limit} {amount / 1e9:g}GB" for limit, amount in limits if amount)
        if not files:  # a part that few runs use, of no set
            files = [file for role in error.details["missing"] for file in store.serving(entry.part(role))[:1]]
            name, options = f"ms:{files[0].repository}", ""
        size, names = sum(file.bytes or 0 for file in files) / 1e9, ", ".join(file.name for file in files)
        error.details |= {"pull": name, "files": [f"{file.repository}/{file.path}" for file in files]}
        listed = f"{f'{size:.1f} GB: ' if size else ''}{names}"
        error.hint = f"type: kinema models pull {name}{options}   ({listed})\n{error.hint}"
        raise


def _near(path: Path) -> str:
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    names = sorted(item.name for item in folder.iterdir())[:8] if folder else []
    return f"{folder} holds: {', '.join(names) or 'nothing'}"


def _inspect(role: str, path: Path) -> FileFacts:
    kinds = KINDS[role]
    held = components_in(path)
    facts = inspect(path, next((kind for kind in kinds if kind in held), None))
    if facts.component not in kinds:
        right = flag(next(other for other, its in KINDS.items() if facts.component in its))
        raise RequestError(
            f"{flag(role)} {path} is a {facts.component.replace('_', ' ')} ({facts.structure})",
            f"pass it as {right}, and a {role.replace('_', ' ')} file as {flag(role)}",
            field=role,
            got=str(path),
            allowed=kinds,
        )
    return facts


def _loras(request: Request, files: Mapping[str, FileFacts], settings: Settings) -> tuple[LoraFacts, ...]:
    """What each LoRA of the request is, and how it fits the DiTs. Reads headers only."""
    if not request.lora:
        return ()
    roles = {
        role: parameter_shapes(build(file.component, file.config))
        for role, file in files.items()
        if role in ("dit", "dit_high")
    }
    found = [lora_facts(read_lora(_lora_path(ref, settings)), roles) for ref in request.lora]
    return tuple(facts.model_copy(update={"known": known_lora(facts.files[0])}) for facts in found)


def _check_sound(path: Path) -> None:
    """Raise RequestError where there is no sound to keep: skeletons have none, unless somebody put it there."""
    try:
        audio_facts(path)
    except RequestError as error:
        hint = f"pass --video with the clip that {path.name} was made of, or leave --keep-audio out"
        raise RequestError(error.message, hint, field="keep_audio", got=str(path)) from error


def _with_room(
    request: Request, entry: CatalogEntry, files: dict[str, FileFacts], settings: Settings
) -> tuple[dict[str, FileFacts], tuple[Note, ...]]:
    """The same files, the DiT with room for the channels that a LoRA of this model brings weights for.

    The control LoRAs of FLUX are trained on a transformer whose input was widened by columns of zeros.
    """
    dit, wanted = files["dit"], entry.structure.get("in_channels")
    if entry.family != "flux" or not request.lora or wanted is None or dit.config["in_channels"] >= wanted:
        return files, ()
    for ref in request.lora:
        for change in read_lora(_lora_path(ref, settings)).changes:
            if change.target == "img_in.weight" and change.shape[-1] == 4 * wanted:
                text = f"the input of {dit.path.name} gets columns of zeros for {ref.path.name}, which fills them"
                wide = dit.model_copy(update={"config": {**dit.config, "in_channels": wanted}})
                return {**files, "dit": wide}, (Note(about="lora", text=text),)
    return files, ()


def _lora_path(ref: LoraRef, settings: Settings) -> Path:
    path = _here(ref.path, settings).expanduser()
    found = path if path.exists() else Folders.of(settings).find("loras", str(ref.path))
    if found is None:
        raise CatalogError(
            f"--lora {ref.path}: no such file, neither here nor in a loras folder of the models folders",
            f"{_near(path)}\nwrite --lora {LORA_SYNTAX}",
            name=str(ref.path),
        )
    return found


def _identify(request: Request, files: Mapping[str, FileFacts], catalog: Mapping[str, CatalogEntry]) -> CatalogEntry:
    """The one model these files can be. Which of several a file belongs to is asked for, never guessed."""
    if "dit" not in files:
        raise CatalogError("no DiT file was given or found", "pass --dit FILE, or --model NAME", name="dit")
    alike = matching_entries(files["dit"].config, catalog)
    pairs = [entry for entry in alike if "high" in entry.experts]
    entries = (pairs or alike) if "dit_high" in files else [entry for entry in alike if entry not in pairs]
    if len(entries) > 1 and request.model:
        name = Path(request.model).expanduser().resolve().name.casefold()
        entries = [e for e in entries if name in {r.split("/")[-1].casefold() for r in e.repositories}] or entries
    if entries and not request.model and "dit_high" not in files:
        entries = [*entries, *pairs]  # one file may be half of a pair
    if len(entries) == 1:
        return entries[0]
    if not entries and pairs:
        names = " or ".join(entry.name for entry in pairs)
        raise CatalogError(
            f"{files['dit'].path} is one expert of {names}; the other one is not given",
            "pass --dit LOW_NOISE_FILE --dit-high HIGH_NOISE_FILE",
            name=str(files["dit"].path),
            missing=["dit_high"],
        )
    if not entries:
        known = ", ".join(entry.name for entry in catalog.values())
        raise CatalogError(
            f"{files['dit'].path} ({files['dit'].structure}) is none of: {known}",
            "name the model it belongs to with --model NAME",
            name=str(files["dit"].path),
        )
    raise RequestError(
        f"{files['dit'].path} may be {' or '.join(entry.name for entry in entries)}: the file itself does not say",
        f"pass --model {entries[0].name}" + "".join(f" or --model {entry.name}" for entry in entries[1:]),
        field="model",
        got=None,
        allowed=[entry.name for entry in entries],
    )


def _tokenizer(request: Request, paths: Mapping[str, Path], encoder: FileFacts, settings: Settings) -> Path | None:
    """The tokenizer's path, or None where the text encoder's file holds it."""
    part = "t5-xxl" if encoder.component == "t5" else "umt5-xxl"
    if request.tokenizer:
        place = paths["tokenizer"]
        named = find_tokenizer(place) if place.is_dir() else place
        if named is None or named.suffix not in (".model", ".json"):
            raise CatalogError(
                f"--tokenizer {request.tokenizer} is no {part} tokenizer: spiece.model, tokenizer.json or their folder",
                "leave it out: `kinema models pull` brings one with the text encoder",
                name=str(request.tokenizer),
            )
        return named
    if encoder.has_tokenizer:
        return None
    return paths.get("tokenizer") or _tokenizer_file(encoder.path, part, settings)


def _clip_tokenizer(paths: Mapping[str, Path], encoder: FileFacts, settings: Settings) -> Path:
    """The path of CLIP's tokenizer, which no encoder's file holds."""
    named = paths.get("clip_tokenizer")
    if named is None:
        return _tokenizer_file(encoder.path, "clip-l", settings)
    if found := find_tokenizer(named, (), *TOKENIZERS["clip-l"]):
        return found
    raise CatalogError(
        f"--clip-tokenizer {named} holds no CLIP tokenizer (vocab.json with merges.txt, or tokenizer.json)",
        "take the folder tokenizer of FLUX.1, or leave it out: `kinema models pull flux.1-dev` brings one",
        name="clip_tokenizer",
    )


TOKENIZERS = {
    "umt5-xxl": (TOKENIZER_FOLDERS, TOKENIZER_FILES),
    "t5-xxl": (T5_FOLDERS, TOKENIZER_FILES),
    "clip-l": (CLIP_FOLDERS, CLIP_FILES),
}
"""Part of the catalog -> folders its tokenizer is known to lie in, and what it may be called."""


def _tokenizer_file(encoder: Path, part: str, settings: Settings) -> Path:
    """A text encoder's tokenizer: near its file, in a models folder, or where the catalog has it pulled to."""
    store, folders = load_store(settings.catalogs), Folders.of(settings)
    names, files = TOKENIZERS[part]
    if found := find_tokenizer(encoder, folders.roots, names, files):
        return found
    rows = (row for row in store.serving(part) if row.role in ("tokenizer", "clip_tokenizer"))
    for place in filter(None, map(folders.locate, rows)):
        if found := find_tokenizer(place, files=files):
            return found
    row = tokenizer_of(part, store)
    name = f"{row.repository}/{row.path}".rstrip("/")
    field = "clip_tokenizer" if part == "clip-l" else "tokenizer"
    raise CatalogError(
        f"{encoder} holds no tokenizer, and none lies in {', '.join(map(str, (encoder.parent, *folders.roots)))}",
        f"type: kinema models pull {name}\nor pass {flag(field)} PATH: {' or '.join(files)}",
        name=field,
        pull=name,
    )


def _cut(request: Request, tokenizer: Tokenizer | ClipTokenizer, text_len: int) -> dict[str, int]:
    """Tokens of the user's texts that an encoder will not read, by field; none of the fields that fit."""
    texts = {"prompt": request.prompt or "", "negative": request.negative or ""}
    cut = {field: tokenizer.encode(text, text_len).cut for field, text in texts.items()}
    return {field: count for field, count in cut.items() if count}


# --- inputs and outputs --------------------------------------------------------------------------


def _given(request: Request, field: str) -> Iterable[Path]:
    value = getattr(request, field)
    if field == "camera" and value and is_pose_file(value):
        return (Path(value),)
    if field == "middle":
        return tuple(split_place(text)[0] for text in value)
    if not value or isinstance(value, str):
        return ()
    return value if isinstance(value, tuple) else (value,)


def _media(field: str, path: Path, entry: CatalogEntry) -> MediaFacts:
    still = field in IMAGE_FIELDS or entry.family == "flux"
    if not path.is_file() and (still or not path.is_dir()):
        raise RequestError(f"{flag(field)} {path}: no such file", _near(path), field=field, got=str(path))
    if field == "camera":
        return pose_facts(path)
    if field == "audio":
        return audio_facts(path)
    if field == "first" and path.suffix.lower() in VIDEO_SUFFIXES:
        return probe(path)
    return read_image(path)[1] if still else probe(path)


def _spoken(request: Request, settings: Settings) -> dict[str, tuple[MediaFacts, ...]]:
    """The sound of `speech_text`, asked of a service the first time and kept: the one place that uses a network."""
    if not request.speech_text or not request.speech_url:
        return {}
    folder = settings.cache / "speech" if settings.cache else output_folder(request)
    key = settings.speech_key.get_secret_value() if settings.speech_key else None
    voice, model = request.speech_voice or "alloy", request.speech_model or "tts-1"
    return {"audio": (audio_facts(speak(request.speech_text, request.speech_url, voice, model, folder, key)),)}


def existing_names(folder: Path) -> frozenset[str]:
    """Return the names in a folder; none where it is not there yet."""
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def _check_no_folder(field: str, file: Path, name: str) -> None:
    if file.is_dir():
        raise RequestError(
            f"{field} {file} is a folder, and looks like a file name",
            f"pass --{field} {file / name}",
            field=field,
            got=str(file),
        )


def _free(folder: Path, field: str = "save") -> int:
    """Free bytes where outputs go; RequestError for a folder that cannot be written."""
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    fault = "is a file, not a folder" if not place.is_dir() else "cannot be written to"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise RequestError(
            f"{field} {folder}: {place} {fault}", f"pass --{field} another place", field=field, got=str(folder)
        )
    return shutil.disk_usage(place).free
