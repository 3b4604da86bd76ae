"""Where a reader stands in a stream, and how it notices that entries were taken from under it."""

from typing import NamedTuple

from bus.envelope import order
from bus.streams.follower import Extent

START = b"0-0"  # before every entry
LAST = 2**64 - 1  # the largest number in an id


def reaches(extent: Extent, entry_id: bytes) -> bool:
    """Return whether a stream has entries so old that this one can only have been deleted alone."""
    return bool(extent.first) and order(extent.first) <= order(entry_id)


class Gap(NamedTuple):
    """Entries may have been missed: the one at which a reader stood is gone, and older ones, too.

    after: where it stood. first: the oldest entry now, b"" for none. at: it goes on after this.
    another: whether the stream is certainly another than the one it stood in: it lacks that entry,
    and nothing was ever taken from it (6.2 does not know).
    """

    stream: str
    after: bytes
    first: bytes
    at: bytes
    another: bool = False


class Place:
    """Where a reader stands in one stream.

    at: all up to this id has been read. met: an entry of that id was there, so that one can look
    whether it still is. shared: the id was given for several streams and may be of another.
    gone: the stream was not there when last looked at.
    """

    __slots__ = ("at", "gone", "met", "shared")

    def __init__(
        self, at: bytes = START, *, met: bool = False, shared: bool = False, gone: bool = False
    ) -> None:
        self.at = at
        self.met = met
        self.shared = shared
        self.gone = gone

    @classmethod
    def end_of(cls, extent: Extent | None) -> "Place":
        """Return the end of a stream; its beginning, if it is not there."""
        return cls(gone=True) if extent is None else cls(extent.last, met=extent.met)

    def copy(self) -> "Place":
        """Return another that stands there, too."""
        return Place(self.at, met=self.met, shared=self.shared, gone=self.gone)

    def move(self, entry_id: bytes) -> None:
        """Stand at an entry that was read."""
        self.at = entry_id
        self.met = True
        self.shared = self.gone = False

    def check(self, stream: str, extent: Extent | None) -> Gap | None:
        """Return what may have been missed, given where the stream begins and ends now.

        A stream that ends before us was begun anew by a clock that is behind, if it was not there
        when we last looked: we go on from its beginning. Else it has most likely lost its end, to
        a restart with older data, and we have seen what is left: we go on from its end.
        """
        gone, self.gone = self.gone, extent is None
        if extent is None or not self.met:
            return None
        here, last = order(self.at), order(extent.last)
        if last < here:
            return self._lost(stream, extent, START if gone else extent.last)
        if reaches(extent, self.at):
            return None
        if (extent.first or last > here) and not (self.shared and extent.whole):
            # The place stays: a read that is under way may bring some of what is gone by now.
            return self._lost(stream, extent, self.at)
        self.met = False  # it went after it was read, or was never here: nothing is missing
        return None

    def renewed(self, stream: str, first: bytes) -> Gap | None:
        """Return what may have been missed, given an entry that came once the stream was gone.

        One that is not beyond our place is of a stream begun anew; there we are at the beginning.
        """
        gone, self.gone = self.gone, False
        if not gone or not self.met or order(first) > order(self.at):
            return None
        gap = Gap(stream, self.at, first, START)
        self.at, self.met = START, False
        return gap

    def _lost(self, stream: str, extent: Extent, at: bytes) -> Gap:
        gap = Gap(stream, self.at, extent.first, at, another=extent.whole)
        self.at = at
        self.met = False  # so that it is told once
        return gap
