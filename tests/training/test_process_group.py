"""What a process makes of the beats of the others. Whole runs of several processes are in faults/test_ranks.py."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mini_distill.errors import DataError, DistributedError, OutOfMemory, Preempted
from mini_distill.processes import is_stopped, this_machine
from mini_distill.training import process_group
from mini_distill.training.process_group import SILENT, STOPPED, _Peer, _Watch, ending_together


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> _Watch:
    """Of rank 0 of two, without a thread and a store; in step 7."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    watch = _Watch(stuck_after=100.0, on_end=None)
    watch.own.update(step=7, doing="")
    return watch


def hear(watch: _Watch, ago: float = 0.0, **beat: Any) -> None:
    """Rank 1 has said this so long ago."""
    said = {**watch._said(), "rank": 1, **beat}
    watch._peers[1] = _Peer(json.dumps(said).encode(), time.monotonic() - ago, said)


@contextmanager
def child() -> Iterator[int]:
    """A process of this machine that does nothing."""
    pid = os.fork()
    if pid == 0:
        time.sleep(100)
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_process_that_beats_or_has_only_fallen_silent_is_left_alone(watch: _Watch) -> None:
    """A thread can be kept from beating: by whatever holds Python's lock, or a network that pauses."""
    assert watch._find(SILENT) is None  # it has not come yet
    hear(watch)
    assert watch._find(SILENT) is None
    hear(watch, ago=1000.0)
    assert watch._find(SILENT) is None  # it is this very process: alive, not stopped
    hear(watch, ago=SILENT - 1, machine="another")
    assert watch._find(SILENT) is None


def test_a_machine_that_is_not_heard_of_is_named_with_host_and_process(watch: _Watch) -> None:
    hear(watch, ago=SILENT + 1, machine="another", host="node3", pid=4711)
    found = watch._find(SILENT)
    assert found is not None and found.grace == 0
    assert str(found.error) == (
        f"rank 1, step 7: not heard of for {SILENT + 1:.0f} s (process 4711 on node3): that machine, or the network, is down."
        " Rank 0 ends with it. The same command goes on from the last checkpoint."
    )
    hear(watch, ago=5.0, machine="another")
    assert watch._find(process_group.BROKEN) is not None  # an exchange has broken: it has to be somebody


def test_a_dead_process_of_this_machine_is_gone_unless_it_has_left(watch: _Watch) -> None:
    with child() as pid:
        hear(watch, pid=pid, start="")
        watch._exchange()
        assert watch._find(SILENT) is None
    watch._exchange()
    found = watch._find(SILENT)
    assert found is not None and "rank 1, step 7: gone without a word" in str(found.error) and found.grace > 0
    hear(watch, pid=pid, start="", left={"code": 0})
    watch._exchange()
    assert watch._find(SILENT) is None


def test_the_last_words_of_one_who_has_just_left_are_read_before_it_is_called_gone(watch: _Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both had saved and rank 1 was a little quicker: its beat was read, it left, its process was gone, and rank 0 ended in an error."""

    class Store:
        """What rank 1 has written."""

        def __init__(self, said: bytes) -> None:
            self.said = said

        def set(self, key: str, value: str) -> None: ...

        def multi_get(self, keys: list[str]) -> list[bytes]:
            return [self.said for _ in keys]

    with child() as pid:
        hear(watch, pid=pid, start="")
        store = Store(watch._peers[1].text)
        monkeypatch.setattr(watch, "_store", store)
        watch._exchange()
    assert watch._find(SILENT) is None  # what was read is older than its end
    store.said = json.dumps({**watch._peers[1].beat, "left": {"code": 0}}).encode()
    watch._exchange()
    assert watch._find(SILENT) is None and not watch._peers[1].is_here
    hear(watch, pid=pid, start="")
    store.said = watch._peers[1].text
    watch._exchange()
    assert watch._find(SILENT) is not None  # it has said nothing more


def test_a_stopped_process_of_this_machine_is_found_after_a_while(watch: _Watch) -> None:
    with child() as pid:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        assert is_stopped(pid) and not is_stopped(os.getpid())
        hear(watch, ago=STOPPED - 1, pid=pid, start="")
        assert watch._find(SILENT) is None
        hear(watch, ago=STOPPED + 1, pid=pid, start="")
        found = watch._find(SILENT)
        assert found is not None and "rank 1, step 7: stopped for 8 s" in str(found.error)
        hear(watch, ago=STOPPED + 1, pid=pid, start="", machine="another")
        assert watch._find(SILENT) is None  # the number is another process's there


def test_processes_that_share_a_host_name_only_do_not_look_for_each_other(watch: _Watch) -> None:
    """In two containers of a host, or two machines from one image, the number of the other is nobody's, or somebody else's."""
    hear(watch, machine="another", pid=2**22 + 1)
    assert watch._peers[1].beat["host"] == watch.own["host"] and watch._find(SILENT) is None
    assert this_machine() == watch.own["machine"]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            DistributedError("rank 1, step 3", "ValueError: a bug", "The traceback stands above."),
            DistributedError,
            "rank 1, step 3: ValueError: a bug. Rank",
        ),
        (
            DataError("a.jsonl:3", "not JSON", "Mend it."),
            DistributedError,
            "rank 1, step 3: ended with: a.jsonl:3: not JSON. Mend it. Rank",
        ),
        (Preempted("step 0", "stopped by SIGTERM", "", 143), Preempted, "rank 1, step 3: ended with: step 0: stopped by SIGTERM. Rank"),
        (KeyboardInterrupt(), Preempted, "rank 1, step 3: ended by KeyboardInterrupt. Rank"),
        (SystemExit(0), DistributedError, "rank 1, step 3: ended by SystemExit. Rank"),
    ],
)
def test_an_error_of_another_process_is_told_in_its_words(watch: _Watch, error: BaseException, kind: type, words: str) -> None:
    other = {**watch.own, "rank": 1, "step": 3}
    own, watch.own = watch.own, other
    last_words = watch._last_words(error)
    watch.own = own
    hear(watch, left=last_words)
    found = watch._find(SILENT)
    assert found is not None and type(found.error) is kind and str(found.error).startswith(words) and found.grace > 0


def test_who_is_gone_is_told_before_those_who_ended_because_of_it(watch: _Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    hear(watch, left={"code": 8, "where": "rank 1, step 7", "what": "another process of the group is gone"})
    watch._peers[2] = _Peer(b"", time.monotonic(), {**watch._said(), "rank": 2, "pid": 2**22 + 1})
    watch._exchange()
    found = watch._find(SILENT)
    assert found is not None and str(found.error).startswith("rank 2, step 7: gone without a word")


@pytest.mark.parametrize(
    ("own", "other", "where"),
    [
        ({"met": 9, "still": 0}, {"met": 8, "still": 200}, "rank 1, step 7: stuck for 100 s while the others wait (rank 1 at x.py:1 (f))"),
        ({"met": 8, "still": 200}, {"met": 9, "still": 0}, "rank 0, step 7: stuck for 100 s while the others wait (rank 0 at x.py:1 (f))"),
        (
            {"met": 9, "still": 200},
            {"met": 9, "still": 200},
            "rank 0, step 7: stuck for 100 s (rank 0 at x.py:1 (f); rank 1 at x.py:1 (f))",
        ),
        ({"met": 9, "still": 200}, {"met": 8, "still": 50}, None),  # it computes, or moves
        ({"met": 9, "still": 200}, {"met": 8, "still": 200, "alone": 50}, None),  # it has met somebody since
        ({"met": 9, "still": 200}, {"met": 8, "still": 200, "doing": "loading"}, None),  # waiting for a cache that another run writes
        ({"met": 9, "still": 200}, {"met": 8, "still": 200, "left": {"code": 0}}, None),
    ],
)
def test_who_is_behind_and_stands_still_is_stuck(watch: _Watch, own: Any, other: Any, where: str | None, monkeypatch: Any) -> None:
    usual = {**watch._said(), "alone": 200.0, "place": "x.py:1 (f)"}
    monkeypatch.setattr(watch, "_said", lambda: {**usual, **own})
    hear(watch, **other)
    found = watch._find_stuck()
    assert (found is None) if where is None else (found is not None and str(found.error).startswith(where))
    watch._stuck_after = None
    assert watch._find_stuck() is None


def test_a_main_thread_moves_while_it_goes_from_line_to_line_or_computes(watch: _Watch) -> None:
    release, places = threading.Event(), []

    def still(body: Any) -> float:
        thread = threading.Thread(target=body)
        thread.start()
        watch._main = thread.ident or 0
        for _ in range(4):
            time.sleep(0.1)
            watch._look_at_main_thread()
        places.append(watch._place)
        stood = float(watch._said()["still"])
        release.set()
        thread.join()
        release.clear()
        return stood

    def computes() -> None:
        while not release.is_set():
            sum(range(100_000))

    assert still(lambda: release.wait(20)) > 0.25 and "threading.py" in places[0]
    assert still(computes) < 0.1 and "(computes)" in places[1]


def test_who_was_stopped_himself_blames_nobody(watch: _Watch) -> None:
    hear(watch, ago=SILENT + 50, machine="another")
    watch._looked = time.monotonic() - 60  # the thread was not run meanwhile
    watch._exchange()
    assert watch._find(SILENT) is None


def test_with_one_process_nothing_is_watched_and_errors_stay_what_they_are() -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match="a bug"), ending_together():
        assert threading.active_count() == threads
        raise ValueError("a bug")
    with pytest.raises(OutOfMemory), ending_together():
        raise torch.OutOfMemoryError("CUDA out of memory")
