"""The product with a mistake in it, to see that the checker of histories would notice.

Each is installed in the process of one worker or publisher; the files stay as they are. A mutant
that finds nothing to change any more raises, so that none of them fades away unnoticed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bus.committer import Committer
from bus.effects import Effects
from bus.streams import stream
from bus.streams.answers import Committed, Fate
from bus.streams.script import Script
from bus.streams.stream import StreamStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus import Delivery


@dataclass(frozen=True)
class Rewrite:
    """commit.lua with one place of it changed; called, it takes effect in this process."""

    old: str
    new: str

    @property
    def text(self) -> bytes:
        text = Script("commit")._text.decode()
        assert text.count(self.old) == 1, f"commit.lua does not say this once: {self.old}"
        return text.replace(self.old, self.new).encode()

    @property
    def digest(self) -> str:
        return hashlib.sha1(self.text, usedforsecurity=False).hexdigest()

    def __call__(self) -> None:
        stream._commit._text = self.text
        stream._commit._by_digest = self.digest


# --- effects that are commands of their own, and the ack before or after them

_calls: dict[int, list[tuple[str, Any]]] = {}  # what was collected, by the id of an Effects


def _listen(name: str) -> None:
    """Have a method of Effects note its calls, but for those that have a condition to meet."""
    inner = getattr(Effects, name)

    def noted(self: Effects, *args: Any, when: Any = None, **kwargs: Any) -> Any:
        if not self:
            _calls[id(self)] = []
        if when is None:
            _calls[id(self)].append((name, args))
        return inner(self, *args, when=when, **kwargs)

    setattr(Effects, name, noted)


async def _apply(store: StreamStore, delivery: Delivery[Any]) -> None:
    for name, args in _calls.pop(id(delivery.effects)):
        match name, args:
            case "publish", (event,):
                await delivery.bus.publish(event)
            case "hincrby", (key, field):
                await store.commands.call("HINCRBY", key, field, 1)
            case _:
                await store.commands.call(name.upper(), *map(str, args))


def _in_steps(*, ack_first: bool) -> Callable[[], None]:
    """Return what has deliveries applied by plain commands, and acked by the script of acks."""

    async def commit(
        self: Committer, stream: str, group: str, consumer: str, deliveries: list[Delivery[Any]]
    ) -> list[Committed]:
        async def ack() -> list[bytes]:
            return await self._store.ack(stream, group, consumer, [d.entry_id for d in deliveries])

        refused = await ack() if ack_first else []
        for delivery in deliveries:
            if delivery.entry_id not in refused:
                await _apply(self._store, delivery)
        refused = refused if ack_first else await ack()
        return [Committed(Fate.REFUSED if d.entry_id in refused else Fate.DONE) for d in deliveries]

    def install() -> None:
        for name in ("hincrby", "sadd", "publish"):
            _listen(name)
        Committer.commit = commit  # type: ignore[method-assign, assignment]

    return install


MUTANTS: dict[str, Callable[[], None]] = {
    "the ack comes first": _in_steps(ack_first=True),
    "effects are commands of their own": _in_steps(ack_first=False),
    "nobody asks whose the entry is": Rewrite(
        "if transaction or mine[id] then", "if transaction or mine then"
    ),
    "a transaction is not remembered": Rewrite(
        "    if last == owner then\n", "    if last == '' then\n"
    ),
    "what failed half way is not acked": Rewrite(
        "if bury(id, attempt, origin, answer[2], stays) then done[#done + 1] = id end",
        "bury(id, attempt, origin, answer[2], stays)",
    ),
    "the dead letter of what failed half way is forgotten": Rewrite(
        "if bury(id, attempt, origin, answer[2], stays) then done", "if true then done"
    ),
    "a command that failed is no failure": Rewrite(
        "wrong = args[1] .. ' '", "local ignored = args[1] .. ' '"
    ),
    "conditions are not tested": Rewrite("met = met and holds(", "met = true or holds("),
}
