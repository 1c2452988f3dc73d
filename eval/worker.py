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
from amk.models.errors import ModelError

Event = tuple[str, Any]
OnEvent = Callable[[str, Any], None]
TIMEOUT_S = 900.0


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

    @classmethod
    def shared(cls) -> Worker:
        if cls._shared is None or not cls._shared._process.is_alive():
            cls._shared = cls()
        return cls._shared

    def call(self, verb: str, model: str, place: Place, arguments: dict[str, Any], on_event: OnEvent, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer of one request. RemoteError for what the request itself met; WorkerDied if the process hung or died, which ends it."""
        self._pipe.send((verb, model, place, arguments))
        try:
            while True:
                if not self._pipe.poll(timeout_s):
                    raise WorkerDied("timeout", f"the worker must answer within {timeout_s:.0f} s, but did not: it was killed")
                kind, value = self._pipe.recv()
                if kind == "result":
                    return value
                if kind == "error":
                    raise RemoteError(*value)
                on_event(kind, value)
        except (EOFError, ConnectionError) as problem:
            raise WorkerDied("crash", "the worker process died; the kernel or its driver crashed") from problem
        finally:
            if not self._process.is_alive():
                Worker._shared = None

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        Worker._shared = None


def _serve(pipe: Connection) -> None:
    """The worker's side: keeps the last session, answers until the parent goes away."""
    session: tuple[str, Place, Session] | None = None
    while True:
        try:
            verb, model, place, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if session is None or session[:2] != (model, place):
                session = (model, place, Session(model, place, lambda text: pipe.send(("progress", text))))
            pipe.send(("result", run(session[2], verb, arguments, lambda *token: pipe.send(("token", token)))))
        except (EvalError, ModelError, ValueError) as problem:
            pipe.send(("error", (str(problem), getattr(problem, "exit_code", 3))))


def run(session: Session, verb: str, arguments: dict[str, Any], on_token: Callable[..., None]) -> Any:
    """One request of a session, in whichever process it lives."""
    if verb == "evaluate":
        return session.evaluate(arguments["config"]).to_json()
    if verb == "bench":
        return session.bench(arguments["config"], arguments["positions"])
    return generate(session, on_token=on_token, **arguments)
