"""What one sees while the demo runs: one line that is written anew, or plain lines in a log."""

import shutil
import sys
import time

from demo.ledger import Book
from demo.watch import Snapshot

PLAIN_EVERY_S = 2.0


class Progress:
    """Prints how far it has come. `say` is for what happens once."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._started = time.monotonic()
        self._printed_at = 0.0
        self._width = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the demo started."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(f"{self.elapsed_s:6.1f} s  {text}", flush=True)

    def show(self, book: Book, snapshot: Snapshot) -> None:
        """Show the counts: at once on a terminal, every two seconds elsewhere."""
        handled = "  ".join(f"{group} {count:,}" for group, count in snapshot.handled.items())
        text = (
            f"published {len(book.entries):,}  handled: {handled}"
            f"  failed attempts {snapshot.failed:,}  dead letters {snapshot.dead:,}"
        )
        if self._live:
            # A line that wraps would not be overwritten by the next.
            columns = shutil.get_terminal_size().columns
            line = f"{self.elapsed_s:6.1f} s  {text}"[: columns - 1]
            print("\r" + line.ljust(self._width), end="", flush=True)
            self._width = len(line)
        elif self.elapsed_s - self._printed_at >= PLAIN_EVERY_S:
            self._printed_at = self.elapsed_s
            self.say(text)

    def clear(self) -> None:
        """Take the live line away."""
        if self._width:
            print("\r" + " " * self._width + "\r", end="", flush=True)
            self._width = 0
