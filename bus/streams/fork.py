"""What has to be made anew in a child of os.fork."""

import os
from collections.abc import Callable
from weakref import WeakMethod

_after_fork: list[WeakMethod[Callable[[], None]]] = []


def call_after_fork(hook: Callable[[], None]) -> None:
    """Call `hook`, a method, in every child made by os.fork, for as long as its object lives."""
    _after_fork[:] = [known for known in _after_fork if known() is not None]
    _after_fork.append(WeakMethod(hook))


def forget_after_fork(hook: Callable[[], None]) -> None:
    """Undo `call_after_fork`."""
    _after_fork[:] = [known for known in _after_fork if known() not in (None, hook)]


def _in_child() -> None:
    for known in _after_fork:
        hook = known()
        if hook is not None:
            hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
