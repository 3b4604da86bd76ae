"""The application that the tests of the command line name with `--app shop`."""

from bus import Backoff, Event, Topic, event_handler

ORDERS = Topic("order", partitions=2, maxlen=50_000, keep=1_000)


class OrderPaid(Event, type="order.paid", key="order_id"):
    order_id: str
    cents: int


class OrderLost(Event, type="order.lost", version=2, key="order_id"):
    order_id: str


@event_handler(
    OrderPaid,
    OrderLost,
    group="receipts",
    max_attempts=1,
    breaker=None,
    backoff=Backoff(base_s=600.0),
)
async def send_receipt(event: OrderPaid | OrderLost) -> None:
    if isinstance(event, OrderPaid) and event.cents < 0:
        raise ValueError(f"less than nothing: {event.cents}")


@event_handler(OrderPaid, group="patient", breaker=None, backoff=Backoff(base_s=600.0))
async def fail(event: OrderPaid) -> None:
    raise RuntimeError("not today")
