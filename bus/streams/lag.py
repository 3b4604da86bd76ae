"""How many entries a group was not given yet, as far as the server's own counters can be believed.

What they say was tried out on Redis 6.2 and 7.0 and on Valkey 9.1:

case                                 6.2   7.0                         Valkey 9.1
normal reading                       none  exact                       exact
group made at `0`                    none  exact                       exact
... at `$`, or in mid-stream         none  null until read to the end  null until read to the end
... at the end, with ENTRIESREAD     none  exact                       exact
trimmed or deleted behind it         none  exact                       exact
deleted ahead of it                  none  null until read to the end  null until read to the end
... the very next entries            none  null, then TOO HIGH         null until read to the end
trimmed ahead of it                  none  TOO HIGH, for ever          too high until its next read
after a restart with AOF             none  null until read to the end  exact

An XDEL leaves a tombstone, the server sees it ahead and says null; a trim leaves none. Whoever
takes away the very next entries of a group by hand (XTRIM, XDEL) makes 7.0 count what is gone as
still to come, and it never notices. So a number that cannot be is not believed: 0 or below, or not
below the length though the first entry was delivered. A backlog on 7.0 stays too high by what was
taken away until somebody sets the group right: XGROUP SETID <stream> <group> <its last-delivered
id> makes the server say null, and count afresh once the group has read to the end.
"""

from typing import Any

from bus.envelope import order

Id = tuple[int, int]


def undelivered_of(row: dict[str, Any], info: dict[str, Any]) -> int | None:
    """Return how many entries a group was not given yet, None if the server does not know.

    row, info: of XINFO GROUPS and XINFO STREAM, the former asked for first.
    """
    if not info["first-entry"]:
        return 0
    delivered = order(row["last-delivered-id"])
    if delivered >= order(info["last-entry"][0]):
        return 0
    if delivered < order(info["first-entry"][0]):
        return int(info["length"])
    lag = row.get("lag")
    # The first entry was delivered, so fewer than all are left; see the head of this file.
    if lag is None or not 0 < lag < info["length"]:
        return None
    return None if order(info["max-deleted-entry-id"]) > delivered else int(lag)
