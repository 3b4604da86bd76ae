"""The reference application: the event layer of a knowledge base and agent platform.

Users build *apps*; an app answers from *datasets*; a dataset holds *documents*, whose text is
indexed as soon as it is stored; people send *messages*, which use up their *quota*. What agents
and models *stream* while they answer, to a browser for one, is in `examples`.

    events.py     everything that can happen, and the topics it is kept in
    state.py      where the present state lies in Redis: every key, and what a document is
    services.py   what a program calls: state and event in one step, and questions answered

What follows from an event, one file and one handler group each, or two:

    indexing.py   documents can be found: the inverted index of a dataset, and `search`
    quota.py      a message's tokens are taken from its user's quota, exactly once
    cache.py      views that are costly to compute, and their end when what they show changes
    cleanup.py    what was in a deleted app or dataset goes with it

`python worker.py` runs every handler of this package. It imports from `bus` what any other
program could, and nothing else, so it can be copied as the start of a new one.

Three habits carry it. A change and the event that tells of it are one step (`bus.transaction()`),
so neither is ever without the other. What a handler does in one command or two are effects of its
delivery, so they take place once. What takes longer is done in steps that see the revision they
belong to, so whoever is late or has been replaced changes nothing.
"""
