"""Files of many requests -> Lines: prompt lines, JSON lines, CSV, a folder of images.

Reading goes on after a bad line: each Line holds its request or its fault.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.batch.lines import parse_line
from kinema.errors import KinemaError, RequestError
from kinema.request import REPEATED, make_request, merge, nearest
from kinema.schema import Request

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LIST_SEPARATOR = ";"
"""Between several values of one CSV cell."""


@dataclass(frozen=True)
class Line:
    """One request of a batch, or why it is none.

    number  counts from 1: the line of the file (of a CSV the row's first line, of a folder the image in order).
    where   how messages name it, such as "line 3", or the image's own name.
    """

    number: int
    where: str
    request: Request | None = None
    fault: KinemaError | None = None


def read_lines(path: Path, defaults: Mapping[str, Any]) -> list[Line]:
    """Return the requests of a file or folder, each over `defaults` (fields of Request).

    Raises RequestError where the file as a whole cannot be a batch: missing, empty, of another kind, not UTF-8.
    """
    read = _folder_rows(path, defaults) if path.is_dir() else _reader(path)(_read_text(path), defaults)
    rows = list(read)
    if not rows:
        wanted = "images" if path.is_dir() else "requests"
        raise RequestError(
            f"{path} holds no {wanted}", "see `kinema generate --help` on --from-file", field="from_file", got=str(path)
        )
    return [_line(number, where, fields, defaults) for number, where, fields in rows]


Row = tuple[int, str, dict[str, Any] | KinemaError]


def _line(number: int, where: str, fields: dict[str, Any] | KinemaError, defaults: Mapping[str, Any]) -> Line:
    if isinstance(fields, KinemaError):
        return Line(number, where, fault=fields)
    try:
        return Line(number, where, make_request(merge(defaults, fields)))
    except RequestError as fault:
        return Line(number, where, fault=fault)


def _reader(path: Path) -> Callable[[str, Mapping[str, Any]], Iterator[Row]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        kinds = ", ".join(READERS)
        raise RequestError(
            f"{path} is no prompt file: {path.suffix or 'no ending'} is not one of {kinds} or a folder of images",
            "name it .txt to have one prompt a line",
            field="from_file",
            got=str(path),
            allowed=list(READERS),
        )
    return reader


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        near = nearest(path.name, [item.name for item in path.parent.iterdir()]) if path.parent.is_dir() else None
        hint = (
            f"did you mean {path.parent / near}?" if near else "name a .txt, .jsonl or .csv file, or a folder of images"
        )
        raise RequestError(f"prompt file {path} does not exist", hint, field="from_file", got=str(path)) from error
    except OSError as error:
        raise RequestError(
            f"prompt file {path} cannot be read: {error.strerror}", field="from_file", got=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"prompt file {path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}",
            "save it as UTF-8",
            field="from_file",
            got=str(path),
        ) from error


def _text_rows(text: str, defaults: Mapping[str, Any]) -> Iterator[Row]:
    for number, line in _written(text):
        yield number, f"line {number}", _line_fields(line, defaults)


def _json_rows(text: str, defaults: Mapping[str, Any]) -> Iterator[Row]:
    for number, line in _written(text):
        yield number, f"line {number}", _json_fields(line)


def _written(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are neither blank nor comments, and their numbers."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _line_fields(line: str, defaults: Mapping[str, Any]) -> dict[str, Any] | KinemaError:
    try:
        return parse_line(line, defaults)
    except RequestError as fault:
        return fault


def _json_fields(line: str) -> dict[str, Any] | KinemaError:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        hint = 'one object a line, such as {"prompt": "a cat", "seed": 7}'
        return RequestError(f"not JSON at column {error.colno}: {error.msg}", hint, got=line[:200])
    if not isinstance(row, dict):
        return RequestError(f"{line[:60]} is no JSON object", 'write {"prompt": "a cat"}', got=line[:200])
    return {name.replace("-", "_"): value for name, value in row.items() if value is not None}


def _csv_rows(text: str, defaults: Mapping[str, Any]) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [name.strip().replace("-", "_") for name in next(reader, [])]
    for name in header:
        if name not in Request.model_fields:
            near = nearest(name, Request.model_fields)
            raise RequestError(
                f"CSV column {name!r} is no field of a request" + (f"; did you mean {near!r}?" if near else ""),
                "the first line names the columns: " + ", ".join(Request.model_fields),
                field=name,
                got=name,
                allowed=list(Request.model_fields),
            )
        if header.count(name) > 1:
            raise RequestError(f"CSV column {name!r} is there twice", "name each column once", field=name, got=name)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = RequestError(f"not CSV: {error}", 'quote text with commas: "a cat, walking"', got="")
            yield number, f"line {number}", fault
            return
        if any(cell.strip() for cell in cells):
            yield number, f"line {number}", _csv_fields(header, cells)


def _csv_fields(header: list[str], cells: list[str]) -> dict[str, Any] | KinemaError:
    if len(cells) != len(header):
        return RequestError(
            f"{len(cells)} cells under {len(header)} columns",
            'quote text with commas: "a cat, walking"',
            got=cells,
            allowed=len(header),
        )
    fields: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
    for name in REPEATED:
        if name in fields:
            fields[name] = tuple(part.strip() for part in fields[name].split(LIST_SEPARATOR))
    return fields


def _folder_rows(folder: Path, defaults: Mapping[str, Any]) -> Iterator[Row]:
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    for number, image in enumerate(images, 1):
        text = image.with_suffix(".txt")
        fields: dict[str, Any] | KinemaError = {}
        if text.is_file():
            try:
                fields = parse_line(" ".join(_read_text(text).split()), defaults)
            except RequestError as fault:
                fields = fault
        yield number, image.name, fields if isinstance(fields, KinemaError) else {"first": image} | fields


READERS: dict[str, Callable[[str, Mapping[str, Any]], Iterator[Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
}
