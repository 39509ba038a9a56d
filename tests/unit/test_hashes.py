"""Hashes are right, remembered, and never stale."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from kinema.errors import CheckpointError
from kinema.weights import hashes
from kinema.weights.hashes import HashCache, hash_file


def test_the_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_file_is_read_once_across_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "a", tmp_path / "cache" / "hashes.json"
    file.write_bytes(b"abc")
    digest = HashCache(cache).sha256(file)
    reads: list[Path] = []
    monkeypatch.setattr(hashes, "hash_file", lambda path: reads.append(path) or "read again")
    assert HashCache(cache).sha256(file) == digest
    assert not reads
    file.write_bytes(b"abd")
    os.utime(file, ns=(0, 1))
    assert HashCache(cache).sha256(file) == "read again"


def test_caches_of_two_processes_keep_each_other_s_rows(tmp_path: Path) -> None:
    cache = tmp_path / "hashes.json"
    first, second = HashCache(cache), HashCache(cache)
    for name, keeper in (("a", first), ("b", second)):
        (tmp_path / name).write_bytes(name.encode())
        keeper.sha256(tmp_path / name)
    assert cache.read_text().count("[") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "hashes.json"]


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"KEY": 3}', '{"KEY": [1, 2]}', '{"KEY": [3, "x", 5]}'])
def test_a_broken_cache_costs_time_not_truth(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "hashes.json").write_text(text.replace("KEY", str(tmp_path / "a")))
    assert HashCache(tmp_path / "hashes.json").sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_an_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert HashCache(tmp_path / "a" / "hashes.json").sha256(tmp_path / "a")


def test_a_cache_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "hashes.json").mkdir()
    assert HashCache(tmp_path / "hashes.json").sha256(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "hashes.json"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none cannot be read"):
        HashCache(None).sha256(tmp_path / "none")
