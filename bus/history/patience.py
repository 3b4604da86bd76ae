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
from bus.sender import is_transient

T = TypeVar("T")


async def patiently(
    ask: Callable[[], Awaitable[T]],
    patience_s: float = LOOK_PATIENCE_S,
    told: Callable[[BaseException], None] | None = None,
) -> T:
    """Return what `ask` returns; after errors that time may heal it is asked again.

    told: called with each such error. Errors: the last one, after `patience_s`; others at once.
    """

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if told is not None and error is not None:
            told(error)

    async for attempt in AsyncRetrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_delay(patience_s),
        wait=wait_random_exponential(multiplier=0.05, max=1.0),
        before_sleep=tell,
        reraise=True,
    ):
        with attempt:
            return await ask()
    raise AssertionError("tenacity ends by returning or raising")
