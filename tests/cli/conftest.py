"""The command line run in this process, away from the user's own settings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kinema.cli import main
from tiny_world import TinyWorld


@dataclass(frozen=True)
class Ran:
    """What one command left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        (found,) = [event for event in self.events if event.get("event") == "error"]
        return found


Cli = Callable[..., Ran]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `kinema ARGV...` in a fresh folder, with an empty configuration file and no KINEMA_ variables."""
    for name in [name for name in os.environ if name.startswith("KINEMA_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    config = tmp_path / "empty.toml"
    config.write_text("")
    monkeypatch.setenv("KINEMA_CONFIG", str(config))
    monkeypatch.setenv("KINEMA_CACHE", str(tmp_path / "cache"))

    def run(*argv: str | Path) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def tiny(cli: Cli, tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The same, with the small models installed."""
    monkeypatch.setenv("KINEMA_MODELS", str(tiny_world.root))
    monkeypatch.setenv("KINEMA_CATALOGS", str(tiny_world.root / "tiny.toml"))
    return cli
