"""Channels: short-lived streams for what one run says while it runs.

    channel.publish, end -> the channel's sender -> one script call in flight -> receipt
    channel.tail -> what was, page by page -> the hub's shared read -> the end marker, or a gap

A channel is one key on the server, and nothing in a process that does not use it right now.
"""
