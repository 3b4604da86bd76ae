"""The events of these tests; types are known process-wide, so their family is their own."""

from bus import Event

STREAM = "bus:{work:0}"


class Asked(Event, type="work.asked"):
    n: int
