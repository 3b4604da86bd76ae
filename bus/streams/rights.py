"""Which commands each role needs, and which of them a user may not run.

The table of docs/wire.md, each command with arguments that would do no harm. Inside MULTI the
server checks a command as it is queued: that there is one of that name, that the user may run it,
that he may touch its keys; and DISCARD throws all of them away. So it is told without any effect,
on Redis 6.2 and 7.0 and on Valkey alike. (ACL LOG has what was refused, as after every refusal.)
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Literal

from redis import exceptions as redis_errors

from bus.config import REPLY_TIMEOUT_S
from bus.streams.connection import Arg, ConnectionLost, Server, next_reply, pack, reason_of
from bus.streams.keys import PROBE
from bus.streams.replies import Reply, ReplyError

# Why a command is not queued: the user may not run it, or not on keys bus:*, or there is none.
Refusal = Literal["command", "keys", "unknown"]

_CONNECTION = "PING AUTH SELECT CLIENT|ID CLIENT|UNBLOCK INFO EVAL EVALSHA XADD"
_PUBLISHER = (
    "HGET HSET XLEN XDEL GET SET XINFO|GROUPS XPENDING XRANGE XTRIM XACK XGROUP|SETID HINCRBY"
)
_LOOKING = "TIME XINFO|STREAM XINFO|GROUPS XRANGE XREVRANGE XPENDING XLEN TYPE HGETALL"
_TABLE = {
    "every connection": _CONNECTION,
    "publisher": _PUBLISHER,
    "worker": (
        f"{_PUBLISHER} XREADGROUP XREAD XCLAIM XGROUP|CREATE XGROUP|DELCONSUMER XINFO|STREAM"
        " XINFO|CONSUMERS XREVRANGE HGETALL TIME TYPE SADD SREM SMEMBERS EXISTS PEXPIRE DEL"
    ),
    "effects": (
        f"{_PUBLISHER} TYPE SET GET INCRBY INCRBYFLOAT HSET HSETNX HGET HINCRBY HINCRBYFLOAT HDEL"
        " SADD SREM SISMEMBER SCARD ZADD ZINCRBY ZREM ZSCORE ZCARD EXISTS UNLINK PEXPIRE PERSIST"
    ),
    "history": "HGET XRANGE XREVRANGE TYPE HGETALL",
    "tail": "HGET XINFO|STREAM XLEN XRANGE XREAD TYPE HGETALL",
    "channel": "XREVRANGE PEXPIRE XINFO|STREAM PTTL XRANGE XLEN XREAD",
    "replay": "HGET XINFO|GROUPS XRANGE XREVRANGE XLEN GET SET EXPIRE XADD XGROUP|CREATE",
    "dead-letters": (
        "HGET HGETALL XRANGE XREVRANGE XLEN XINFO|GROUPS XINFO|CONSUMERS TYPE XDEL XADD"
        " XGROUP|CREATE GET SET SMEMBERS TIME EXISTS"
    ),
    "backlog": f"HGET {_LOOKING}",
    "inspect": f"HGET {_LOOKING} XINFO|CONSUMERS SMEMBERS GET",
    "admin": (
        f"HGET {_LOOKING} XINFO|CONSUMERS SMEMBERS GET EXISTS HSET HDEL XTRIM XACK XADD XDEL XCLAIM"
        " XGROUP|CREATE XGROUP|SETID XGROUP|DESTROY XGROUP|DELCONSUMER UNLINK"
    ),
    "doctor": f"HGET {_LOOKING} XINFO|CONSUMERS SMEMBERS GET MULTI DISCARD CONFIG|GET",
}
ROLES: Mapping[str, tuple[str, ...]] = {
    role: tuple(dict.fromkeys(words.split())) for role, words in _TABLE.items()
}

# What a command is asked with; `k` is the key. Even if they ran, hardly any would change a thing.
_ARGUMENTS = {
    "AUTH": "x",
    "CLIENT|ID": "",
    "CLIENT|UNBLOCK": "0",
    "CONFIG|GET": "x",
    "DEL": "k",
    "EVAL": "return(0) 1 k",
    "EVALSHA": f"{'0' * 40} 1 k",
    "EXISTS": "k",
    "EXPIRE": "k 1",
    "GET": "k",
    "HDEL": "k x",
    "HGET": "k x",
    "HGETALL": "k",
    "HINCRBY": "k x none",
    "HINCRBYFLOAT": "k x none",
    "HSET": "k x 0 x",
    "HSETNX": "k x 0",
    "INCRBY": "k none",
    "INCRBYFLOAT": "k none",
    "INFO": "server",
    "PERSIST": "k",
    "PEXPIRE": "k 1",
    "PING": "",
    "PTTL": "k",
    "SADD": "k x",
    "SCARD": "k",
    "SELECT": "0",
    "SET": "k x XX",
    "SISMEMBER": "k x",
    "SMEMBERS": "k",
    "SREM": "k x",
    "TIME": "",
    "TYPE": "k",
    "UNLINK": "k",
    "WAIT": "0 1",
    "WAITAOF": "0 0 1",
    "XACK": "k x 0-1",
    "XADD": "k NOMKSTREAM * x 0",
    "XCLAIM": "k x x 0 0-1",
    "XDEL": "k 0-1",
    "XGROUP|CREATE": "k x 0",
    "XGROUP|DELCONSUMER": "k x x",
    "XGROUP|DESTROY": "k x",
    "XGROUP|SETID": "k x 0",
    "XINFO|CONSUMERS": "k x",
    "XINFO|GROUPS": "k",
    "XINFO|STREAM": "k",
    "XLEN": "k",
    "XPENDING": "k x",
    "XRANGE": "k - - COUNT 1",
    "XREAD": "STREAMS k 0",
    "XREADGROUP": "GROUP x x STREAMS k >",
    "XREVRANGE": "k - - COUNT 1",
    "XTRIM": "k MINID 0",
    "ZADD": "k none x",
    "ZCARD": "k",
    "ZINCRBY": "k none x",
    "ZREM": "k x",
    "ZSCORE": "k x",
}
# They cannot be queued; that MULTI and DISCARD may be run shows by themselves.
_FRAME = frozenset(["MULTI", "DISCARD"])


class Rights:
    """What the user of a server may do."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def refused(self, words: Iterable[str]) -> dict[str, Refusal] | None:
        """Return those of the commands that the user may not run, and why; None if he may not ask.

        words: as in ROLES, `XGROUP|CREATE` with its subcommand. MULTI, all of them, DISCARD: three
        round trips on a connection of their own. Errors: ConnectionLost, those of connecting.
        """
        asked = [w for w in dict.fromkeys(words) if w not in _FRAME]
        raw = await self._server.open()
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                # Nothing else may be sent unless this very connection queues it: were MULTI
                # refused, or the connection made anew, the commands would run.
                await raw.send_packed_command([pack(("MULTI",))], check_health=False)
                if isinstance(await next_reply(raw), ReplyError) or not raw.is_connected:
                    return None
                packed = [pack(_command(w)) for w in asked]
                await raw.send_packed_command([*packed, pack(("DISCARD",))], check_health=False)
                replies = [await next_reply(raw) for _ in asked]
                discarded = await next_reply(raw)
        except (TimeoutError, redis_errors.RedisError, OSError) as error:
            raise ConnectionLost(f"connection lost: {reason_of(error)}", sent=True) from None
        finally:
            await raw.disconnect(nowait=True)  # where DISCARD is refused, this discards
        found = {
            word: why
            for word, reply in zip(asked, replies, strict=True)
            if (why := _refusal(reply)) is not None
        }
        return found | ({"DISCARD": "command"} if isinstance(discarded, ReplyError) else {})


def _command(word: str) -> tuple[Arg, ...]:
    arguments = [PROBE if a == "k" else a for a in _ARGUMENTS[word].split()]
    return (*word.split("|"), *arguments)


def _refusal(reply: Reply) -> Refusal | None:
    """Return why a command was not queued, if that has to do with rights.

    A server that is full, say, or of which another node has the key, would have let him.
    """
    if not isinstance(reply, ReplyError):
        return None
    if reply.code == "NOPERM":
        return "command" if "run the" in reply.text else "keys"
    return "unknown" if "unknown command" in reply.text.lower() else None
