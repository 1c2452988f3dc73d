"""GPU work in a process of its own, kept warm between requests, that can be killed: the parent never makes a CUDA context."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from amk.eval.candidate import Candidate
from amk.eval.card import Place
from amk.eval.card_lock import live_card_lock
from amk.eval.errors import EvalError
from amk.eval.generation import generate
from amk.eval.processes import own_context
from amk.eval.session import Session
from amk.eval.trace import trace
from amk.models.errors import ModelError
from amk.vm.interface import LaunchFailed

Event = tuple[str, Any]
OnEvent = Callable[[str, Any], None]
TIMEOUT_S = 900.0
IDLE_S = 60.0

# What ends a request: an answer or an error; the same of a worker whose context may be damaged; what the worker itself ended on.
ENDS = ("result", "error", "last", "failed", "died")


class WorkerDied(Exception):
    """The worker ended without an answer: `kind` is "timeout" (killed by the watchdog) or "crash"."""

    exit_code: ClassVar[int] = 1

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RemoteError(Exception):
    """An error of the worker that a request may meet, as the parent raises it: its sentence and its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Request:
    """One question to a session of `model` in `place`: evaluate, compile, bench, trace or generate, with that verb's further arguments.

    `token` serves to fetch the model and for nothing else.
    """

    verb: str
    model: str
    place: Place
    candidate: Candidate
    options: dict[str, Any] = field(default_factory=dict)
    token: str | None = field(default=None, repr=False)


class Worker:
    """A process that serves requests one at a time; `Worker.shared` keeps one for all callers of this process.

    It ends after `idle_s` without a request, so that the card is free for others, and is started anew by the next one.
    """

    _shared: ClassVar[Worker | None] = None

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._idle_s = idle_s
        self._start()

    def _start(self) -> None:
        context = own_context()
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._idle_s), daemon=True)
        self._process.start()
        other.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @classmethod
    def shared(cls) -> Worker:
        if cls._shared is None or not cls._shared._process.is_alive():
            cls._shared = cls()
        return cls._shared

    def call(self, request: Request, on_event: OnEvent, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer of one request. RemoteError for what the request itself met; WorkerDied if no word came for `timeout_s`, or no more.

        A worker whose request did not end in order is killed: nothing of it can reach the next request.
        """
        try:
            if not self._begin(request, timeout_s):
                raise WorkerDied("crash", "the worker process must start, but died; amk doctor says what this machine has")
            kind, value = self._next(timeout_s)
            while kind not in ENDS:
                on_event(kind, value)
                kind, value = self._next(timeout_s)
        except BaseException:
            self.kill()
            raise
        if kind not in ("result", "error"):
            self.kill()
        if kind == "died":
            raise WorkerDied("crash", f"the worker ended on {value}")
        if kind in ("error", "failed"):
            raise RemoteError(*value)
        return value

    def _begin(self, request: Request, timeout_s: float) -> bool:
        """Whether a process took the request: this one, or a new one where this one had ended idle."""
        if self._take(request, timeout_s):
            return True
        self._process.join()
        self._pipe.close()
        self._start()
        return self._take(request, timeout_s)

    def _take(self, request: Request, timeout_s: float) -> bool:
        try:
            self._pipe.send(request)
        except ConnectionError:
            return False
        try:
            return self._next(timeout_s)[0] == "begun"
        except WorkerDied as death:
            if death.kind == "timeout":
                raise
            return False

    def _next(self, timeout_s: float) -> Event:
        try:
            if not self._pipe.poll(timeout_s):
                raise WorkerDied("timeout", f"the worker must give a sign of life within {timeout_s:.0f} s, but did not: it was killed")
            event: Event = self._pipe.recv()
            return event
        except (EOFError, ConnectionError) as problem:
            raise WorkerDied("crash", "the worker process died; the kernel or its driver crashed") from problem

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        if Worker._shared is self:
            Worker._shared = None


def _serve(pipe: Connection, idle_s: float) -> None:
    """The worker's side: holds the card and the last session, answers until the parent goes away, asks no more, or a launch went wrong."""
    session: tuple[str, Place, Session] | None = None

    def tell(text: str) -> None:
        pipe.send(("progress", text))

    with ExitStack() as held:
        while pipe.poll(idle_s):
            try:
                request: Request = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(("begun", None))
                if request.place.device == "cuda":
                    held.enter_context(live_card_lock(tell))
                if session is None or session[:2] != (request.model, request.place):
                    session = None  # its weights go before the next model's come
                    session = (request.model, request.place, Session(request.model, request.place, tell, request.token))
                result = run(session[2], request, lambda *token: pipe.send(("token", token)))
                pipe.send(("last" if unfinished(result) else "result", result))
            except (EvalError, ModelError) as problem:
                pipe.send(("error", (str(problem), problem.exit_code)))
            except LaunchFailed as problem:
                pipe.send(("failed", (f"{problem.kind}: {problem}", 1)))
            except ImportError as problem:
                pipe.send(("error", (f"a package is missing: {problem}", 3)))
            except Exception as problem:  # the edge of this process: the parent learns what it was, and starts another
                pipe.send(("died", f"{type(problem).__name__}: {problem}"))


def unfinished(result: dict[str, Any]) -> bool:
    """Whether a launch behind the result did not finish."""
    return result.get("verdict", result).get("status") in ("timeout", "crash")


def run(session: Session, request: Request, on_token: Callable[..., None]) -> dict[str, Any]:
    """One request of a session, in whichever process it lives."""
    candidate = session.adopt(request.candidate)
    if request.verb == "evaluate":
        return session.evaluate(candidate).to_json()
    if request.verb == "compile":
        return session.compile(candidate, **request.options)
    if request.verb == "bench":
        return session.bench(candidate, **request.options)
    if request.verb == "trace":
        return trace(session, candidate, **request.options)
    return generate(session, candidate, on_token=on_token, **request.options)
