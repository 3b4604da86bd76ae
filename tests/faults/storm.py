"""Rounds of events and faults, drawn from a seed: what is published, who is hit where and when.

A round starts a publisher and workers, each with a failpoint of its own, and is over when these
have struck or nothing is left to do. Who stands still is woken as soon as others have what it held.
In the end the faults stop, a fresh worker drains, and what still stands is woken beside it.
"""

from __future__ import annotations

import random
import signal
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import msgspec
from redis.asyncio import Redis

from bus import Bus, Worker
from bus.streams import keys, stream
from tests.faults import history, purse
from tests.faults.proxy import Proxy, digest
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.faults.crew import Crew, Member

ROUNDS, SPENDS, CHANGES = 3, 40, 12
SCRIPTS = {
    "commit": stream._commit,
    "append": stream._append,
    "park": stream._park,
    "dead_letter": stream._dead_letter,
}
KINDS = ["plain"] * 12 + ["slow"] * 6 + ["flaky"] * 3 + ["broken", "rejected"] + ["stop"]

# Where a worker is hit, and how many times it comes there first, at most.
POINTS = {
    ("commit", "before"): 4,
    ("commit", "after"): 4,
    ("handler", "before"): 20,
    ("handler", "after"): 20,
    ("read", "before"): 3,
    ("read", "after"): 3,
    ("park", "before"): 2,
    ("park", "after"): 2,
    ("dead_letter", "before"): 1,
    ("dead_letter", "after"): 1,
    ("reclaim", "before"): 2,
    ("reclaim", "after"): 1,
    ("start", "before"): 3,
    ("start", "after"): 3,
    ("recover", "before"): 1,
    ("recover", "after"): 1,
}


@dataclass(frozen=True)
class Fault:
    """point, moment, nth, signal, lose_reads: see `program.py`. through: behind the proxy.

    batch: see `purse.handlers`.
    """

    point: str
    moment: str
    nth: int
    signal: str
    lose_reads: int
    through: bool
    batch: int = 0


@dataclass(frozen=True)
class Round:
    """lost: of which script how many answers get lost."""

    spends: tuple[purse.Spent, ...]
    changes: tuple[int, ...]
    publisher: Fault
    workers: tuple[Fault, ...]
    lost: tuple[str, int]


def schedule(seed: int) -> list[Round]:
    """Return what happens under a seed: always the same."""
    rng = random.Random(seed)
    rounds = []
    for number in range(ROUNDS):
        spends = [_spend(rng, number * SPENDS + n) for n in range(SPENDS)]
        spends[rng.randrange(SPENDS)] = purse.Spent(
            n=spends[0].n + SPENDS * ROUNDS, purse="a", amount=1, kind="doomed"
        )
        changes = tuple(range(number * CHANGES, (number + 1) * CHANGES))
        workers = (_fault(rng, through=True), _fault(rng, through=False))
        rounds.append(
            Round(
                tuple(spends),
                changes,
                _publisher_fault(rng),
                workers,
                (rng.choice(["commit", "commit", *SCRIPTS]), rng.randrange(5)),
            )
        )
    return rounds


def _spend(rng: random.Random, n: int) -> purse.Spent:
    which = rng.choice(list(purse.OPENING))
    return purse.Spent(n=n, purse=which, amount=rng.randint(1, 9), kind=rng.choice(KINDS))


def _fault(rng: random.Random, *, through: bool) -> Fault:
    point, moment = rng.choice(list(POINTS))
    nth = rng.randint(1, POINTS[point, moment])
    name = rng.choice(["SIGKILL", "SIGKILL", "SIGSTOP"])
    lose_reads = 1 if point == "recover" else rng.choice([0, 0, 0, 1])
    batch = rng.choice([0, 0, 5])
    if batch and point == "handler":
        point, nth = "batch", -(-nth // batch)
    return Fault(point, moment, nth, name, lose_reads, through, batch)


def _publisher_fault(rng: random.Random) -> Fault:
    point = rng.choice(["commit", "append", ""])
    moment = rng.choice(["before", "after"])
    name = rng.choice(["SIGKILL", "SIGKILL", "SIGSTOP"])
    nth = rng.randint(1, 10 if point == "commit" else 4)
    return Fault(point, moment, nth, name, 0, through=True)


class Storm:
    """Runs rounds on one server.

    struck: the processes of those workers whose faults are over.
    """

    def __init__(self, crew: Crew, url: str, proxy: Proxy, redis: Redis) -> None:
        self._crew = crew
        self._url = url
        self._proxy = proxy
        self._redis = redis
        self._workers: dict[str, Member] = {}
        self._publishers: list[Member] = []
        self.struck: set[int] = set()
        self._asleep: dict[str, Member] = {}

    async def run(self, rounds: list[Round]) -> history.History:
        """Return the history of all rounds and of what comes after them."""
        for script in SCRIPTS.values():  # so that calls by digest are what counts
            await self._redis.script_load(script._text)
        for number, one in enumerate(rounds):
            word, count = one.lost
            self._proxy.lose(digest(SCRIPTS[word]), count)
            publisher = self._publish(one)
            pids = {self._hire(f"w{number}-{n}", fault).pid for n, fault in enumerate(one.workers)}
            await eventually(lambda p=publisher, w=pids: self._is_over(p, w), f"round {number}")
        self._proxy.lose(b"", 0)
        await self._calm()
        return history.History(history.read(self._crew.journal.path), await purse.look(self._redis))

    def _publish(self, one: Round) -> Member:
        member = self._crew.start(
            self._proxy.url,
            role="publisher",
            publish_timeout_s=0.5,
            spends=[msgspec.to_builtins(s) for s in one.spends],
            changes=one.changes,
            **asdict(one.publisher),
        )
        self._publishers.append(member)
        return member

    def _hire(self, name: str, fault: Fault) -> Member:
        url = self._proxy.url if fault.through else self._url
        member = self._crew.start(url, name=name, **asdict(fault))
        self._workers[name] = member
        return member

    async def _is_over(self, publisher: Member, pids: set[int]) -> bool:
        """Wake whoever has lost everything; whether the round is over."""
        await self._look_after()
        if publisher.process.poll() is None and not publisher.stands():
            return False
        return pids <= self.struck or not any((await purse.left(self._redis)).values())

    async def _look_after(self) -> None:
        for name, member in self._workers.items():
            if member.process.poll() is not None:
                self.struck.add(member.pid)
                self._asleep.pop(name, None)
            elif member.stands():
                self.struck.add(member.pid)
                self._asleep[name] = member
        for name, member in list(self._asleep.items()):
            if await self._lost_everything(name):
                del self._asleep[name]
                member.send(signal.SIGCONT)

    async def _lost_everything(self, name: str) -> bool:
        """Whether the lease of a worker is over and what it held belongs to others."""
        leases = [keys.lease(s, name) for s in purse.GROUPS]
        return not await self._redis.exists(*leases) and not await purse.held_by(self._redis, name)

    async def _calm(self) -> None:
        """Let a fresh worker finish, beside those that stood still and now wake up."""
        await self._look_after()
        for name, member in self._workers.items():
            if name not in self._asleep:
                member.process.kill()
                member.process.wait()
        sleepers = list(self._asleep.values())
        async with Bus.connect(self._url) as bus:
            handlers = purse.handlers(self._crew.journal)
            async with Worker(bus, handlers, lease_s=purse.LEASE_S, name="fresh") as worker:
                await eventually(self._all_are_awake, f"taken from {list(self._asleep)}")
                for member in sleepers:
                    member.process.terminate()
                for member in self._publishers:
                    if member.process.poll() is None:
                        member.send(signal.SIGCONT)
                await eventually(lambda: self._all_ended(sleepers), "woken workers end")
                for member in [*sleepers, *self._publishers]:
                    assert await member.ended() in (0, -signal.SIGKILL), member.output()
                await worker.drained()

    async def _all_are_awake(self) -> bool:
        await self._look_after()
        return not self._asleep

    async def _all_ended(self, members: list[Member]) -> bool:
        """Some stand still once more, at another event that has them do so, and are woken again."""
        await self._look_after()
        return all(m.process.poll() is not None for m in members)
