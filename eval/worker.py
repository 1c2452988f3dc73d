"""GPU work in a process of its own, kept warm between requests, that can be killed: the parent never makes a CUDA context."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from amk.eval.card import Place
from amk.eval.errors import EvalError
from amk.eval.generation import generate
from amk.eval.session import Session
from amk.eval.trace import trace
from amk.models.errors import ModelError
from amk.vm.interface import LaunchFailed

Event = tuple[str, Any]
OnEvent = Callable[[str, Any], None]
TIMEOUT_S = 900.0


# What ends a request: an answer or an error; the same of a worker whose context may be damaged; what the worker itself ended on.
ENDS = ("result", "error", "last", "failed", "died")


class WorkerDied(Exception):
    """The worker ended without an answer: `kind` is "timeout" (killed by the watchdog) or "crash"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RemoteError(Exception):
    """An error of the worker that a request may meet, as the parent raises it: its sentence and its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Worker:
    """A process that serves Session requests one at a time; `Worker.shared` keeps one for all callers of this process."""

    _shared: ClassVar[Worker | None] = None

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
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

    def call(self, verb: str, model: str, place: Place, arguments: dict[str, Any], on_event: OnEvent, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer of one request. RemoteError for what the request itself met; WorkerDied if no word came for `timeout_s`, or no more.

        A worker whose request did not end in order is killed: nothing of it can reach the next request.
        """
        try:
            self._pipe.send((verb, model, place, arguments))
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


def _serve(pipe: Connection) -> None:
    """The worker's side: keeps the last session, answers until the parent goes away or the card's context may be damaged."""
    session: tuple[str, Place, Session] | None = None
    while True:
        try:
            verb, model, place, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if session is None or session[:2] != (model, place):
                session = None  # its weights go before the next model's come
                session = (model, place, Session(model, place, lambda text: pipe.send(("progress", text))))
            result = run(session[2], verb, arguments, lambda *token: pipe.send(("token", token)))
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


def run(session: Session, verb: str, arguments: dict[str, Any], on_token: Callable[..., None]) -> Any:
    """One request of a session, in whichever process it lives."""
    if verb == "evaluate":
        return session.evaluate(arguments["config"]).to_json()
    if verb == "bench":
        return session.bench(**arguments)
    if verb == "trace":
        return trace(session, **arguments)
    return generate(session, on_token=on_token, **arguments)
