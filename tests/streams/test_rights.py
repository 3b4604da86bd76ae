"""Which commands a user may not run: told by every kind of server, with no effect at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from bus.errors import AuthenticationFailed, ServerUnreachable
from bus.streams.address import parse_url
from bus.streams.connection import ConnectionLost
from bus.streams.rights import ROLES, Rights
from bus.streams.server import Standalone
from tests.proxy import Proxy, listening
from tests.servers import ask

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterator

    from bus.embedded import EmbeddedServer

PAGE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Rights")[2]
ALL = tuple(dict.fromkeys(w for words in ROLES.values() for w in words))
FRAME = {"MULTI", "DISCARD"}
EXTRA = ("WAIT", "WAITAOF", "CLIENT|UNBLOCK")


def rows() -> dict[str, set[str]]:
    """The table of the page: role -> commands."""
    found = re.findall(r"^\| ([a-z -]+) \| (.*`[A-Z]+`.*) \|$", TABLE, re.MULTILINE)
    own = {role: set(re.findall(r"`([A-Z]+)`", text)) for role, text in found}
    return {
        role: own[role] | (own["publisher"] if "those, and" in text else set())
        for role, text in found
    }


def test_the_roles_are_the_table_of_the_page():
    named = {role: {w.partition("|")[0] for w in words} for role, words in ROLES.items()}
    assert named == rows(), "docs/wire.md and bus/streams/rights.py differ"


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(url, protocol=2) as redis:
        yield redis


@pytest.fixture
def rights_of(server: EmbeddedServer, url: str) -> Iterator[Callable[..., Rights]]:
    """Make a user with these rules, on all keys unless they say otherwise; return his rights."""
    made = []

    def with_rules(*rules: str, keys: str = "~*") -> Rights:
        made.append("tried")
        assert ask(server, "ACL", "SETUSER", "tried", "reset", "on", ">pw", keys, *rules) == (
            b"+OK\r\n"
        )
        return rights(url.replace("redis://", "redis://tried:pw@"))

    yield with_rules
    if made:
        ask(server, "ACL", "DELUSER", "tried")


def rights(url: str) -> Rights:
    return Rights(Standalone(parse_url(url)))


async def test_who_may_do_everything_is_refused_nothing(url, server_kind):
    """So every command is known to every kind of server, and has as many arguments as it takes."""
    refused = await rights(url).refused((*ALL, *EXTRA))
    assert refused == ({} if server_kind == "valkey-9.1" else {"WAITAOF": "unknown"})


async def test_each_command_that_is_forbidden_is_named_and_no_other(rights_of):
    for word in ALL:
        if word not in FRAME | {"AUTH"}:  # that one nobody can be forbidden
            command = word.partition("|")[0].lower()
            refused = await rights_of("+@all", f"-{command}").refused(ALL)
            subcommands = {w for w in ALL if w.partition("|")[0] == word.partition("|")[0]}
            assert refused == dict.fromkeys(subcommands, "command"), word


async def test_a_subcommand_may_be_all_that_is_allowed(rights_of):
    asked = ("XGROUP|CREATE", "XGROUP|DESTROY", "XINFO|GROUPS", "CLIENT|ID")
    allowed = ("+multi", "+discard", "+xgroup|create", "+client|id", "+xinfo")
    refused = await rights_of(*allowed).refused(asked)
    assert refused == {"XGROUP|DESTROY": "command"}


@pytest.mark.parametrize("role", sorted(ROLES))
async def test_a_user_with_the_rights_of_a_role_lacks_none_of_it(rights_of, role):
    words = (*ROLES["every connection"], *ROLES[role])
    rules = [f"+{w.lower()}" for w in dict.fromkeys((*words, *FRAME))]
    mine = rights_of(*rules, keys="~bus:*")
    assert await mine.refused(words) == {}
    others = [w for w in ALL if w not in words and w not in FRAME]
    refused = await mine.refused(others)
    # 6.2 knows a subcommand only by name: what has one of them allowed has not all.
    assert refused == dict.fromkeys(others, "command")


async def test_keys_that_may_not_be_touched(rights_of):
    refused = await rights_of("+@all", keys="~mine:*").refused(("HGET", "TIME", "EVAL", "PING"))
    assert refused == {"HGET": "keys", "EVAL": "keys"}
    both = await rights_of("+@all", "-hget", keys="~mine:*").refused(("HGET", "XADD"))
    assert both == {"HGET": "command", "XADD": "keys"}


async def test_who_may_not_ask_is_told_nothing_and_nothing_is_done(rights_of, redis):
    mine = rights_of("+@all", "-multi")
    await redis.config_resetstat()
    assert await mine.refused(ALL) is None
    assert await ran(redis) <= {"multi", "auth"}
    assert await redis.dbsize() == 0


async def test_who_may_not_discard_is_told_so_and_nothing_is_done(rights_of, redis):
    mine = rights_of("+@all", "-discard")
    await redis.config_resetstat()
    assert await mine.refused(ALL) == {"DISCARD": "command"}
    assert await ran(redis) <= {"multi", "discard", "auth"}
    assert await redis.dbsize() == 0


async def test_nothing_is_done(url, redis):
    await redis.config_resetstat()
    await rights(url).refused(ALL)
    assert await ran(redis) == {"multi", "discard"}
    assert await redis.dbsize() == 0


async def ran(redis: Redis) -> set[str]:
    """The commands that were executed, other than for looking that up."""
    stats = await redis.info("commandstats")
    done = {name.removeprefix("cmdstat_") for name, seen in stats.items() if seen["calls"]}
    return {name.partition("|")[0] for name in done} - {"config", "info", "select"}


async def test_what_is_full_or_a_replica_is_a_matter_of_rights_to_nobody(
    private_server, server_kind
):
    server = private_server(server_kind)
    ask(server, "CONFIG", "SET", "maxmemory", "1")
    assert await rights(server.url).refused(ALL) == {}
    ask(server, "CONFIG", "SET", "maxmemory", "0")
    ask(server, "REPLICAOF", "127.0.0.1", "1")
    assert await rights(server.url).refused(ALL) == {}


async def test_a_connection_that_breaks_after_multi_sends_nothing_on_another_one():
    """On another connection nothing would be thrown away."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(1000))
        writer.write(b"+OK\r\n")

    async with listening(serve) as url:
        with pytest.raises(ConnectionLost):
            await rights(url).refused(ALL)
    assert seen == [b"*1\r\n$5\r\nMULTI\r\n"]


async def test_a_reply_that_is_lost(server):
    async with Proxy(server.port) as proxy:
        proxy.lose_replies = 1
        with pytest.raises(ConnectionLost):
            await rights(proxy.url).refused(ALL)
    assert ask(server, "EXISTS", "bus:probe") == b":0\r\n"


async def test_nobody_there_and_a_wrong_password(url):
    with pytest.raises(ServerUnreachable):
        await rights("redis://127.0.0.1:1/0").refused(ALL)
    with pytest.raises(AuthenticationFailed):
        await rights(url.replace("redis://", "redis://nobody:pw@")).refused(ALL)
