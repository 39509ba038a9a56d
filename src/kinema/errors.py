"""The exception tree. Every error says what was wrong, what is accepted, and what to type.

    KinemaError(message, hint, **details)      exit  HTTP
      RequestError     the request cannot mean anything      2   400
      CatalogError     model or file unknown or missing      3   404
      CheckpointError  a file is not what it claims          4   422
      MachineError     this machine cannot do it             5   507
      NumericsError    a value stopped being finite          7   500
      OutputError      finished work could not be written    8   507
      Cancelled        the user stopped it                 130   499

Owns error types only; imports nothing of ours.
"""

from __future__ import annotations

from typing import Any


class KinemaError(Exception):
    """Base of all errors meant for people. `message` names the fault, `hint` says what to type."""

    exit_code = 1
    http_status = 500

    def __init__(self, message: str, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that CLI `--json`, HTTP and RunPod payloads share."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "details": {key: _plain(value) for key, value in self.details.items()},
        }


class RequestError(KinemaError):
    """The request cannot mean anything. details: field, got, allowed."""

    exit_code = 2
    http_status = 400


class CatalogError(KinemaError):
    """A model or file is unknown or missing. details: name, searched."""

    exit_code = 3
    http_status = 404


class CheckpointError(KinemaError):
    """A file is not what it claims. details: path, key, expected, found."""

    exit_code = 4
    http_status = 422


class MachineError(KinemaError):
    """This machine cannot do it. details: need, have, fits."""

    exit_code = 5
    http_status = 507


class NumericsError(KinemaError):
    """A value stopped being finite. details: stage, step, layer."""

    exit_code = 7


class OutputError(KinemaError):
    """Finished work could not be written. details: path, latents (where the work was kept)."""

    exit_code = 8
    http_status = 507


class Cancelled(KinemaError):
    """The user stopped the run; nothing half-written remains."""

    exit_code = 130
    http_status = 499


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)
