"""Where model files are looked for: ComfyUI's folders and extra_model_paths.yaml, repository folders, the hub's cache.

Owns the order of search; opens no model file. Source of the rules: Comfy-Org/ComfyUI folder_paths.py and
utils/extra_config.py; the cache's layout: huggingface_hub, "Understand caching".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kinema.catalog.files import CatalogFile
from kinema.errors import CatalogError, RequestError
from kinema.schema import Settings

KEYS: dict[str, tuple[str, ...]] = {
    "diffusion_models": ("unet", "diffusion_models"),
    "text_encoders": ("text_encoders", "clip"),
    "controlnet": ("controlnet", "t2i_adapter"),
    **{
        name: (name,)
        for name in (
            "checkpoints", "loras", "vae", "clip_vision", "style_models", "embeddings", "vae_approx", "gligen",
            "upscale_models", "hypernetworks", "photomaker", "classifiers", "model_patches", "audio_encoders",
        )
    },
}  # fmt: skip
"""ComfyUI's folder key -> directories below models/, in order of search."""

OLD_KEYS = {"unet": "diffusion_models", "clip": "text_encoders"}
SAVED_KEYS = {"checkpoints": "checkpoints", "clip": "text_encoders", "vae": "vae", "loras": "loras"}
SAVED_KEYS |= {"diffusion_models": "diffusion_models"}
"""Folders below output/ that ComfyUI searches last: models it saved itself."""

EXTENSIONS = frozenset((".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"))
"""What ComfyUI lists under its own keys. GGUF files have keys of their own there, and are listed here where asked."""

YAML = "extra_model_paths.yaml"


@dataclass(frozen=True)
class Folders:
    """Everything that is searched, in order.

    roots      models folders, for ComfyUI's folders and for folders named as a repository.
    by_key     ComfyUI's folder key -> directories.
    caches     hub caches of huggingface_hub.
    """

    roots: tuple[Path, ...]
    by_key: Mapping[str, tuple[Path, ...]]
    caches: tuple[Path, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Folders:
        by_key = settings.folders or comfy_folders(settings.models, settings.extra_model_paths)
        return cls(tuple(models_folder(root)[0] for root in settings.models), by_key, settings.hub_caches)

    def find(self, key: str, name: str) -> Path | None:
        """Return what ComfyUI loads for `name` of a folder key: the first directory that has it wins."""
        inside = os.path.relpath(os.path.join("/", name), "/")  # so that no name leads out of its folder
        places = (folder / inside for folder in self.by_key.get(OLD_KEYS.get(key, key), ()))
        return next((place for place in places if place.is_file()), None)

    def names(self, key: str, also: Sequence[str] = ()) -> list[str]:
        """Return what ComfyUI lists for a folder key: the sorted union. `also`: further extensions."""
        key = OLD_KEYS.get(key, key)
        allowed = EXTENSIONS | frozenset(also) if key in KEYS else None
        folders = self.by_key.get(key, ())
        names = {name for folder in folders for name in _names(folder)}
        return sorted(name for name in names if allowed is None or os.path.splitext(name)[1].lower() in allowed)

    def locate(self, file: CatalogFile) -> Path | None:
        """Return where a catalog file lies, None where it is not installed.

        Shards count only when all are there, a folder only when there is a file in it.
        """
        for place in self._places(file):
            if file.path.endswith("/"):
                found = place.is_dir() and any(path.is_file() for path in place.iterdir())
            else:
                found = all((place.parent / path.rpartition("/")[2]).is_file() for path in file.paths)
            if found:
                return place
        return None

    def _places(self, file: CatalogFile) -> Iterator[Path]:
        if file.folder:
            key = OLD_KEYS.get(file.folder, file.folder)
            for folder in self.by_key.get(key) or [root / file.folder for root in self.roots]:
                yield folder / file.name
                yield from self._deeper.get(folder, {}).get(file.name, ())
        yield from self.in_repository(file.repository, file.path)

    def in_repository(self, repository: str, path: str = "") -> Iterator[Path]:
        """Yield where a file of a repository may lie: folders named as it, then snapshots of the hub's cache."""
        if not repository:
            return
        for root in self.roots:
            yield root / repository / path
            yield root / repository.rsplit("/", 1)[-1] / path
        for cache in self.caches:
            yield from (snapshot / path for snapshot in _snapshots(cache / f"models--{repository.replace('/', '--')}"))

    @cached_property
    def _deeper(self) -> dict[Path, dict[str, list[Path]]]:
        """Files in sub-folders of ComfyUI's folders, by file name: publishers' own folders are often kept."""
        found: dict[Path, dict[str, list[Path]]] = {}
        for folder in {folder for folders in self.by_key.values() for folder in folders}:
            for name in sorted(name for name in _names(folder) if os.sep in name):
                found.setdefault(folder, {}).setdefault(os.path.basename(name), []).append(folder / name)
        return found


def comfy_folders(
    roots: Sequence[Path], extra: Sequence[Path] = (), variables: Mapping[str, str] | None = None
) -> dict[str, tuple[Path, ...]]:
    """Return the directories of every folder key, those of the first root first.

    roots      models folders, or folders of ComfyUI itself, whose extra_model_paths.yaml is read too.
    extra      further such files; their paths come after all roots, unless a section says is_default.
    variables  what $NAME in a base_path stands for.
    """
    found: dict[str, list[Path]] = {}
    for root in roots:
        models, comfy = models_folder(root)
        own = {key: [models / name for name in names] for key, names in KEYS.items()}
        if comfy is not None:
            if (comfy / YAML).is_file():
                _add_yaml(own, comfy / YAML, variables or {})
            for name, key in SAVED_KEYS.items():
                own[key].append(comfy / "output" / name)
        for key, folders in own.items():
            found.setdefault(key, []).extend(folder for folder in folders if folder not in found.get(key, ()))
    for file in extra:
        _add_yaml(found, file, variables or {})
    return {key: tuple(folders) for key, folders in found.items()}


def models_folder(root: Path) -> tuple[Path, Path | None]:
    """Return (models folder, ComfyUI's own folder or None) of a root that may be either."""
    if _is_comfy(root):
        return root / "models", root
    return root, root.parent if root.name == "models" and _is_comfy(root.parent) else None


def store_root(settings: Settings, to: Path | None = None) -> Path:
    """Return the models folder that files are pulled to: `to`, that of the settings, or the first that is searched."""
    root = to or settings.store or next(iter(settings.models), None)
    if root is None:
        raise RequestError("no models folder is set", "pass --to FOLDER", field="to", got=None)
    return models_folder(root)[0]


def _is_comfy(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (YAML, "folder_paths.py")) and (folder / "models").is_dir()


def _add_yaml(found: dict[str, list[Path]], file: Path, variables: Mapping[str, str]) -> None:
    """Add the directories of one extra_model_paths.yaml, in ComfyUI's order.

    A section's paths come last, or each at the front where is_default is set, so that of several lines the last
    ends first. A path that is there already moves only to the front.
    """
    for section in _sections(file):
        base = section.pop("base_path", None)
        folder = Path(_expand(str(base), variables)) if base else None
        if folder is not None and not folder.is_absolute():
            folder = file.absolute().parent / folder
        is_default = bool(section.pop("is_default", False))
        for key, value in section.items():
            folders = found.setdefault(OLD_KEYS.get(key, key), [])
            for line in filter(None, str(value).split("\n")):
                path = Path(os.path.normpath((folder or file.absolute().parent) / line))
                if is_default and path in folders:
                    folders.remove(path)
                if is_default:
                    folders.insert(0, path)
                elif path not in folders:
                    folders.append(path)


def _sections(file: Path) -> list[dict[str, Any]]:
    import yaml  # only where such a file exists

    try:
        table = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CatalogError(f"{file} cannot be read: {error}", "mend it, or move it away", name=str(file)) from error
    sections = list(table.values()) if isinstance(table, dict) else [table]
    if not all(section is None or isinstance(section, dict) for section in sections):
        raise CatalogError(
            f"{file} is not made of named sections", "see ComfyUI's extra_model_paths.yaml.example", name=str(file)
        )
    return [dict(section) for section in sections if section]


def _expand(path: str, variables: Mapping[str, str]) -> str:
    """Expand ~, $NAME and ${NAME}; a name that is not set stays as it is, as in a shell script of the same words."""
    path = os.path.expanduser(path)
    return re.sub(r"\$(?:(\w+)|\{([^}]*)\})", lambda m: variables.get(m[1] or m[2], m[0]), path)


def _names(folder: Path) -> Iterator[str]:
    seen: set[str] = set()  # a link may lead back to a folder above it
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name not in (".git", ".kinema", ".cache")]
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in files)


def _snapshots(folder: Path) -> list[Path]:
    """Return the snapshots of a cached repository: that of its main branch first, then the newest."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return []
    main = folder / "refs" / "main"
    first = main.read_text().strip() if main.is_file() else ""
    return sorted(
        (path for path in snapshots.iterdir() if path.is_dir()),
        key=lambda path: (path.name != first, -path.stat().st_mtime),
    )
