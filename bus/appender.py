"""How the batches of one sender reach their stream: once each, whatever the network does.

A batch whose outcome is unknown is sent again, unchanged and under the same sequence number, which
the script recognises; nothing else is ever re-sent.
"""

import asyncio

from tenacity import AsyncRetrying, retry_if_exception, stop_never, wait_random_exponential

from bus.batch import Batch
from bus.config import REPLY_TIMEOUT_S
from bus.errors import BusError
from bus.streams.answers import Appended, Limits, Room
from bus.streams.connection import is_transient
from bus.streams.replies import ReplyError
from bus.telemetry import Telemetry
from bus.unit import Appends


class Appender:
    """Calls the script for a sender. limits: how long the stream may grow by it."""

    def __init__(
        self,
        stream: str,
        publisher_id: str,
        store: Appends,
        telemetry: Telemetry,
        patience_s: float,
    ) -> None:
        self.limits = Limits(1, 1, 1)
        self._stream = stream
        self._publisher_id = publisher_id
        self._store = store
        self._telemetry = telemetry
        self._timeout_s = min(patience_s, REPLY_TIMEOUT_S)
        self._all_told = asyncio.Event()  # the callers of the batch that is tried again

    def append_soon(self, batch: Batch, *, follows: bool, at_once: bool) -> None:
        """Send a batch for the first time, and let it be told the answer.

        follows: behind one that is on its way; it is not taken if that is not, whole. at_once:
        nothing else is published in this turn of the loop. Errors: what cannot be packed.
        """
        batch.attempting = True
        self._store.append_soon(
            self._stream,
            self._publisher_id,
            batch.sequence,
            [u.args for u in batch.units],
            batch.events,
            self.limits,
            self._timeout_s,
            answer=batch,
            follows=follows,
            at_once=at_once,
        )

    async def bring_in(self, batch: Batch) -> Appended:
        """Append a batch, again if it has failed, until it is in or its last deadline has passed.

        Errors: why it is not in, as far as is known; see `Batch.maybe_sent`.
        """
        error = batch.trouble
        if error is None or (isinstance(error, ReplyError) and error.code == "NOSCRIPT"):
            if error is not None:
                _leave_out_who_was_told(batch, error)
            try:
                return await self._attempt(batch)
            except BusError as first:
                error = first
        if is_transient(error):
            return await self._insist(batch, error)
        raise error

    async def room(self, entries: int) -> Room:
        """Say how much fits."""
        return await self._store.room(self._stream, self.limits, entries)

    def all_told(self) -> None:
        """Note that nobody waits any more for the batch that is tried again."""
        self._all_told.set()

    async def _attempt(self, batch: Batch) -> Appended:
        batch.attempting = True
        try:
            return await self._store.append(
                self._stream,
                self._publisher_id,
                batch.sequence,
                [u.args for u in batch.units],
                batch.events,
                self.limits,
                self._timeout_s,
                again_ms=batch.age_ms if batch.maybe_sent else 0,
            )
        except BusError as error:
            batch.note(error)
            raise
        finally:
            batch.attempting = False

    async def _insist(self, batch: Batch, first: BusError) -> Appended:
        """Send the batch again until it is in or its last deadline has passed."""
        loop = asyncio.get_running_loop()
        last = max(u.deadline for u in batch.units)
        error: BusError = first
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(is_transient),
            stop=stop_never,
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            sleep=self._pause,
            reraise=True,
        ):
            if loop.time() >= last:
                raise error
            _leave_out_who_was_told(batch, error)
            self._telemetry.emit(
                "publish.retried",
                stream=self._stream,
                count=batch.events,
                error_type=type(error).__name__,
                error=str(error),
            )
            with attempt:
                try:
                    return await self._attempt(batch)
                except BusError as again:
                    error = again
                    raise
        raise error

    async def _pause(self, delay_s: float) -> None:
        """Wait before the next attempt, no longer than anybody waits for it."""
        self._all_told.clear()
        try:
            async with asyncio.timeout(delay_s):
                await self._all_told.wait()
        except TimeoutError:
            pass


def _leave_out_who_was_told(batch: Batch, error: BusError) -> None:
    """See that who was told "not published" is not in; raises `error` if nobody is left.

    Only where nothing of it is in for certain: what may be in is sent again unchanged.
    """
    if batch.maybe_sent:
        return
    batch.units[:] = [u for u in batch.units if not u.future.done()]
    if not batch.units:
        raise error
