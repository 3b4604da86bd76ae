"""What is measured: `python -m bench [compare|growth|own|channels|profile]`."""

import argparse
import sys
from pathlib import Path

from bench import channels, compare, growth, own, profile


def main() -> int:
    """Run what is asked for; the exit code is 1 when a figure misses its mark."""
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument(
        "what",
        nargs="?",
        default="compare",
        choices=("compare", "growth", "own", "channels", "profile"),
    )
    p.add_argument("--quick", action="store_true", help="ours and the bare loops, about a minute")
    p.add_argument("--rounds", type=int)
    p.add_argument("--systems", help="a few of them, by comma")
    p.add_argument("--only", default="", help="tests with this in their names")
    p.add_argument("--json", type=Path, help="write the figures here, too")
    a = p.parse_args()
    if a.what == "growth":
        return growth.main(a.rounds or 3)
    if a.what == "own":
        return own.main(a.rounds or 3)
    if a.what == "channels":
        return channels.main()
    if a.what == "profile":
        return profile.main(a.only)
    names = list(compare.QUICK) if a.quick else list(compare.SYSTEMS)
    if a.systems:
        names = a.systems.split(",")
    rounds = a.rounds or (3 if a.quick else 5)
    return compare.run(names, rounds, quick=a.quick, only=a.only, file=a.json)


if __name__ == "__main__":
    sys.exit(main())
