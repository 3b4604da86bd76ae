"""Asks the hooks of `hook.handle` before handlers run, as long as there are any.

It is asked within the handler's attempt: what a hook takes counts towards `timeout_s`, and what it
raises is a failed attempt. A no is a dead letter, as if the handler had raised Reject. The handler
sees the event that the hooks went on with; the entry, and what retries, dead letters and `on_dead`
make of it, stay what was published.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from bus.delivery import Delivery
from bus.errors import HookRejected, Reject
from bus.handler import Handler
from bus.hooks import HANDLE, Hooks
from bus.worker.consumer import Consumer


class Hooked:
    """Puts the hooks of one bus before the handlers of one worker, and takes them away again."""

    def __init__(self, hooks: Hooks, consumers: Sequence[Consumer]) -> None:
        self._hooks = hooks
        self._consumers = consumers

    def begin(self) -> None:
        """Ask hooks from now on, whenever they are registered."""
        self._hooks.changed.append(self._choose)
        self._choose()

    def end(self) -> None:
        """Look no more for hooks that come and go: the worker has stopped."""
        if self._choose in self._hooks.changed:
            self._hooks.changed.remove(self._choose)

    def _choose(self) -> None:
        asked = self._hooks.serve(HANDLE)
        for consumer in self._consumers:
            consumer.executor.call_instead(
                _asking(self._hooks, consumer.handler) if asked else None
            )


def _asking(hooks: Hooks, handler: Handler[...]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return what asks, and then calls the handler: called with (event, delivery), or a list."""
    call: Callable[..., Any] = handler.call

    async def ask_and_call(event: Any, delivery: Delivery[Any]) -> None:
        delivery.event = made = await _asked(hooks, event)
        try:
            await (call(made, delivery) if handler.takes_delivery else call(made))
        finally:
            delivery.event = event  # on_dead is about what was published

    async def ask_and_call_batch(deliveries: list[Delivery[Any]]) -> None:
        published = [(delivery, delivery.event) for delivery in deliveries]
        left = []
        try:
            for delivery in deliveries:
                try:
                    delivery.event = await _asked(hooks, delivery.event)
                except Exception as error:
                    delivery.fail(error)
                else:
                    left.append(delivery)
            if left:
                await call(left)
        finally:
            for delivery, event in published:
                delivery.event = event  # as above, and one that is tried alone is asked about again

    return ask_and_call if handler.batch is None else ask_and_call_batch


async def _asked(hooks: Hooks, event: Any) -> Any:
    try:
        return await hooks.intervene(HANDLE, event)
    except HookRejected as no:
        raise Reject(no) from no
