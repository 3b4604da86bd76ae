"""What the demo's workers run: the application's handlers, each run put on record in Redis.

`worker.py --handlers demo.workload` collects the handlers of this module. They differ from those
of `handlers/` in four settings, for a demo that is over in time: shorter waits between attempts and
before a dead letter, a shorter time until a dead worker's entries are taken over, and the record.
"""

import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from bus import Backoff, Breaker, Bus, Delivery, Event, Handler, event_handler
from demo import records
from handlers import cache, cleanup, events, indexing, quota

BACKOFF = Backoff(base_s=0.25, factor=2.0)  # five attempts in at most 3.75 s; the default takes 15
BREAKER = Breaker(window_s=2.5, probe_s=1.25)  # a quarter of the default, as the waits are
VISIBILITY_S = 5.0  # the default is 30; this is how long a killed worker's entries lie still

# One command, as half of what a worker does here is to keep the record.
RETURNED = """
redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
"""

PARENT_LOOK_S = 0.2
LAST_WORDS_S = 4.0


def recorded(handler: Handler[...]) -> Handler[...]:
    """Return the handler with the demo's settings and a record of every run."""
    group = handler.group

    async def run(event: Event, delivery: Delivery[Event]) -> None:
        redis: Any = delivery.bus.redis
        event_id = delivery.envelope.event_id
        await redis.hincrby(records.started(group), event_id, 1)
        try:
            await (handler(event, delivery) if handler.takes_delivery else handler(event))
        except Exception:
            await redis.hincrby(records.failed(group), event_id, 1)
            raise
        keys = records.finished(group), records.handled(group)
        await redis.eval(RETURNED, 2, *keys, event_id, records.now_ms())

    return replace(
        handler,
        call=run,
        takes_delivery=True,
        backoff=BACKOFF,
        breaker=BREAKER,
        visibility_s=VISIBILITY_S,
    )


documents = events.DOCUMENTS
index = recorded(indexing.index_document)
unindex = recorded(indexing.unindex_document)
charge = recorded(quota.charge_message)
views = recorded(cache.drop_stale_views)
clean = recorded(cleanup.clean_up)


@recorded
@event_handler("app.*", "dataset.*", "document.*", "message.*", "quota.*", group="audit")
async def audit(_event: Event) -> None:
    """Do nothing: the record is what is wanted, of every event and at once."""


@asynccontextmanager
async def lifespan(_bus: Bus) -> AsyncIterator[None]:
    """See to it that no worker outlives the demo for long, however that ended.

    worker.py drains once its parent is gone. With the embedded server gone too there is nobody to
    drain to, and what it still wants to publish would keep it for half a minute.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_LOOK_S)
        time.sleep(LAST_WORDS_S)
        os._exit(1)

    # A thread, because it has to end the process also when the event loop is stuck.
    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
    yield
