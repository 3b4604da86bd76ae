"""Our numbers beside the bare loops', in one run: `python -m bench`."""
