"""Asking again: what only reads, or is recognised by the server when it is repeated."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

from bus.config import LOOK_PATIENCE_S
from bus.errors import ServerUnreachable
from bus.streams.connection import ConnectionLost, is_transient
from bus.streams.replies import TRANSIENT, ReplyError

T = TypeVar("T")


async def patiently(
    ask: Callable[[], Awaitable[T]],
    patience_s: float = LOOK_PATIENCE_S,
    told: Callable[[BaseException], None] | None = None,
) -> T:
    """Return what `ask` returns; after errors that time may heal it is asked again.

    told: called with each such error. Errors: after `patience_s` ServerUnreachable or
    ServerRefused, according to the last one; others at once.
    """

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if told is not None and error is not None:
            told(error)

    try:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_delay(patience_s),
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            before_sleep=tell,
            reraise=True,
        ):
            with attempt:
                return await ask()
    except ConnectionLost as error:
        raise ServerUnreachable(str(error)) from error
    except ReplyError as error:
        if error.code in TRANSIENT:
            raise error.refusal() from error
        raise
    raise AssertionError("tenacity ends by returning or raising")


async def twice_at_worst(
    do: Callable[[], Awaitable[T]], patience_s: float = LOOK_PATIENCE_S
) -> tuple[T, bool]:
    """Return what `do` returns, which changes something, and whether it is in doubt what it met.

    It is when an answer was lost: what it does may have been done by the call before.
    """
    in_doubt = False

    def tell(error: BaseException) -> None:
        nonlocal in_doubt
        in_doubt = in_doubt or getattr(error, "sent", False)

    return await patiently(do, patience_s, tell), in_doubt
