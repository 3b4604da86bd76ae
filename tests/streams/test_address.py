"""URLs, good and bad, and that no password is shown of them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import (
    Bus,
    DeclarationError,
    NotSupported,
)
from bus.streams.address import DEFAULT_URL, parse_url, url_of_environment
from bus.streams.server import Standalone
from tests.streams.wire import CANARY


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("redis://", {"scheme": "redis", "host": "localhost", "port": 6379, "db": 0}),
        ("redis://h", {"host": "h", "port": 6379, "db": 0, "username": None, "password": None}),
        ("redis://h:7000/3", {"host": "h", "port": 7000, "db": 3}),
        ("redis://h?db=4", {"db": 4}),
        ("redis://[::1]:7000/", {"host": "::1", "port": 7000}),
        ("redis://:p%40ss@h", {"username": None, "password": "p@ss"}),
        ("redis://us%3Aer:p%2Fw@h/1", {"username": "us:er", "password": "p/w", "db": 1}),
        (
            "rediss://h/1?ssl_ca_certs=/ca.pem&ssl_certfile=c&ssl_keyfile=k",
            {"scheme": "rediss", "tls": (("ssl_ca_certs", "/ca.pem"),)},
        ),
        ("memory://", {"scheme": "memory", "path": "", "redacted": "memory://"}),
        ("memory://shop-1", {"scheme": "memory", "path": "shop-1", "redacted": "memory://shop-1"}),
        ("unix:///run/redis.sock?db=2", {"scheme": "unix", "path": "/run/redis.sock", "db": 2}),
        ("unix://u:p@/run/my%20redis.sock", {"path": "/run/my redis.sock", "password": "p"}),
    ],
)
def test_good_urls(url, parts):
    address = parse_url(url)
    for name, value in parts.items():
        found = getattr(address, name)
        assert found[: len(value)] == value if name == "tls" else found == value


@pytest.mark.parametrize(
    ("url", "says"),
    [
        *(("", "has no scheme"), ("localhost:6379", "has no scheme"), (None, "has no scheme")),
        *((5, "has no scheme"), ("http://h", "http:// is no known scheme: use redis://")),
        *(("redis://h:port", "cannot be parsed"), ("redis://h:99999", "cannot be parsed")),
        *(("redis://[::1", "cannot be parsed"), ("redis://h/zero", "database .* is not a number")),
        *(("redis://h/-1", "is not a number"), ("redis://h/0/1", "is not a number")),
        *(("redis://h?db=x", "is not a number"), ("redis://h/²", "is not a number")),
        ("redis://h?timeout=5", "URL option 'timeout' is not known for redis://; known: db"),
        ("redis://h?ssl_ca_certs=x", "'ssl_ca_certs' is not known for redis://"),
        ("rediss://h?ssl_cert_reqs=none", "'ssl_cert_reqs' is not known for rediss://"),
        *(("unix://", "names a socket"), ("unix:///", "names a socket")),
        ("unix:///s?db=x", "is not a number"),
        ("memory://a/b", "name in memory:// .* is not valid"),
    ],
)
def test_bad_urls_are_refused_in_words(url, says):
    with pytest.raises(DeclarationError, match=says):
        parse_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://h:26379/mymaster",
        "rediss+sentinel://h/m",
        "redis+cluster://h",
        "rediss+cluster://h",
    ],
)
def test_what_later_releases_bring_is_told_from_mistakes(url):
    with pytest.raises(NotSupported, match="is not part of this release"):
        parse_url(url)


@given(st.text() | st.from_regex(r"\A(redis|rediss|unix)://[^\n]{0,40}\Z"))
def test_any_other_text_is_refused_with_one_kind_of_error(url):
    with contextlib.suppress(DeclarationError):
        parse_url(url)


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, DEFAULT_URL),
        ({"BUS_URL": "redis://ours"}, "redis://ours"),
        ({"REDIS_URL": "redis://theirs"}, "redis://theirs"),
        ({"BUS_URL": "redis://ours", "REDIS_URL": "redis://theirs"}, "redis://ours"),
        ({"BUS_URL": "", "REDIS_URL": "redis://theirs"}, "redis://theirs"),
        ({"BUS_URL": "", "REDIS_URL": ""}, DEFAULT_URL),
    ],
)
def test_the_environment_says_where_the_server_is(monkeypatch, variables, url):
    """REDIS_URL is what hosting services set; our own variable comes first."""
    for name in ("BUS_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert url_of_environment() == url
    assert Bus.connect().address == parse_url(url).redacted


def test_a_broken_url_of_the_environment_is_refused_without_its_password(monkeypatch):
    monkeypatch.delenv("BUS_URL", raising=False)
    monkeypatch.setenv("REDIS_URL", f"http://user:{CANARY}@h")
    with pytest.raises(DeclarationError, match="http:// is no known scheme") as told:
        Bus.connect()
    assert CANARY not in str(told.value)


URLS_WITH_PASSWORD = [
    f"redis://:{CANARY}@h",
    f"redis://user:{CANARY}@h:7000/1",
    f"rediss://user:{CANARY}@h",
    f"unix://user:{CANARY}@/run/redis.sock",
]
BROKEN_URLS_WITH_PASSWORD = [
    *(f"redis:/user:{CANARY}@h", f"http://user:{CANARY}@h", f"redis://user:{CANARY}@h:port"),
    *(f"redis://user:{CANARY}@h/zero", f"redis://user:{CANARY}@h?x=1", f"user:{CANARY}@h"),
    *(f"redis+cluster://user:{CANARY}@h", f"redis://user:{CANARY}@[h"),
    # Characters that had to be written as %23 and so on.
    *(f"redis://user:1{c}{CANARY}@h/0" for c in "#?/[]@:%"),
    *(f"unix://user:1{c}{CANARY}@/run/redis.sock" for c in "#?/"),
]


@pytest.mark.parametrize("url", URLS_WITH_PASSWORD)
def test_no_password_in_what_is_shown_of_an_address(url):
    address = parse_url(url)
    server = Standalone(address)
    assert address.password == CANARY
    assert "***" in address.redacted
    for shown in (repr(address), str(address), address.redacted, server.redacted, repr(server)):
        assert CANARY not in shown


@pytest.mark.parametrize("url", BROKEN_URLS_WITH_PASSWORD)
def test_no_password_in_the_error_of_a_broken_url(url):
    try:
        shown = parse_url(url).redacted
    except DeclarationError as error:
        shown = str(error)
    assert CANARY not in shown
