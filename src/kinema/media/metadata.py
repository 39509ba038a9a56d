"""Text that travels inside an output file: the plan that made it, so that the file can be replayed.

Owns where each container keeps its text. PNG has one text chunk a key; the others have one slot (the
comment tag of mp4 and webm, the comment block of gif, Exif ImageDescription of webp), which holds the
JSON object of all keys, in ASCII. Knows nothing of what the text means.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import av
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from kinema.errors import RequestError

EXIF_IMAGE_DESCRIPTION = 0x010E


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata `video.write` put into `path`, {} where there is none.

    path  mp4, webm, gif, webp or png file, or a folder of png frames (whose first frame is read).

    Text of other programs comes back under "comment". Raises RequestError for what is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = min(path.glob("frame_*.png"), default=path / "frame_0001.png")
    try:
        with path.open("rb") as file:
            head = file.read(12)
        if head.startswith(b"\x89PNG"):
            with Image.open(path) as image:
                return {key: str(value) for key, value in getattr(image, "text", {}).items()}
        if head.startswith(b"GIF8"):
            return _unpack(_gif_comment(path))
        if head[:4] == b"RIFF" and head[8:] == b"WEBP":
            with Image.open(path) as image:
                return _unpack(image.getexif().get(EXIF_IMAGE_DESCRIPTION, ""))
        with av.open(str(path.resolve())) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
            return _unpack(tags.get("comment", ""))
    except (OSError, av.FFmpegError, UnidentifiedImageError, struct.error, IndexError) as error:
        raise RequestError(
            f"{path} cannot be read as mp4, webm, gif, webp or png: {error}",
            "give a file that kinema wrote",
            field="path",
            got=str(path),
        ) from error


def pack(metadata: Mapping[str, str]) -> str:
    """Return the text of a one-slot container."""
    return json.dumps(dict(metadata))


def png_text(metadata: Mapping[str, str]) -> PngInfo:
    """Return PNG chunks: tEXt, or iTXt where Latin-1 does not reach."""
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_text(key, value)
    return chunks


def webp_exif(metadata: Mapping[str, str]) -> bytes:
    """Return Exif data, as TIFF without the JPEG prefix."""
    exif = Image.Exif()
    exif[EXIF_IMAGE_DESCRIPTION] = pack(metadata)
    return exif.tobytes().removeprefix(b"Exif\x00\x00")


def add_gif_comment(path: Path, metadata: Mapping[str, str]) -> None:
    """Put a comment block before the trailer of a finished GIF. Source: GIF89a specification, section 24."""
    text = pack(metadata).encode("ascii")
    with path.open("r+b") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\x3b":
            raise OSError("the animation was cut short")
        file.seek(-1, 2)
        file.write(b"\x21\xfe")
        for start in range(0, len(text), 255):
            part = text[start : start + 255]
            file.write(bytes([len(part)]) + part)
        file.write(b"\x00\x3b")


def _unpack(text: str | bytes) -> dict[str, str]:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        return {"comment": text}
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        return found
    return {"comment": text}


def _gif_comment(path: Path) -> bytes:
    """Walk the blocks of a GIF and return the text of its last comment."""
    comment = b""
    with path.open("rb") as file:
        flags = file.read(13)[10]
        file.seek(_colour_table(flags), 1)
        while (kind := file.read(1)) in (b"\x21", b"\x2c"):
            if kind == b"\x21":
                label = file.read(1)
                data = b"".join(_sub_blocks(file))
                comment = data if label == b"\xfe" else comment
            else:
                file.seek(_colour_table(file.read(9)[8]) + 1, 1)
                for _ in _sub_blocks(file):
                    pass
    return comment


def _colour_table(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _sub_blocks(file: BinaryIO) -> Iterator[bytes]:
    while size := file.read(1)[0]:
        yield file.read(size)
