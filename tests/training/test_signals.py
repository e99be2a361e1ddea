from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mini_distill.training.signals import SAME_PRESS, StopRequest

PROGRAM = """
import os, sys, time
from mini_distill.training.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for step in range(1000):
        time.sleep(0.02)
        if stop.requested:
            print("saved", stop.signal_name, flush=True)
            {after}
            sys.exit(stop.exit_code)
"""


@contextmanager
def running(after: str = "") -> Iterator[subprocess.Popen[str]]:
    code = PROGRAM.format(after=after)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_lets_the_step_finish_and_the_run_save(number: signal.Signals, code: int) -> None:
    with running() as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (code, f"saved {number.name}\n")
    assert len(err.strip().splitlines()) == 1 and f"{number.name}: finishing what is under way, then saving" in err


def test_a_second_ctrl_c_stops_at_once() -> None:
    with running(after="time.sleep(60)") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stdout.readline() == "saved SIGINT\n"
        time.sleep(SAME_PRESS + 0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err


def test_one_press_that_arrives_twice_and_repeated_sigterms_do_not_cut_the_save_short() -> None:
    """A terminal sends Ctrl-C to every process of the group, and torchrun passes its own on: each worker gets two."""
    with running(after="time.sleep(1)") as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None and process.stdout.readline() == "saved SIGINT\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 130


@pytest.mark.parametrize("when", ["before", "within"])
def test_one_within_another_hears_what_the_other_does(when: str) -> None:
    """A run that writes its targets first lost a SIGTERM that came to the one or to the other: it waited, or trained, for ever."""
    with StopRequest() as outer:
        if when == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest() as inner:
            if when == "within":
                os.kill(os.getpid(), signal.SIGTERM)
            assert inner.requested and inner.exit_code == 143
        assert outer.requested and outer.signal_name == "SIGTERM"


def test_the_old_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) not in before
        assert (stop.requested, stop.exit_code, stop.signal_name) == (False, None, None)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_ending_says_what_happened_and_how_to_go_on() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        error = stop.preempted(12)
    assert (error.exit_code, str(error)) == (143, "step 12: stopped by SIGTERM and saved. The same command goes on from here.")
    assert StopRequest().preempted(3).exit_code == 143  # another rank got the signal


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def body() -> None:
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_forked_data_worker_ignores_ctrl_c_and_still_ends_on_sigterm() -> None:
    """The handler is inherited: workers that could not be terminated held up the end of the run."""
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGINT)
        time.sleep(0.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not stop.requested
