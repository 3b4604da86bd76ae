"""Every key name, as other languages read them in docs/wire.md."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.streams import keys

STREAM = "bus:{document:3}"


def test_the_names_are_the_documented_ones():
    assert keys.TOPICS == "bus:topics"
    assert keys.stream("document", 3) == STREAM
    assert keys.dead(STREAM, "index") == "bus:{document:3}:dead:index"
    assert keys.lease(STREAM, "host-1-ab") == b"bus:{document:3}:lease:host-1-ab"
    assert keys.lease(STREAM, b"\xff") == b"bus:{document:3}:lease:\xff"
    assert keys.workers(STREAM) == "bus:{document:3}:workers"
    assert keys.producer(STREAM, "c0ffee") == "bus:{document:3}:pub:c0ffee"
    once = keys.once(STREAM, "index", b"", b"document.made", b"a:b")
    assert once == "bus:{document:3}:once:index::document.made:a:b"
    assert keys.sweep(STREAM, ["b", "a"]) == f"bus:{{document:3}}:sweep:{zlib.crc32(b'a,b'):08x}"


def test_everything_of_a_partition_has_its_hash_tag():
    """One script may then touch it all on a Cluster."""
    made = [keys.dead(STREAM, "g"), keys.lease(STREAM, "w").decode(), keys.workers(STREAM)]
    made += [keys.sweep(STREAM, ["g"]), keys.producer(STREAM, "p")]
    made += [keys.once(STREAM, "g", b"{r}", b"{t}", b"{i}")]
    for key in made:
        assert key[key.index("{") : key.index("}") + 1] == "{document:3}"


@given(st.lists(st.tuples(*[st.binary(max_size=120)] * 3), min_size=2, max_size=2, unique=True))
def test_no_two_events_share_a_mark_and_its_key_is_short(events):
    first, second = (keys.once(STREAM, "g", *event) for event in events)
    assert first != second
    assert max(len(first.encode()), len(second.encode())) < 350


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((b"r", b"t:i", b""), (b"r", b"t", b"i:")),
        ((b"r:t", b"", b"i"), (b"r", b"t:", b"i")),
        ((b"", b"t", b"\xff"), (b"", b"t", b"\xfe")),
        ((b"", b"t", b"i" * 101), (b"", b"t", b"i" * 102)),
        ((b"", b"t", b"\xff"), (b"", b"t", keys.once("", "", b"", b"", b"\xff")[-33:].encode())),
    ],
)
def test_the_parts_of_a_mark_are_told_apart(one, other):
    assert keys.once(STREAM, "g", *one) != keys.once(STREAM, "g", *other)


def test_processes_that_serve_the_same_groups_share_a_sweep():
    assert keys.sweep(STREAM, ["a", "b"]) == keys.sweep(STREAM, iter(["b", "a"]))
    assert keys.sweep(STREAM, ["a"]) != keys.sweep(STREAM, ["b"])


@pytest.mark.parametrize(
    ("key", "partition"), [("", 0), ("d-1", 3), ("d-2", 1), ("dökument", 3), ("漢字", 3)]
)
def test_the_partition_of_a_key_is_the_same_for_ever(key, partition):
    """These numbers are on the wire: a change would tear every key's order apart."""
    assert zlib.crc32(key.encode()) % 4 == partition
    assert keys.partition_of(key, 4) == partition


@given(key=st.text(st.characters(exclude_categories=["Cs"])), partitions=st.integers(1, 1024))
def test_every_key_has_a_partition(key, partitions):
    assert 0 <= keys.partition_of(key, partitions) < partitions


@pytest.mark.parametrize(
    ("consumer", "due"),
    [
        (b"parked:0", 0),
        (b"parked:1763629200000", 1763629200000),
        *((b"parked:", None), (b"parked:soon", None), (b"parked:-5", None), (b"parked:5 ", None)),
        *((b"parked:\xd9\xa3", None), (b"host-1-ab", None), (b"", None), (b"\xff", None)),
    ],
)
def test_lanes_are_told_from_workers_by_name(consumer, due):
    assert keys.lane_due_ms(consumer) == due
