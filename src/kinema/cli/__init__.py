"""The command line: argv -> Request -> Engine, and events told to a person or, with --json, to a machine.

Owns flags, rendering, signals and exit codes, nothing of what a video is. Flags come from schema.Request alone.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` is without the program's name."""
    # Late, so that importing this package is light.
    from kinema.cli.app import run

    return run(argv)
