"""What the messages came to, held against the balances that are left.

The tokens are read from the entries in the stream, past the code under test.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from demo.ingest import GRANTS, USERS
from demo.ledger import Entry
from handlers.state import quota_key


@dataclass(frozen=True, slots=True)
class Accounts:
    """By user: tokens of the messages, what is left, and how often `quota.exceeded` was told."""

    messages: int = 0
    used: Counter[str] = field(default_factory=Counter)
    balances: dict[str, int] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)

    @property
    def expected_balances(self) -> dict[str, int]:
        """What has to be left: what was granted, minus what was used."""
        return {user: GRANTS.get(user, 0) - self.used[user] for user in self.balances}

    @property
    def expected_told(self) -> Counter[str]:
        """Once for everybody who has used more than was granted."""
        return Counter(user for user, left in self.expected_balances.items() if left < 0)


async def read_accounts(redis: Any, entries: Iterable[Entry]) -> Accounts:
    """Read the balances, and what the streams say of messages and quotas."""
    used: Counter[str] = Counter()
    told: Counter[str] = Counter()
    messages = 0
    for entry in entries:
        if entry.type == "message.created":
            messages += 1
            used[entry.event["user_id"]] += entry.event["tokens"]
        elif entry.type == "quota.exceeded":
            told[entry.event["user_id"]] += 1
    balances = {user: int(await redis.hget(quota_key(user), "balance") or 0) for user in USERS}
    return Accounts(messages, used, balances, told)
