"""Runs one process inside a sandbox, and outlives whoever asked. A program of its own, run by `python -c`.

Its argument is a folder with `spec.json`. What goes on stands in files there, which is all that others need to follow:

    state.json         where it stands: written anew as a whole with each change, at most every 50 ms for output
    output/OFFSET      the end of the output, in parts named by the offset of their first byte: frames of stream (1
                       byte), length (4, big endian) and bytes; the oldest are dropped
    requests/NAME.json input, new sizes and signals; each is done once, removed, and answered in the state

The process is started at most once: who finds `state.json` leaves it alone. While it runs, its runner's id and when
that began stand in the state: no such process, and no end in the state, means that the machine was lost.
"""

import base64
import ctypes
import errno
import fcntl
import json
import os
import selectors
import signal
import struct
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

PART_BYTES = 64 * 1024
PARTS = 16
_FRAME_BYTES = 32 * 1024
_PART_FILE_BYTES = 2 * PART_BYTES
_HELD_INPUT_BYTES = 256 * 1024
_ANSWERS = 32
_WRITE_SECONDS = 0.05
_DRAIN_SECONDS = 0.2
_LAST_WORDS_SECONDS = 600  # for a disk that is full; a runner that is gone without a word is told as lost
_KILL_SECONDS = 5.0
_LOOK_SECONDS = 0.1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_IN_CLOSE_WRITE, _IN_MOVED_TO = 0x8, 0x80  # inotify(7)
_STDOUT, _STDERR = 1, 2
_END_OF_INPUT = b"\x04"

_libc = ctypes.CDLL(None, use_errno=True)


class Runner:
    """One process."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.state: dict[str, Any] = {
            "pid": os.getpid(),
            "began": _began(os.getpid()),
            "running": False,
            "output_bytes": 0,
            "parts": [],
            "input": 0,
            "closed": False,
            "answers": {},
            "end": None,
        }
        self.ready = selectors.DefaultSelector()
        self.outputs: dict[int, int] = {}
        self.input: int | None = None
        self.pending = bytearray()
        self.part: int | None = None
        self.part_bytes = self.part_file_bytes = 0
        self.child = 0
        self.status: int | None = None
        self.began = time.monotonic()
        self.over: float | None = None
        self.timed_out = self.lost = False
        self.kill_time: float | None = None
        self.dirty, self.written = True, 0.0

    def run(self) -> None:
        """Run it to its end."""
        for folder in ("output", "requests"):
            Path(folder).mkdir(exist_ok=True)
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, _noted)
        signal.signal(signal.SIGTERM, self._stopped)
        for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(ignored, signal.SIG_IGN)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        notices = _watch_requests()
        self._write()
        with suppress(FileNotFoundError):
            Path("spec.json").unlink()  # its environment may hold secrets
        failure = self._start()
        if failure:
            self._end({"failure": failure})
            return
        for one in (woken, notices):
            if one >= 0:
                self.ready.register(one, selectors.EVENT_READ)
        self.state["running"] = True
        self._write()
        while self.status is None or not self._drained():
            self._step(woken, notices)
        for output in list(self.outputs):
            self._read(output, most=PARTS * PART_BYTES)
        self._end(self._how())

    def _step(self, woken: int, notices: int) -> None:
        """Wait for something and see to it."""
        for key, _ in self.ready.select(self._patience(notices)):
            if key.fd in (woken, notices):
                with suppress(BlockingIOError):
                    os.read(key.fd, 65536)
            elif key.fd in self.outputs:
                self._read(key.fd, most=PART_BYTES)
        self._reap()
        self._feed()
        self._answer()
        self._watch_time()
        if self.dirty and time.monotonic() - self.written >= _WRITE_SECONDS:
            self._write()

    def _patience(self, notices: int) -> float | None:
        now = time.monotonic()
        times = [self.written + _WRITE_SECONDS] if self.dirty else []
        if self.status is not None or notices < 0:
            times.append(now + _LOOK_SECONDS)
        if self.spec["seconds"] and not self.timed_out:
            times.append(self.began + self.spec["seconds"])
        if self.kill_time is not None:
            times.append(self.kill_time)
        return max(0.0, min(times) - now) if times else None

    def _start(self) -> "list[str] | None":
        """Start the process; return what failed, and the words for it."""
        size = self.spec["terminal"]
        if size:
            ours, theirs = os.openpty()
            _resize(ours, size)
            os.set_blocking(ours, False)
            stdin = stdout = stderr = theirs
            self.outputs, self.input = {ours: _STDOUT}, os.dup(ours)
            kept = [theirs]
        else:
            stdin, self.input = os.pipe()
            out, stdout = os.pipe()
            err, stderr = os.pipe()
            self.outputs = {out: _STDOUT, err: _STDERR}
            kept = [stdin, stdout, stderr]
        for end in (*self.outputs, self.input):
            os.set_blocking(end, False)
        told, tell = os.pipe()
        environment = {**os.environ, **({"TERM": "xterm-256color"} if size else {}), **self.spec["environment"]}
        runner = os.getpid()
        self.child = os.fork()
        if self.child == 0:
            _become(self.spec, environment, (stdin, stdout, stderr), tell, runner)
        for end in (*kept, tell):
            os.close(end)
        with os.fdopen(told, "rb") as failed:
            words = failed.read()
        if words:
            os.waitpid(self.child, 0)
            what, _, why = words.decode(errors="replace").partition(" ")
            return [what, why]
        for output in self.outputs:
            self.ready.register(output, selectors.EVENT_READ)
        return None

    def _read(self, output: int, most: int) -> None:
        """Take what the process wrote, until there is no more now or it is much."""
        taken = 0
        while taken < most:
            try:
                data = os.read(output, _FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError as error:  # the other end of a terminal is closed
                if error.errno != errno.EIO:
                    raise
                data = b""
            if not data:
                self.ready.unregister(output)
                del self.outputs[output]
                os.close(output)
                return
            taken += len(data)
            with suppress(OSError):  # a full disk loses output and nothing else
                self._keep(self.outputs[output], data)

    def _keep(self, stream: int, data: bytes) -> None:
        parts: list[int] = self.state["parts"]
        if self.part is None or self.part_bytes + len(data) > PART_BYTES or self.part_file_bytes > _PART_FILE_BYTES:
            if self.part is not None:
                os.close(self.part)
                self.part = None
            begin = self.state["output_bytes"]
            self.part = os.open(_part(begin), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            self.part_bytes = self.part_file_bytes = 0
            parts.append(begin)
            while len(parts) > PARTS:
                with suppress(OSError):
                    Path(_part(parts.pop(0))).unlink()
        frame = struct.pack(">BI", stream, len(data)) + data
        done = 0
        try:
            while done < len(frame):
                done += os.write(self.part, frame[done:])
        except OSError:
            os.ftruncate(self.part, self.part_file_bytes)
            raise
        self.part_bytes += len(data)
        self.part_file_bytes += len(frame)
        self.state["output_bytes"] += len(data)
        self.dirty = True

    def _feed(self) -> None:
        """Give the process what it can take of its input."""
        if self.input is None:
            return
        try:
            while self.pending:
                del self.pending[: os.write(self.input, self.pending[:_FRAME_BYTES])]
        except BlockingIOError:
            pass
        except OSError:  # it reads no more
            self.pending.clear()
            self._close_input()
            return
        registered = self.input in self.ready.get_map()
        if self.pending and not registered:
            self.ready.register(self.input, selectors.EVENT_WRITE)
        elif not self.pending and registered:
            self.ready.unregister(self.input)
        if not self.pending and self.state["closed"] and not self.spec["terminal"]:
            self._close_input()

    def _close_input(self) -> None:
        if self.input is None:
            return
        with suppress(KeyError):
            self.ready.unregister(self.input)
        os.close(self.input)
        self.input = None

    def _answer(self) -> None:
        """Do what is asked for, each once. Input waits while much of it is not read yet."""
        try:
            names = sorted(path.name for path in Path("requests").glob("*.json"))
        except OSError:
            return
        for name in names:
            path = Path("requests", name)
            try:
                request = json.loads(path.read_text())
                if request["what"] == "input" and len(self.pending) > _HELD_INPUT_BYTES:
                    continue
                answer = self._do(request)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it is being written
            with suppress(OSError):
                path.unlink()
            answers: dict[str, Any] = self.state["answers"]
            answers[name.removesuffix(".json")] = answer
            while len(answers) > _ANSWERS:
                del answers[next(iter(answers))]
            self._write()

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        what = request["what"]
        if what == "input":
            return self._take_input(request["offset"], base64.b64decode(request["data"]), close=request["close"])
        if what == "resize" and self.spec["terminal"]:
            for terminal in self.outputs:
                _resize(terminal, request["size"])
        elif what == "signal":
            for pid in _descendants(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(pid, request["signal"])
        elif what == "stop":
            self._stop()
        return {}

    def _take_input(self, offset: int, data: bytes, *, close: bool) -> dict[str, Any]:
        known: int = self.state["input"]
        if offset > known:
            return {"gap": known}
        fresh = data[known - offset :]
        if fresh and self.state["closed"]:
            return {"closed": known}
        if self.input is not None:
            self.pending += fresh
        self.state["input"] = known + len(fresh)
        if close and not self.state["closed"]:
            self.state["closed"] = True
            if self.spec["terminal"] and self.input is not None:
                self.pending += _END_OF_INPUT
        self._feed()
        return {"offset": self.state["input"]}

    def _watch_time(self) -> None:
        now = time.monotonic()
        may_run: float = self.spec["seconds"]
        if may_run and not self.timed_out and self.status is None and now - self.began >= may_run:
            self.timed_out = True
            self._stop()
        if self.kill_time is not None and now >= self.kill_time:
            self.kill_time = None
            _kill_all()

    def _stop(self) -> None:
        """Ask the process and all that it started to end, and see to it that they do. Shells heed a hang-up alone."""
        first = signal.SIGHUP if self.spec["terminal"] else signal.SIGTERM
        for pid in _descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, first)
                os.kill(pid, signal.SIGCONT)
        self.kill_time = time.monotonic() + _KILL_SECONDS

    def _stopped(self, *_: object) -> None:
        self.lost = True
        _kill_all()

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.child:
                    self.status, self.over = status, time.monotonic()
                    if self.kill_time is not None:  # what is left of it ends, too
                        self.kill_time = None
                        _kill_all()

    def _drained(self) -> bool:
        """Say whether all that the process wrote is read; what it left running may go on writing."""
        return not self.outputs or self.lost or time.monotonic() - (self.over or 0.0) > _DRAIN_SECONDS

    def _how(self) -> dict[str, Any]:
        if self.lost:
            return {"failure": ["sandbox", "the sandbox was stopped"]}
        code = os.waitstatus_to_exitcode(self.status or 0)
        return {"exit_code": code} if code >= 0 else {"signal": -code}

    def _end(self, how: dict[str, Any]) -> None:
        seconds = (self.over or time.monotonic()) - self.began
        self.state["end"] = {**how, "timed_out": self.timed_out, "seconds": seconds, "time": time.time()}
        for _ in range(_LAST_WORDS_SECONDS):
            self._write()
            if not self.dirty:
                return
            time.sleep(1)  # the disk is full

    def _write(self) -> None:
        """Write the state anew, as a whole."""
        try:
            Path("state.new").write_text(json.dumps(self.state))
            os.replace("state.new", "state.json")  # noqa: PTH105
            self.dirty = False
        except OSError:
            self.dirty = True
        self.written = time.monotonic()


def _become(
    spec: dict[str, Any], environment: dict[str, str], streams: tuple[int, int, int], tell: int, runner: int
) -> NoReturn:
    """Become the process, in the child; or tell what failed and end."""
    what = "program"
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        if spec["terminal"]:
            fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != runner:
            os._exit(1)
        what = "directory"
        os.chdir(spec["directory"])
        what = "program"
        os.execvpe(spec["command"][0], spec["command"], environment)  # noqa: S606 - no shell is wanted
    except BaseException as error:  # noqa: BLE001 - the child must not go on as the runner
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        os.write(tell, f"{what} {why}".encode(errors="replace")[:1000])
    finally:
        os._exit(127)


def _noted(*_: object) -> None:
    """Have a signal wake the loop."""


def _part(offset: int) -> str:
    return f"output/{offset:020}"


def _resize(terminal: int, size: "list[int]") -> None:
    with suppress(OSError):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))


def _watch_requests() -> int:
    """Return what becomes readable when a request comes; -1 where it must be looked for."""
    notices: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if notices >= 0 and _libc.inotify_add_watch(notices, b"requests", _IN_CLOSE_WRITE | _IN_MOVED_TO) < 0:
        os.close(notices)
        return -1
    return notices


def _kill_all() -> None:
    """Kill all that was started, and what that starts meanwhile."""
    for _ in range(100):
        found = _descendants(os.getpid())
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _descendants(root: int) -> list[int]:
    """Return all living processes that descend from one: orphans among them become its own children."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            state, parent = _stat(int(path.name))[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.name))
    found: list[int] = []
    waiting = [root]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            found.append(child)
            waiting.append(child)
    return found


def _stat(pid: int) -> list[str]:
    """Return what the kernel says of a process, from its state on (proc(5), `stat`)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _began(pid: int) -> str:
    """Return when a process began, in the kernel's ticks."""
    return _stat(pid)[19]


def main() -> None:
    """Go to the background, and run what the folder says unless it was run before."""
    os.chdir(sys.argv[1])
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    words = os.open("runner.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, stream in enumerate((nothing, nothing, words)):
        os.dup2(stream, number)
    lock = os.open("lock", os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not Path("state.json").exists():
            Runner(json.loads(Path("spec.json").read_text())).run()


if __name__ == "__main__":
    main()
