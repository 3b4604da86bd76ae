"""Looking back: the streams are the event store.

history      `event_store` reads and merges; `selection` chooses, `position` says where in time
tail         `tail` is what the user has; `hub` reads for all of them over one connection, each has
             a `seat` there; `past` catches up; `place`, `proof` and `batch` are what they pass on
replay       `replay` reads and puts what is `wanted` to `destinations`; `checkpoint` is the file
dead letters `dead_letters` finds, `letter` is one, `letter_id` names it, `redrive` moves them back,
             `mend` edits, `export` writes them down
inspection   `inspector` makes the `snapshot`; `backlog` looks closer at one topic
patience, throttle: how often what fails is asked again, and how fast things go
"""
