"""Effects take place exactly once whatever is killed, stopped or lost; mutants show that we'd know.

`EFFECTS_SEEDS=7` or `=1-30` runs other schedules of faults; a failure names the one it is of.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import Bus, Worker
from bus.streams import stream
from tests.faults import history, mutants, purse
from tests.faults.crew import Crew
from tests.faults.proxy import Proxy, digest
from tests.faults.purse import Spent
from tests.faults.storm import Storm, schedule
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.faults.crew import Member


def _seeds() -> list[int]:
    first, _, last = os.environ.get("EFFECTS_SEEDS", "1").partition("-")
    return list(range(int(first), int(last or first) + 1))


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(tmp_path, "tests.faults.effects_program")
    yield crew
    crew.end()


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(url) as redis:
        await purse.open_purses(redis)
        yield redis


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(valkey_url) as redis:
        await purse.open_purses(redis)
        yield redis


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def clean(found: history.History, about: str = "") -> None:
    """Fail with every invariant that does not hold."""
    wrong = history.violations(found)
    assert not wrong, f"{about}\n{history.told(wrong)}"


async def publish(crew: Crew, url: str, spends: list[Spent]) -> None:
    async with Bus.connect(url) as bus:
        await purse.publish(bus, crew.journal, spends)


async def drained(crew: Crew, url: str, redis: Redis) -> history.History:
    """Let a fresh worker, the product as it is, finish here; return the history."""
    async with Bus.connect(url) as bus:
        handlers = purse.handlers(crew.journal)
        async with Worker(bus, handlers, lease_s=purse.LEASE_S, name="fresh") as worker:
            await worker.drained()
    return await told(crew, redis)


async def told(crew: Crew, redis: Redis) -> history.History:
    return history.History(history.read(crew.journal.path), await purse.look(redis))


# --- storms


@pytest.mark.parametrize("seed", _seeds())
async def test_effects_take_place_once_in_a_storm_of_faults(
    crew: Crew, url: str, redis: Redis, seed: int
) -> None:
    rounds = schedule(seed)
    faults = [(r.publisher, r.workers, r.lost) for r in rounds]
    about = f"EFFECTS_SEEDS={seed}: {faults}"
    async with Proxy(port_of(url)) as proxy:
        storm = Storm(crew, url, proxy, redis)
        try:
            found = await storm.run(rounds)
        except AssertionError as error:
            raise AssertionError(f"{about}\n{error}") from error
    clean(found, about)
    assert storm.struck, "some fault came about"
    assert found.server.marks, "some effects took place"


# --- one fault at a time, on every server

SPENDS = [
    Spent(n=0, purse="a", amount=50),
    Spent(n=1, purse="a", amount=50, kind="flaky"),
    Spent(n=2, purse="b", amount=3, kind="broken"),
    Spent(n=3, purse="c", amount=1, kind="slow"),
    Spent(n=4, purse="a", amount=7, kind="rejected"),
    Spent(n=5, purse="c", amount=2),
]


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_kill_beside_the_commit_neither_loses_nor_repeats_effects(
    crew: Crew, url: str, redis: Redis, moment: str
) -> None:
    await publish(crew, url, SPENDS)
    await crew.start(url, point="commit", moment=moment).killed()
    took_place = await redis.hlen("applied")
    assert (took_place > 0) == (moment == "after"), "the kill was where it should be"
    found = await drained(crew, url, redis)
    clean(found)
    assert len(found.server.crossings) == 2


ASLEEP: dict[str, tuple[str, dict[str, Any]]] = {
    "in its handler": ("stop", {}),
    "on its way to the server": (
        "plain",
        {"point": "commit", "moment": "before", "signal": "SIGSTOP"},
    ),
}


@pytest.mark.parametrize("where", ASLEEP)
async def test_what_a_zombie_collected_never_takes_place(
    crew: Crew, url: str, redis: Redis, where: str
) -> None:
    """It stands still, another takes over and finishes, and then it goes on."""
    kind, fault = ASLEEP[where]
    await publish(crew, url, [Spent(n=0, purse="a", amount=61, kind=kind)])
    zombie = crew.start(url, name="zombie", **fault)
    await zombie.stopped()
    await drained(crew, url, redis)
    before = await purse.look(redis)
    await _wake(zombie)
    found = await told(crew, redis)
    clean(found)
    assert found.server == before, "nothing of it took place, not even in part"
    ended = {s.pid for s in found.steps if s.name == "end"}
    assert ended == {os.getpid(), zombie.pid}, "both handlers returned"
    assert found.server.marks == {(0, os.getpid(), 2)}
    (refused,) = zombie.logged("delivery.refused")
    assert (refused["verb"], refused["count"]) == ("commit", 1)


async def _wake(zombie: Member) -> None:
    """Let it go on, bring its verdict to the server, and end."""
    zombie.send(signal.SIGCONT)
    zombie.process.terminate()
    assert await zombie.ended() == 0, zombie.output()


async def test_lost_answers_to_commits_repeat_no_effect(crew: Crew, url: str, redis: Redis) -> None:
    await redis.script_load(stream._commit._text)  # so that calls by digest are what counts
    await publish(crew, url, SPENDS)
    async with Proxy(port_of(url)) as proxy, Bus.connect(proxy.url) as bus:
        proxy.lose(digest(stream._commit), 4)
        async with Worker(bus, purse.handlers(crew.journal), lease_s=purse.LEASE_S) as worker:
            await eventually(lambda: proxy.lost == 4)
            await worker.drained()
    clean(await told(crew, redis))


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_transaction_is_whole_or_not_at_all_when_its_process_is_killed(
    crew: Crew, url: str, redis: Redis, moment: str
) -> None:
    fault = {"point": "commit", "moment": moment, "nth": 3}
    await crew.start(url, role="publisher", changes=list(range(6)), **fault).killed()
    found = await drained(crew, url, redis)
    clean(found)
    assert (len(found.server.changes) > 0) == (moment == "after")


async def test_a_transaction_whose_answers_are_lost_takes_place_once(
    crew: Crew, url: str, redis: Redis
) -> None:
    clean(await _changed_without_answers(crew, url, redis))


async def _changed_without_answers(
    crew: Crew, url: str, redis: Redis, mutant: str = ""
) -> history.History:
    """Four answers to transactions never arrive, and all are sent again."""
    script = mutants.MUTANTS[mutant] if mutant else stream._commit
    await redis.script_load(script.text if mutant else script._text)
    async with Proxy(port_of(url)) as proxy:
        proxy.lose(script.digest.encode() if mutant else digest(script), 4)
        publisher = crew.start(proxy.url, role="publisher", mutant=mutant, changes=list(range(20)))
        assert await publisher.ended() == 0, publisher.output()
        assert proxy.lost == 4
    return await drained(crew, url, redis)


# --- mutants: each mistake is one that the checker reports, and without it there is nothing wrong


@dataclass(frozen=True)
class Trial:
    """One event of a kind meets a worker with a mistake in it, which is hit.

    fault, control: where, with the mistake and without. broken: an invariant that must be reported.
    """

    mutant: str
    broken: str
    fault: dict[str, Any]
    kind: str = "plain"
    control: dict[str, Any] | None = None


AFTER_COMMIT = {"point": "commit", "moment": "after"}
TRIALS = [
    Trial(
        "the ack comes first",
        "each_event_takes_effect_once",
        {"point": "ack", "moment": "after"},
        control=AFTER_COMMIT,
    ),
    Trial(
        "effects are commands of their own",
        "each_event_takes_effect_once",
        {"point": "ack", "moment": "before"},
        control=AFTER_COMMIT,
    ),
    Trial("what failed half way is not acked", "only_what_must_is_dead", AFTER_COMMIT, "broken"),
    Trial(
        "the dead letter of what failed half way is forgotten",
        "only_what_must_is_dead",
        AFTER_COMMIT,
        "broken",
    ),
    Trial("a command that failed is no failure", "only_what_must_is_dead", AFTER_COMMIT, "broken"),
    Trial("conditions are not tested", "crossings_are_told_once", AFTER_COMMIT),
]


async def _tried(
    trial: Trial, crew: Crew, url: str, redis: Redis, *, mutated: bool
) -> history.History:
    await publish(crew, url, [Spent(n=0, purse="b", amount=5, kind=trial.kind)])
    fault = trial.fault if mutated else trial.control or trial.fault
    await crew.start(url, mutant=trial.mutant if mutated else "", **fault).killed()
    return await drained(crew, url, redis)


@pytest.mark.parametrize("trial", TRIALS, ids=lambda t: t.mutant)
async def test_a_mutant_is_caught(crew: Crew, valkey_url: str, valkey: Redis, trial: Trial) -> None:
    found = await _tried(trial, crew, valkey_url, valkey, mutated=True)
    assert trial.broken in history.violations(found)


@pytest.mark.parametrize("trial", TRIALS, ids=lambda t: t.mutant)
async def test_without_its_mistake_there_is_nothing_to_catch(
    crew: Crew, valkey_url: str, valkey: Redis, trial: Trial
) -> None:
    clean(await _tried(trial, crew, valkey_url, valkey, mutated=False))


async def test_a_zombie_is_caught_that_does_not_ask_whose_the_entry_is(
    crew: Crew, valkey_url: str, valkey: Redis
) -> None:
    await publish(crew, valkey_url, [Spent(n=0, purse="a", amount=61, kind="stop")])
    zombie = crew.start(valkey_url, name="zombie", mutant="nobody asks whose the entry is")
    await zombie.stopped()
    await drained(crew, valkey_url, valkey)
    await _wake(zombie)
    found = history.violations(await told(crew, valkey))
    assert "one_attempt_takes_effect" in found
    assert "sums_are_exact" in found
    assert "each_event_has_one_follow_up" in found


async def test_a_transaction_that_is_not_remembered_is_caught(
    crew: Crew, valkey_url: str, valkey: Redis
) -> None:
    mutant = "a transaction is not remembered"
    found = await _changed_without_answers(crew, valkey_url, valkey, mutant)
    assert "transactions_take_place_once" in history.violations(found)


def test_each_mutant_is_tried() -> None:
    zombie, forgetful = "nobody asks whose the entry is", "a transaction is not remembered"
    assert {t.mutant for t in TRIALS} | {zombie, forgetful} == set(mutants.MUTANTS)
