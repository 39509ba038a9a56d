"""What this machine has and what it lacks; nothing optional that is missing is a failure."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kinema.cli.tell import gigabytes
from kinema.schema import Settings
from kinema.settings import Configuration, default_config_path
from kinema.version import VERSION

LIBRARIES = ("torch", "numpy", "safetensors", "transformers", "sentencepiece", "ftfy", "av", "pillow", "pydantic")

EXTRAS = {
    "flash_attn": "attention on CUDA cards, often faster than torch's own at long videos",
    "sageattention": "8-bit attention on CUDA cards: faster, slightly different pictures",
    "onnxruntime": "poses and skeletons: kinema drive, kinema control pose",
    "triton": "what sageattention's kernels are compiled with",
}
"""Import name of each optional package -> what it would change. Plain torch always works."""

CODECS = {"libx264": "mp4", "libvpx-vp9": "webm", "gif": "gif", "libwebp_anim": "animated webp", "png": "png"}
"""Encoder that PyAV must offer -> the output that needs it."""


def examine(configuration: Configuration) -> tuple[str, dict[str, Any]]:
    """Return what was found, as a page and as data."""
    found: dict[str, Any] = {
        "kinema": VERSION,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "libraries": {name: _version(name) for name in LIBRARIES},
        "devices": _devices(),
        "attention": _attention(),
        "codecs": _codecs(),
        "memory": _memory(),
        "disk": _disk(configuration.settings),
        "encoded texts": _texts(configuration.settings),
        "settings": _settings(configuration),
        "extras": {name: _extra(name, change) for name, change in EXTRAS.items()},
        "notes": [note.text for note in configuration.notes],
    }
    return _page(found), found


def _page(found: Mapping[str, Any]) -> str:
    lines = []
    for section, content in found.items():
        if isinstance(content, dict):
            lines += [section, *(f"  {name:<16} {value}" for name, value in content.items())]
        elif isinstance(content, list):
            lines += [f"{section[:-1]}: {item}" for item in content]
        else:
            lines.append(f"{section:<10} {content}")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing: reinstall kinema"


def _devices() -> dict[str, str]:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    built = f"ROCm {torch.version.hip}" if torch.version.hip else built
    found = {
        "cpu": f"{os.cpu_count()} cores, torch computes with {torch.get_num_threads()}; torch is built with {built}"
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            found[f"cuda:{index}"] = f"{name}, {gigabytes(free)} of {gigabytes(total)} free, capability {major}.{minor}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def _attention() -> dict[str, str]:
    import torch

    from kinema.runtime.attention import available

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        name: f"works on {device}" if reason is None else f"no: {reason}" for name, reason in available(device).items()
    }


def _codecs() -> dict[str, str]:
    import av

    return {
        name: f"yes, writes {output}" if name in av.codecs_available else f"missing: no {output} output"
        for name, output in CODECS.items()
    }


def _memory() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    return {"free": gigabytes(memory.available), "total": gigabytes(memory.total)}


def _disk(settings: Settings) -> dict[str, str]:
    places = {"here": Path.cwd(), "cache": settings.cache, **{str(folder): folder for folder in settings.models}}
    return {name: f"{gigabytes(_free(path))} free" for name, path in places.items() if path is not None}


def _texts(settings: Settings) -> str:
    from kinema.text_cache import LIMIT, TextCache

    if settings.cache is None:
        return "kept in memory only"
    cache = TextCache.within(settings.cache)
    count, size = cache.size()
    return f"{count}, {size / 1e6:.0f} of {LIMIT / 1e6:.0f} MB, in {cache.folder}: may be deleted at any time"


def _free(path: Path) -> int:
    absolute = path.absolute()
    place = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
    return shutil.disk_usage(place).free


def _settings(configuration: Configuration) -> dict[str, str]:
    settings, sources = configuration.settings, configuration.sources
    there = [f"{folder}{'' if folder.is_dir() else ' (not there)'}" for folder in settings.models]
    found = {
        "configuration": str(configuration.file or f"none; would be {default_config_path()}"),
        "models": f"{', '.join(there) or 'none'} ({sources['models']})",
        "catalogs": f"{', '.join(map(str, settings.catalogs)) or 'none'} ({sources['catalogs']})",
        "cache": f"{settings.cache} ({sources['cache']})",
    }
    return found | {name: f"{value} ({sources[name]})" for name, value in configuration.defaults.items()}


def _extra(name: str, change: str) -> str:
    there = name in sys.modules or importlib.util.find_spec(name) is not None
    return f"there: {change}" if there else f"not installed; would change: {change}"
