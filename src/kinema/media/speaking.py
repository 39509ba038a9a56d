"""Text spoken by a service that answers as OpenAI's /v1/audio/speech does. Used only where a request asks for it.

Source: OpenAI API reference, "Create speech" (the shape of request and answer, which local servers share).
"""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from kinema.errors import RequestError
from kinema.media.audio import audio_facts
from kinema.media.files import write_whole

PATH = "/audio/speech"
TIMEOUT_SECONDS = 300
MOST_BYTES = 500_000_000
"""A wav of over an hour; more is no answer to a text."""


def speak(text: str, url: str, voice: str, model: str, folder: Path, key: str | None = None) -> Path:
    """Return a sound file in `folder` of the text spoken; the one that lies there from the same words, if it does.

    url   of the service, such as http://localhost:8880/v1, with or without /audio/speech.
    key   sent as a bearer token, where there is one.

    Raises RequestError for a service that cannot be reached, refuses, or answers with what is no sound; nothing is
    kept then.
    """
    address = url.rstrip("/")
    address = address if address.endswith(PATH) else address + PATH
    if not address.startswith(("http://", "https://")):
        raise RequestError(
            f"speech_url {url} is no web address",
            "pass --speech-url http://localhost:8880/v1",
            field="speech_url",
            got=url,
        )
    said = json.dumps({"model": model, "input": text, "voice": voice, "response_format": "wav"})
    path = folder / f"speech-{hashlib.sha256(f'{address} {said}'.encode()).hexdigest()[:16]}.wav"
    if not path.is_file():
        write_whole(path, _ask(address, said, key))
    try:
        audio_facts(path)
    except RequestError:
        start = path.read_bytes()[:200].decode("utf-8", "replace")
        path.unlink()
        raise _refused(url, f"what it answered is no sound: {start!r}") from None
    return path


def _ask(address: str, said: str, key: str | None) -> bytes:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(address, said.encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            sound: bytes = answer.read(MOST_BYTES + 1)
            missing = answer.length  # of the bytes it announced
    except urllib.error.HTTPError as error:
        words = error.read(500).decode("utf-8", "replace").strip()
        hint = " (KINEMA_SPEECH_KEY holds its key)" if error.code in (401, 403) else ""
        raise _refused(address, f"it answered {error.code} {error.reason}{hint}: {words}") from error
    except (OSError, ValueError, HTTPException) as error:
        raise _refused(address, f"it cannot be reached: {getattr(error, 'reason', None) or error}") from error
    if len(sound) > MOST_BYTES:
        raise _refused(address, f"its answer is over {MOST_BYTES // 1_000_000} MB")
    if missing:
        raise _refused(address, f"its answer breaks off, {missing} bytes before its end")
    return sound


def _refused(url: str, why: str) -> RequestError:
    return RequestError(
        f"the speech service {url} did not speak: {why}",
        "check --speech-url, --speech-voice and --speech-model, or pass a sound file with --audio",
        field="speech_url",
        got=url,
    )
