"""What tests wait for and look at: conditions that come true, and everything a bus has emitted."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from bus import Bus

PATIENCE_S = 20.0
LOOK_EVERY_S = 0.01


async def eventually(
    holds: Callable[[], Any], what: str = "", timeout_s: float = PATIENCE_S
) -> Any:
    """Look again and again until `holds()` is true (it may be a coroutine function); return it."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = holds()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline_s:
            raise AssertionError(f"never came true: {what or inspect.getsource(holds).strip()}")
        await asyncio.sleep(LOOK_EVERY_S)


class Witness:
    """Remembers everything that a bus emits."""

    def __init__(self, bus: Bus) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        bus.telemetry.attach("*", self._see)

    def _see(self, name: str, fields: dict[str, Any]) -> None:
        self.seen.append((name, fields))

    def of(self, name: str, **having: Any) -> list[dict[str, Any]]:
        """The fields of everything emitted under `name` whose fields have these values."""
        return [
            fields
            for seen, fields in self.seen
            if seen == name and all(fields.get(k) == v for k, v in having.items())
        ]

    def total(self, name: str, **having: Any) -> int:
        """The sum of `count` over what was emitted under `name`."""
        return sum(fields["count"] for fields in self.of(name, **having))

    def counts(self) -> Counter[str]:
        """How often each name was emitted."""
        return Counter(name for name, _ in self.seen)

    def forget(self) -> Self:
        """Start afresh."""
        self.seen.clear()
        return self
