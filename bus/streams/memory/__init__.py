"""`memory://`: the verbs of `bus/streams/` once more, on the state of this process.

The state is in `place.py` and `log.py`. A verb is a plain function of a place: what a script does
on a server, one file per concern. `store.py` puts them behind the classes that the floors above
know; `connection.py` answers the plain commands that those classes send besides.
"""
