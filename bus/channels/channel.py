"""A channel: what one run says while it runs, for whoever listens, from any point on."""

import secrets
from datetime import timedelta

from bus.channels.senders import Lane, Senders
from bus.channels.tail import ChannelTail
from bus.config import (
    CHANNEL_MAXLEN,
    CHANNEL_TTL,
    CHANNEL_TTL_LEAST,
    CHANNEL_TTL_MOST,
    checked_name,
    checked_number,
)
from bus.errors import ChannelEnded, DeclarationError, InvalidEvent
from bus.event import Event
from bus.history.hub import Hub
from bus.publisher import Publisher, Receipt
from bus.streams import keys
from bus.streams.channels import END_TYPE, end_fields
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry

_MAXLEN_MOST = 1_000_000


class Channels:
    """The channels of one bus."""

    def __init__(
        self,
        store: StreamStore,
        publisher: Publisher,
        hub: Hub,
        telemetry: Telemetry,
        publish_timeout_s: float,
    ) -> None:
        self.senders = Senders(store, telemetry, publish_timeout_s)
        self.publisher = publisher
        self.hub = hub

    async def close(self) -> None:
        """Wait for what is being published."""
        await self.senders.close()

    def channel(
        self, name: str, ttl: timedelta = CHANNEL_TTL, maxlen: int = CHANNEL_MAXLEN
    ) -> "Channel":
        """Return a channel. See `Bus.channel`."""
        checked_name(name, "channel name")
        if not isinstance(ttl, timedelta) or not CHANNEL_TTL_LEAST <= ttl <= CHANNEL_TTL_MOST:
            raise DeclarationError(
                f"ttl must be a timedelta from {CHANNEL_TTL_LEAST} to {CHANNEL_TTL_MOST},"
                f" not {ttl!r}"
            )
        checked_number(maxlen, "maxlen", 2, _MAXLEN_MOST, whole=True)
        return Channel(self, name, ttl, maxlen)


class Channel:
    """A short-lived stream of one key; made by `Bus.channel`. Costs nothing until it is used.

    name: as it was given. key: where it is on the server. ttl: it expires so long after what was
    published last. maxlen: about so many entries are kept, the newest. Where several objects of
    a process say other things of one channel, it is as the one says that published last.
    """

    __slots__ = ("_channels", "_ended", "_lane", "key", "maxlen", "name", "ttl")

    def __init__(self, channels: Channels, name: str, ttl: timedelta, maxlen: int) -> None:
        self.name = name
        self.key = keys.channel(name)
        self.ttl = ttl
        self.maxlen = maxlen
        self._channels = channels
        self._lane = Lane(self.key, ttl // timedelta(milliseconds=1), maxlen)
        self._ended = False

    async def publish(self, event: Event) -> Receipt:
        """Append one event and return where it is; the channel's expiry begins anew.

        No handler sees it. What is published to one channel at the same time shares one script
        call, what goes to several one write; the order of the calls is kept. Each is appended
        once, also when an answer is lost, unless `maxlen` others came before the repeat.
        Errors: ChannelEnded; as `Bus.publish`, but nothing waits for room.
        """
        if self._ended:
            raise self._over()
        event_id, fields, size = self._channels.publisher.entry_of(event)
        if fields[3] == END_TYPE:
            raise InvalidEvent(f"{END_TYPE} is the end of a channel: call end()")
        try:
            ms, at = await self._channels.senders.send(self._lane, fields, size)
        except ReplyError as error:
            if error.code == "ENDED":
                raise self._over() from None
            raise
        return Receipt(event_id, self.key, f"{ms}-{at}")

    async def end(self) -> None:
        """Append the end marker, behind all that is being published: readers finish.

        Later publishes are refused, by this object for ever, by the server until the channel
        expires. One that has ended is left as it is. Errors: as `publish`.
        """
        fields = end_fields(secrets.token_hex(8))
        try:
            await self._channels.senders.send(self._lane, fields, sum(map(len, fields)))
        except ReplyError as error:
            if error.code != "ENDED":
                raise
        self._ended = True
        self._channels.senders.forget(self.key)

    def tail(self, after: str | None = None) -> ChannelTail:
        """Iterate over what was published and what comes, until the end. See `ChannelTail`.

        after: id of an entry, to go on behind it; None, or 0-0, for the beginning.
        Errors: DeclarationError for what is no id.
        """
        return ChannelTail(self._channels.hub, self.name, self.key, after)

    def _over(self) -> ChannelEnded:
        return ChannelEnded(
            f"channel {self.name} was ended: nothing can be published to it any more;"
            " another run takes another name"
        )

    def __repr__(self) -> str:
        return f"<Channel {self.name}>"
