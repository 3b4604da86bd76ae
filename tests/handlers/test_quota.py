"""What messages use up: to the token, and told once."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import pytest

from bus import Reject
from handlers import quota, state
from handlers.events import MessageCreated, QuotaExceeded, QuotaExceededV1
from handlers.services import MessageService, QuotaService
from tests.handlers.application import (
    Crash,
    Interrupted,
    connect,
    envelopes,
    handle,
    kept,
    published,
    work,
)

if TYPE_CHECKING:
    from bus import Bus


async def charged(bus: Any, *tokens: int, user_id: str = "u") -> int:
    """Handle a new message of each number of tokens; return the user's balance."""
    for count in tokens:
        message_id = secrets.token_hex(4)
        event = MessageCreated(message_id=message_id, user_id=user_id, app_id="a", tokens=count)
        await handle(event, bus)
    return await QuotaService(bus).balance(user_id)


@pytest.mark.parametrize(
    ("granted", "tokens", "told"),
    [
        (30, [10, 10], 0),
        (30, [10, 10, 10], 0),  # zero is not below
        (30, [10, 10, 11], 1),
        (30, [31], 1),
        (30, [10, 10, 10, 1, 1, 10, 500], 1),
        (0, [1, 1], 1),
        (None, [5, 5], 1),  # a user nobody has granted anything
    ],
)
async def test_the_message_that_crosses_zero_is_told_and_no_other(
    bus: Bus, granted: int | None, tokens: list[int], told: int
) -> None:
    if granted is not None:
        await QuotaService(bus).grant("u", granted)
    assert await charged(bus, *tokens) == (granted or 0) - sum(tokens)
    assert len(await published(bus, QuotaExceeded)) == told


async def test_a_quota_that_was_raised_can_be_exceeded_again(bus: Bus) -> None:
    quotas = QuotaService(bus)
    await quotas.grant("u", 10)
    assert await charged(bus, 11, 5) == -6
    await quotas.grant("u", 20)
    assert await quotas.balance("u") == 4
    assert await charged(bus, 4) == 0
    assert await charged(bus, 1, 1) == -2
    assert len(await published(bus, QuotaExceeded)) == 2


async def test_users_do_not_share_a_quota(bus: Bus) -> None:
    await QuotaService(bus).grant("u", 10)
    await QuotaService(bus).grant("v", 10)
    assert await charged(bus, 4) == 6
    assert await charged(bus, 12, user_id="v") == -2
    assert [getattr(e, "user_id", "") for e in await published(bus, QuotaExceeded)] == ["v"]


async def test_a_message_without_tokens_uses_up_nothing(bus: Bus, redis: Any) -> None:
    assert await charged(bus, 0) == 0
    assert await kept(redis) == set()


async def test_a_message_that_would_give_tokens_back_is_rejected(bus: Bus, redis: Any) -> None:
    with pytest.raises(Reject, match="give back tokens: -3"):
        await charged(bus, -3)
    assert await kept(redis) == set()


async def test_a_message_that_is_told_again_is_charged_once(bus: Bus, redis: Any) -> None:
    """By a sender that was cut off, or by a replay of old events."""
    await QuotaService(bus).grant("u", 5)
    for _ in range(2):
        await MessageService(bus).create("m", "u", "a", "x" * 40)
        for event in await published(bus, MessageCreated):
            await handle(event, bus)
    assert await QuotaService(bus).balance("u") == 5 - 11
    assert len(await published(bus, QuotaExceeded)) == 1
    assert await redis.hget(state.message_key("m"), "charged") == b"11"


async def test_a_handler_that_dies_before_its_effects_has_charged_nothing(
    bus: Bus, redis: Any
) -> None:
    async def before(_trip: int) -> None:
        raise Crash

    with pytest.raises(Crash):
        await charged(Interrupted(bus, before), 1)
    assert await kept(redis) == set()


async def test_a_thousand_messages_in_two_workers_are_charged_to_the_token(url: str) -> None:
    """Every message is told twice, and 20 users are charged at the same time."""
    users, each = 20, 25
    async with connect(url) as bus, connect(url) as other:
        quotas, messages = QuotaService(bus), MessageService(bus)
        for user in range(users):
            await quotas.grant(f"u{user}", 10 * user)
        await asyncio.gather(
            *(
                messages.create(f"m{user}-{number}", f"u{user}", "a", "x" * 4 * (number % 3))
                for user in range(users)
                for number in range(each)
                for _ in range(2)
            )
        )
        await asyncio.gather(work(bus, quota.charge_message), work(other, quota.charge_message))
        used = sum(1 + number % 3 for number in range(each))
        balances = {user: await quotas.balance(f"u{user}") for user in range(users)}
        assert balances == {user: 10 * user - used for user in range(users)}
        told = [getattr(e, "user_id", "") for e in await published(bus, QuotaExceeded)]
        assert sorted(told) == sorted(f"u{u}" for u, left in balances.items() if left < 0)
        assert 0 < len(told) < users  # some crossed, some did not


async def test_what_was_told_before_can_still_be_read(bus: Bus, redis: Any) -> None:
    await bus.publish(QuotaExceededV1(user_id="u", tokens_used=12, tokens_allowed=10))
    await charged(bus, 1)
    old, new = await envelopes(bus)
    assert (old.type, old.version) == ("quota.exceeded", 1)
    assert old.event == QuotaExceededV1(user_id="u", tokens_used=12, tokens_allowed=10)
    assert (new.type, new.version) == ("quota.exceeded", 2)
    assert new.stream == old.stream == "bus:{message:0}"


async def test_the_event_is_caused_by_the_message_that_did_it(bus: Bus) -> None:
    receipt = await MessageService(bus).create("m", "u", "a", "x")
    await work(bus, quota.charge_message)
    [exceeded] = await envelopes(bus, QuotaExceeded)
    assert exceeded.event == QuotaExceeded(user_id="u", message_id="m", tokens=1)
    assert exceeded.causation_id == exceeded.correlation_id == receipt.event_id
    assert exceeded.causation_depth == 1
