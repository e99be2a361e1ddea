"""Several processes end together: each shows that it lives, and ends where another died, hangs, or ended in an error.

A thread of each process writes a beat a second into the store of the group (torch's TCPStore, kept by torchrun or by rank 0): the step,
where the main thread stands and for how long, how often it has met the others. It reads those of the others, and ends its process when one

    is gone             no process of this number is left on this machine               after GRACE seconds
    is stopped          on this machine, without a beat for STOPPED seconds             at once, and it is killed
    is not heard of     on another machine, for SILENT seconds                          at once
    ended in an error   as its last beat says                                           after AFTER_ERROR seconds
    is stuck            it has stood at one place for `trainer.stuck_after` seconds     at once
                        without computing, and the others wait for it

The main thread is left some seconds to find out by itself, from an exchange that breaks: then the run ends in good order. One that
waits in an exchange for ever cannot be woken: then the thread says the line, writes the status and ends the process.

A healthy run is left alone. Beats come whatever the main thread does. Whoever evaluates, compiles, reads or writes for hours while the
others wait computes, or moves from line to line. A process that was itself stopped, as by a laptop that slept, blames nobody.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from ..errors import ConfigError, DistributedError, MiniDistillError, Preempted
from ..out_of_memory import is_out_of_memory, out_of_memory
from ..processes import is_alive, is_stopped, process_start_of, this_host, this_machine
from ..redaction import print_traceback, redact_text

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT = 1.0
GRACE = 3.0
STOPPED = 7.0
SILENT = 60.0
AFTER_ERROR = 6.0
BROKEN = 3.0
"""Seconds without a beat after which another machine is taken for gone when an exchange has broken."""
COMPUTES = 0.1
"""Share of a core from which on a process computes."""
COME_WITHIN = timedelta(minutes=30)
EXCHANGE_WITHIN = timedelta(days=1)
"""The backend's own limit, which knows nothing of beats: longer than what one process does alone, such as tokenising."""
GO_ON = "The same command goes on from the last checkpoint."


@contextlib.contextmanager
def ending_together(stuck_after: float | None = None, on_end: Callable[[MiniDistillError], None] | None = None) -> Iterator[None]:
    """The life of a run on this process and, where there are several, with the others. Inside another one nothing is watched anew.

    With several processes an unexpected error becomes a line that names the one it happened on, and the step.

    Args:
        stuck_after: Seconds, as `trainer.stuck_after`; None: never.
        on_end: Given the error where the process is ended from the thread, and nothing is left in good order.

    Raises:
        DistributedError: another process died, hangs or ended in an error; or something unexpected happened in this one.
        OutOfMemory: also with one process.
        ConfigError: the student cannot be compiled here; also with one process.
    """
    global _watch
    watch = _Watch(stuck_after, on_end) if _is_one_of_several() and _watch is None else None
    if watch is not None:
        _watch = watch
        watch.start()
    error: BaseException | None = None
    try:
        yield
    except BaseException as found:
        error = _named(found) if isinstance(found, Exception) else found
        if error is found:
            raise
        raise error from found
    finally:
        if watch is not None:
            watch.leave(error)
            _watch = None


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def start_processes(precision: str, num_threads: int | None) -> Accelerator:
    """The process group, device and precision.

    Raises:
        DistributedError: weights were to be sharded, or more processes were launched than joined the group.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    on_gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    AcceleratorState._reset_state()  # of another run in this process, as in a sweep: its precision is not ours
    _refuse_sharding()
    accelerator = start_accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=not on_gpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise DistributedError(
            "torch.distributed",
            f"{launched} processes were launched, but the group has {accelerator.num_processes}",
            "Start with torchrun --nproc_per_node N -m mini_distill.train.",
        )
    return accelerator


def _refuse_sharding() -> None:
    """By what a launcher says of itself: on a CPU, and with a single process, accelerate passes over it and shards nothing.

    Raises:
        DistributedError: weights were to be sharded.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1", "yes", "on"):
            what = f"accelerate is set up for {name} (ACCELERATE_USE_{name}), and checkpoints of sharded weights are not written here"
            raise DistributedError("torch.distributed", what, "Start with torchrun, which replicates the student (DDP).")


def start_accelerator(**settings: Any) -> Accelerator:
    """Accelerate, once all processes are there.

    Raises:
        DistributedError: one did not come.
    """
    if _watch is not None:
        _watch.wait_for_all()
        settings["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=EXCHANGE_WITHIN)]
    return _Counting(**settings)


def note(step: int, doing: str = "") -> None:
    """The main thread is about to do optimizer step `step`, or something after it."""
    if _watch is not None:
        _watch.own.update(step=step, doing=doing)


def _named(error: Exception) -> Exception:
    """What is to be said instead of `error`; itself, if it says what there is to say."""
    if is_out_of_memory(error):
        return out_of_memory(error)
    if _is_of_the_compiler(error):
        paragraph, _, _ = str(error).partition("\n\n")  # advice on how to report a bug follows
        return ConfigError("trainer.compile", f"true, and the student cannot be compiled here ({paragraph})", "Leave it out.")
    if _watch is None:
        return error
    broken = _is_of_exchange(error)
    lost = _watch.lost(patience=BROKEN + BEAT if broken else 0.0)
    if lost is not None and (broken or (isinstance(error, Preempted) and not isinstance(lost, Preempted))):
        return lost  # also where torchrun has asked this process to stop because of the other
    if broken:
        return DistributedError(_watch.where, "another process of the group is gone", "Its own line says why, if it was not killed.")
    if isinstance(error, MiniDistillError):
        return error
    print_traceback()
    return DistributedError(_watch.where, f"{type(error).__name__}: {error}", "The traceback stands above.")


def _is_of_the_compiler(error: Exception) -> bool:
    """Where nothing was compiled, the seconds are spared that importing its errors takes."""
    known = sys.modules.get("torch._dynamo.exc")
    return known is not None and isinstance(error, known.TorchDynamoException)


def _is_of_exchange(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is of a connection to another process."""
    if error is None:
        return False
    return (
        isinstance(error, torch.distributed.DistError)
        or "gloo/transport" in str(error)  # gloo has no class of its own
        or _is_of_exchange(error.__cause__)
    )


class _Counting(Accelerator):
    """Counts how often this process has come to meet the others: they wait for who is behind."""

    def reduce(self, *arguments: Any, **settings: Any) -> Any:
        _count()
        return super().reduce(*arguments, **settings)

    def wait_for_everyone(self) -> None:
        _count()
        super().wait_for_everyone()

    def backward(self, *arguments: Any, **settings: Any) -> None:
        _count()
        super().backward(*arguments, **settings)

    def prepare_model(self, *arguments: Any, **settings: Any) -> nn.Module:
        model: nn.Module = super().prepare_model(*arguments, **settings)
        if _watch is not None:
            model.register_forward_pre_hook(_count)  # DDP exchanges the model's buffers before each pass
        return model


def _count(*_: object) -> None:
    if _watch is not None:
        _watch.own["met"] += 1
        _watch.met_at = time.monotonic()


# ------------------------------------------------------------------------------------------------------------------- the thread


@dataclass
class _Peer:
    """Another process: what it wrote last, when that was new, and whether its process was gone before it was read."""

    text: bytes = b""
    heard: float = 0.0
    beat: dict[str, Any] = field(default_factory=dict)
    gone: bool = False

    @property
    def silent(self) -> float:
        return time.monotonic() - self.heard

    @property
    def failed(self) -> bool:
        return bool(self.beat.get("left", {}).get("code"))

    @property
    def is_here(self) -> bool:
        """Whether it has come, and has not left."""
        return bool(self.beat) and "left" not in self.beat

    @property
    def is_heard(self) -> bool:
        """Whether it is here, and beats."""
        return self.is_here and self.silent < 3 * BEAT

    def lives(self) -> bool:
        """Whether its process is there; of this machine."""
        return is_alive(self.beat["pid"], self.beat["start"])


class _Found(NamedTuple):
    """What ends the run, and the seconds that the main thread is left to find out by itself."""

    error: MiniDistillError
    grace: float = 0.0


class _Watch:
    """Of this process over the others, and over its own main thread.

    Attributes:
        own: What this process says of itself.
        met_at: When it last came to meet the others.
    """

    _number = 0  # of runs watched in this process: each has names of its own in the store

    def __init__(self, stuck_after: float | None, on_end: Callable[[MiniDistillError], None] | None) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.own: dict[str, Any] = {"rank": self.rank, "step": 0, "doing": "loading", "met": 0}
        self.own |= {"host": this_host(), "machine": this_machine(), "pid": os.getpid()}
        self.own["start"] = process_start_of(os.getpid()) or ""
        self.met_at = self._looked = self._sampled = self._moved = time.monotonic()
        self._cpu, self._place = 0.0, ""
        self._stack: list[tuple[int, int]] = []
        self._stuck_after, self._on_end = stuck_after, on_end
        self._peers = {rank: _Peer() for rank in range(self.size) if rank != self.rank}
        self._keeps_store = self.rank == 0 and not _torchrun_keeps_store()
        self._store: Store | None = None
        self._beats = 0
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="process group", daemon=True)
        self._all_came, self._left, self._wake, self._exchanged = (threading.Event() for _ in range(4))
        _Watch._number += 1
        self._prefix = f"mini_distill/{_Watch._number}/"

    @property
    def where(self) -> str:
        """This process, as errors name it."""
        return _where(self.own)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def leave(self, error: BaseException | None) -> None:
        """The last beat: how the run ended here."""
        self.own["left"] = self._last_words(error)
        self._left.set()
        self._wake.set()
        self._thread.join(3 * BEAT)

    def wait_for_all(self) -> None:
        """In Python, where signals are answered; within the exchange that makes the group they would not be."""
        until = time.monotonic() + COME_WITHIN.total_seconds()
        while not self._all_came.wait(0.1):
            if time.monotonic() > until:
                missing = ", ".join(str(rank) for rank, peer in self._peers.items() if not peer.beat)
                what = f"of {self.size} processes {missing} did not come within {COME_WITHIN.total_seconds() / 60:.0f} minutes"
                raise DistributedError(self.where, what, "Look at what they print, and whether they can reach MASTER_ADDR.")

    def lost(self, patience: float) -> MiniDistillError | None:
        """What has become of the others, where one is gone or ended in an error; looked for again and again for `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            self._exchange_now()
            found = self._find(silent=BROKEN if patience else SILENT)
            if found is not None or time.monotonic() >= until:
                return None if found is None else found.error
            time.sleep(0.1)

    def _run(self) -> None:
        try:
            self._store = _open_store(self.size, self._keeps_store, self._prefix)
        except Exception:  # the group will not come about either, and says why
            self._all_came.set()
            return
        while not self._left.is_set():
            self._look_at_main_thread()
            self._exchange()
            found = self._find(SILENT) or self._find_stuck()
            if found is not None and not self._left.wait(found.grace):
                self._end(found.error)
            self._wake.wait(BEAT if self._all_came.is_set() else BEAT / 10)
            self._wake.clear()
        self._last_exchange()

    def _look_at_main_thread(self) -> None:
        """Whether it has moved to another place, or the process computes."""
        now, cpu = time.monotonic(), time.process_time()
        frames: list[tuple[int, int]] = []
        frame = sys._current_frames().get(self._main)
        if frame is not None:
            self._place = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
        while frame is not None:
            frames.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        if frames != self._stack or cpu - self._cpu > COMPUTES * (now - self._sampled):
            self._moved = now
        self._stack, self._cpu, self._sampled = frames, cpu, now

    def _said(self) -> dict[str, Any]:
        """This process's beat."""
        now = time.monotonic()
        return {**self.own, "place": self._place, "still": now - self._moved, "alone": now - self.met_at}

    def _exchange_now(self) -> None:
        """For the main thread, which does not wait for a store that does not answer."""
        self._exchanged.clear()
        self._wake.set()
        self._exchanged.wait(2 * BEAT)

    def _exchange(self) -> None:
        """Write a beat, and read those of the others."""
        if time.monotonic() - self._looked > 3 * BEAT:  # this process was stopped: what it did not hear is no sign
            for peer in self._peers.values():
                peer.heard = time.monotonic()
        self._looked = time.monotonic()
        here = [peer for peer in self._peers.values() if peer.is_here and peer.beat["machine"] == self.own["machine"]]
        gone = [peer for peer in here if not peer.lives()]  # looked at first: its last words are then there to be read
        self._read_store()
        for peer in gone:
            peer.gone = True  # said nothing more, else another stands in its place
        self._exchanged.set()

    def _read_store(self) -> None:
        if self._store is None:
            return
        self._beats += 1
        with contextlib.suppress(Exception):  # no store: nobody is heard
            self._store.set(str(self.rank), json.dumps({"beat": self._beats, **self._said()}))
            came = [rank for rank, peer in self._peers.items() if peer.beat or self._store.check([str(rank)])]
            for rank, text in zip(came, self._store.multi_get([str(rank) for rank in came]), strict=True):
                if text != self._peers[rank].text:
                    self._peers[rank] = _Peer(text, time.monotonic(), json.loads(text))
            if len(came) == len(self._peers):
                self._all_came.set()

    def _last_exchange(self) -> None:
        """Who keeps the store stays a little, until the others have read it and left."""
        until = time.monotonic() + 2 * BEAT
        self._exchange()
        while self._keeps_store and any(peer.is_heard for peer in self._peers.values()) and time.monotonic() < until:
            time.sleep(BEAT / 10)
            self._exchange()

    # ------------------------------------------------------------------------------------------------------- what is found

    def _find(self, silent: float) -> _Found | None:
        """Who is gone, stopped or not heard of for `silent` seconds, or ended in an error."""
        for peer in self._peers.values():
            if not peer.is_here:
                continue
            process = f"process {peer.beat['pid']} on {peer.beat['host']}"
            if peer.beat["machine"] == self.own["machine"]:
                if peer.gone:
                    return _Found(self._error(peer, f"gone without a word ({process}): killed, or out of memory"), GRACE)
                if peer.silent > STOPPED and is_stopped(peer.beat["pid"]):
                    return _Found(self._error(peer, f"stopped for {peer.silent:.0f} s ({process}), and now killed"))
            elif peer.silent > silent:
                return _Found(self._error(peer, f"not heard of for {peer.silent:.0f} s ({process}): that machine, or the network, is down"))
        for peer in self._peers.values():
            if peer.failed:
                return _Found(self._as_told(peer.beat["left"]), AFTER_ERROR)
        return None

    def _find_stuck(self) -> _Found | None:
        """Who is behind, if nobody has met anybody for `stuck_after` seconds, and those behind stand still."""
        beats = {rank: (peer.beat, peer.silent) for rank, peer in self._peers.items() if peer.is_here} | {self.rank: (self._said(), 0.0)}
        limit = self._stuck_after
        if limit is None or len(beats) < self.size or any(beat["doing"] == "loading" for beat, _ in beats.values()):
            return None
        fewest = min(beat["met"] for beat, _ in beats.values())
        late = {rank: beat for rank, (beat, _) in beats.items() if beat["met"] == fewest}
        waits = all(beat["alone"] + silent > limit for beat, silent in beats.values())
        if not waits or not all(beats[rank][0]["still"] + beats[rank][1] > limit for rank in late):
            return None
        places = "; ".join(f"rank {rank} at {beat['place']}" for rank, beat in sorted(late.items())[:4])
        what = f"stuck for {limit:.0f} s" + (" while the others wait" if len(late) < self.size else "") + f" ({places})"
        return _Found(DistributedError(_where(late[min(late)]), what, f"trainer.stuck_after says how long is waited. {GO_ON}"))

    def _error(self, peer: _Peer, what: str) -> DistributedError:
        """With the step of this process, which waits for the other: the other's beat may be older than its last steps."""
        return DistributedError(_where({**self.own, "rank": peer.beat["rank"]}), what, f"Rank {self.rank} ends with it. {GO_ON}")

    def _as_told(self, left: dict[str, Any]) -> MiniDistillError:
        """The error of another process, which was asked to stop, or failed."""
        remedy = f"Rank {self.rank} ends with it. {GO_ON}"
        if left["code"] in (130, 143):
            return Preempted(left["where"], left["what"], remedy, left["code"])
        return DistributedError(left["where"], left["what"], remedy)

    # ---------------------------------------------------------------------------------------------------------------- ends

    def _last_words(self, error: BaseException | None) -> dict[str, Any]:
        if error is None:
            return {"code": 0}
        if not isinstance(error, MiniDistillError):
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
            return {"code": code, "where": self.where, "what": f"ended by {type(error).__name__}"}
        problem = error.problems[0]
        if problem.where.startswith("rank "):
            return {"code": error.exit_code, "where": problem.where, "what": problem.what}
        return {"code": error.exit_code, "where": self.where, "what": f"ended with: {problem}"}

    def _end(self, error: MiniDistillError) -> None:
        """This process, whatever its main thread waits for."""
        self.own["left"] = self._last_words(error)
        os.write(2, redact_text(f"\n{'' if isinstance(error, Preempted) else 'error: '}{error}\n").encode())
        self._kill([peer.beat["pid"] for peer in self._peers.values() if self._is_stopped_here(peer)])
        tellings = [threading.Thread(target=self._last_exchange, daemon=True)]
        if self._on_end is not None:
            tellings.append(threading.Thread(target=self._on_end, args=(error,), daemon=True))
        for telling in tellings:
            telling.start()
        for telling in tellings:  # what hangs may be the store's machine, or a file system
            telling.join(3 * BEAT)
        self._kill([worker.pid for worker in multiprocessing.active_children() if worker.pid])  # that read data
        os._exit(error.exit_code)

    @staticmethod
    def _kill(pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _is_stopped_here(self, peer: _Peer) -> bool:
        return peer.is_here and peer.beat["machine"] == self.own["machine"] and peer.lives() and is_stopped(peer.beat["pid"])


_watch: _Watch | None = None


def _where(beat: dict[str, Any]) -> str:
    return f"rank {beat['rank']}, step {beat['step']}" + (f" ({beat['doing']})" if beat["doing"] else "")


def _torchrun_keeps_store() -> bool:
    """Else rank 0 does, as torch has it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(size: int, is_ours: bool, prefix: str) -> Store:
    """A connection of its own to the store of the group, which finds one that is kept in this process already."""
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=is_ours,
        timeout=COME_WITHIN,
        wait_for_workers=False,
        multi_tenant=not _torchrun_keeps_store(),
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )
    return PrefixStore(prefix, store)
