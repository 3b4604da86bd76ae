"""The bar of what takes long: on stderr, and only where that is a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from bus.cli.output import err


class Bar:
    """How far something is: a share of 0 to 1 and a few words. Nothing where nobody looks."""

    def __init__(self, what: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=err(),
            transient=False,
            disable=not err().is_terminal,
        )
        self._task = self._progress.add_task(what, total=1.0, said="")

    def at(self, share: float | None, said: str) -> None:
        """Show how far it is; None for a share that nobody knows."""
        self._progress.update(self._task, total=None if share is None else 1.0, said=said)
        if share is not None:
            self._progress.update(self._task, completed=share)

    def __enter__(self) -> Self:
        """Begin to show it."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave it where it is."""
        self._progress.stop()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something is under way of which nobody knows how long it takes."""
    with err().status(what) if err().is_terminal else _nothing():
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
