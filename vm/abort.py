"""What a launch that gives up, or ends early, writes down: the words of its abort record, as isa/device/sync.cuh numbers them."""

from __future__ import annotations

from enum import IntEnum

END_WORD = 6  # tokens of a launch that a stop token has ended


class AbortCode(IntEnum):
    """Why it gave up; 0 is a launch that did not."""

    TIMEOUT = 1
    HOST = 2
    PLACEMENT = 3
    MISMATCH = 4


class Actor(IntEnum):
    """Who gave up; 0 is the block, before it has actors."""

    FEEDER = 1
    CONSUMER = 2
    STORER = 3
    WATCHER = 4
    LAUNCH_END = 5


class WaitKind(IntEnum):
    """What a wait is for; 0 is none of these."""

    TASK = 1
    TAG = 2
    FULL = 3
    EMPTY = 4
    SLOT = 5
    COUNTER = 6
    TOKEN_END = 7
    BARRIER = 8


# The kind of LaunchFailed.
FAILURES: dict[int, str] = {
    AbortCode.TIMEOUT: "timeout",
    AbortCode.HOST: "timeout",
    AbortCode.PLACEMENT: "crash",
    AbortCode.MISMATCH: "mismatch",
}
ACTORS: dict[int, str] = {
    0: "the block",
    Actor.FEEDER: "the feeder",
    Actor.CONSUMER: "a consumer",
    Actor.STORER: "the storer",
    Actor.WATCHER: "the watcher",
    Actor.LAUNCH_END: "the end of the launch",
}
WAITS: dict[int, str] = {
    0: "",
    WaitKind.TASK: "waiting for the watcher",
    WaitKind.TAG: "waiting for a tag",
    WaitKind.FULL: "waiting for a chunk",
    WaitKind.EMPTY: "waiting for a free stage",
    WaitKind.SLOT: "waiting for a reduction slot",
    WaitKind.COUNTER: "waiting for a counter",
    WaitKind.TOKEN_END: "waiting for the end of an earlier token",
    WaitKind.BARRIER: "waiting for the other consumers",
}
