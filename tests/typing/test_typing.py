"""What users write is understood by mypy --strict, and their mistakes are found by it."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(find_spec("mypy") is None, reason="no mypy here; `make env` installs it")
@pytest.mark.timeout(180)  # the first time mypy reads all of redis-py
def test_mypy_accepts_what_is_right_and_refuses_the_rest() -> None:
    """One run: in `refused.py` an ignore that nothing needs is an error by itself."""
    files = [str(HERE / "api.py"), str(HERE / "refused.py")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *files],
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
