"""What the server answers, and what its errors mean: one code per error, whatever the version."""

import re
from typing import Any

from redis import exceptions as redis_errors

from bus.errors import BusError, PermissionDenied, ServerRefused, WrongKeyType

Reply = Any  # bytes, int, None, ReplyError or a list of them

# redis-py strips the code from the text of these; our table of errors goes by code.
_CODES: dict[type[Exception], str] = {
    redis_errors.NoScriptError: "NOSCRIPT",
    redis_errors.OutOfMemoryError: "OOM",
    redis_errors.ReadOnlyError: "READONLY",
    redis_errors.NoPermissionError: "NOPERM",
    redis_errors.BusyLoadingError: "LOADING",
    redis_errors.AuthenticationWrongNumberOfArgsError: "NOAUTH",
    redis_errors.AuthenticationError: "NOAUTH",
    redis_errors.MasterDownError: "MASTERDOWN",
    redis_errors.ClusterDownError: "CLUSTERDOWN",
    redis_errors.TryAgainError: "TRYAGAIN",
    redis_errors.ExecAbortError: "EXECABORT",
}
# Not executed, and will be once the server has recovered.
TRANSIENT = frozenset(
    [
        "LOADING",
        "BUSY",
        "READONLY",
        "MASTERDOWN",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "NOREPLICAS",
        "OOM",
        "MISCONF",
        "UNBLOCKED",
    ]
)
# What an operator can do about a server that answers and takes nothing.
REMEDIES = {
    "OOM": "; it is out of memory: raise maxmemory, or let workers drain and lower maxlen and keep",
    "READONLY": "; it is a replica: check that the URL names the primary",
    "MISCONF": "; it cannot save to disk: look for space and rights there",
    "LOADING": "; it is still loading its data",
    "NOREPLICAS": "; it has fewer replicas than min-replicas-to-write",
}
# The connection leads to a server that does not take writes (any more).
NOT_THE_PRIMARY = frozenset(["READONLY", "MASTERDOWN", "UNBLOCKED"])
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -?([A-Z]{2,})\b")  # how 6.2 quotes the inner error
_FIRST_WORD = re.compile(r"([A-Z][A-Z0-9]+)\b")


class ReplyError(BusError):
    """The server answered with an error. `code` is its first word, e.g. NOGROUP, OOM, ERR.

    6.2 wraps what happens in a script ("Error running script ... -OOM ..."): the code is the
    inner one. The text may quote arguments, so it is never logged; `str()` gives the code and,
    for codes that never do, the text.
    """

    def __init__(self, code: str, text: str) -> None:
        shown = text.partition(" script: ")[0]
        if not shown.startswith(code):
            shown = f"{code} {shown}"
        super().__init__(shown if code in _SAFE_TEXT else code)
        self.code = code
        self.text = text

    @classmethod
    def of(cls, error: Exception) -> "ReplyError":
        """Classify an exception of redis-py by the server's error code."""
        text = str(error)
        for kind, code in _CODES.items():
            if isinstance(error, kind):
                return cls(code, text)
        if "script" in text and ("ACL failure" in text or "executing the script can't" in text):
            return cls("NOPERM", text)
        inner = _IN_SCRIPT.search(text) if "script" in text else None
        first = _FIRST_WORD.match(text)
        return cls((inner or first)[1] if inner or first else "ERR", text)  # type: ignore[index]

    def explained(self, key: str) -> BusError:
        """Return the error a caller should see for an operation on `key`."""
        if self.code == "WRONGTYPE":
            return WrongKeyType(f"the key {key} holds another Redis type than it should")
        if self.code == "NOPERM":
            return PermissionDenied(
                f"the user lacks a right on {key}: docs/wire.md lists the commands that are needed"
            )
        return self

    def refusal(self, where: str = "") -> ServerRefused:
        """Return the error for a server, at the address `where`, that takes no writes now."""
        server = f"the server at {where}" if where else "the server"
        text = f"{server} refused ({self.code}){REMEDIES.get(self.code, '')}"
        return ServerRefused(text, self.code)


_SAFE_TEXT = TRANSIENT | {"STALE", "WRONGTYPE", "NOGROUP", "BUSYGROUP"}


def refuse_replica(reply: Reply) -> None:
    """Raise what a probe was answered by a server that is not the primary (any more).

    Whatever else it says may be old: nobody is to be told by it that something is gone.
    """
    if isinstance(reply, ReplyError) and reply.code in NOT_THE_PRIMARY:
        raise reply


def row_of(flat: list[Reply]) -> dict[str, Reply]:
    """Return a row of XINFO, which RESP2 sends as a flat list of names and values."""
    return {k.decode(): v for k, v in zip(flat[::2], flat[1::2], strict=True)}
