"""What a message uses up: its tokens are taken from its user's quota, exactly once.

A quota is a hash with what was `granted` in all and the `balance` that is left of it. A user to
whom nothing was granted has 0, and the first message exceeds it. The balance may go on falling
below zero: the message has been sent, and refusing the next one is not a handler's business but
its sender's, who asks `QuotaService.balance`.

Deduction, the decision about it and the event are effects of one delivery. They take place in one
script with the ack, so a worker may be killed at any moment and the balance is right to the token.
That is once per *event*; a message whose sender was cut off and sent it again is two events. So
the step begins with a mark in the message's hash, and a message that has it is not charged again.

`quota.exceeded` is told by the message that takes the balance from zero or more to below zero, and
by no other: a balance that is below zero already crosses nothing. Whether this is the one, only the
server can say, for other messages of the user are charged at the same time.
"""

from bus import Delivery, Reject, event_handler
from handlers.events import MessageCreated, QuotaExceeded
from handlers.state import message_key, quota_key


@event_handler(MessageCreated, group="quota")
async def charge_message(event: MessageCreated, delivery: Delivery[MessageCreated]) -> None:
    """Take a message's tokens from its user's balance; tell when that is used up."""
    tokens = event.tokens
    if tokens < 0:
        raise Reject(f"a message cannot give back tokens: {tokens}")
    if tokens == 0:
        return
    effects = delivery.effects
    first = effects.hsetnx(message_key(event.message_id), "charged", tokens).equals(1)
    left = effects.hincrby(quota_key(event.user_id), "balance", -tokens, when=first)
    effects.publish(
        QuotaExceeded(user_id=event.user_id, message_id=event.message_id, tokens=tokens),
        when=left.between(-tokens, -1),  # so it was 0 or more before
    )
