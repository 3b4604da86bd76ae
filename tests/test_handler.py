"""Declaring handlers: what is accepted, and that every mistake is told at the declaration."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from bus import (
    Backoff,
    Breaker,
    DeclarationError,
    Delivery,
    Event,
    Handler,
    NotSupported,
    Registry,
    Topic,
    Worker,
    event_handler,
)
from bus import Bus as BusClass
from bus.config import BATCH_WAIT_MS, CONCURRENCY, MAX_ATTEMPTS, VISIBILITY_S


class Sent(Event, type="letter.sent"):
    to: str = ""


class Burnt(Event, type="letter.burnt", topic="fire"):
    pass


async def both(event, delivery):
    return event, delivery


async def alone(event):
    return event


class Reader:
    """A handler as a class."""

    def __init__(self) -> None:
        self.read: list[Event] = []

    async def handle(self, event, delivery):
        self.read.append(event)
        return event, delivery


class Quick:
    async def __call__(self, event):
        return event


class Helpful:
    @staticmethod
    async def handle(event):
        return event


# --- what is accepted


def test_a_handler_is_a_value_with_its_settings():
    async def told(dead, bus):
        pass

    handler = event_handler(
        *(Sent, "fire.*"),
        group="post",
        topics=["attic"],
        concurrency=3,
        max_attempts=7,
        backoff=Backoff(base_s=9),
        timeout_s=2,
        visibility_s=60,
        start="now",
        on_dead=told,
        breaker=Breaker(min_calls=3),
    )(both)
    assert isinstance(handler, Handler)
    assert (handler.patterns, handler.group) == (("letter.sent", "fire.*"), "post")
    assert handler.topics == ("attic",)
    assert (handler.concurrency, handler.max_attempts, handler.visibility_s) == (3, 7, 60)
    assert (handler.backoff, handler.timeout_s) == (Backoff(base_s=9), 2)
    assert (handler.start, handler.on_dead, handler.name) == ("now", told, "both")
    assert handler.breaker == Breaker(min_calls=3)


def test_the_defaults_are_those_of_the_configuration():
    handler = event_handler(Sent, group="post")(both)
    assert (handler.concurrency, handler.max_attempts) == (CONCURRENCY, MAX_ATTEMPTS)
    assert (handler.visibility_s, handler.backoff) == (VISIBILITY_S, Backoff())
    assert (handler.timeout_s, handler.start, handler.on_dead) == (None, "beginning", None)
    assert handler.breaker == Breaker()


async def test_a_handler_is_called_as_the_function_it_was():
    handler = event_handler(Sent, group="post")(both)
    assert await handler(Sent(), "delivery") == (Sent(), "delivery")
    assert handler.takes_delivery


async def test_a_function_of_one_parameter_gets_the_event_alone():
    handler = event_handler(Sent, group="post")(alone)
    assert await handler(Sent()) == Sent()
    assert not handler.takes_delivery


async def test_a_class_is_instantiated_and_its_handle_called():
    handler = event_handler(Sent, group="post")(Reader)
    assert handler.name == "Reader"
    assert handler.takes_delivery
    assert await handler(Sent(), None) == (Sent(), None)
    assert handler.call.__self__.read == [Sent()]


async def swapped(delivery, event):
    pass


@pytest.mark.parametrize(
    ("target", "takes_delivery"),
    [
        (Quick(), False),
        (Helpful, False),
        (functools.partial(swapped, None), False),
        (Reader().handle, True),
    ],
    ids=["object", "static method", "partial", "bound method"],
)
def test_other_things_that_can_be_awaited(target, takes_delivery):
    assert event_handler(Sent, group="post")(target).takes_delivery is takes_delivery


def test_optional_parameters_and_star_arguments():
    async def optional(event, delivery=None, *, shout=False):
        pass

    async def star(*args):
        pass

    assert event_handler(Sent, group="post")(optional).takes_delivery
    assert event_handler(Sent, group="post")(star).takes_delivery


def test_it_wants_what_it_asked_for():
    handler = event_handler(Sent, "fire.*", group="post")(both)
    asked = ["letter.sent", "fire.lit", "letter.burnt", "letter.sent.twice"]
    assert [t for t in asked if handler.wants(t)] == ["letter.sent", "fire.lit"]


def test_it_reads_the_topics_where_that_can_lie():
    assert event_handler(Sent, Burnt, group="post")(both).reads() == ("fire", "letter")
    assert {"a", "b"} <= set(event_handler("*", group="all", topics=["b", "a"])(both).reads())
    with pytest.raises(DeclarationError, match="no topic is known for"):
        event_handler("*.unheard_of", group="post")(both).reads()


# --- what is refused


@pytest.mark.parametrize("group", ["", "a b", "a:b", "parked:1", "-a", "a" * 101, None, 5, "é"])
def test_bad_group_names(group):
    with pytest.raises(DeclarationError, match=r"group name .* is not valid"):
        event_handler(Sent, group=group)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ((), "say which events"),
        ((5,), "5 is no event class and no type pattern"),
        ((str,), "is no event class and no type pattern"),
        (([Sent],), "is no event class and no type pattern"),
        ((Sent(),), "is no event class and no type pattern"),
        ((Event,), "'Event' has no type"),
        (("letter sent",), "type pattern 'letter sent' is not valid"),
        (("letter.se*",), "type pattern 'letter.se*' is not valid"),
        (("",), "type pattern '' is not valid"),
    ],
)
def test_bad_things_to_ask_for(what, says):
    with pytest.raises(DeclarationError, match=re.escape(says)):
        event_handler(*what, group="post")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"concurrency": 0}, "concurrency must be a whole number from 1 to"),
        ({"concurrency": 2.5}, "concurrency must be a whole number"),
        ({"concurrency": True}, "concurrency must be a whole number"),
        ({"max_attempts": 0}, "max_attempts must be a whole number from 1"),
        ({"timeout_s": 0}, "timeout_s must be a number from 0.001"),
        ({"timeout_s": "5"}, "timeout_s must be a number"),
        ({"visibility_s": 0.01}, "visibility_s must be a number from 0.3"),
        ({"start": "end"}, "start is 'beginning' or 'now', not 'end'"),
        ({"breaker": False}, "breaker is a Breaker(...), or None for none, not False"),
        ({"breaker": Breaker}, "breaker is a Breaker(...), or None for none, not <class"),
        ({"backoff": 5}, "backoff is a Backoff(...), not 5"),
        ({"batch": 0}, "batch must be a whole number from 1 to 5000, not 0"),
        ({"batch": 5_001}, "batch must be a whole number from 1 to 5000, not 5001"),
        ({"batch": True}, "batch must be a whole number"),
        ({"batch": 2, "batch_wait_ms": -1}, "batch_wait_ms must be a whole number from 0 to 10000"),
        ({"batch": 2, "batch_wait_ms": 10_001}, "batch_wait_ms must be a whole number from 0 to"),
        ({"batch": 2, "batch_wait_ms": 0.5}, "batch_wait_ms must be a whole number"),
        ({"batch_wait_ms": 50}, "batch_wait_ms goes with batch=, the most per call"),
        ({"on_dead": print}, "on_dead must be an async function"),
        ({"topics": "letter"}, "topics is a list of names, not one string"),
        ({"topics": ["a b"]}, "topic name 'a b' is not valid"),
    ],
)
def test_bad_settings(setting, says):
    with pytest.raises(DeclarationError, match=re.escape(says)):
        event_handler(Sent, group="post", **setting)


@pytest.mark.parametrize(
    "later",
    [
        {"ordered": True},
        {"ordered": True, "batch": 10},
    ],
    ids=" ".join,
)
def test_what_this_release_cannot_do_it_does_not_ignore(later):
    with pytest.raises(NotSupported, match=f"handler post: {next(iter(later))} is not part"):
        event_handler(Sent, group="post", **later)


class WithoutHandle:
    pass


class Demanding:
    def __init__(self, database):
        pass

    async def handle(self, event):
        pass


class Blocking:
    def handle(self, event):
        pass


async def nothing():
    pass


async def three(event, delivery, more):
    pass


async def keyword(event, *, database):
    pass


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (lambda event: None, "must be `async def`; run blocking code with asyncio.to_thread"),
        (print, "must be `async def`"),
        (Blocking, "Blocking must be `async def`"),
        (WithoutHandle, "class WithoutHandle has no method `handle`"),
        (Demanding, "class Demanding must be constructible without arguments"),
        (5, "5 cannot be called"),
        (nothing, "takes (event) or (event, delivery), not ()"),
        (three, "takes (event) or (event, delivery), not (event, delivery, more)"),
        (keyword, "takes (event) or (event, delivery), not (event, *, database)"),
    ],
)
def test_bad_functions(target, says):
    with pytest.raises(DeclarationError, match="handler post: .*" + re.escape(says)):
        event_handler(Sent, group="post")(target)


# --- a program's handlers together


def test_two_handlers_with_one_group_are_refused_by_both_names():
    first, second = (
        event_handler(Sent, group="post")(both),
        event_handler(Sent, group="post")(alone),
    )
    with pytest.raises(
        DeclarationError, match=r"two handlers have the group 'post': both and alone"
    ):
        Registry([first, second])


async def test_a_worker_refuses_them_too(valkey_url):
    handlers = [event_handler(Sent, group="post")(f) for f in (both, alone)]
    bus = BusClass.connect(valkey_url)
    with pytest.raises(DeclarationError, match="two handlers have the group"):
        Worker(bus, handlers)
    await bus.close()


def test_one_handler_named_twice_is_one_handler():
    handler = event_handler(Sent, group="post")(both)
    assert Registry([handler, handler]).handlers == (handler,)


def test_what_is_no_handler_is_refused():
    with pytest.raises(DeclarationError, match="is no handler: decorate it"):
        Registry([both])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package `letters` that can be imported during the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(**files: str) -> str:
        for name, text in files.items():
            path = tmp_path / "letters" / (name.replace("__dot__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return "letters"

    yield write
    for name in [m for m in sys.modules if m.split(".")[0] == "letters"]:
        del sys.modules[name]


HEAD = "from bus import Event, Topic, event_handler\n"
HANDLER = HEAD + "@event_handler('letter.*', group='{0}')\nasync def {0}(event): ...\n"


def test_a_package_is_collected_with_its_submodules(package):
    name = package(
        __init__="from letters.reading import read\nasync def lifespan(bus): ...\n",
        reading=HANDLER.format("read"),
        topics=HEAD + "LETTER = Topic('letter', partitions=4)\n",
        deep__dot____init__="",
        deep__dot__burning=HANDLER.format("burn"),
        __main__="raise SystemExit('a collected package is not run')",
    )
    registry = Registry.collect(name)
    assert [h.group for h in registry.handlers] == ["read", "burn"]
    assert registry.topics == (Topic("letter", partitions=4),)
    assert registry.lifespan is sys.modules["letters"].lifespan


def test_a_single_module_will_do(package):
    package(__init__="", reading=HANDLER.format("read"))
    assert [h.group for h in Registry.collect("letters.reading").handlers] == ["read"]


def test_a_topic_may_be_declared_twice_in_the_same_way_only(package):
    topic = HEAD + "LETTER = Topic('letter', partitions={})\n"
    name = package(__init__=HANDLER.format("read"), a=topic.format(4), b=topic.format(4))
    assert Registry.collect(name).topics == (Topic("letter", partitions=4),)
    package(c=topic.format(2))
    with pytest.raises(DeclarationError, match="topic letter is declared twice, differently"):
        Registry.collect(name)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "cannot import 'letters': ModuleNotFoundError"),
        ({"__init__": "1/0"}, "cannot import 'letters': ZeroDivisionError"),
        ({"__init__": "", "sub": "def"}, "cannot import 'letters.sub': SyntaxError"),
        ({"__init__": "", "sub": "import nope_"}, "'letters.sub': ModuleNotFoundError: No module"),
        (
            {"__init__": "", "deep__dot____init__": "raise OSError('gone')"},
            "cannot import 'letters.deep': OSError: gone",
        ),
        (
            {"__init__": "", "sub": HANDLER.format("read").replace("async ", "")},
            "'letters.sub': DeclarationError: handler read: read must be `async def`",
        ),
        ({"__init__": "x = 1"}, "'letters' holds no handlers"),
        (
            {"__init__": "", "a": HANDLER.format("read"), "b": HANDLER.format("read")},
            "two handlers have the group 'read'",
        ),
    ],
)
def test_a_package_that_cannot_serve_says_why(package, files, says):
    package(**files)
    with pytest.raises(DeclarationError, match=re.escape(says)):
        Registry.collect("letters")


@pytest.mark.parametrize(
    "name", ["", "my handlers", "handlers/", "handlers.py:x", "../x", "a..b", 5]
)
def test_what_is_no_package_name_is_refused(name):
    with pytest.raises(DeclarationError, match="is not the name of a Python package"):
        Registry.collect(name)


class Other(Event, type="handler.other"):
    n: int


def test_an_annotation_that_names_another_event_is_refused():
    async def wrong(event: Other) -> None: ...

    async def swapped(delivery: Delivery[Sent], event: Sent) -> None: ...

    async def one_of_several(event: Sent | Other) -> None: ...

    async def any_event(event: Event) -> None: ...

    with pytest.raises(DeclarationError, match="asks for Sent and its parameter `event` is annot"):
        event_handler(Sent, group="post")(wrong)
    with pytest.raises(DeclarationError, match="the event comes first, then the delivery"):
        event_handler(Sent, group="post")(swapped)
    event_handler(Sent, group="post")(one_of_several)
    event_handler(Sent, group="post")(any_event)
    event_handler("handler.*", group="post")(wrong)


def test_an_on_dead_of_other_parameters_is_refused():
    async def on_dead(dead_lettered): ...

    with pytest.raises(DeclarationError, match=r"on_dead takes \(dead_lettered, bus\)"):
        event_handler(Sent, group="post", on_dead=on_dead)


# --- batches


async def many(deliveries):
    return deliveries


def test_a_batch_handler_says_how_many_and_how_long():
    handler = event_handler(Sent, group="post", batch=100, batch_wait_ms=20)(many)
    assert (handler.batch, handler.batch_wait_ms) == (100, 20)
    assert not handler.takes_delivery
    assert event_handler(Sent, group="post", batch=1)(many).batch_wait_ms == BATCH_WAIT_MS
    assert event_handler(Sent, group="post")(alone).batch is None


async def test_a_batch_handler_is_called_as_the_function_it_was():
    class Counter:
        async def handle(self, deliveries):
            return len(deliveries)

    assert await event_handler(Sent, group="post", batch=9)(many)([1, 2]) == [1, 2]
    assert await event_handler(Sent, group="post", batch=9)(Counter)([1, 2]) == 2


async def star(*deliveries):
    pass


@pytest.mark.parametrize("target", [nothing, both, three, keyword, star])
def test_a_batch_handler_takes_one_list(target):
    with pytest.raises(DeclarationError, match=r"a batch handler takes one list, \(deliveries\)"):
        event_handler(Sent, group="post", batch=9)(target)


RIGHT = [
    list[Delivery[Sent]],
    list[Delivery[Event]],
    list[Delivery[Sent | Other]],
    list[Delivery[Sent] | Delivery[Other]],
    list[Delivery],
    list[Delivery[Any]],
    list[Any],
    list,
    Sequence[Delivery[Sent]],
    Iterable[Delivery[Sent]],
    Any,
    "list[Delivery[SomethingUnresolvable]]",
]
NO_LIST = [
    Sent,
    Delivery[Sent],
    list[Sent],
    list[Delivery[Sent] | None],
    list[Delivery[Sent]] | None,
    dict[str, Delivery[Sent]],
    tuple[Delivery[Sent], ...],
    set[Delivery[Sent]],
]


def batch_of(annotation):
    async def read(deliveries): ...

    read.__annotations__["deliveries"] = annotation
    return read


@pytest.mark.parametrize("annotation", RIGHT, ids=str)
def test_annotations_of_a_batch(annotation):
    event_handler(Sent, group="post", batch=9)(batch_of(annotation))


@pytest.mark.parametrize("annotation", NO_LIST, ids=str)
def test_an_annotation_that_is_no_list_of_deliveries_is_refused(annotation):
    with pytest.raises(
        DeclarationError,
        match=r"handler post: a batch handler takes a list of deliveries: annotate `deliveries`"
        r" as list\[Delivery\[Sent\]\], not as .",
    ):
        event_handler(Sent, group="post", batch=9)(batch_of(annotation))


def test_a_batch_of_another_event_is_refused():
    with pytest.raises(DeclarationError, match=r"asks for Sent and its parameter `deliveries` is"):
        event_handler(Sent, group="post", batch=9)(batch_of(list[Delivery[Other]]))
    with pytest.raises(DeclarationError, match=r"asks for Sent and its parameter `deliveries` is"):
        event_handler(Sent, group="post", batch=9)(batch_of(list[Delivery[Other | Burnt]]))
    event_handler("letter.*", group="post", batch=9)(batch_of(list[Delivery[Other]]))


def test_a_list_without_batch_is_refused():
    with pytest.raises(DeclarationError, match="only a batch handler takes a list of deliveries"):
        event_handler(Sent, group="post")(batch_of(list[Delivery[Sent]]))
