"""The end of something that has parts: all of them are closed, whatever one of them raises."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any


async def close_all(*rounds: Sequence[Callable[[], Any]]) -> None:
    """Close round after round; those of one round, plain or async, at the same time.

    Errors: the last that was raised, those before it as its context; when all are closed.
    """
    async with AsyncExitStack() as left:
        for closings in reversed(rounds):
            left.push_async_callback(_together, closings)


async def _together(closings: Sequence[Callable[[], Any]]) -> None:
    if len(closings) == 1:  # in this task: an observer that closes its bus does not wait for itself
        await _closed(closings[0])
        return
    answers = await asyncio.gather(*map(_closed, closings), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer


async def _closed(close: Callable[[], Any]) -> None:
    answer = close()
    if inspect.isawaitable(answer):
        await answer
