"""Files arrive whole or not at all, whatever the network, the hub, the disk or another process does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

import kinema
from kinema.catalog.files import CatalogFile
from kinema.catalog.folders import Folders
from kinema.catalog.hub import HubClient
from kinema.catalog.pull import Wanted, pull, wanted, wanted_from, wanted_of
from kinema.catalog.sources import Source, fetched, parse_source
from kinema.catalog.transfer import record_of
from kinema.errors import Cancelled, CatalogError, MachineError
from kinema.schema import Event, Hub, Note, Progress, Settings
from store.hub import FakeHub, Stored, running_hub

KIB = 1024
DATA = random.Random(7).randbytes(1000 * KIB + 13)
MODEL = Wanted("Org/Repo", "vae/x.safetensors", "vae/x.safetensors")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as fake:
        fake.add("Org/Repo/vae/x.safetensors", DATA)
        yield fake


def get(hub: FakeHub, root: Path, *files: Wanted, settings: Hub | None = None, **options) -> list[Event]:
    defaults = {"chunk": 64 * KIB, "patience": 0.0, "connections": 4, "timeout": 5.0}
    return list(pull(files or (MODEL,), root, settings or hub.hub, **{**defaults, **options}))


def only_file(root: Path) -> bytes:
    """Return the one file under its final name; nothing else may be there but what the store keeps."""
    names = [path for path in root.rglob("*") if path.is_file() and ".kinema" not in path.parts]
    assert [path.relative_to(root).as_posix() for path in names] == [MODEL.place]
    return names[0].read_bytes()


def nothing_final(root: Path) -> None:
    assert not [path for path in root.rglob("*") if path.is_file() and ".kinema" not in path.parts]


# --- when all goes well ------------------------------------------------------------------------------


def test_a_file_arrives_once_and_is_remembered(hub: FakeHub, tmp_path: Path):
    events = get(hub, tmp_path)
    assert only_file(tmp_path) == DATA and hub.served == len(DATA)
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert (last.done, last.total, last.unit) == (len(DATA), len(DATA), "bytes") and last.rate
    kept = record_of(tmp_path / MODEL.place)
    assert kept and kept["sha256"] == hashlib.sha256(DATA).hexdigest() and kept["repository"] == "Org/Repo"
    before = len(hub.log)
    assert get(hub, tmp_path) == [] and len(hub.log) == before, "what is there is not even asked for"
    assert not list((tmp_path / "vae/.kinema").glob("*.part"))


def test_small_files_are_checked_by_gits_hash(hub: FakeHub, tmp_path: Path):
    hub.add("Org/Repo/config.json", b'{"a": 1}', large=False)
    get(hub, tmp_path, Wanted("Org/Repo", "config.json", "c.json"))
    assert (tmp_path / "c.json").read_bytes() == b'{"a": 1}'
    hub.faults.flips = [3, 3]
    with pytest.raises(CatalogError, match="another sha1"):
        get(hub, tmp_path, Wanted("Org/Repo", "config.json", "d.json"))


def test_an_empty_file_arrives(hub: FakeHub, tmp_path: Path):
    hub.add("Org/Repo/empty", b"")
    get(hub, tmp_path, Wanted("Org/Repo", "empty", "empty"))
    assert (tmp_path / "empty").read_bytes() == b""


def test_any_repository_can_be_had_by_pattern(hub: FakeHub, tmp_path: Path):
    for name in ("a.json", "b.safetensors", "t/c.json", "t/d.json", "e.txt"):
        hub.add(f"Org/Repo/{name}", name.encode() * 9)
    client = HubClient(hub.hub, patience=0)
    files = wanted_from(parse_source("hf:Org/Repo:*.json"), client)
    assert [file.place for file in files] == ["Org/Repo/a.json", "Org/Repo/t/c.json", "Org/Repo/t/d.json"]
    get(hub, tmp_path, *files)
    assert (tmp_path / "Org/Repo/t/d.json").read_bytes() == b"t/d.json" * 9
    assert len(client.listing(Source("hf", "Org/Repo"))) == 6, "listings go over several pages"
    with pytest.raises(CatalogError, match=r"matches '\*\.bin'"):
        client.listing(Source("hf", "Org/Repo", "*.bin"))
    client.close()


def test_a_pattern_names_files_and_not_what_is_noted_of_them(hub: FakeHub, tmp_path: Path):
    address, client = parse_source("hf:Org/Repo:*x*"), HubClient(hub.hub, patience=0)
    get(hub, tmp_path, *wanted_from(address, client))
    client.close()
    folders = Folders.of(Settings(models=(tmp_path,)))
    assert fetched(address, folders) == tmp_path / "Org/Repo/vae/x.safetensors"


def test_a_folder_of_the_catalog_is_all_of_its_files(hub: FakeHub, tmp_path: Path):
    for name in ("spiece.model", "tokenizer.json"):
        hub.add(f"Org/Repo/google/umt5-xxl/{name}", name.encode())
    (row,) = wanted([CatalogFile(repository="Org/Repo", path="google/umt5-xxl/", role="tokenizer")])
    get(hub, tmp_path, row)
    assert (tmp_path / "Org/Repo/google/umt5-xxl/spiece.model").read_bytes() == b"spiece.model"


def test_shards_are_all_wanted(hub: FakeHub):
    row = CatalogFile(
        repository="a/b", path="high/m.safetensors.index.json", role="dit", shards=2, bytes=9, size="listed"
    )
    assert [one.place for one in wanted([row])] == [
        "a/b/high/m.safetensors.index.json",
        "a/b/high/m-00001-of-00002.safetensors",
        "a/b/high/m-00002-of-00002.safetensors",
    ]


def test_a_renamed_repository_is_followed(hub: FakeHub, tmp_path: Path):
    hub.add("new/thing/w.bin", DATA)
    get(hub, tmp_path, Wanted("old/thing", "w.bin", MODEL.place))
    assert only_file(tmp_path) == DATA


@pytest.mark.parametrize("text", ["hf:noslash", "ms:", "hf:a/b/c", "hf:a b/c"])
def test_an_address_that_names_no_repository_is_refused(text: str):
    with pytest.raises(CatalogError, match="names no repository"):
        parse_source(text)


# --- cuts and kills ------------------------------------------------------------------------------------


def test_a_hundred_cuts_cost_no_more_than_they_have_to(hub: FakeHub, tmp_path: Path):
    hub.faults.cuts = random.Random(1).sample(range(1, len(DATA)), 100)
    get(hub, tmp_path)
    assert only_file(tmp_path) == DATA and hub.faults.cuts == []
    assert hub.served - len(DATA) <= 64 * KIB, "a cut piece goes on where it broke off"


def test_a_hundred_runs_cut_at_random_offsets_each_resume_with_one_piece_again(hub: FakeHub, tmp_path: Path):
    data = hub.add("Org/Repo/vae/x.safetensors", DATA[: 200 * KIB + 13])
    chunk, rng = 64 * KIB, random.Random(2)
    for number in range(100):
        root = tmp_path / str(number)
        hub.served, hub.faults.cuts, hub.faults.down_after_cut = 0, [rng.randrange(1, len(data))], True
        with pytest.raises(CatalogError):
            get(hub, root, connections=1, chunk=chunk)
        nothing_final(root)
        hub.faults.down = False
        get(hub, root, connections=1, chunk=chunk)
        assert only_file(root) == data
        assert hub.served - len(data) <= chunk


PULL = """
import sys, json, resource
from pathlib import Path
from kinema.catalog.pull import Wanted, pull
from kinema.schema import Hub
endpoint, root, chunk, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
list(pull([Wanted("Org/Repo", "vae/x.safetensors", "vae/x.safetensors")], root, Hub(endpoint=endpoint), chunk=chunk,
          connections=2, patience=0.05))
"""


def start(hub: FakeHub, root: Path, chunk: int = 64 * KIB, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PULL, hub.url, str(root), str(chunk), str(limit)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_a_state_that_goes_on(hub: FakeHub, tmp_path: Path):
    hub.faults.slow = 0.01
    process, state = start(hub, tmp_path), tmp_path / "vae/.kinema/x.safetensors.state"
    until = time.monotonic() + 20
    while not (state.is_file() and len(json.loads(state.read_text())["done"]) >= 3):
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    nothing_final(tmp_path)
    done = json.loads(state.read_text())["done"]
    time.sleep(0.2)
    hub.faults.slow, hub.served = 0.0, 0
    get(hub, tmp_path)
    assert only_file(tmp_path) == DATA
    assert hub.served == len(DATA) - sum(min(64 * KIB, len(DATA) - 64 * KIB * index) for index in done)


def test_bytes_that_never_reached_the_disk_are_found(hub: FakeHub, tmp_path: Path):
    """After a loss of power a piece that was noted may be wrong on a lying disk: the hash of the whole finds it."""
    hub.faults.cuts, hub.faults.down_after_cut = [700 * KIB], True
    with pytest.raises(CatalogError):
        get(hub, tmp_path, connections=1)
    with (tmp_path / "vae/.kinema/x.safetensors.part").open("r+b") as part:
        part.seek(100 * KIB)
        part.write(bytes(4096))
    hub.faults.down = False
    events = get(hub, tmp_path)
    assert only_file(tmp_path) == DATA
    assert any(isinstance(event, Note) and "once more" in event.text for event in events)


def test_a_file_that_changed_on_the_hub_is_begun_again(hub: FakeHub, tmp_path: Path):
    hub.faults.cuts, hub.faults.down_after_cut = [700 * KIB], True
    with pytest.raises(CatalogError):
        get(hub, tmp_path, connections=1)
    hub.faults.down = False
    changed = hub.add("Org/Repo/vae/x.safetensors", DATA[::-1])
    events = get(hub, tmp_path)
    assert only_file(tmp_path) == changed
    assert any(isinstance(event, Note) and "changed on the hub" in event.text for event in events)


def test_stopping_keeps_what_came(hub: FakeHub, tmp_path: Path):
    hub.faults.slow = 0.03  # half a second in all; it is asked every fifth of one
    asked = []
    with pytest.raises(Cancelled):
        get(hub, tmp_path, cancelled=lambda: asked.append(1) or len(asked) > 1)
    nothing_final(tmp_path)
    hub.faults.slow, hub.served = 0.0, 0
    get(hub, tmp_path)
    assert only_file(tmp_path) == DATA and hub.served < len(DATA)


def test_eight_processes_fetch_a_file_once(hub: FakeHub, tmp_path: Path):
    hub.faults.slow = 0.004
    processes = [start(hub, tmp_path) for _ in range(8)]
    assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0] * 8
    assert only_file(tmp_path) == DATA and hub.served == len(DATA)


# --- hubs that lie ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 64 * KIB - 1, 64 * KIB, 500 * KIB + 7, len(DATA) - 1])
def test_any_flipped_bit_is_found_and_fetched_again(hub: FakeHub, tmp_path: Path, offset: int):
    hub.faults.flips = [offset]
    events = get(hub, tmp_path)
    assert only_file(tmp_path) == DATA and hub.served == 2 * len(DATA)
    assert any(isinstance(event, Note) and "another sha256" in event.text for event in events)


def test_wrong_bytes_twice_are_an_error_and_nothing_stays(hub: FakeHub, tmp_path: Path):
    hub.faults.flips = [5, 5]
    with pytest.raises(CatalogError, match="another sha256") as caught:
        get(hub, tmp_path)
    nothing_final(tmp_path)
    assert caught.value.details["expected"] == hashlib.sha256(DATA).hexdigest()
    assert not list((tmp_path / "vae/.kinema").glob("*.part"))


@pytest.mark.parametrize("said", [len(DATA) - 1, len(DATA) + 1, len(DATA) + 200 * KIB, 10])
def test_a_length_that_is_a_lie_is_an_error(hub: FakeHub, tmp_path: Path, said: int):
    hub.faults.says_bytes = said
    with pytest.raises(CatalogError):
        get(hub, tmp_path)
    nothing_final(tmp_path)


def test_two_lengths_that_disagree_are_named(hub: FakeHub, tmp_path: Path):
    hub.faults.range_total = len(DATA) + 5
    with pytest.raises(CatalogError, match=f"{len(DATA) + 5} bytes long"):
        get(hub, tmp_path)


def test_a_range_that_begins_elsewhere_is_asked_for_again(hub: FakeHub, tmp_path: Path):
    hub.faults.shifted = 3
    get(hub, tmp_path)
    assert only_file(tmp_path) == DATA


def test_a_server_without_ranges_sends_it_whole(hub: FakeHub, tmp_path: Path):
    hub.faults.no_ranges, hub.faults.cuts = True, [300 * KIB]
    get(hub, tmp_path)
    assert only_file(tmp_path) == DATA


def test_a_busy_hub_is_asked_again(hub: FakeHub, tmp_path: Path):
    hub.faults.busy = 4
    get(hub, tmp_path)
    assert only_file(tmp_path) == DATA


# --- refusals ------------------------------------------------------------------------------------------------


def test_a_gated_repository_is_explained_step_by_step(hub: FakeHub, tmp_path: Path):
    hub.add("BFL/Flux/f.safetensors", DATA, gated=True)
    row = Wanted("BFL/Flux", "f.safetensors", MODEL.place)
    with pytest.raises(CatalogError, match="gated") as caught:
        get(hub, tmp_path, row)
    assert f"{hub.url}/BFL/Flux" in caught.value.hint and "HF_TOKEN=" in caught.value.hint
    other = hub.hub.model_copy(update={"token": SecretStr("hf_other")})
    with pytest.raises(CatalogError, match="gated") as caught:
        get(hub, tmp_path, row, settings=other)
    assert "has not accepted" in caught.value.hint
    good = hub.hub.model_copy(update={"token": SecretStr("hf_good")})
    get(hub, tmp_path, row, settings=good)
    assert only_file(tmp_path) == DATA


def test_the_token_of_a_login_is_used_and_goes_to_the_hub_alone(hub: FakeHub, tmp_path: Path):
    (tmp_path / "token").write_text("hf_good\n")
    hub.add("BFL/Flux/f.safetensors", DATA, gated=True)
    with running_hub() as storage:  # another host: it must never see the token
        storage.add("BFL/Flux/f.safetensors", DATA)
        hub.url, own = storage.url, hub.url
        settings = Hub(endpoint=own, token_file=tmp_path / "token")
        get(hub, tmp_path / "m", Wanted("BFL/Flux", "f.safetensors", MODEL.place), settings=settings)
        assert only_file(tmp_path / "m") == DATA
        assert set(storage.tokens) == {None} and "Bearer hf_good" in hub.tokens


def test_a_missing_file_and_a_missing_repository_are_told_apart(hub: FakeHub, tmp_path: Path):
    with pytest.raises(CatalogError, match="Org/Repo has no file nope"):
        get(hub, tmp_path, Wanted("Org/Repo", "nope", "nope"))
    with pytest.raises(CatalogError, match="no repository Org/None"):
        get(hub, tmp_path, Wanted("Org/None", "nope", "nope"))


def test_everything_is_asked_before_anything_is_fetched(hub: FakeHub, tmp_path: Path):
    with pytest.raises(CatalogError, match="no file nope"):
        get(hub, tmp_path, MODEL, Wanted("Org/Repo", "nope", "nope"))
    assert hub.served == 0


def test_modelscope_helps_where_the_hub_is_gone_and_the_hash_is_known(hub: FakeHub, tmp_path: Path):
    hub.modelscope["PAI/Repo/vae/x.safetensors"] = hub.files["Org/Repo/vae/x.safetensors"]
    gone = hub.hub.model_copy(update={"endpoint": "http://127.0.0.1:9"})
    row = Wanted("alibaba-pai/Repo", "vae/x.safetensors", MODEL.place)
    with pytest.raises(CatalogError, match="cannot be reached"):
        get(hub, tmp_path, row, settings=gone)
    known = Wanted(row.repository, row.path, row.place, sha256=hashlib.sha256(DATA).hexdigest())
    get(hub, tmp_path, known, settings=gone)
    assert only_file(tmp_path) == DATA


def test_modelscope_helps_where_the_length_is_known_exactly_and_says_so(hub: FakeHub, tmp_path: Path):
    hub.modelscope["PAI/Repo/vae/x.safetensors"] = hub.files["Org/Repo/vae/x.safetensors"]
    gone = hub.hub.model_copy(update={"endpoint": "http://127.0.0.1:9"})
    other = Wanted("alibaba-pai/Repo", "vae/x.safetensors", MODEL.place, bytes=len(DATA) + 1)
    with pytest.raises(CatalogError, match="cannot be reached") as caught:
        get(hub, tmp_path, other, settings=gone)
    assert "--source ms" in caught.value.hint and f"{len(DATA):,} bytes" in caught.value.hint
    nothing_final(tmp_path)
    known = Wanted(other.repository, other.path, other.place, bytes=len(DATA))
    events = get(hub, tmp_path, known, settings=gone)
    assert only_file(tmp_path) == DATA
    assert any(isinstance(event, Note) and "comes from ModelScope" in event.text for event in events)


def test_modelscope_helps_with_a_folder_whose_length_is_known_exactly(hub: FakeHub, tmp_path: Path):
    names = ("spiece.model", "tokenizer.json")
    for name in (*names, "../config.json"):
        hub.modelscope[f"Org/Repo/google/umt5-xxl/{name}".replace("umt5-xxl/../", "")] = Stored(name.encode())
    gone = hub.hub.model_copy(update={"endpoint": "http://127.0.0.1:9"})
    folder = Wanted("Org/Repo", "google/umt5-xxl/", "text_encoders/umt5-xxl", bytes=sum(map(len, names)))
    with pytest.raises(CatalogError, match="cannot be reached") as caught:
        get(hub, tmp_path, replace(folder, bytes=27), settings=gone)
    assert "has a folder of this name, 26 bytes" in caught.value.hint
    events = get(hub, tmp_path, folder, settings=gone)
    assert [(tmp_path / folder.place / name).read_text() for name in names] == list(names)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 1 and "google/umt5-xxl/ comes from ModelScope, whose length" in notes[0]
    assert sum("/repo/files" in line for line in hub.log) == 2, "a repository is listed once a pull"


def test_modelscope_can_be_named(hub: FakeHub, tmp_path: Path):
    hub.modelscope["Org/Repo/vae/x.safetensors"] = hub.files["Org/Repo/vae/x.safetensors"]
    client = HubClient(hub.hub, patience=0)
    (file,) = wanted_from(parse_source("ms:Org/Repo:vae/*"), client)
    client.close()
    get(hub, tmp_path, file)
    assert (tmp_path / "Org/Repo/vae/x.safetensors").read_bytes() == DATA
    with pytest.raises(CatalogError, match="has no file that matches") as caught:
        HubClient(hub.hub, patience=0).listing(Source("ms", "Org/Repo", "*.bin"))
    assert hub.hub.modelscope in caught.value.hint


# --- disks ------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_before_the_start(hub: FakeHub, tmp_path: Path):
    hub.faults.says_bytes = 10**16
    with pytest.raises(MachineError, match="GB free") as caught:
        get(hub, tmp_path)
    assert caught.value.details["need"] == 10**16 and hub.served == 0
    nothing_final(tmp_path)


def test_a_disk_that_fills_up_meanwhile_keeps_what_came(hub: FakeHub, tmp_path: Path):
    process = start(hub, tmp_path, limit=512 * KIB)
    assert "MachineError: writing failed" in process.communicate(timeout=60)[1]
    nothing_final(tmp_path)
    hub.served = 0
    get(hub, tmp_path)
    assert only_file(tmp_path) == DATA and hub.served < len(DATA)


def test_a_file_of_another_length_is_not_overwritten(hub: FakeHub, tmp_path: Path):
    place = tmp_path / MODEL.place
    place.parent.mkdir()
    place.write_bytes(b"mine")
    with pytest.raises(CatalogError, match="is there with 4 bytes"):
        get(hub, tmp_path)
    assert place.read_bytes() == b"mine" and hub.served == 0


def test_a_file_of_another_repository_is_not_taken_for_the_one_that_is_there(hub: FakeHub, tmp_path: Path):
    get(hub, tmp_path)
    hub.add("Other/Repo/vae/x.safetensors", DATA[::2])
    with pytest.raises(CatalogError, match="the file of Other/Repo has"):
        get(hub, tmp_path, Wanted("Other/Repo", MODEL.path, MODEL.place))
    hub.add("Same/Repo/vae/x.safetensors", DATA)
    assert get(hub, tmp_path, Wanted("Same/Repo", MODEL.path, MODEL.place)) == []


def test_a_folder_that_cannot_be_written_is_told(hub: FakeHub, tmp_path: Path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(MachineError, match="writing failed: Not a directory"):
        get(hub, tmp_path / "models")


def test_what_two_addresses_name_is_fetched_once(hub: FakeHub):
    rows = wanted_of((), ("hf:Org/Repo", "hf:Org/Repo:vae/*"), hub.hub, "hf")
    assert [row.path for row in rows] == ["vae/x.safetensors"]


def test_a_folder_that_is_a_link_to_another_place_is_written_there(hub: FakeHub, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").mkdir()
    (tmp_path / "m/vae").symlink_to(tmp_path / "disk")
    get(hub, tmp_path / "m")
    assert (tmp_path / "disk/x.safetensors").read_bytes() == DATA
    assert os.path.islink(tmp_path / "m/vae")


def test_python_fetches_by_name_and_by_address(hub: FakeHub, tmp_path: Path):
    name = "Wan2.1-Fun-14B-InP-MPS.safetensors"
    hub.add(f"alibaba-pai/Wan2.1-Fun-Reward-LoRAs/{name}", DATA)
    settings = Settings(models=(tmp_path,), hub=hub.hub)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places = kinema.pull(name, "hf:Org/Repo:vae/*", vram=16 * 10**9, settings=settings)
    assert places == [tmp_path / "loras" / name, tmp_path / "Org/Repo/vae/x.safetensors"]
    assert all(place.read_bytes() == DATA for place in places)


def test_python_warns_of_what_stands_for_a_file_and_of_where_it_comes_from(hub: FakeHub, tmp_path: Path):
    real = "city96/FLUX.1-dev-gguf/flux1-dev-Q5_K_S.gguf"
    hub.add(real, DATA)
    settings = Settings(models=(tmp_path,), hub=hub.hub)
    with pytest.warns(UserWarning, match="never published") as told:
        (place,) = kinema.pull("flux1-dev-Q5_K_M.gguf", vram=16 * 10**9, settings=settings)
    assert place.name == "flux1-dev-Q5_K_S.gguf" and [Path(one.filename) for one in told] == [Path(__file__)]
    with pytest.warns(UserWarning) as told:
        kinema.pull("flux1-dev-Q5_K_M.gguf", vram=16 * 10**9, settings=settings)
    assert len(told) == 1, "each time it is asked for"
