"""A teacher on a server gives what the live teacher's top-k would be; whatever the server does wrong ends in a line, or is waited for."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import build, cache_config, cache_module, content
from runs import before_step, checkpoint_steps, rows, run, status, steps_of
from server_double import ServerDouble
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mini_distill.cli import load_config, report
from mini_distill.contract import build_config
from mini_distill.data.batch import Batch
from mini_distill.digest import digest_run
from mini_distill.errors import CacheError, ConfigError, ModelError, Preempted
from mini_distill.losses.divergences import forward_kl
from mini_distill.losses.reduction import IGNORE_INDEX, loss_mask, supervised_targets
from mini_distill.losses.sparse import TopKRows
from mini_distill.teachers import server
from mini_distill.teachers.bit_packing import unpack_rising
from mini_distill.teachers.cache_build import CacheBuilder
from mini_distill.teachers.online import OnlineTeacher
from mini_distill.teachers.server import API_KEY, ServerTeacher, prompts

VOCAB, K = 62, 5
SECRET = "p9-Lq"  # shorter than what is taken for a secret wherever it stands


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait between tries is long; no key is set."""
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(server, "LONGEST_WAIT", 0.02)
    monkeypatch.delenv(API_KEY, raising=False)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_llama(vocab=64, seed=1)  # the weights of `tiny_teacher`


@pytest.fixture
def start(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., ServerDouble]]:
    """Starts servers, which go away with the test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(ServerDouble(settings.pop("model", model), tiny_tokenizer, **settings).running())


@pytest.fixture
def double(start: Callable[..., ServerDouble]) -> ServerDouble:
    return start()


@pytest.fixture
def connect(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., ServerTeacher]:
    def open_teacher(double: ServerDouble, **settings: Any) -> ServerTeacher:
        where = {"url": double.url, "model": None, "k": K} | {
            name: settings.pop(name) for name in ("url", "model", "k") if name in settings
        }
        return ServerTeacher(**where, tokenizer=tiny_tokenizer, **{"timeout": 5.0, **settings})

    return open_teacher


def packed() -> Batch:
    """Two rows: three documents and padding; a prompt that is not supervised and one document."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCAB, (2, 24), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(9), torch.arange(2), torch.arange(8), torch.zeros(5)]).long(), torch.arange(24)])
    labels = ids.clone()
    labels[positions == 0] = IGNORE_INDEX
    labels[0, 19:] = labels[0, 16:19] = labels[1, :7] = labels[1, 10:12] = IGNORE_INDEX
    return Batch(ids, labels, positions, torch.arange(2), torch.ones_like(ids))


def padded() -> Batch:
    """One document in each row, of different lengths; one of them has nothing supervised."""
    ids = torch.randint(4, VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
    positions, labels = torch.zeros_like(ids), ids.clone()
    for row, length in enumerate((12, 5, 7, 2)):
        positions[row, :length], labels[row, length:] = torch.arange(length), IGNORE_INDEX
    labels[:, 0] = labels[2] = IGNORE_INDEX
    return Batch(ids, labels, positions, torch.arange(4), torch.ones_like(ids))


def live_log_probs(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    return OnlineTeacher(model)(batch).logits()[:, :VOCAB].log_softmax(-1)


# ------------------------------------------------------------------------------------------------------------------ its targets


@pytest.mark.parametrize("make", [packed, padded])
def test_it_gives_the_live_teachers_top_k(
    double: ServerDouble, connect: Callable[..., ServerTeacher], model: LlamaForCausalLM, make: Callable[[], Batch]
) -> None:
    batch, teacher = make(), connect(double)
    expected = live_log_probs(model, batch)
    rows, top = teacher(batch).rows(slice(None)), expected.topk(K)
    assert isinstance(rows, TopKRows) and not rows.spread and rows.ids.dtype == torch.int64
    torch.testing.assert_close(rows.log_probs, top.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows.ids, top.indices)
    torch.testing.assert_close(rows.tail, 1 - top.values.exp().sum(-1), rtol=1e-3, atol=1e-4)
    about = teacher.about_teacher(batch)
    targets = supervised_targets(batch.labels)
    torch.testing.assert_close(about["target_log_prob"], expected.gather(-1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(about["top_log_prob"], top.values[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(about["top_id"], top.indices[:, 0])


def test_a_document_is_sent_alone_and_no_further_than_its_last_supervised_token(
    double: ServerDouble, connect: Callable[..., ServerTeacher]
) -> None:
    batch, teacher = packed(), connect(double, num_requests=1)
    del double.asked[:]
    teacher(batch)
    sent = [body["prompt"] for body in double.completions]
    ids = batch.input_ids.tolist()
    assert sent == [ids[0][:9], ids[0][9:11], ids[0][11:16], ids[1]]
    assert all(body["max_tokens"] == 1 and body["temperature"] == 1 and body["prompt_logprobs"] == K for body in double.completions)


def test_prompts_cover_the_supervised_positions_in_their_order() -> None:
    for batch in (packed(), padded()):
        told = [prompt.ids[target] for prompt in prompts(batch) for target in prompt.targets]
        assert told == supervised_targets(batch.labels).tolist()
        assert sum(len(prompt.targets) for prompt in prompts(batch)) == loss_mask(batch.labels).sum()


def test_a_batch_that_is_asked_about_twice_is_sent_once(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    batch, teacher = packed(), connect(double)
    teacher(batch)
    before = len(double.asked)
    teacher.about_teacher(batch)
    assert len(double.asked) == before


def test_nothing_supervised_asks_nothing(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    batch, teacher = packed(), connect(double)
    batch.labels.fill_(IGNORE_INDEX)
    before = len(double.asked)
    rows = teacher(batch).rows(slice(None))
    assert rows.ids.shape == (0, K) and rows.tail.shape == (0,) and len(double.asked) == before
    assert rows.compare("forward_kl", forward_kl, torch.zeros(0, VOCAB), {}).shape == (0,)
    assert teacher.about_teacher(batch)["top_id"].shape == (0,)


def test_the_order_of_the_answers_does_not_matter(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    batch, teacher = packed(), connect(double, num_requests=4)
    expected = teacher(batch).rows(slice(None))
    lengths: list[int] = sorted(len(prompt.ids) for prompt in prompts(batch))
    for order in (lengths, lengths[::-1], [lengths[i] for i in (2, 0, 3, 1)]):
        double.delay = lambda prompt, order=order: 0.03 * order.index(len(prompt)) if len(prompt) in order else 0.0
        teacher._latest = None
        rows = teacher(batch).rows(slice(None))
        assert torch.equal(rows.ids, expected.ids) and torch.equal(rows.log_probs, expected.log_probs)


@pytest.mark.parametrize("num_requests", [1, 3])
def test_so_many_requests_run_at_a_time(double: ServerDouble, connect: Callable[..., ServerTeacher], num_requests: int) -> None:
    teacher = connect(double, num_requests=num_requests)
    double.delay = lambda prompt: 0.1
    teacher(packed())
    assert double.most_at_a_time == num_requests


def test_asking_draws_no_random_number_of_the_run(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    teacher, states = connect(double), (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[index]
    double.faults = ["503"]
    teacher(packed())
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_likely_columns_beyond_the_tokenizer_give_way_to_tokens(
    start: Callable[..., ServerDouble], connect: Callable[..., ServerTeacher], model: LlamaForCausalLM
) -> None:
    """An embedding that is padded: its further columns can come among the most likely tokens where all others are impossible."""
    peaked = LlamaForCausalLM(model.config)
    peaked.load_state_dict(model.state_dict())
    peaked.lm_head.weight.data.mul_(8)
    double, batch = start(model=peaked, padding=0.0), packed()
    rows = connect(double, k=20)(batch).rows(slice(None))
    expected = live_log_probs(peaked, batch)
    assert rows.ids.max() < VOCAB and all(len(set(row)) == 20 for row in rows.ids.tolist())
    assert (rows.log_probs.diff(dim=-1) <= 1e-6).all()
    torch.testing.assert_close(rows.log_probs[:, 0].exp(), expected.max(-1).values.exp(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(rows.log_probs.exp().sum(-1) + rows.tail, torch.ones(len(rows)), rtol=0, atol=1e-5)


def test_an_impossible_token_stays_a_finite_number(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    teacher = connect(double, num_requests=1)
    double.always = "minus infinity"
    rows = teacher(packed()).rows(slice(None))
    assert rows.log_probs.isfinite().all() and rows.log_probs.min() >= server.LEAST
    assert rows.compare("forward_kl", forward_kl, torch.zeros(len(rows), VOCAB).log_softmax(-1), {}).isfinite().all()


# ----------------------------------------------------------------------------------------------------- outages that are waited for


@pytest.mark.parametrize("faults", [["503", "503"], ["500"], ["502", "drops"], ["drops"], ["half"], ["429 0"], ["429"], ["hangs"]])
def test_what_passes_is_waited_for(
    double: ServerDouble, connect: Callable[..., ServerTeacher], faults: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = connect(double, timeout=0.4, num_requests=1)
    expected = connect(double)(packed()).rows(slice(None))
    double.faults = list(faults)
    with caplog.at_level(logging.WARNING):
        rows = teacher(packed()).rows(slice(None))
    assert torch.equal(rows.ids, expected.ids) and torch.equal(rows.log_probs, expected.log_probs) and not double.faults
    (message,) = [record.getMessage() for record in caplog.records if record.name == server.__name__]
    assert message.endswith("trying again for a while") and double.url in message


@pytest.mark.parametrize("seconds", ["1", formatdate(time.time() + 3600)], ids=["in seconds", "as a date"])
def test_retry_after_is_obeyed(
    double: ServerDouble, connect: Callable[..., ServerTeacher], seconds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = connect(double, num_requests=1)
    double.faults = [f"429 {seconds}"]
    started = time.monotonic()
    if seconds == "1":
        teacher(packed())
        assert time.monotonic() - started >= 1
    else:  # an hour: nobody waits for that
        with pytest.raises(ModelError, match=r"answers 429 \(slow down\)"):
            teacher(packed())
        assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("503", r"answers 503 \(status 503 of the double\), 3 times"),
        ("drops", "cannot be reached"),
        ("half", "cannot be reached"),
        ("hangs", r"does not answer within teacher\.timeout=0\.2 seconds, 3 times"),
    ],
)
def test_what_does_not_pass_ends_in_a_line(double: ServerDouble, connect: Callable[..., ServerTeacher], fault: str, words: str) -> None:
    teacher = connect(double, timeout=0.2, tries=3)
    double.always = fault
    started = time.monotonic()
    with pytest.raises(ModelError, match=words) as raised:
        teacher(packed())
    assert time.monotonic() - started < 5
    assert raised.value.exit_code == 4 and double.url in str(raised.value) and "goes on where this one stopped" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_one_refusal_ends_the_others_waits(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    teacher = connect(double, num_requests=4, tries=10)
    double.faults = ["429 200", "429 200", "429 200", "400"]
    started = time.monotonic()
    with pytest.raises(ModelError, match="answers 400"):
        teacher(packed())
    assert time.monotonic() - started < 3


# ------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fault", "where", "words"),
    [
        ("400", "teacher.url", r"/v1/completions answers 400 \(status 400 of the double\)"),
        ("old error", "teacher.url", r"answers 400 \(an older vLLM's words\)"),
        ("404", "teacher.url", "answers 404"),
        ("moved", "teacher.url", "answers 302"),
        ("html", "teacher.url", "answers with text/html, expected JSON"),
        ("no choice", "teacher.url", "without prompt_logprobs"),
        ("ignores", "teacher.url", "without prompt_logprobs.*vllm serve"),
        ("beyond", "teacher.path", "the token 1000, and the tokenizer's last is 61"),
        ("negative", "teacher.url", "negative"),
        ("nan", "teacher.url", "not finite"),
        ("infinite", "teacher.url", "not finite"),
        ("null", "teacher.url", "no number"),
        ("text", "teacher.url", "no number"),
        ("heavy", "teacher.url", "add up to"),
        ("few", "teacher.url", f"gives [12] tokens at a position, expected teacher.top_k={K}"),
        ("nothing", "teacher.url", "says nothing about a token"),
        ("list", "teacher.url", "says nothing about a token"),
        ("short", "teacher.url", r"gives \d+ positions for \d+ tokens"),
        ("another text", "teacher.url", "another text"),
    ],
)
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_wrong_answer_is_a_line(
    double: ServerDouble, connect: Callable[..., ServerTeacher], fault: str, where: str, words: str, when: str
) -> None:
    teacher = connect(double) if when == "later" else None
    double.always, before = fault, len(double.completions)
    with pytest.raises(ModelError, match=words) as raised:
        teacher(packed()) if teacher is not None else connect(double)
    (problem,) = raised.value.problems
    assert problem.where == where and double.url in problem.what
    assert problem.remedy or fault in ("400", "old error", "moved")
    assert len(double.completions) - before <= 8  # no second try
    assert "\n" not in str(raised.value)


def test_more_tokens_than_the_server_gives_are_explained(start: Callable[..., ServerDouble], connect: Callable[..., ServerTeacher]) -> None:
    with pytest.raises(
        ModelError, match=r"greater than max allowed: 3\)\. Start vLLM with a larger --max-logprobs, or set teacher\.top_k=3"
    ):
        connect(start(max_logprobs=3))


def test_more_tokens_than_there_are_is_a_line(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.top_k: got 63, and the vocabulary has 62 tokens"):
        connect(double, k=63)


def test_the_nearest_name_is_suggested(start: Callable[..., ServerDouble], connect: Callable[..., ServerTeacher]) -> None:
    double = start(name="org/Tiny-1B")
    assert connect(double, model="org/Tiny-1B").model == "org/Tiny-1B"
    with pytest.raises(
        ModelError, match=r"teacher\.model: no 'org/tiny1b' at .* which serves 'org/Tiny-1B'\. Did you mean 'org/Tiny-1B'\?"
    ):
        connect(double, model="org/tiny1b")


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_as_people_write_it(double: ServerDouble, connect: Callable[..., ServerTeacher], suffix: str) -> None:
    assert connect(double, url=double.url + suffix).model == "tiny"


def test_nobody_there_is_a_line(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    double.stop()
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"teacher\.url: http://127\.0\.0\.1:\d+/v1/models cannot be reached .*Is the server running\?"):
        connect(double)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("url", ["http://", "http://[", "ftp://127.0.0.1", "http://127.0.0.1:99999999", "http://a\nb"])
def test_what_is_no_address_is_a_line(connect: Callable[..., ServerTeacher], url: str, double: ServerDouble) -> None:
    with pytest.raises(ModelError, match=r"no address|cannot be reached"):
        connect(double, url=url, timeout=0.2)


def test_another_tokenizer_is_noticed(
    start: Callable[..., ServerDouble], connect: Callable[..., ServerTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    double = start()
    monkeypatch.setattr(double, "tokenizer", Shifted(double.tokenizer))
    with pytest.raises(
        ModelError, match=r"teacher\.path: 'tiny' at .* has another tokenizer \(token 0 of a probe: \[1\] there, \[0\] here\)"
    ):
        connect(double)


class Shifted:
    """Every token has the next number."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [token + 1 for token in self.tokenizer.encode(text, add_special_tokens=add_special_tokens)]


def test_a_server_that_cannot_tokenise_is_believed(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    double.tokenizes = False
    assert connect(double).model == "tiny"


def test_a_sequence_and_the_token_that_is_written_have_to_fit(double: ServerDouble, connect: Callable[..., ServerTeacher]) -> None:
    teacher = connect(double)
    teacher.check_length(127)
    with pytest.raises(ConfigError, match=r"data\.seq_len: got 128, and 'tiny' reads 128 tokens.*data\.seq_len=127"):
        teacher.check_length(128)


# ------------------------------------------------------------------------------------------------------------------ the secret


@pytest.mark.parametrize("shown", [SECRET, "sk-" + "x" * 30])
def test_the_key_is_sent_and_never_shown(
    start: Callable[..., ServerDouble],
    connect: Callable[..., ServerTeacher],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    shown: str,
) -> None:
    monkeypatch.setenv(API_KEY, shown)
    double = start(key=shown)
    caplog.set_level(logging.DEBUG, logger=server.__name__)
    teacher = connect(double, num_requests=1)
    double.faults = ["503"]
    teacher(packed())
    double.key = "another"
    with pytest.raises(ModelError, match=r"answers 401 \(Unauthorized: Bearer \*\*\*\).*MINI_DISTILL_API_KEY.*was refused") as raised:
        teacher(padded())
    assert shown not in str(raised.value) and shown not in repr(vars(teacher)) and shown not in caplog.text


def test_a_missing_key_is_asked_for_and_no_other_is_sent(
    start: Callable[..., ServerDouble], connect: Callable[..., ServerTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(ModelError, match=r"Unauthorized: None.*MINI_DISTILL_API_KEY\. It is not set"):
        connect(start(key=SECRET))


def test_a_password_in_the_address_is_not_shown(connect: Callable[..., ServerTeacher], double: ServerDouble) -> None:
    url = double.url.replace("http://", f"http://me:{SECRET}@")
    teacher = connect(double, url=url)
    double.always = "400"
    with pytest.raises(ModelError) as raised:
        teacher(packed())
    assert SECRET not in str(raised.value) and "***@127.0.0.1" in str(raised.value)


# ------------------------------------------------------------------------------------------------------------------- settings

SERVED = {"kind": "server", "url": "http://here:8000", "path": "some/model"}
STUDENT = {"kind": "hf", "path": "some/model"}


@pytest.mark.parametrize(
    ("where", "settings", "words"),
    [
        ("teacher.url", {"teacher": {**SERVED, "url": None}, "student": STUDENT}, "missing"),
        ("teacher.url", {"teacher": {**SERVED, "url": "here:8000"}, "student": STUDENT}, "http://"),
        ("teacher.path", {"teacher": {**SERVED, "path": None}, "student": STUDENT}, "tokenizer"),
        ("teacher.path", {"teacher": {**SERVED, "path": "./no_such"}, "student": STUDENT}, "no such file"),
        ("teacher.dtype", {"teacher": {**SERVED, "dtype": "float32"}, "student": STUDENT}, "on a server"),
        ("teacher.cache_dir", {"teacher": {**SERVED, "cache_dir": "."}, "student": STUDENT}, "teacher=cached"),
        ("student.kind", {"teacher": SERVED}, "student=mini_2m"),
        ("objective.temperature", {"teacher": SERVED, "student": STUDENT, "objective": {"temperature": 2.0}}, "objective.temperature=1"),
        (
            "objective.terms.jsd.temperature",
            {"teacher": SERVED, "student": STUDENT, "objective": {"terms": {"jsd": {"temperature": 3.0}}}},
            "temperature 1 only",
        ),
        *(
            (f"teacher.{name}", {"teacher": {name: value}}, "Choose teacher=server")
            for name, value in {"url": "http://x", "model": "x", "top_k": 3, "num_requests": 3, "timeout": 3.0}.items()
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line(where: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_config(settings)
    (problem,) = raised.value.problems
    assert problem.where == where and words in str(problem)


def test_settings_that_fit() -> None:
    config = load_config(
        ["teacher=server", "teacher.url=https://here/v1", "teacher.path=some/model", "student=mini_2m", "objective=reverse_kl"]
    )
    assert config.teacher.top_k == 20 and config.teacher.num_requests == 8
    build_config({"teacher": SERVED, "student": STUDENT, "objective": {"temperature": 2.0, "kl_weight": 0}})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["cache.kind=sampled"], r"cache\.kind: got sampled.*Set cache\.kind=topk cache\.k=20"),
        (["cache.kind=full"], "most likely tokens only"),
        (["cache.kind=hidden"], "most likely tokens only"),
        (["cache.kind=topk"], r"cache\.k: got 32, and teacher\.top_k is 20\. Set cache\.k=20, or teacher\.top_k=32"),
        (["cache.kind=topk", "cache.k=8", "cache.temperature=2"], "temperature 1 only"),
        (["cache.kind=topk", "cache.k=8", "teacher.url=null"], r"teacher\.url: missing"),
    ],
)
def test_a_cache_that_a_server_cannot_give_is_one_line(more: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        cache_config(["teacher=server", "teacher.url=http://here", "teacher.path=some/model"], tmp_path, *more)
    assert len(raised.value.problems) == 1


# -------------------------------------------------------------------------------------------------------------------- whole runs


FEW = "data.max_rows=30"


def served(tiny_command: list[str], double: ServerDouble, *more: str) -> list[str]:
    """The tiny run, its teacher on a server, its student from scratch."""
    kept = [text for text in tiny_command if text != "teacher=hf" and not text.startswith("student.")]
    student = ["student=mini_2m", "student.hidden_size=16", "student.num_layers=1", "student.num_heads=2", "student.num_kv_heads=1"]
    return [
        "teacher=server",
        *kept,
        *student,
        "student.intermediate_size=32",
        "trainer.max_steps=2",
        f"teacher.url={double.url}",
        FEW,
        *more,
    ]


def test_a_run_against_a_server_and_from_a_cache_of_it(
    start: Callable[..., ServerDouble], tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, SECRET)
    double = start(key=SECRET)
    command = served(tiny_command, double, "teacher.top_k=8")
    live = run(command, tmp_path / "live")
    assert live["train/steps"] == 2
    after = {row["step"]: row for row in rows(tmp_path / "live")}[2]
    assert after["eval/teacher_perplexity"] > 1 and 0 <= after["eval/top1_agreement"] <= 1 and 0 <= after["eval/teacher_ece"] <= 1
    assert not {"eval/forward_kl", "eval/reverse_kl"} & set(after)  # of a few tokens they would be lower bounds

    summary = build([*command, "teacher.top_k=10"], tmp_path / "cache", "cache.kind=topk", "cache.k=8")
    assert summary["cache/scored_sequences"] > 0 and 0 < summary["cache/captured_mass"] < 1
    description = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert description["identity"]["teacher"] == {"weights": "tiny (root org/tiny, max_model_len 128)", "dtype": "server"}
    from_cache = [text for text in command if not text.startswith("teacher")]
    cached = run(["teacher=cached", f"teacher.cache_dir={tmp_path / 'cache'}", *from_cache], tmp_path / "cached")
    shared = [key for key in live if key.startswith("eval/") and isinstance(live[key], float)]
    assert shared
    for key in shared:  # the cache holds log-probabilities in a byte each
        assert cached[key] == pytest.approx(live[key], rel=0.02, abs=0.01), key
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 20 and not [file for file in written if SECRET.encode() in file.read_bytes()]


def answered(double: ServerDouble, documents: int) -> None:
    """Waits until so many have been asked about."""
    for _ in range(500):
        if len(double.completions) >= documents:
            return
        time.sleep(0.01)
    raise AssertionError(f"{len(double.completions)} documents were asked about, not {documents}")


def test_a_step_is_asked_about_while_the_student_takes_the_one_before(
    double: ServerDouble, tiny_command: list[str], tmp_path: Path
) -> None:
    """Each step waited for its answers, and the server for the student."""
    command = [*served(tiny_command, double), "trainer.max_steps=3", "data.packing=false", "data.eval_fraction=0"]
    command += ["trainer.micro_batch_size=2", "trainer.grad_accum_steps=2"]
    double.delay = lambda prompt: 0.05
    asked: list[int] = []

    def before(step: int) -> None:
        asked.append(len(double.completions))
        if step > 1:
            answered(double, asked[0] + 4 * step)  # of this step already, although its batches are not known to the loop yet

    with before_step(1, partial(before, 1)), before_step(2, partial(before, 2)), before_step(3, partial(before, 3)):
        run(command, tmp_path / "ahead")
    assert len(double.completions) == asked[0] + 12  # nothing twice, and nothing beyond the last step

    @contextmanager
    def plain(_: Any, steps: Any) -> Iterator[Any]:
        yield steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_distill.distillation.asked_ahead", plain)
        run(command, tmp_path / "plain")
    assert digest_run(tmp_path / "ahead") == digest_run(tmp_path / "plain")


def test_a_run_that_is_stopped_does_not_wait_for_what_it_asked_ahead(double: ServerDouble, tiny_command: list[str], tmp_path: Path) -> None:
    command = [*served(tiny_command, double), "trainer.max_steps=5", "data.packing=false", "teacher.num_requests=1"]
    began: list[float] = []

    def stop() -> None:
        double.delay = lambda prompt: 1.0
        began.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    with before_step(3, stop), pytest.raises(Preempted):
        run(command, tmp_path)
    begun = len(double.completions)
    assert time.monotonic() - began[0] < 15 and checkpoint_steps(tmp_path)[-1] == 3
    time.sleep(1.2)
    assert len(double.completions) <= begun + 1  # the one that was under way


def test_a_cache_of_a_server_is_that_of_the_live_teacher(double: ServerDouble, tiny_command: list[str], tmp_path: Path) -> None:
    kind = ["cache.kind=topk", "cache.k=8", "cache.batch_size=3"]
    build([*tiny_command, FEW], tmp_path / "live", *kind)
    build(served(tiny_command, double), tmp_path / "served", *kind)
    for side in ("train", "held_out"):
        for file in (tmp_path / "live" / side).rglob("*.npy"):
            ours, theirs = np.load(tmp_path / "served" / file.relative_to(tmp_path / "live")), np.load(file)
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            if file.stem in ("log_tail", "ends", "target_log_prob", "top_log_prob"):
                np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)
            elif file.stem not in ("mark", "levels", "exact_entropy"):
                assert (ours == theirs).mean() > 0.99, file.stem
            elif file.stem == "levels":
                ours, theirs = (unpack_rising(values, 8).astype(int) for values in (ours, theirs))
                assert np.abs(ours - theirs).max() <= 1 or (ours == theirs).mean() > 0.99


def test_as_many_requests_run_at_a_time_as_are_allowed_whatever_a_batch_holds(
    double: ServerDouble, tiny_command: list[str], tmp_path: Path
) -> None:
    """Each batch was waited for: with two sequences in it no more than their documents were ever under way."""
    double.delay = lambda prompt: 0.02
    command = [*served(tiny_command, double), "teacher.num_requests=7", "data.packing=false"]
    build(command, tmp_path / "ahead", "cache.kind=topk", "cache.k=5", "cache.batch_size=2", "cache.shard_sequences=3")
    assert double.most_at_a_time == 7
    asked = [tuple(body["prompt"]) for body in double.completions]
    double.delay, double.most_at_a_time = lambda prompt: 0.0, 0
    build(
        [*command, "teacher.num_requests=1"],
        tmp_path / "one",
        "cache.kind=topk",
        "cache.k=5",
        "cache.batch_size=2",
        "cache.shard_sequences=3",
    )
    assert content(tmp_path / "ahead") == content(tmp_path / "one") and double.most_at_a_time == 1
    assert sorted(asked) == sorted(tuple(body["prompt"]) for body in double.completions[len(asked) :])  # nothing twice


def test_a_build_that_is_stopped_gives_up_what_it_asked_ahead(double: ServerDouble, tiny_command: list[str], tmp_path: Path) -> None:
    command = [*served(tiny_command, double), "teacher.num_requests=4", "data.packing=false"]
    shard, started = CacheBuilder._shard, time.monotonic()

    def stopped(*args: Any) -> Any:
        double.delay = lambda prompt: 1.0
        os.kill(os.getpid(), signal.SIGTERM)
        return shard(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(CacheBuilder, "_shard", stopped)
        build(command, tmp_path, "cache.kind=topk", "cache.k=5", "cache.batch_size=1")
    assert time.monotonic() - started < 30
    time.sleep(0.5)  # what was on its way arrives
    begun = len(double.completions)
    time.sleep(1.5)  # whoever had not given up would ask on as soon as these are answered
    assert len(double.completions) == begun


def test_a_cache_goes_on_at_another_address_and_is_verified_there(
    start: Callable[..., ServerDouble], tiny_command: list[str], tmp_path: Path
) -> None:
    first, second, other = start(), start(), start(name="other")
    kind = ["cache.kind=topk", "cache.k=8"]
    build(served(tiny_command, first), tmp_path, *kind)
    assert build(served(tiny_command, second), tmp_path, *kind)["cache/scored_sequences"] >= 0
    found = cache_module.verify(cache_config(served(tiny_command, second), tmp_path, *kind))
    assert 0 <= found["verify/mean_kl"] < 1e-3
    with pytest.raises(CacheError, match=r"teacher\.weights: the cache has .*tiny .*this run .*other "):
        build(served(tiny_command, other), tmp_path, *kind)


def test_a_run_goes_on_at_another_address(start: Callable[..., ServerDouble], tiny_command: list[str], tmp_path: Path) -> None:
    first, second, other = start(), start(), start(name="other")
    run(served(tiny_command, first), tmp_path / "run")
    longer = ["trainer.max_steps=3", "resume_allow=[trainer.max_steps]"]
    assert run(served(tiny_command, second, *longer), tmp_path / "run")["train/steps"] == 3
    with pytest.raises(ConfigError, match=r"teacher"):
        run(served(tiny_command, other, "trainer.max_steps=4", "resume_allow=[trainer.max_steps]"), tmp_path / "run")


def test_a_server_that_is_none_ends_a_run_before_its_first_step(
    double: ServerDouble, tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    double.always = "ignores"
    with pytest.raises(ModelError) as raised:
        run(served(tiny_command, double), tmp_path)
    assert report(raised.value) == 4
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"error: teacher.url: {double.url} answers without prompt_logprobs")
    assert status(tmp_path)["state"] == "failed" and not steps_of(tmp_path)
