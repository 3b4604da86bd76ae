"""Topics: their declaration, and which topics a handler's patterns read."""

from __future__ import annotations

from datetime import timedelta

import pytest

from bus import DeclarationError, Event, Topic
from bus.topic import topics_of


class PageAdded(Event, type="paper.page_added"):
    pass


class PaperShredded(Event, type="paper.shredded", topic="shredder"):
    pass


class PaperFiled(Event, type="paper.filed", topic="archive"):
    pass


def test_a_topic_has_one_partition_unless_it_says_so():
    assert Topic("paper").partitions == 1
    assert Topic("paper", partitions=1024).partitions == 1024
    assert Topic("paper") == Topic("paper", partitions=1)


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a:b", "{a}", "-a", ".a", "_a", "a" * 101, "é", "a\n", None, 5],
)
def test_bad_names_are_refused(name):
    with pytest.raises(DeclarationError, match=r"topic name .* is not valid: 1 to 100 letters"):
        Topic(name)


@pytest.mark.parametrize("name", ["a", "9lives", "a.b_c-D", "a" * 100])
def test_good_names_are_taken(name):
    assert Topic(name).name == name


@pytest.mark.parametrize("partitions", [0, -1, 1025, 2.0, "4", True, None, float("nan")])
def test_bad_partition_counts_are_refused(partitions):
    with pytest.raises(DeclarationError, match=r"topic paper: partitions must be a whole number"):
        Topic("paper", partitions=partitions)


def test_marks_have_defaults_and_keep_follows_maxlen():
    topic = Topic("paper")
    assert (topic.maxlen, topic.keep, topic.on_full) == (1_000_000, 100_000, "block")
    assert topic.retention is None
    assert Topic("paper", maxlen=500).keep == 50
    assert Topic("paper", maxlen=2).keep == 1
    assert Topic("paper", maxlen=500, keep=499).keep == 499


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"maxlen": 0}, "maxlen must be a whole number from 2"),
        ({"maxlen": 1}, "maxlen must be a whole number from 2"),
        ({"maxlen": -5}, "maxlen must be a whole number from 2"),
        ({"maxlen": 1e6}, "maxlen must be a whole number from 2"),
        ({"maxlen": None}, "maxlen must be a whole number from 2"),
        ({"keep": 0}, "keep must be a whole number from 1"),
        ({"keep": -1}, "keep must be a whole number from 1"),
        ({"keep": True}, "keep must be a whole number from 1"),
        ({"maxlen": 10, "keep": 10}, "keep = 10 must be below maxlen = 10"),
        ({"maxlen": 10, "keep": 11}, "keep = 11 must be below maxlen = 10"),
        ({"on_full": "wait"}, "on_full is 'block', 'reject' or 'drop_oldest', not 'wait'"),
        ({"on_full": None}, "on_full is 'block', 'reject' or 'drop_oldest', not None"),
        ({"retention": 7}, "retention is a timedelta"),
        ({"retention": timedelta(0)}, "retention is a timedelta"),
        ({"retention": timedelta(days=-1)}, "retention is a timedelta"),
        ({"retention": timedelta(days=99_999)}, "retention is a timedelta"),
    ],
)
def test_bad_marks_are_refused(marks, message):
    with pytest.raises(DeclarationError, match=f"topic paper: {message}"):
        Topic("paper", **marks)


@pytest.mark.parametrize(
    ("patterns", "declared", "topics"),
    [
        (["paper.page_added"], [], ("paper",)),
        (["paper.shredded"], [], ("shredder",)),  # its only class lives elsewhere
        (["paper.unheard_of"], [], ("paper",)),  # no class is known: the name says where
        (["paper.*"], [], ("archive", "paper", "shredder")),
        (["paper.page_added", "paper.shredded"], ["extra"], ("extra", "paper", "shredder")),
        (["*.shredded"], [], ("shredder",)),
        (["*.unheard_of"], ["attic"], ("attic",)),
    ],
)
def test_the_topics_that_patterns_read(patterns, declared, topics):
    assert topics_of(patterns, declared) == topics


def test_patterns_that_lead_nowhere_are_refused():
    with pytest.raises(DeclarationError, match=r"no topic is known for \*\.unheard_of.*topics="):
        topics_of(["*.unheard_of"])
    with pytest.raises(DeclarationError, match="topic name 'a b' is not valid"):
        topics_of(["paper.*"], ["a b"])
