"""The product with a mistake in it, to see that the checker of histories would notice.

Each is installed in the process of one worker or publisher; the files stay as they are. A mutant
that finds nothing to change any more raises, so that none of them fades away unnoticed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from bus.streams import stream
from bus.streams.answers import Committed, Fate
from bus.streams.script import Script
from bus.streams.stream import StreamStore

if TYPE_CHECKING:
    from collections.abc import Callable


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


# --- effects that are commands of their own


async def _apply(store: StreamStore, unit: list[Any]) -> None:
    """Run the commands of a delivery one by one, those whose conditions are met."""
    commands: list[Any] = unit[5]
    replies: list[Any] = []
    for tests, words in commands:
        met = True
        for command, _, low, high in zip(*(tests[i::4] for i in range(4)), strict=True):
            reply = replies[command - 1]
            met = met and reply is not None and int(low) <= reply <= int(high)
        replies.append(await store.commands.call(*words) if met else None)


def _in_steps(
    apply: Callable[[StreamStore, list[list[Any]], Callable[[], Any]], Any],
) -> Callable[[], None]:
    """Return what has `apply(store, units, ack)` done to deliveries instead of the script."""

    def install() -> None:
        inner = StreamStore.commit

        async def commit(
            self: StreamStore,
            target: tuple[Any, ...],
            group: str,
            owner: str,
            touched: Any,
            sheet: Any,
        ) -> Any:
            if not group:
                return await inner(self, target, group, owner, touched, sheet)
            _, units = msgspec.msgpack.decode(sheet[0])
            ids = [u[0].encode() for u in units]
            refused = await apply(self, units, lambda: self.ack(target[0], group, owner, ids))
            fates = [Committed(Fate.REFUSED if i in refused else Fate.DONE) for i in ids]
            return fates, [], {}

        StreamStore.commit = commit  # type: ignore[method-assign]

    return install


async def _ack_first(store: StreamStore, units: list[list[Any]], ack: Callable[[], Any]) -> Any:
    refused = await ack()
    for unit in units:
        if unit[0].encode() not in refused:
            await _apply(store, unit)
    return refused


async def _ack_last(store: StreamStore, units: list[list[Any]], ack: Callable[[], Any]) -> Any:
    for unit in units:
        await _apply(store, unit)
    return await ack()


MUTANTS: dict[str, Callable[[], None]] = {
    "the ack comes first": _in_steps(_ack_first),
    "effects are commands of their own": _in_steps(_ack_last),
    "nobody asks whose the entry is": Rewrite(
        "if transaction or mine[id] then", "if transaction or mine then"
    ),
    "a transaction is not remembered": Rewrite(
        "if last[1] == owner then return", "if last[1] == '' then return"
    ),
    "what failed half way is not acked": Rewrite(
        "        done[#done + 1] = id\n", "        if not wrong then done[#done + 1] = id end\n"
    ),
    "the dead letter of what failed half way is forgotten": Rewrite(
        "if not transaction then bury(id, attempt, origin, wrong, answer[3]) end", ""
    ),
    "a command that failed is no failure": Rewrite(
        "wrong = args[1] .. ' '", "local ignored = args[1] .. ' '"
    ),
    "conditions are not tested": Rewrite("met = met and holds(", "met = true or holds("),
}
