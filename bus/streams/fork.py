"""What has to be made anew in a child of os.fork."""

import os
from collections.abc import Callable

_after_fork: list[Callable[[], None]] = []


def call_after_fork(hook: Callable[[], None]) -> None:
    """Call `hook` in every child made by os.fork, until `forget_after_fork`."""
    _after_fork.append(hook)


def forget_after_fork(hook: Callable[[], None]) -> None:
    """Undo `call_after_fork`."""
    if hook in _after_fork:
        _after_fork.remove(hook)


def _in_child() -> None:
    for hook in _after_fork:
        hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
