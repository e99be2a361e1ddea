"""A teacher on a server: vLLM, or another that answers `/v1/completions` with `prompt_logprobs`.

Each document is sent by itself, as token numbers, up to its last supervised token; the server gives the most likely tokens at
every position and the log-probability of the token that stands there. So the rows are top-k rows, with the mass of all other
tokens in one bucket; log-probabilities come at temperature 1 only.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from textwrap import shorten
from typing import Any

import httpx
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import TeacherConfig
from ..data.batch import Batch
from ..data.tokenizers import vocabulary_size
from ..errors import ConfigError, ModelError
from ..losses.reduction import IGNORE_INDEX, loss_mask
from ..losses.sparse import TopKRows
from ..redaction import MASK, redact_text
from .cache_kinds import LEAST, SparseTargets

API_KEY = "MINI_DISTILL_API_KEY"
"""The only variable that is read: a key that was set for another service is not sent to this one."""

TRIES, TRIES_AT_START = 10, 3
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between tries, doubling; about two minutes in all, so that a server can be restarted."""

LONGEST_RETRY_AFTER = 300.0
IMPOSSIBLE = -9999.0
"""vLLM writes that for -inf."""

MASS_ROUNDING = 0.01
PADDING_MASS = 1e-3
"""Of token numbers beyond the tokenizer's: so little may fall on columns that pad the embedding, and not on another vocabulary."""

PROBE = "The quick brown fox jumps over 13 lazy dogs, doesn't it? — Sì!\n"
SAME_COMMAND = "The same command goes on where this one stopped, once it answers."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A document of a batch, as it is sent.

    Attributes:
        ids: Its tokens up to the last supervised one.
        targets: Where in them the supervised tokens stand, ascending; never 0.
    """

    ids: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Answers:
    """What the server says about some supervised tokens, on the CPU.

    Attributes:
        ids: `(n, k)` int64, the most likely first.
        log_probs: `(n, k)` float32.
        tail: `(n,)` float32, the mass of all other tokens.
        target_log_prob: `(n,)` float32, of the token that stands there.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    target_log_prob: Tensor


class ServerTeacher:
    """Asks a server for the most likely tokens at the supervised positions of a batch.

    Args:
        url: Of the server, with or without `/v1`.
        model: Its name there; None: the only one there is.
        k: Tokens at each position.
        tokenizer: That of the served model; its ids are sent and come back.
        num_requests: Requests at a time.
        timeout: Seconds to wait for an answer.
        tries: Requests before an outage is an error.

    Raises:
        ModelError: the server does not answer, does not serve the model, or its answers cannot be targets.
    """

    is_dense = False
    device = torch.device("cpu")

    def __init__(
        self,
        url: str,
        model: str | None,
        k: int,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_requests: int = 8,
        timeout: float = 120.0,
        tries: int = TRIES,
    ) -> None:
        self.connection = Connection(url, num_requests, timeout, tries)
        self.k, self.vocab_size, self.num_requests = k, vocabulary_size(tokenizer), num_requests
        self._latest: tuple[Tensor, Answers] | None = None
        self._asked: list[tuple[Tensor, list[Future[Answers]]]] = []
        self._pool, self._given_up = ThreadPoolExecutor(num_requests), threading.Event()
        if k > self.vocab_size:
            raise ConfigError("teacher.top_k", f"got {k}, and the vocabulary has {self.vocab_size} tokens")
        self.card = self._find_model(model)
        self.model = str(self.card["id"])
        self._check_tokenizer(tokenizer)
        self._check_answer(tokenizer)

    # ------------------------------------------------------------------------------------------------------------ its targets

    def __call__(self, batch: Batch) -> SparseTargets:
        """The targets at the supervised positions of `batch`, in row-major order, on its device.

        Raises:
            ModelError: the server refuses, is gone, or answers with something that is no distribution.
        """
        answers = self._answers(batch)
        rows = TopKRows(answers.ids, answers.log_probs, answers.tail, spread=False)
        return SparseTargets(rows.to(batch.labels.device))

    def about_teacher(self, batch: Batch) -> dict[str, Tensor]:
        """What the teacher itself makes of each token, `(supervised,)`: `target_log_prob`, `top_log_prob` and `top_id`."""
        answers = self._answers(batch)
        found = {"target_log_prob": answers.target_log_prob, "top_log_prob": answers.log_probs[:, 0], "top_id": answers.ids[:, 0]}
        return {name: values.to(batch.labels.device) for name, values in found.items()}

    def nothing(self) -> TopKRows:
        """Targets of no token at all."""
        none = torch.zeros(0)
        return TopKRows(none.long().view(0, 1), none.view(0, 1), none, spread=False)

    @property
    def identity(self) -> dict[str, str]:
        """What it is, wherever it is served: its name, its origin and its context length, as the server tells them."""
        root, length = self.card.get("root"), self.card.get("max_model_len")
        return {"weights": f"{self.model} (root {root}, max_model_len {length})", "dtype": "server"}

    @property
    def positions(self) -> int:
        """The longest sequence it reads; 0 when the server does not say."""
        length = self.card.get("max_model_len")
        return length if isinstance(length, int) else 0

    def check_length(self, seq_len: int) -> None:
        """One token more than it is sent has to fit: the server writes one.

        Raises:
            ConfigError: it does not.
        """
        if 0 < self.positions <= seq_len:
            what = f"got {seq_len}, and '{self.model}' reads {self.positions} tokens, of which the server writes one"
            remedy = f"Set data.seq_len={self.positions - 1}, or start it with a longer --max-model-len."
            raise ConfigError("data.seq_len", what, remedy)

    def ask(self, batch: Batch) -> list[Future[Answers]]:
        """Begin to ask about each document of a batch whose targets will be wanted; nothing is waited for."""
        futures = [self._pool.submit(self._ask, document, self._given_up) for document in prompts(batch)]
        self._asked.append((batch.input_ids, futures))
        return futures

    def give_up(self) -> None:
        """Ask nothing more of what was begun."""
        self._given_up.set()  # nobody waits for its next try
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._asked, self._pool, self._given_up = [], ThreadPoolExecutor(self.num_requests), threading.Event()

    def _answers(self, batch: Batch) -> Answers:
        """All documents at once, put together in their order; the latest batch is not asked for twice."""
        if self._latest is None or self._latest[0] is not batch.input_ids:
            if not any(asked is batch.input_ids for asked, _ in self._asked):
                self.ask(batch)
            (futures,) = (futures for asked, futures in self._asked if asked is batch.input_ids)
            self._latest = batch.input_ids, _together(self._wait_for(futures), self.k)
            self._asked = [(asked, futures) for asked, futures in self._asked if asked is not batch.input_ids]
        return self._latest[1]

    def _wait_for(self, futures: list[Future[Answers]]) -> list[Answers]:
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done() and (error := future.exception()) is not None:
                    raise error
            return [future.result() for future in futures]
        except BaseException:
            self.give_up()
            raise

    def _ask(self, document: Prompt, give_up: threading.Event | None = None, tries: int | None = None) -> Answers:
        """One document."""
        body = {
            "model": self.model,
            "prompt": document.ids,
            "max_tokens": 1,  # the least that it takes
            "temperature": 1.0,
            "prompt_logprobs": self.k,
        }
        answer = self.connection.request("POST", "/v1/completions", body, tries=tries, give_up=give_up)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        listed = choice.get("prompt_logprobs")
        if not isinstance(listed, list):
            what = f"{self.connection.url} answers without prompt_logprobs"
            raise ModelError("teacher.url", what, "Serve the model with vLLM: vllm serve <model> (other servers ignore that field).")
        if len(listed) != len(document.ids):
            raise self._wrong(f"gives {len(listed)} positions for {len(document.ids)} tokens")
        ids, log_probs, tails, target_log_probs = zip(*(self._row(listed[i], document.ids[i]) for i in document.targets), strict=True)
        return Answers(torch.tensor(ids), torch.tensor(log_probs), torch.tensor(tails), torch.tensor(target_log_probs))

    def _row(self, entries: Any, target: int) -> tuple[list[int], list[float], float, float]:
        """The k most likely tokens of a position, their log-probabilities, the mass of all others, and the log-probability of `target`."""
        listed = self._listed(entries)
        if target not in listed:
            raise self._wrong(f"does not list the token that was sent ({target}): it read another text")
        mass = sum(math.exp(min(value, 700.0)) for value in listed.values())
        if mass > 1 + MASS_ROUNDING:
            raise self._wrong(f"gives log-probabilities that add up to {mass:.4g}, expected at most 1")
        inside = {token: value for token, value in listed.items() if token < self.vocab_size}
        if target not in inside or sum(math.exp(value) for token, value in listed.items() if token not in inside) > PADDING_MASS:
            what = f"{self.connection.url} gives the token {max(listed)}, and the tokenizer's last is {self.vocab_size - 1}"
            raise ModelError("teacher.path", what, "Give the tokenizer of the model that is served.")
        likely = sorted(inside.items(), key=lambda entry: (-entry[1], entry[0]))[: self.k]
        tail = max(0.0, 1 - sum(math.exp(value) for _, value in likely))
        if missing := self.k - len(likely):  # columns that pad the embedding took their places: others share the mass of the rest
            share = tail / (self.vocab_size - len(likely))
            others = (token for token in range(self.vocab_size) if token not in inside)
            likely += [(token, math.log(max(share, math.exp(LEAST)))) for token, _ in zip(others, range(missing), strict=False)]
            likely.sort(key=lambda entry: -entry[1])  # their share may be more than the least of those that are listed
            tail -= missing * share
        bounded = [min(0.0, max(value, LEAST)) for _, value in likely]  # above 0 by rounding
        return [token for token, _ in likely], bounded, tail, min(0.0, max(listed[target], IMPOSSIBLE))

    def _listed(self, entries: Any) -> dict[int, float]:
        """Token -> log-probability of one position."""
        if not isinstance(entries, dict):
            raise self._wrong("says nothing about a token of the prompt")
        try:
            listed = {int(token): float(entry["logprob"]) for token, entry in entries.items()}
        except (TypeError, KeyError, ValueError) as error:
            raise self._wrong("gives a log-probability that is no number") from error
        if any(math.isnan(value) or value == math.inf for value in listed.values()):
            raise self._wrong("gives a log-probability that is not finite")
        if len(listed) < self.k:
            raise self._wrong(f"gives {len(listed)} tokens at a position, expected teacher.top_k={self.k}")
        if min(listed) < 0:
            raise self._wrong("gives a token with a negative number")
        return listed

    def _wrong(self, what: str) -> ModelError:
        return ModelError("teacher.url", f"{self.connection.url} {what}", "Update the server, or serve the model with another.")

    # --------------------------------------------------------------------------------------------------------- before training

    def _find_model(self, name: str | None) -> dict[str, Any]:
        """What the server says about the model."""
        answer = self.connection.request("GET", "/v1/models", tries=TRIES_AT_START)
        cards = answer.get("data") if isinstance(answer, dict) else None
        found = {str(card["id"]): card for card in cards or [] if isinstance(card, dict) and "id" in card}
        if not found:
            raise ModelError("teacher.url", f"{self.connection.url} lists no model", "Serve one: vllm serve <model>.")
        if name is None and len(found) == 1:
            return next(iter(found.values()))
        if name is None:
            raise ModelError("teacher.model", f"missing, and {self.connection.url} serves {_some(found)}", "Name one.")
        if name not in found:
            near = get_close_matches(name, list(found), n=1, cutoff=0.4)
            remedy = f"Did you mean '{near[0]}'?" if near else "Name one of them."
            raise ModelError("teacher.model", f"no '{name}' at {self.connection.url}, which serves {_some(found)}", remedy)
        return found[name]

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The server's own tokens of a text are ours; a server that cannot tokenise is believed."""
        body = {"model": self.model, "prompt": PROBE, "add_special_tokens": False}
        answer = self.connection.request("POST", "/tokenize", body, tries=TRIES_AT_START, missing_ok=True)
        theirs = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(theirs, list):
            return
        ours = tokenizer.encode(PROBE, add_special_tokens=False)
        if theirs != ours:
            at = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
            what = f"'{self.model}' at {self.connection.url} has another tokenizer (token {at} of a probe: {theirs[at : at + 1]} there, {ours[at : at + 1]} here)"
            raise ModelError("teacher.path", what, "Give the tokenizer of the model that is served.")

    def _check_answer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """A short text is scored as the training's will be."""
        ids = tokenizer.encode(PROBE, add_special_tokens=False)[:16]
        self._ask(Prompt(ids, list(range(1, len(ids)))), tries=TRIES_AT_START)


def open_server(teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> ServerTeacher | None:
    """The teacher on a server, asked once; None for the other kinds."""
    if teacher.kind != "server":
        return None
    assert teacher.url is not None
    return ServerTeacher(teacher.url, teacher.model, teacher.top_k, tokenizer, num_requests=teacher.num_requests, timeout=teacher.timeout)


def prompts(batch: Batch) -> list[Prompt]:
    """The documents of a batch that have supervised tokens, row by row; padding and what predicts nothing are left out."""
    found = []
    for row in range(len(batch)):
        ids, labels, positions = (tensor[row].tolist() for tensor in (batch.input_ids, batch.labels, batch.position_ids))
        starts = [i for i, position in enumerate(positions) if i == 0 or position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            targets = [i for i in range(1, end - start) if labels[start + i] != IGNORE_INDEX]
            if targets:
                found.append(Prompt(ids[start : start + targets[-1] + 1], targets))
    supervised = int(loss_mask(batch.labels).sum())
    assert sum(len(prompt.targets) for prompt in found) == supervised, "the first token of a document is supervised"
    return found


def _together(parts: list[Answers], k: int) -> Answers:
    if not parts:
        none = torch.zeros(0)
        return Answers(torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k), none, none)
    return Answers(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_probs", "tail", "target_log_prob")))


def _some(names: Any) -> str:
    listed = [f"'{name}'" for name in names]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


# --------------------------------------------------------------------------------------------------------------- the connection


class _Outage(Exception):
    """What may pass; with the seconds that the server wants to be left alone."""

    def __init__(self, what: str, seconds: float | None = None) -> None:
        super().__init__(what)
        self.seconds = seconds


class Connection:
    """JSON over HTTP, with patience for a server that is busy or being restarted. Used by several threads at a time.

    Args:
        url: Of the server, with or without `/v1`.
        num_requests: Connections at a time.
        timeout: Seconds to wait for an answer.
        tries: Requests before an outage is an error.
    """

    def __init__(self, url: str, num_requests: int, timeout: float, tries: int) -> None:
        self._base = url.rstrip("/").removesuffix("/v1")
        self._key = os.environ.get(API_KEY, "").strip()
        self.url, self.timeout, self.tries = self._clean(self._base), timeout, tries
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=num_requests, max_keepalive_connections=num_requests)
        try:
            httpx.URL(self._base)
            self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)), limits=limits)
        except (httpx.InvalidURL, ValueError) as error:
            raise ModelError("teacher.url", f"{self.url} is no address ({self._clean(str(error))})", "Give http://host:port.") from error
        self._random = random.Random()  # of its own: the run's random states stay as they are
        self._is_out = False

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        tries: int | None = None,
        missing_ok: bool = False,
        give_up: threading.Event | None = None,
    ) -> Any:
        """The answer's JSON.

        Args:
            method: GET or POST.
            path: Below the server's address.
            body: Sent as JSON.
            tries: Instead of the usual number.
            missing_ok: Whether a server without that path is no error; gives None.
            give_up: Set when nobody wants the answer any more.

        Raises:
            ModelError: the server refuses (4xx), stays unreachable or failing for all tries, or answers with something else.
        """
        tries = min(tries or self.tries, self.tries)
        for attempt in range(1, tries + 1):
            try:
                answer = self._attempt(method, path, body, missing_ok)
            except _Outage as outage:
                seconds = self._pause(attempt) if outage.seconds is None else outage.seconds
                if attempt == tries or seconds > LONGEST_RETRY_AFTER:
                    if missing_ok:
                        return None
                    times = f", {attempt} times" if attempt > 1 else ""
                    what = f"{self.url}{path} {outage}{times}"
                    raise ModelError("teacher.url", what, f"Is the server running? {SAME_COMMAND}") from None
                if not self._is_out:  # one line for an outage, however many requests it meets
                    self._is_out = True
                    logger.warning("%s%s %s; trying again for a while", self.url, path, outage)
                if (give_up or threading.Event()).wait(seconds):
                    break
            else:
                self._is_out = False
                return answer
        raise ModelError("teacher.url", f"{self.url}{path} was not waited for")  # not seen: another request has failed

    def _attempt(self, method: str, path: str, body: dict[str, Any] | None, missing_ok: bool) -> Any:
        """The JSON of one request; raises `_Outage` for what may pass."""
        try:
            response = self._client.request(method, self._base + path, json=body)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ModelError("teacher.url", f"{self.url} is no address ({self._clean(str(error))})", "Give http://host:port.") from error
        except httpx.TimeoutException as error:
            raise _Outage(f"does not answer within teacher.timeout={self.timeout:g} seconds") from error
        except httpx.RequestError as error:
            raise _Outage(f"cannot be reached ({type(error).__name__}: {self._clean(str(error))})") from error
        if response.status_code == 429 or response.status_code >= 500:
            raise _Outage(f"answers {response.status_code} ({self._message(response)})", _retry_after(response))
        if response.status_code != 200:
            if missing_ok:
                return None
            raise self._refused(path, response)
        try:
            return response.json()
        except ValueError as error:
            if missing_ok:
                return None
            kind = response.headers.get("content-type", "something else")
            what = f"{self.url}{path} answers with {self._clean(kind)}, expected JSON"
            raise ModelError("teacher.url", what, "Give the address of a vLLM server, such as http://host:8000.") from error

    def _refused(self, path: str, response: httpx.Response) -> ModelError:
        status, message = response.status_code, self._message(response)
        what = f"{self.url}{path} answers {status} ({message})"
        if status in (401, 403):
            key = "The key in it was refused" if self._key else "It is not set"
            return ModelError("teacher.url", what, f"The server wants a key, which is read from {API_KEY}. {key}.")
        if limit := re.search(r"logprobs.*max allowed: (\d+)", message):
            remedy = f"Start vLLM with a larger --max-logprobs, or set teacher.top_k={limit[1]}."
            return ModelError("teacher.top_k", what, remedy)
        if status == 404:
            return ModelError("teacher.url", what, "Give the address of a vLLM server, such as http://host:8000.")
        return ModelError("teacher.url", what)

    def _message(self, response: httpx.Response) -> str:
        """What the server says went wrong, in a line."""
        try:
            content: Any = response.json()
        except ValueError:
            content = re.sub(r"<[^>]*>", " ", response.text)
        if isinstance(content, dict):
            content = content.get("error", content.get("detail", content))
        if isinstance(content, dict):
            content = content.get("message", content)
        text = content if isinstance(content, str) else json.dumps(content)
        return self._clean(shorten(text, 200, placeholder=" …")) or response.reason_phrase or "no message"

    def _clean(self, text: str) -> str:
        """Without the key, whoever wrote it there."""
        return redact_text(text.replace(self._key, MASK) if self._key else text)

    def _pause(self, attempt: int) -> float:
        return min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1.0)


def _retry_after(response: httpx.Response) -> float | None:
    """The seconds of a Retry-After header, which holds them or a date."""
    text = response.headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
