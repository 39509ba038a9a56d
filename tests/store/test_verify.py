"""Every kind of damage has a name: cut short, altered, another model; what is right is called right."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import manifest, write_sparse
from kinema.catalog.files import CatalogFile, Store, load_store
from kinema.catalog.folders import Folders
from kinema.catalog.verify import checkpoints, verify
from kinema.schema import Settings

STORE = load_store()

LAYOUTS = {
    "wan2.1_t2v_1.3B_fp16.safetensors": "wan2.1_t2v_1.3B",
    "wan2.2_i2v_high_noise_14B_fp16.safetensors": "wan2.2_i2v_a14B",
    "wan2.2_i2v_low_noise_14B_fp16.safetensors": "wan2.2_i2v_a14B",
    "wan2.2_t2v_low_noise_14B_fp16.safetensors": "wan2.2_t2v_a14B",
    "wan2.2_ti2v_5B_fp16.safetensors": "wan2.2_ti2v_5B",
    "wan2.1_i2v_480p_14B_fp16.safetensors": "wan2.1_i2v_14B",
    "wan2.1_flf2v_720p_14B_fp16.safetensors": "wan2.1_flf2v_14B",
    "wan2.1_vace_14B_fp16.safetensors": "wan2.1_vace_14B",
    "wan2.2_animate_14B_bf16.safetensors": "wan2.2_animate_14B",
    "wan2.2_s2v_14B_bf16.safetensors": "wan2.2_s2v_14B",
    "wan_2.1_vae.safetensors": "wan2.1_vae",
    "wan2.2_vae.safetensors": "wan2.2_vae",
    "flux1-schnell.safetensors": "flux1_schnell",
    "ae.safetensors": "flux1_ae",
}
"""Published names -> the layout each has; written sparse, they take no disk."""


def without_lengths(store: Store = STORE) -> Store:
    """The sparse files have the right tensors and not the published length, which has metadata and mixed dtypes."""
    return replace(store, files=tuple(f.model_copy(update={"bytes": None, "size": None}) for f in store.files))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_of_the_right_layout_is_right(tmp_path: Path, name: str):
    found = verify(write_sparse(tmp_path / name, manifest(LAYOUTS[name]), "F16"), without_lengths())
    assert (found.finding, found.by) == ("right", "header"), found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_of_another_model_is_told(tmp_path: Path, name: str):
    other = "wan2.1_t2v_1.3B" if LAYOUTS[name] != "wan2.1_t2v_1.3B" else "wan2.2_ti2v_5B"
    found = verify(write_sparse(tmp_path / name, manifest(other), "F16"), without_lengths())
    assert found.finding == "another model" and found.is_fault, found


def test_the_vae_of_the_other_version_is_told(tmp_path: Path):
    found = verify(write_sparse(tmp_path / "wan_2.1_vae.safetensors", manifest("wan2.2_vae")), without_lengths())
    assert found.finding == "another model"


@pytest.mark.parametrize("lost", [1, 1000, 10**9])
def test_a_cut_file_is_told_with_the_bytes_that_lack(tmp_path: Path, lost: int):
    path = write_sparse(tmp_path / "wan2.1_t2v_1.3B_fp16.safetensors", manifest("wan2.1_t2v_1.3B"))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - lost)
    found = verify(path, STORE)
    assert found.finding == "truncated" and f"{lost:,}" in found.says


def test_bytes_after_the_end_are_told(tmp_path: Path):
    path = write_sparse(tmp_path / "wan_2.1_vae.safetensors", manifest("wan2.1_vae"))
    with path.open("ab") as file:
        file.write(b"more")
    assert verify(path, without_lengths()).finding == "altered"


def test_another_length_than_the_published_is_told(tmp_path: Path):
    path = write_sparse(tmp_path / "wan_2.1_vae.safetensors", manifest("wan2.1_vae"), "F32")
    found = verify(path, STORE)
    assert (found.finding, found.by) == ("altered", "length") and "253,815,318" in found.says


def test_a_web_page_and_a_pointer_are_told(tmp_path: Path):
    page, pointer = tmp_path / "wan_2.1_vae.safetensors", tmp_path / "x.safetensors"
    page.write_text("<!DOCTYPE html>")
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "web page" in verify(page, STORE).says and verify(page, STORE).is_fault
    assert "LFS pointer" in verify(pointer, STORE).says


def test_a_name_nobody_publishes_is_unknown_and_said_to_be_whole(tmp_path: Path):
    found = verify(write_sparse(tmp_path / "mine.safetensors", manifest("wan2.1_vae")), STORE)
    assert found.finding == "unknown" and "whole" in found.says and not found.is_fault


# --- by hash ------------------------------------------------------------------------------------------


@pytest.fixture
def known(tmp_path: Path) -> tuple[Path, Store]:
    """A small file that a row knows by its hash."""
    path = write_sparse(tmp_path / "vae/tiny.safetensors", {"a": (4, 4)})
    row = CatalogFile(
        repository="a/b", path="vae/tiny.safetensors", folder="vae", role="lora", size="exact",
        bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )  # fmt: skip
    return path, replace(STORE, files=(row, *STORE.files))


def test_a_hash_proves_a_file_right_under_any_name(known: tuple[Path, Store]):
    path, store = known
    assert verify(path, store).by == "header"
    assert (verify(path, store, full=True).finding, verify(path, store, full=True).by) == ("right", "hash")
    other = path.rename(path.with_name("renamed.safetensors"))
    assert verify(other, store).finding == "unknown"
    assert "a/b/vae/tiny.safetensors, under another name" in verify(other, store, full=True).says


@pytest.mark.parametrize("offset", [-1, -17, -32])
def test_every_flipped_bit_is_found_by_reading_all(known: tuple[Path, Store], offset: int):
    path, store = known
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    assert verify(path, store, full=True).finding == "altered"


def test_what_was_pulled_is_checked_by_what_the_hub_said(tmp_path: Path):
    path = write_sparse(tmp_path / "mine.safetensors", {"a": (4, 4)})
    (tmp_path / ".kinema").mkdir()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record = {"repository": "me/mine", "path": "mine.safetensors", "bytes": path.stat().st_size, "sha256": digest}
    (tmp_path / ".kinema/mine.safetensors.json").write_text(json.dumps(record))
    assert verify(path, STORE, full=True).finding == "right"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert verify(path, STORE).finding == "unknown", "a header does not show it"
    assert verify(path, STORE, full=True).finding == "altered"


def test_every_checkpoint_of_the_folders_is_looked_at_once(tmp_path: Path):
    names = ("vae/a.safetensors", "diffusion_models/sub/b.gguf", "Org/Repo/high/c.safetensors")
    for name in names:
        write_sparse(tmp_path / name, {"a": (2,)})
    (tmp_path / "vae/put_vae_here").write_text("")
    (tmp_path / "unet").symlink_to(tmp_path / "diffusion_models")
    found = [path.relative_to(tmp_path).as_posix() for path in checkpoints(Folders.of(Settings(models=(tmp_path,))))]
    assert len(found) == 3 and {Path(name).name for name in found} == {"a.safetensors", "b.gguf", "c.safetensors"}
