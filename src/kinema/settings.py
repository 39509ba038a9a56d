"""Where a client finds its settings: flag, environment, configuration file, default, in this order.

Owns the configuration file and the names of the environment variables; the environment itself is passed in,
so that only the command line reads it. Every Request field can be set in each of the four places.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import SecretStr

from kinema.catalog.folders import YAML, comfy_folders, models_folder
from kinema.errors import RequestError
from kinema.request import make_request, merge, nearest
from kinema.schema import Hub, Note, Request, Settings

PREFIX = "KINEMA_"
PLACES = {
    "models": ("KINEMA_MODELS", "--models-dir", "folders searched for model files, in order"),
    "extra_model_paths": (
        "KINEMA_EXTRA_MODEL_PATHS",
        "--extra-model-paths",
        "further extra_model_paths.yaml files of ComfyUI",
    ),
    "catalogs": ("KINEMA_CATALOGS", "--catalog", "further catalog files (TOML)"),
    "cache": ("KINEMA_CACHE", "--cache-dir", "folder of file hashes and of this machine's measured speed"),
}
"""Settings that are no Request field: key of the configuration file -> (environment variable, flag, meaning)."""

CONFIG_VARIABLE = "KINEMA_CONFIG"
SPEECH_KEY_VARIABLE = "KINEMA_SPEECH_KEY"
"""Of the service that speaks `speech_text`. No file and no flag: a key belongs in neither."""

PROBES = (
    Path("/workspace/models"),
    Path("/runpod-volume/models"),
    Path("/runpod-volume"),
    Path("/workspace/ComfyUI"),
    Path("/workspace/runpod-slim/ComfyUI"),
)
"""Where rented machines keep models: searched where no models folder is named and one is there."""


@dataclass(frozen=True)
class Configuration:
    """What environment and configuration file say, before any flag of the request itself.

    defaults  Request fields; `sources` says where each, and each of the settings, came from.
    file      the configuration file that was read, None where there is none.
    """

    settings: Settings
    defaults: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    notes: tuple[Note, ...] = ()


def default_config_path() -> Path:
    """Return where the configuration file is looked for unless KINEMA_CONFIG or --config names one."""
    return platformdirs.user_config_path("kinema") / "config.toml"


def default_settings() -> Settings:
    """Return the folders used where nothing else is said: ./models, those of rented machines, the user's data folder.

    Files are pulled to the first of those machines' folders, else to the user's data folder.
    """
    own = platformdirs.user_data_path("kinema") / "models"
    probed = tuple(folder for folder in PROBES if _holds_models(folder))
    return Settings(
        models=(Path("models"), *probed, own),
        store=probed[0] if probed else own,
        cache=platformdirs.user_cache_path("kinema"),
        **_hub_places({}),
    )


def _holds_models(folder: Path) -> bool:
    """A folder called models, ComfyUI's own, or one with ComfyUI's folders in it."""
    names = ("models", "diffusion_models", "unet", "checkpoints")
    return folder.is_dir() and (folder.name == "models" or any((folder / name).is_dir() for name in names))


def configure(
    environment: Mapping[str, str],
    *,
    config: Path | None = None,
    models: Sequence[Path] = (),
    extra_model_paths: Sequence[Path] = (),
    catalogs: Sequence[Path] = (),
    cache: Path | None = None,
) -> Configuration:
    """Return settings and request defaults; the keyword arguments are flags and win.

    Raises RequestError for a configuration file that is named but missing, is not TOML, or holds a key or
    value that means nothing, and for folders and catalogs that were named and do not exist.
    """
    path = _config_path(environment, config)
    table = _read_config(path) if path else {}
    values: dict[str, Any] = default_settings().model_dump()
    sources = dict.fromkeys(PLACES, "default")
    flags = {
        "models": tuple(models),
        "extra_model_paths": tuple(extra_model_paths),
        "catalogs": tuple(catalogs),
        "cache": cache,
    }
    for layer, source in (
        (_file_places(table, path), f"configuration file {path}"),
        (_environment_places(environment), "environment"),
        (flags, "flag"),
    ):
        for name in (name for name, value in layer.items() if value):
            values[name] = layer[name]
            sources[name] = source if source != "environment" else f"environment {PLACES[name][0]}"
    if sources["models"] != "default":
        values["store"] = values["models"][0]
    key = environment.get(SPEECH_KEY_VARIABLE)
    values |= _hub_places(environment) | {"speech_key": SecretStr(key) if key else None}
    settings = Settings(**values)
    _check_places(settings, sources)
    settings = settings.model_copy(update={"folders": _folders(settings, environment)})
    defaults, field_sources, notes = _defaults(environment, table, path)
    return Configuration(settings, defaults, sources | field_sources, path, notes)


def variable(name: str) -> str:
    """Return the environment variable of a Request field: guidance_high -> KINEMA_GUIDANCE_HIGH."""
    return PREFIX + name.upper()


# --- configuration file ----------------------------------------------------------------------------


def _config_path(environment: Mapping[str, str], config: Path | None) -> Path | None:
    named = config or (Path(environment[CONFIG_VARIABLE]) if environment.get(CONFIG_VARIABLE) else None)
    if named is None:
        return default_config_path() if default_config_path().is_file() else None
    if not named.exists() or named.is_dir():
        where = "--config" if config else CONFIG_VARIABLE
        fault = "is a folder" if named.is_dir() else "does not exist"
        raise RequestError(
            f"configuration file {named} (from {where}) {fault}",
            f"pass --config FILE.toml, or leave out {where}",
            field="config",
            got=str(named),
        )
    return named


def _read_config(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(
            f"configuration file {path} cannot be read: {error.strerror}", field="config", got=str(path)
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(
            f"configuration file {path} is not TOML: {error}",
            'a line looks like: models = ["/data/models"]',
            field="config",
            got=str(path),
        ) from error
    known = (*PLACES, "defaults")
    for key in table:
        if key not in known:
            raise _unknown_key(key, known, path)
    if not isinstance(table.get("defaults", {}), dict):
        raise RequestError(
            f"{path}: defaults is not a table", "write [defaults] on a line of its own", field="defaults"
        )
    return table


def _unknown_key(key: str, known: Sequence[str], path: Path) -> RequestError:
    near = nearest(key, known)
    if near is None and key in Request.model_fields:
        return RequestError(
            f"{path}: {key!r} stands outside [defaults]",
            "move it below a line [defaults]",
            field=key,
            got=key,
            allowed=list(known),
        )
    return RequestError(
        f"{path}: unknown key {key!r}" + (f"; did you mean {near!r}?" if near else ""),
        "allowed: " + ", ".join(known),
        field=key,
        got=key,
        allowed=list(known),
    )


def _file_places(table: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """Return the settings of the file; relative paths count from the file's own folder."""
    if path is None:
        return {}
    found: dict[str, Any] = {}
    for name in PLACES:
        value = table.get(name)
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) and item for item in items) or (name == "cache" and len(items) != 1):
            wanted = "one path" if name == "cache" else "a list of paths"
            raise RequestError(
                f"{path}: {name} is {value!r}, not {wanted}",
                f'write {name} = "/data/cache"' if name == "cache" else f'write {name} = ["/data/{name}"]',
                field=name,
                got=value,
                allowed=wanted,
            )
        paths = tuple(path.parent / Path(item).expanduser() for item in items)
        found[name] = paths[0] if name == "cache" else paths
    return found


# --- environment -----------------------------------------------------------------------------------


def _environment_places(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (key, _, _) in PLACES.items():
        if not environment.get(key):
            continue
        parts = [environment[key]] if name == "cache" else environment[key].split(os.pathsep)
        paths = tuple(Path(part).expanduser() for part in parts if part)
        found[name] = paths[0] if name == "cache" else paths
    return found


def _hub_places(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return hub and cache as the variables of huggingface_hub and modelscope set them."""
    cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = Path(environment.get("HF_HOME") or Path(cache) / "huggingface").expanduser()
    token = environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN")
    named = {
        "endpoint": environment.get("HF_ENDPOINT", "").rstrip("/"),
        "modelscope": environment.get("MODELSCOPE_ENDPOINT", "").rstrip("/"),
        "token": SecretStr(token) if token else None,
    }
    hub = Hub(token_file=Path(environment.get("HF_TOKEN_PATH") or home / "token").expanduser())
    hub = hub.model_copy(update={name: value for name, value in named.items() if value})
    return {"hub": hub, "hub_caches": (Path(environment.get("HF_HUB_CACHE") or home / "hub").expanduser(),)}


def _folders(settings: Settings, environment: Mapping[str, str]) -> dict[str, tuple[Path, ...]]:
    """Return ComfyUI's directories where an extra_model_paths.yaml changes them; {} without one."""
    owners = [models_folder(root)[1] for root in settings.models]
    if not settings.extra_model_paths and not any(owner and (owner / YAML).is_file() for owner in owners):
        return {}
    return comfy_folders(settings.models, settings.extra_model_paths, environment)


def _check_places(settings: Settings, sources: Mapping[str, str]) -> None:
    for folder in settings.models:
        if not folder.is_dir() and sources["models"] != "default":
            fault = "is a file" if folder.exists() else "does not exist"
            raise RequestError(
                f"models folder {folder} (from {sources['models']}) {fault}",
                "name a folder that holds model files; a model itself is named with --model",
                field="models",
                got=str(folder),
            )
    for name, what, hint in (
        ("extra_model_paths", "file", "name an extra_model_paths.yaml of ComfyUI"),
        ("catalogs", "catalog file", "name a TOML file of models"),
    ):
        for path in getattr(settings, name):
            if not path.is_file():
                fault = f"{what} {path} (from {sources[name]}) does not exist"
                raise RequestError(fault, hint, field=name, got=str(path))


def _defaults(
    environment: Mapping[str, str], table: Mapping[str, Any], path: Path | None
) -> tuple[dict[str, Any], dict[str, str], tuple[Note, ...]]:
    """Return Request fields of file and environment, where each came from, and notes on variables nobody reads."""
    from_file = {key.replace("-", "_"): value for key, value in table.get("defaults", {}).items()}
    make_request(from_file, f"{path} [defaults]: ")
    from_environment = {
        name: environment[variable(name)] for name in Request.model_fields if environment.get(variable(name))
    }
    make_request(from_environment, "environment KINEMA_*: ")
    sources = dict.fromkeys(from_file, f"configuration file {path}")
    sources |= {name: f"environment {variable(name)}" for name in from_environment}
    own = {CONFIG_VARIABLE, SPEECH_KEY_VARIABLE}
    known = own | {*(key for key, _, _ in PLACES.values()), *map(variable, Request.model_fields)}
    notes = []
    for key in sorted(key for key in environment if key.startswith(PREFIX) and key not in known):
        near = nearest(key, known)
        notes.append(
            Note(about=key, text=f"Kinema reads no variable {key}" + (f"; did you mean {near}?" if near else ""))
        )
    return merge(from_file, from_environment), sources, tuple(notes)
