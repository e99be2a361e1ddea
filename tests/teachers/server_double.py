"""A small real HTTP server that answers as vLLM does, from a model of transformers, and can be told to misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Fault = str
"""What becomes of a request for a completion; see `ServerDouble._misbehave` and `_bend`."""


class ServerDouble:
    """The server and what it was asked.

    Args:
        model: Its teacher.
        tokenizer: Columns of the logits beyond it are padding, and as unlikely as `padding` says.
        name: The model's name here.
        max_logprobs: vLLM's own limit.
        max_model_len: Tokens that prompt and completion may have together.
        key: What a client has to show.
        padding: Logit of the columns that pad the vocabulary.

    Attributes:
        faults: Each is taken by one request for a completion, the first by the first.
        always: The fault of all further ones.
        delay: Seconds that the completion of a prompt takes besides.
        asked: Path and body of every request, in the order of their arrival.
        most_at_a_time: Completions that were under way together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "tiny",
        max_logprobs: int = 20,
        max_model_len: int = 128,
        key: str | None = None,
        padding: float = -1e4,
    ) -> None:
        self.model, self.tokenizer, self.name, self.key = model.eval(), tokenizer, name, key
        self.max_logprobs, self.max_model_len, self.padding = max_logprobs, max_model_len, padding
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.delay: Callable[[list[int]], float] = lambda prompt: 0.0
        self.asked: list[tuple[str, Any]] = []
        self.tokenizes, self.most_at_a_time, self._now = True, 0, 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                double._answer(self, None)

            def do_POST(self) -> None:
                double._answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def running(self) -> Iterator[ServerDouble]:
        """Serve until the end of the block."""
        self._thread.start()
        try:
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        """Go away; whoever connects is refused."""
        self._closed.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def completions(self) -> list[dict[str, Any]]:
        """The bodies of the requests for completions."""
        return [body for path, body in self.asked if path == "/v1/completions"]

    # ------------------------------------------------------------------------------------------------------------------ routes

    def _answer(self, request: BaseHTTPRequestHandler, body: Any) -> None:
        with self._lock:
            self.asked.append((request.path, body))
        if request.path.startswith("/v1") and self.key and request.headers["Authorization"] != f"Bearer {self.key}":
            self._error(request, 401, f"Unauthorized: {request.headers['Authorization']}")  # as careless as some are
        elif request.path == "/v1/models":
            card = {"id": self.name, "object": "model", "root": f"org/{self.name}", "max_model_len": self.max_model_len}
            self._send(request, 200, {"object": "list", "data": [card]})
        elif request.path == "/tokenize" and self.tokenizes:
            tokens = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            self._send(request, 200, {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens})
        elif request.path == "/v1/completions":
            self._complete(request, body)
        else:
            self._send(request, 404, {"detail": "Not Found"})

    def _complete(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            fault = self.faults.pop(0) if self.faults else self.always
            self._now += 1
            self.most_at_a_time = max(self.most_at_a_time, self._now)
        try:
            self._closed.wait(self.delay(body["prompt"]))
            if fault is None or not self._misbehave(request, fault):
                self._score(request, body, fault)
        finally:
            with self._lock:
                self._now -= 1

    def _score(self, request: BaseHTTPRequestHandler, body: dict[str, Any], fault: Fault | None) -> None:
        k = body.get("prompt_logprobs") or 0
        if body["model"] != self.name:
            self._error(request, 404, f"The model `{body['model']}` does not exist.")
        elif k > self.max_logprobs:
            self._error(request, 400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}")
        elif len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            self._error(request, 400, f"This model's maximum context length is {self.max_model_len} tokens.")
        else:
            choice: dict[str, Any] = {"index": 0, "text": "a", "logprobs": None, "finish_reason": "length", "stop_reason": None}
            if fault != "ignores":
                choice["prompt_logprobs"] = _bend(fault, self._prompt_logprobs(body["prompt"], k))
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
            self._send(request, 200, {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": [choice], "usage": usage})

    @torch.no_grad()
    def _prompt_logprobs(self, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
        """As vLLM: nothing for the first token; then the k most likely, and the token that stands there."""
        logits = self.model(torch.tensor([prompt])).logits[0, :-1].float()
        logits[:, len(self.tokenizer) :] = self.padding
        listed: list[dict[str, Any] | None] = [None]
        for row, target in zip(logits.log_softmax(-1), prompt[1:], strict=True):
            ids = [*row.topk(k).indices.tolist()]
            ranks = {token: rank for rank, token in enumerate(ids, 1)} | {target: int((row >= row[target]).sum())}
            names = {token: str(self.tokenizer.convert_ids_to_tokens(min(token, len(self.tokenizer) - 1))) for token in ranks}
            entries = {
                str(token): {"logprob": row[token].item(), "rank": rank, "decoded_token": names[token]} for token, rank in ranks.items()
            }
            listed.append(dict(sorted(entries.items(), key=lambda entry: int(entry[0]))))  # their order tells nothing
        return listed

    def _misbehave(self, request: BaseHTTPRequestHandler, fault: Fault) -> bool:
        """Faults that are no answer; whether it was one."""
        if fault.isdecimal():
            self._error(request, int(fault), f"status {fault} of the double")
        elif fault.startswith("429 "):  # after so many seconds
            self._send(request, 429, {"error": {"message": "slow down"}}, {"Retry-After": fault.split(" ", 1)[1]})
        elif fault == "drops":
            request.close_connection = True
            request.connection.close()
        elif fault == "half":
            request.send_response(200)
            request.send_header("Content-Length", "1000")
            request.end_headers()
            request.wfile.write(b'{"choices": [')
            request.close_connection = True
        elif fault == "hangs":
            self._closed.wait(20)
        elif fault == "html":
            self._send(request, 200, "<html><body>Welcome</body></html>")
        elif fault == "moved":
            self._send(request, 302, "", {"Location": "/elsewhere"})
        elif fault == "old error":
            self._send(request, 400, {"object": "error", "message": "an older vLLM's words", "code": 400})
        elif fault == "no choice":
            self._send(request, 200, {"choices": []})
        else:
            return False
        return True

    def _error(self, request: BaseHTTPRequestHandler, status: int, message: str) -> None:
        self._send(request, status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})

    def _send(self, request: BaseHTTPRequestHandler, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        request.send_response(status)
        request.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        request.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)


def _bend(fault: Fault | None, listed: list[dict[str, Any] | None]) -> Any:
    """Faults within an answer, at its last position."""
    last = listed[-1]
    assert last is not None
    best = max(last, key=lambda token: last[token]["logprob"])
    values = {"nan": float("nan"), "infinite": float("inf"), "null": None, "heavy": 0.5, "minus infinity": -float("inf"), "text": "often"}
    if fault in values:
        last[best]["logprob"] = values[fault]
    elif fault == "beyond":
        last["1000"] = last.pop(best)
    elif fault == "negative":
        last["-1"] = last.pop(best)
    elif fault == "few":
        listed[-1] = {best: last[best]}
    elif fault == "nothing":
        listed[-1] = None
    elif fault == "short":
        listed.pop()
    elif fault == "another text":
        listed[-1] = {str(token): {"logprob": -9.0 - token} for token in range(62) if str(token) not in last}
    elif fault == "list":
        listed[-1] = [last]  # type: ignore[call-overload]
    return listed
