"""The systems that are measured, one file each.

`publisher(url)` returns what has `event(fields)`, which makes what it publishes, `publish(event)`,
`publish_many(events)` where the system has that, and `close()`. `work(url, work)` connects, awaits
`work.gate()`, has `work.handler` called once per event, and ends when `work.stopped` is set.
"""
