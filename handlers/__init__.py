"""The reference application: the event layer of a knowledge base and agent platform.

Users build *apps*; an app answers from *datasets*; a dataset holds *documents*, whose text is
indexed as soon as it is stored; people send *messages*; agents and models *stream* what they do.

    events.py     everything that can happen, and the topics it is kept in
    state.py      where the present state lies in Redis: every key, and the one guarded write
    services.py   what a program calls: change the state, then publish what happened
    indexing.py   what follows: the inverted index of a dataset, and `search`

`python worker.py` runs every handler of this package. It imports from `bus` what any other
program could, and nothing else, so it can be copied as the start of a new one.
Quotas, caches and the cleanup behind a deleted app or dataset come in a later release.
"""
