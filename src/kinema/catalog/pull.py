"""Files from a hub to a models folder: in parallel pieces, resumable after anything, hash-checked, never half there.

A file arrives in `.kinema/` beside its place. Several processes may ask for the same file: the one that holds its
lock fetches it, the others wait and find it there.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import httpx2

from kinema.catalog.files import CatalogFile
from kinema.catalog.hub import TRIES, HubClient, Remote
from kinema.catalog.sources import HubName, Source, parse_source
from kinema.catalog.transfer import Transfer, WrongHash, record_of
from kinema.errors import Cancelled, CatalogError, MachineError
from kinema.schema import Event, Hub, Note, Progress

CHUNK = 64 * 2**20
CONNECTIONS = 8
SPARE = 256 * 2**20
"""Bytes that are left free on a disk."""

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Wanted:
    """One file to fetch: where from, and where below the models folder it belongs. A path ending in / is a folder.

    bytes   exact; of a folder all its files together.
    """

    repository: str
    path: str
    place: str
    hub: HubName = "hf"
    bytes: int | None = None
    sha256: str | None = None


def wanted(files: Sequence[CatalogFile], hub: HubName = "hf") -> list[Wanted]:
    """Return what has to be fetched for catalog files: of shards every one."""
    found = []
    for file in files:
        size = file.bytes if file.size == "exact" and file.shards is None else None
        for path in file.paths or (file.path,):
            place = file.place if path == file.path else f"{file.place.rpartition('/')[0]}/{path.rpartition('/')[2]}"
            found.append(Wanted(file.repository, path, place, hub, size, file.sha256))
    return found


def wanted_from(source: Source, client: HubClient) -> list[Wanted]:
    """Return what has to be fetched of any repository: it keeps its paths, in a folder named as it is."""
    return [Wanted(r.repository, r.path, f"{r.repository}/{r.path}", r.hub) for r in client.listing(source)]


def wanted_of(files: Sequence[CatalogFile], addresses: Sequence[str], hub: Hub, source: HubName) -> list[Wanted]:
    """Return what has to be fetched for catalog files, from the hub `source`, and for addresses of repositories."""
    rows = wanted(files, source)
    sources = [found for address in addresses if (found := parse_source(address))]
    if sources:
        with closing(HubClient(hub)) as client:
            rows += [row for found in sources for row in wanted_from(found, client)]
    return list(dict.fromkeys(rows))


def pull(
    files: Sequence[Wanted],
    root: Path,
    hub: Hub,
    *,
    connections: int = CONNECTIONS,
    chunk: int = CHUNK,
    patience: float = 0.5,
    timeout: float = 30.0,
    cancelled: Stop = lambda: False,
) -> Iterator[Event]:
    """Fetch files into `root`, yielding Progress in bytes; what is there already is not fetched again.

    Everything that can be known is asked first: sizes, hashes, gates, room on the disk.
    Raises CatalogError for what cannot be had or arrives wrong twice, MachineError for a disk that is too small, and
    for a folder that cannot be written.
    """
    with closing(HubClient(hub, connections=connections, patience=patience, timeout=timeout)) as client:
        single = [(file, one) for file in files for one in _expanded(file, client)]
        missing = [(file, one) for file, one in single if not _is_there(one, root, client)]
        coming = [(file, _described(one, client), root / one.place) for file, one in missing]
        yield from dict.fromkeys(_elsewhere(file, remote) for file, remote, _ in coming if remote.hub != file.hub)
        transfers = [Transfer(remote, place, chunk) for _, remote, place in coming]
        _check_room(transfers)
        try:
            yield from _run(transfers, client, connections, cancelled)
        except OSError as error:
            raise MachineError(
                f"writing failed: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""),
                "make room on the disk, or pull to another folder: --to FOLDER; what came so far is kept, and the "
                "same command goes on from there",
            ) from error


# --- before the start --------------------------------------------------------------------------------


def _expanded(file: Wanted, client: HubClient) -> list[Wanted]:
    """Return every file of a folder, or the file itself."""
    if not file.path.endswith("/"):
        return [file]
    pattern = f"{file.path}*"
    try:
        rows = client.listing(Source(file.hub, file.repository, pattern))
    except CatalogError as error:
        rows = _from_modelscope(file, error, lambda: client.listing(Source("ms", file.repository, pattern)))
    return [Wanted(r.repository, r.path, f"{file.place}/{r.path.removeprefix(file.path)}", r.hub) for r in rows]


def _described(file: Wanted, client: HubClient) -> Remote:
    try:
        return client.describe(file.repository, file.path, file.hub)
    except CatalogError as error:
        return _from_modelscope(file, error, lambda: [client.describe(file.repository, file.path, "ms")])[0]


def _from_modelscope(file: Wanted, error: CatalogError, ask: Callable[[], list[Remote]]) -> list[Remote]:
    """Return what ModelScope has where Hugging Face cannot be reached, if it is the very same by hash or by length.

    Raises `error` where it is not, and where another thing went wrong.
    """
    if file.hub == "ms" or not error.details.get("unreachable"):
        raise error
    with suppress(CatalogError):
        found = ask()
        size, digest = sum(remote.bytes for remote in found), found[0].sha256
        if digest == file.sha256 if file.sha256 and digest else size == file.bytes:
            return found
        kind = "folder" if file.path.endswith("/") else "file"
        error.hint = (
            f"ModelScope has a {kind} of this name, {size:,} bytes, and the catalog does not know enough to say that "
            f"it is the same: --source ms takes it all the same\n{error.hint}"
        )
    raise error


def _elsewhere(file: Wanted, remote: Remote) -> Note:
    by = "hash" if file.sha256 and remote.sha256 else "length"
    text = f"Hugging Face cannot be reached: {file.path} comes from ModelScope, whose {by} is the catalog's"
    return Note(about="pull", text=text)


def _is_there(file: Wanted, root: Path, client: HubClient) -> bool:
    """True for a file that is here with the length it has on the hub; one of another length is in the way.

    What was pulled before, or has its exact length in the catalog, is not asked for again.
    """
    place = root / file.place
    if not place.is_file():
        return False
    record, size = record_of(place) or {}, place.stat().st_size
    was_pulled = (record.get("repository"), record.get("path")) == (file.repository, file.path)
    expected = record["bytes"] if was_pulled else file.bytes
    expected = _described(file, client).bytes if expected is None else expected
    if expected == size:
        return True
    raise CatalogError(
        f"{place} is there with {size:,} bytes; the file of {file.repository} has {expected:,}",
        f"see what it is: kinema models verify {place}; then move it away and pull again",
        name=str(place),
    )


def _check_room(transfers: Sequence[Transfer]) -> None:
    need: dict[int, tuple[Path, int]] = {}
    for transfer in transfers:
        folder = next(parent for parent in transfer.place.parents if parent.exists())
        device = folder.stat().st_dev
        need[device] = (folder, need.get(device, (folder, 0))[1] + transfer.left)
    for folder, size in need.values():
        free = shutil.disk_usage(folder).free
        if size + SPARE > free:
            raise MachineError(
                f"{folder} has {free / 1e9:.1f} GB free; {size / 1e9:.1f} GB are to come",
                "free some room, or pull to another disk: --to FOLDER",
                need=size,
                have=free,
            )


# --- all files ----------------------------------------------------------------------------------------


def _run(transfers: list[Transfer], client: HubClient, connections: int, cancelled: Stop) -> Iterator[Event]:
    """Fetch what no other process is fetching, then wait for the others, one by one, holding no lock."""
    waiting: list[Transfer] = []
    mine: list[Transfer] = []
    for transfer in transfers:
        transfer.part.parent.mkdir(parents=True, exist_ok=True)
        (mine if _try_lock(transfer) else waiting).append(transfer)
    try:
        yield from _fetch([one for one in mine if not _arrived(one)], client, connections, cancelled)
    finally:
        for transfer in mine:
            transfer.close()
            transfer.lock.release()
    for transfer in waiting:
        yield from _wait(transfer, cancelled)
        try:
            if not _arrived(transfer):
                yield from _fetch([transfer], client, connections, cancelled)
        finally:
            transfer.close()
            transfer.lock.release()


def _try_lock(transfer: Transfer) -> bool:
    try:
        transfer.lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    return True


def _arrived(transfer: Transfer) -> bool:
    """Another process finished the file meanwhile."""
    return transfer.place.is_file()


def _wait(transfer: Transfer, cancelled: Stop) -> Iterator[Event]:
    yield Note(about="pull", text=f"{transfer.place.name} is being fetched by another process: waiting for it")
    while not _try_lock(transfer):
        _stop_if(cancelled)
        time.sleep(0.1)


def _stop_if(cancelled: Stop) -> None:
    if cancelled():
        raise Cancelled("stopped; what came so far is kept, and the same command goes on from there")


@dataclass
class _Crew:
    """Threads that fetch pieces from one queue until it is empty, or one of them fails."""

    client: HubClient
    work: queue.SimpleQueue[tuple[Transfer, int] | None] = field(default_factory=queue.SimpleQueue)
    faults: list[BaseException] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while (task := self.work.get()) is not None and not self.stop.is_set():
            try:
                _fetch_piece(*task, self.client, self.stop)
            except BaseException as error:
                self.faults.append(error)
                self.stop.set()


def _fetch(transfers: list[Transfer], client: HubClient, connections: int, cancelled: Stop) -> Iterator[Event]:
    if not transfers:
        return
    again: list[Transfer] = []
    for transfer in transfers:
        transfer.open()
        if transfer.note:
            yield Note(about="pull", text=transfer.note)
    yield from _fetch_pieces(transfers, client, connections, cancelled)
    for transfer in transfers:
        try:
            transfer.complete()
        except WrongHash as error:
            yield Note(about="pull", text=f"{error.message}: fetching it once more")
            again.append(transfer)
    for transfer in again:
        transfer.open()
        yield from _fetch_pieces([transfer], client, connections, cancelled)
        transfer.complete()


def _fetch_pieces(transfers: list[Transfer], client: HubClient, connections: int, cancelled: Stop) -> Iterator[Event]:
    crew = _Crew(client)
    for transfer in transfers:
        for index in transfer.missing():
            crew.work.put((transfer, index))
    threads = [threading.Thread(target=crew.run, daemon=True) for _ in range(connections)]
    for _ in threads:
        crew.work.put(None)
    begin, already = time.monotonic(), sum(one.remote.bytes - one.left for one in transfers)
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            _stop_if(cancelled)
            for thread in threads:
                thread.join(0.2 / len(threads))
            yield _progress(transfers, begin, already)
    finally:
        crew.stop.set()
        for thread in threads:
            thread.join()
    if crew.faults:
        raise crew.faults[0]
    yield _progress(transfers, begin, already)  # the end is told however quick it came


def _progress(transfers: list[Transfer], begin: float, already: int) -> Progress:
    total = sum(transfer.remote.bytes for transfer in transfers)
    done = min(total, sum(one.remote.bytes - one.left + one.received for one in transfers))
    rate = (done - already) / max(time.monotonic() - begin, 1e-6)
    eta = (total - done) / rate if rate > 0 else None
    names = transfers[0].place.name if len(transfers) == 1 else f"{len(transfers)} files"
    return Progress(stage=f"pull {names}", done=done, total=total, unit="bytes", rate=rate, eta_seconds=eta)


def _fetch_piece(transfer: Transfer, index: int, client: HubClient, stop: threading.Event) -> None:
    """Fetch one piece, going on after every cut where it broke off; CatalogError when nothing comes any more."""
    begin, end = transfer.span(index)
    at, failures = begin, 0
    while at < end:
        if stop.is_set() or index in transfer.done or transfer.sequential:
            return
        came, fault = 0, ""
        try:
            for data in _stream(transfer, client, at, end):
                transfer.put(at + came, data)
                came += len(data)
                transfer.received += len(data)
                if stop.is_set():
                    break
        except httpx2.TransportError as error:
            fault = str(error) or type(error).__name__
        except _NoRanges:
            _fetch_all(transfer, client, stop)
            return
        at += came
        if at >= end:
            break
        failures = 0 if came else failures + 1
        if failures >= TRIES:
            raise CatalogError(
                f"{transfer.remote.url} breaks off at byte {at:,} of {end:,}: {fault or 'no more came'}",
                "the same command goes on from there later; HF_ENDPOINT names a mirror",
                name=transfer.place.name,
            )
        if failures:
            stop.wait(min(client.patience * 2**failures, 20))
    transfer.received -= end - begin
    transfer.finish_piece(index)


class _NoRanges(Exception):
    """The server sends whole files only."""


def _stream(transfer: Transfer, client: HubClient, at: int, end: int) -> Iterator[bytes]:
    """Yield the bytes [at, end) of a file, as far as they come."""
    url = transfer.remote.url
    headers = {**client.headers(url), "Range": f"bytes={at}-{end - 1}"}
    with client.http.stream("GET", url, headers=headers) as response:
        if response.status_code == 200 and (at > 0 or end < transfer.remote.bytes):
            raise _NoRanges
        _check_answer(response, transfer, at)
        left = end - at
        for data in response.iter_raw():
            if data[:left]:
                yield data[:left]
            left -= len(data)
            if left <= 0:
                return


def _check_answer(response: httpx2.Response, transfer: Transfer, at: int) -> None:
    if response.status_code in (408, 429, 500, 502, 503, 504):
        raise httpx2.RemoteProtocolError(f"answers {response.status_code}")
    said = response.headers.get("Content-Range")
    if response.status_code < 400 and said is not None and said.removeprefix("bytes ").split("-")[0] != str(at):
        raise httpx2.RemoteProtocolError(f"sends {said} where byte {at} was asked for")
    total = said.rpartition("/")[2] if said else "*"
    fault = f"answers {response.status_code}" if response.status_code >= 400 else ""
    if total not in ("*", str(transfer.remote.bytes)):
        fault = f"says now that it is {total} bytes long, and {transfer.remote.bytes} before"
    if fault:
        hint = "pull again, or from a mirror: HF_ENDPOINT"
        raise CatalogError(f"{transfer.remote.url} {fault}", hint, name=transfer.place.name)


def _fetch_all(transfer: Transfer, client: HubClient, stop: threading.Event) -> None:
    """Fetch a file over one connection from a server that knows no ranges; every cut begins it again."""
    if transfer.sequential:
        return
    transfer.sequential = True
    url, failures = transfer.remote.url, 0
    while transfer.missing() and not stop.is_set():
        at = 0
        try:
            with client.http.stream("GET", url, headers=client.headers(url)) as response:
                _check_answer(response, transfer, 0)
                for data in response.iter_raw():
                    transfer.put(at, data[: transfer.remote.bytes - at])
                    at += len(data)
                    for index in transfer.missing():
                        if transfer.span(index)[1] > at or stop.is_set():
                            break
                        transfer.finish_piece(index)
        except httpx2.TransportError:
            pass
        failures += 1
        if transfer.missing() and failures >= TRIES:
            raise CatalogError(
                f"{url} breaks off at byte {at:,} each time", "it knows no ranges: use a mirror", name=url
            )
