"""Small files, whole or not at all: a temporary name in the same folder, synced, then renamed."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from kinema.errors import OutputError


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing it at once. Raises OutputError; nothing partial is left."""
    temporary = path.parent / f".{secrets.token_hex(6)}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error.strerror or error) from error


def unwritable(path: Path, why: object) -> OutputError:
    return OutputError(
        f"{path} could not be written: {why}",
        f"check that {path.parent} exists, can be written to and has room",
        path=str(path),
    )
