"""Our numbers beside the bare loops', and at the cap, in one run: `python -m bench`."""
