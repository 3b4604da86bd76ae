"""The main job: the reference application under load, with poison and a killed worker.

`python worker.py --demo [FOLDER] [--url URL]` runs it; see run.py.

    run.py         the order of events, from the server's start to the exit code
    ingest.py      files become documents, through the services; the paced phase
    poison.py      entries and documents that fail, each in its own way
    crew.py        the worker processes: start, kill, stop
    workload.py    what those run: the application's handlers, each run put on record
    records.py     the keys of that record
    ledger.py      what was published, held against what became of it
    watch.py       looking at the groups while they work
    takeover.py    one worker is killed; what it had in hand is followed
    accounts.py    what the messages came to, and the balances that are left
    views.py       the views that the application keeps, and whether they are right
    removal.py     what is left of a deleted dataset
    outcome.py     what the run came to, and the counts that have to agree
    report.py      the table
    progress.py    what one sees meanwhile
"""
