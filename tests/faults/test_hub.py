"""What a hub answers, over HTTP: one line that says what to do, without the token that was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from runs import command_line

from faults.record import record

TOKEN = "hf_0123456789abcdefghijklmnopqrstuv"
ANSWERS = {
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model org/name is restricted."}, "Accept the licence"),
    "wrong token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "refuses the token"),
    "gated, not logged in": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "You must be authenticated."}, "Accept the licence"),
    "no such repository": (404, {"X-Error-Code": "RepoNotFound"}, "neither a folder nor a repository on the hub"),
    "out of order": (500, {}, "from the hub"),
}


@contextmanager
def hub(status: int, headers: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything alike; its address, and what it was shown as authorisation."""
    shown: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization", ""))
            body = json.dumps({"error": headers.get("X-Error-Message", "no")}).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", shown
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in ("gated", "wrong token") else pytest.mark.slow) for case in ANSWERS]
)
def test_what_the_hub_answers_is_one_line_without_the_token(case: str, tiny_command: list[str], tmp_path: Path) -> None:
    status, headers, words = ANSWERS[case]
    with hub(status, headers) as (address, shown):
        online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        settings = {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), **online}
        process = command_line(tiny_command, tmp_path / "run", "teacher.path=org/name", "teacher.revision=main", **settings)
        out, errors = process.communicate(timeout=150)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert process.returncode == 4 and len(lines) == 1 and "Traceback" not in errors, errors
    assert lines[0].startswith("error: teacher.") and words in lines[0] and lines[0] == errors.strip().splitlines()[-1], errors
    assert any(TOKEN in text for text in shown)  # the server was really asked, as it would be
    written = out + errors + "".join(file.read_text(errors="replace") for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert TOKEN not in written
    record("answers of a hub", injected=1, fired=1, refused=1)
