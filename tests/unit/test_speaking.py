"""Text to speech through a real server on this machine that answers as OpenAI's does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kinema.engine import Engine
from kinema.errors import RequestError
from kinema.media.audio import audio_facts
from kinema.media.speaking import speak
from kinema.schema import Request, Settings
from kinema.settings import configure
from sounds import save_sound, tone_with_clicks
from speech_world import inputs


class Server(ThreadingHTTPServer):
    """Speaks one sound to whoever has the key, and remembers what it was asked."""

    sound: bytes = b""
    asked: list[dict[str, object]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Voice(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        if body["input"] == "secret" and self.headers.get("Authorization") != "Bearer right":
            return self._answer(401, b'{"error": "wrong key"}')
        missing = 100 if body["voice"] == "hoarse" else 0
        self._answer(200, b"<html>not sound</html>" if body["voice"] == "broken" else self.server.sound, missing)

    def _answer(self, code: int, body: bytes, missing: int = 0) -> None:
        if self.server.asked[-1]["voice"] == "mute":
            self.wfile.write(b"no protocol at all\r\n\r\n")
            return
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Voice) as made:
        made.asked = []
        made.sound = save_sound(tmp_path / "said.wav", tone_with_clicks(1.1, 24_000), 24_000).read_bytes()
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_what_is_said_is_kept_and_asked_for_once(server: Server, tmp_path: Path):
    first = speak("hello", server.url, "alloy", "tts-1", tmp_path / "kept")
    again = speak("hello", server.url + "/audio/speech", "alloy", "tts-1", tmp_path / "kept")
    other = speak("hello", server.url, "nova", "tts-1", tmp_path / "kept")
    assert first == again != other and audio_facts(first).seconds == pytest.approx(1.1)
    assert [said["voice"] for said in server.asked] == ["alloy", "nova"]
    assert server.asked[0] == {
        "path": "/v1/audio/speech", "key": None, "model": "tts-1", "input": "hello", "voice": "alloy",
        "response_format": "wav",
    }  # fmt: skip


def test_the_key_is_sent_where_there_is_one(server: Server, tmp_path: Path):
    assert speak("secret", server.url, "alloy", "tts-1", tmp_path, "right").is_file()
    with pytest.raises(RequestError, match=r"401.*KINEMA_SPEECH_KEY.*wrong key"):
        speak("secret", server.url, "nova", "tts-1", tmp_path, "wrong")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "localhost:8880", "file:///etc/passwd"])
def test_a_service_that_is_not_there_is_an_error_with_advice(tmp_path: Path, url: str):
    with pytest.raises(RequestError, match=r"cannot be reached|no web address"):
        speak("hello", url, "alloy", "tts-1", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_answer_that_is_no_sound_is_not_kept(server: Server, tmp_path: Path):
    with pytest.raises(RequestError, match=r"no sound.*not sound"):
        speak("hello", server.url, "broken", "tts-1", tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize(("voice", "words"), [("hoarse", "breaks off, 100 bytes"), ("mute", "no protocol at all")])
def test_an_answer_that_breaks_off_or_is_no_http_is_not_kept(server: Server, tmp_path: Path, voice: str, words: str):
    with pytest.raises(RequestError, match=words):
        speak("hello", server.url, voice, "tts-1", tmp_path)
    assert not list(tmp_path.glob("speech-*"))


def test_the_key_comes_from_the_environment_and_is_not_shown():
    configuration = configure({"KINEMA_SPEECH_KEY": "right"})
    key = configuration.settings.speech_key
    assert key is not None and key.get_secret_value() == "right"
    assert "right" not in repr(configuration) and not configuration.notes


@pytest.fixture
def settings(speech_settings: Settings, tmp_path: Path) -> Settings:
    return speech_settings.model_copy(update={"cache": tmp_path / "cache"})


def request(folder: Path, **fields: object) -> Request:
    given = inputs(folder)
    return Request(model="tiny-s2v", prompt="a cat", reference=given["reference"], device="cpu", **fields)


def test_a_request_speaks(server: Server, settings: Settings, tmp_path: Path):
    asked = request(tmp_path, speech_text="a cat walks", speech_url=server.url, speech_voice="nova")
    with Engine(settings) as engine:
        plan, again = engine.plan(asked), engine.plan(asked)
    assert plan.speech is not None and plan.speech == again.speech and len(server.asked) == 1
    assert plan.speech.audio.parent == tmp_path / "cache" / "speech" and plan.speech.audio in plan.files
    assert plan.frames == 18 - 3  # 1.1 s at 16 fps, less the first three


def test_no_network_is_used_unless_asked(server: Server, settings: Settings, tmp_path: Path):
    with Engine(settings) as engine:
        engine.plan(request(tmp_path, audio=inputs(tmp_path)["audio"], speech_url=server.url))
    assert server.asked == []
