"""The checker of histories reports each thing that can be wrong with effects, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.history import (
    INVARIANTS,
    Dead,
    History,
    Server,
    Spent,
    Step,
    Told,
    read,
    told,
    violations,
)

if TYPE_CHECKING:
    from pathlib import Path

WORKER, HEIR = 100, 200
BROKEN = Dead(3, "effects-failed", "HINCRBY applied\nSADD marks")

# Five events: 0 and 1 are spent from a purse that they take below zero, 2 is rejected, 3 fails half
# way, 4 was published by nobody knows whom for certain, and came in. A worker died with 1.
STEPS = (
    *(Step("spend", n, 0, 1) for n in range(6)),
    *(Step("spend.ok", n, 0, 1) for n in range(4)),
    Step("spend.unknown", 4, 0, 1),
    Step("spend.refused", 5, 0, 1),
    *(Step("start", n, 1, WORKER) for n in range(5)),
    *(Step("end", n, 1, WORKER) for n in (0, 1, 3, 4)),
    Step("start", 1, 2, HEIR),
    Step("end", 1, 2, HEIR),
    *(Step("change", n, 0, 1) for n in range(3)),
    Step("change.ok", 0, 0, 1),
    Step("change.unknown", 1, 0, 1),
    Step("change.refused", 2, 0, 1),
)
SERVER = Server(
    opening={"a": 10, "b": 5},
    balances={"a": -3, "b": 4},
    spent=(
        Spent("id0", 0, "a", 6),
        Spent("id1", 1, "a", 7),
        Spent("id2", 2, "a", 8, "rejected"),
        Spent("id3", 3, "a", 9, "broken"),
        Spent("id4", 4, "b", 1),
    ),
    slips=(Told("s0", 0, "id0"), Told("s1", 1, "id1"), Told("s4", 4, "id4")),
    crossings=(Told("c1", 1, "id1", "a"),),
    changes=(Told("t0", 0, ""), Told("t1", 1, "")),
    dead=(Dead(2, "rejected"), BROKEN),
    applied={0: 1, 1: 1, 3: 1, 4: 1},
    marks=frozenset({(0, WORKER, 1), (1, HEIR, 2), (3, WORKER, 1), (4, WORKER, 1)}),
    slips_applied={0: 1, 1: 1, 4: 1},
    changes_applied={0: 1, 1: 1},
    changed=2,
    change_marks=frozenset({0, 1}),
    left={"bus:{purse:0}": 0},
)


@dataclass(frozen=True)
class Wrong:
    """What the server says differently, lines that are there besides, and what is reported."""

    what: str
    broken: set[str]
    server: dict[str, Any] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()


CASES = [
    Wrong(
        "a published event is nowhere",
        {"nothing_published_is_lost"},
        steps=(Step("spend", 9, 0, 1), Step("spend.ok", 9, 0, 1)),
    ),
    Wrong(
        "an event is there twice though its publish was told once",
        {"nothing_published_is_lost"},
        {"spent": (*SERVER.spent, Spent("id2", 2, "a", 8, "rejected"))},
    ),
    Wrong(
        "an event of unknown outcome is there twice",
        {"nothing_published_is_lost", "sums_are_exact"},
        {"spent": (*SERVER.spent, Spent("id4", 4, "b", 1))},
    ),
    Wrong(
        "a refused event is there",
        {"nothing_comes_of_nothing"},
        {
            "spent": (*SERVER.spent, Spent("id5", 5, "b", 1, "rejected")),
            "dead": (*SERVER.dead, Dead(5, "rejected")),
        },
    ),
    Wrong(
        "an event is there that nobody published",
        {"nothing_comes_of_nothing"},
        {
            "spent": (*SERVER.spent, Spent("id8", 8, "b", 1, "rejected")),
            "dead": (*SERVER.dead, Dead(8, "rejected")),
        },
    ),
    Wrong(
        "an effect is of an event that is not there",
        {"nothing_comes_of_nothing"},
        {"applied": {**SERVER.applied, 5: 1}},
    ),
    Wrong(
        "an effect took place twice",
        {"each_event_takes_effect_once"},
        {"applied": {**SERVER.applied, 0: 2}},
    ),
    Wrong(
        "an effect did not take place",
        {"each_event_takes_effect_once"},
        {"applied": {1: 1, 3: 1, 4: 1}},
    ),
    Wrong(
        "an effect of a rejected event took place",
        {"each_event_takes_effect_once"},
        {"applied": {**SERVER.applied, 2: 1}},
    ),
    Wrong(
        "what failed half way was done again",
        {"each_event_takes_effect_once"},
        {"applied": {**SERVER.applied, 3: 2}},
    ),
    Wrong(
        "a zombie's effects took place beside those of its heir",
        {"one_attempt_takes_effect"},
        {"marks": SERVER.marks | {(1, WORKER, 1)}},
    ),
    Wrong(
        "effects took place of a handler that never returned",
        {"one_attempt_takes_effect"},
        {"marks": SERVER.marks - {(0, WORKER, 1)} | {(0, HEIR, 1)}},
    ),
    Wrong(
        "no attempt took effect",
        {"one_attempt_takes_effect"},
        {"marks": SERVER.marks - {(0, WORKER, 1)}},
    ),
    Wrong(
        "an event is dead that should not be",
        {
            "only_what_must_is_dead",
            "each_event_takes_effect_once",
            "sums_are_exact",
            "each_event_has_one_follow_up",
        },
        {"dead": (*SERVER.dead, Dead(4, "crashed"))},
    ),
    Wrong(
        "an event is dead twice",
        {"only_what_must_is_dead"},
        {"dead": (*SERVER.dead, BROKEN)},
    ),
    Wrong(
        "a dead letter does not say what was applied",
        {"only_what_must_is_dead"},
        {"dead": (Dead(2, "rejected"), BROKEN._replace(applied=""))},
    ),
    Wrong("a purse holds a token too many", {"sums_are_exact"}, {"balances": {"a": -2, "b": 4}}),
    Wrong("a purse is gone", {"sums_are_exact"}, {"balances": {"a": -3}}),
    Wrong("nobody was told of a crossing", {"crossings_are_told_once"}, {"crossings": ()}),
    Wrong(
        "a crossing was told twice",
        {"crossings_are_told_once"},
        {"crossings": (*SERVER.crossings, Told("c0", 0, "id0", "a"))},
    ),
    Wrong(
        "a crossing was told that was none",
        {"crossings_are_told_once"},
        {"crossings": (*SERVER.crossings, Told("c4", 4, "id4", "b"))},
    ),
    Wrong(
        "a follow-up is missing",
        {"each_event_has_one_follow_up"},
        {"slips": SERVER.slips[:2], "slips_applied": {0: 1, 1: 1}},
    ),
    Wrong(
        "an event has two follow-ups",
        {"each_event_has_one_follow_up"},
        {"slips": (*SERVER.slips, Told("s9", 0, "id0"))},
    ),
    Wrong(
        "a dead event has a follow-up",
        {"each_event_has_one_follow_up"},
        {
            "slips": (*SERVER.slips, Told("s2", 2, "id2")),
            "slips_applied": {**SERVER.slips_applied, 2: 1},
        },
    ),
    Wrong(
        "a follow-up names another cause",
        {"each_event_has_one_follow_up"},
        {"slips": (Told("s0", 0, "id1"), *SERVER.slips[1:])},
    ),
    Wrong(
        "two follow-ups have one id",
        {"each_event_has_one_follow_up"},
        {"slips": (Told("s1", 0, "id0"), *SERVER.slips[1:])},
    ),
    Wrong(
        "a follow-up took effect twice",
        {"follow_ups_take_effect_once"},
        {"slips_applied": {**SERVER.slips_applied, 0: 2}},
    ),
    Wrong(
        "a follow-up took no effect",
        {"follow_ups_take_effect_once"},
        {"slips_applied": {0: 1, 1: 1}},
    ),
    Wrong(
        "a follow-up took effect that is not there",
        {"follow_ups_take_effect_once"},
        {"slips_applied": {**SERVER.slips_applied, 2: 1}},
    ),
    Wrong(
        "the event of a change took effect twice",
        {"follow_ups_take_effect_once"},
        {"changes_applied": {0: 2, 1: 1}},
    ),
    Wrong(
        "a transaction changed the state twice",
        {"transactions_take_place_once"},
        {"changed": 3},
    ),
    Wrong(
        "a transaction published twice",
        {"transactions_take_place_once"},
        {"changes": (*SERVER.changes, Told("t1", 1, "")), "changed": 3},
    ),
    Wrong(
        "a committed transaction is nowhere",
        {"transactions_take_place_once"},
        steps=(Step("change", 9, 0, 1), Step("change.ok", 9, 0, 1)),
    ),
    Wrong(
        "a refused transaction took place",
        {"transactions_take_place_once"},
        {
            "changed": 3,
            "changes": (*SERVER.changes, Told("t2", 2, "")),
            "changes_applied": {0: 1, 1: 1, 2: 1},
            "change_marks": frozenset({0, 1, 2}),
        },
    ),
    Wrong(
        "a transaction took place that nobody began",
        {"transactions_take_place_once"},
        {
            "changed": 3,
            "changes": (*SERVER.changes, Told("t7", 7, "")),
            "changes_applied": {0: 1, 1: 1, 7: 1},
            "change_marks": frozenset({0, 1, 7}),
        },
    ),
    Wrong(
        "a transaction has its state and another's event",
        {"transactions_take_place_once"},
        {"change_marks": frozenset({0, 2})},
    ),
    Wrong("something is left to do", {"nothing_is_left"}, {"left": {"bus:{purse:0}": 1}}),
]


def test_a_history_in_which_all_is_well_has_no_violations() -> None:
    assert violations(History(STEPS, SERVER)) == {}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.what.replace(" ", "-"))
def test_what_is_wrong_is_reported(case: Wrong) -> None:
    history = History((*STEPS, *case.steps), replace(SERVER, **case.server))
    found = violations(history)
    assert set(found) == case.broken
    assert told(found)


def test_each_invariant_is_broken_by_some_case() -> None:
    assert {name for case in CASES for name in case.broken} == {r.__name__ for r in INVARIANTS}


def test_a_line_that_a_killed_process_did_not_finish_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text("start 1 2 33\nend 1 2 33\nstart 4 1 3")
    assert read(path) == (Step("start", 1, 2, 33), Step("end", 1, 2, 33))
