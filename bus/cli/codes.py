"""The exit codes of all commands; `bus check` has those of monitors (`bus/admin/checks.py`)."""

DONE = 0
FAILED = 1  # or declined, not there, or something is wrong that was asked about
USAGE = 2
UNKNOWN = 3  # to a monitor
UNREACHABLE = 69
INTERRUPTED = 130
