"""The three standard streams of a program, whatever it was started with.

A daemon may have none of them, and then the next thing that is opened, a socket say, gets their
number and whatever is printed. What is asked to print something fails instead.
"""

import os
import sys
from io import TextIOWrapper


def prepare() -> None:
    """Open what is closed of stdin, stdout and stderr; have them take any text, line by line."""
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):  # stdout: not writable
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115 - as Python does
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
