"""Addresses of any repository, as people type them: hf:owner/name:pattern and ms:owner/name."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kinema.catalog.folders import Folders
from kinema.errors import CatalogError

HubName = Literal["hf", "ms"]


@dataclass(frozen=True)
class Source:
    """Files of any repository: hf:owner/name, ms:owner/name, both with :pattern."""

    hub: HubName
    repository: str
    pattern: str = "*"


def parse_source(text: str) -> Source | None:
    """Return what `hf:owner/name:pattern` names; None for text that is no such address."""
    match = re.fullmatch(r"(hf|ms):([\w.-]+/[\w.-]+)(?::(.+))?", text)
    if match is None:
        if text.startswith(("hf:", "ms:")):
            raise CatalogError(
                f"{text!r} names no repository", "write hf:owner/name or hf:owner/name:pattern", name=text
            )
        return None
    return Source("hf" if match[1] == "hf" else "ms", match[2], match[3] or "*")


def fetched(source: Source, folders: Folders) -> Path:
    """Return where a repository lies, or the one file in it that the pattern names; CatalogError where it does not."""
    for folder in folders.in_repository(source.repository):
        if not folder.is_dir():
            continue
        if source.pattern == "*":
            return folder
        paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
        names = (path.as_posix() for path in paths if ".kinema" not in path.parts)
        found = [name for name in names if fnmatch.fnmatchcase(name, source.pattern)]
        if len(found) > 1:
            raise CatalogError(
                f"{source.pattern!r} names {len(found)} files of {folder}: {', '.join(found[:6])}",
                "write a pattern that names one",
                name=source.pattern,
            )
        if found:
            return folder / found[0]
    address = f"{source.hub}:{source.repository}" + ("" if source.pattern == "*" else f":{source.pattern}")
    raise CatalogError(f"{address} is not here yet", f"type: kinema models pull {address}", name=address, pull=address)
