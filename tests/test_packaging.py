"""What is shipped, what it needs, and that the repository can be built anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {
    "msgspec>=0.22",
    "redis[hiredis]>=8.1,<9",
    "tenacity>=9.1",
    "uvloop>=0.23; sys_platform != 'win32'",
}

# In pieces, because this file is searched too.
REGISTRIES = [
    r"pypi\." + "org",
    "python" + r"hosted\.org",
    r"registry\." + "npmjs",
    r"(deb|security|archive)\.(debian|ubuntu)\." + "(org|com)",
    r"(gh" + r"cr|qu" + r"ay)\.io",
]
MACHINE_PATH = r"(?<![A-Za-z0-9_.])/(work|farm|root|home|Users)/"


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built by the pinned hatchling of this environment."""
    target = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", target, ROOT)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if name.startswith("bus/")}
    assert {name.split("/")[0] for name in names - package} == {
        f"bus_streams-{PROJECT['version']}.dist-info"
    }
    written = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "bus").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package == written
    assert "bus/py.typed" in package
    assert any(name.endswith(".lua") for name in package)


def test_the_core_needs_four_packages_and_no_more():
    assert set(PROJECT["dependencies"]) == CORE


@pytest.mark.timeout(180)
def test_the_core_imports_with_its_four_packages_alone(wheel, tmp_path):
    """From the wheel and far from the repository, so nothing is found by accident."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    shown = run(*pip, "list", "--format", "freeze").lower().split()
    installed = {line.split("==")[0] for line in shown} - {"pip", "setuptools"}
    if sys.version_info < (3, 11, 3):
        installed -= {"async-timeout"}  # what redis-py itself brings to these
    assert installed == {"bus-streams", "hiredis", "msgspec", "redis", "tenacity", "uvloop"}
    assert run(python, "-W", "error", "-c", "import bus; print(bus.__name__)", cwd=tmp_path)


def repository_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git clone, so nothing tells our files from what lies about")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    paths = (ROOT / name for name in listed.split("\0") if name)
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("pattern", [*REGISTRIES, MACHINE_PATH], ids=lambda p: p.replace("\\", ""))
def test_no_file_names_a_registry_or_a_place_on_somebodys_machine(pattern):
    offending = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in repository_files()
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not offending


def test_every_direct_dependency_is_pinned():
    """An unpinned one would make the same commit install something else next month."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*PROJECT["dependencies"], *table["build-system"]["requires"]]
    for group in (PROJECT["optional-dependencies"], table["dependency-groups"]):
        for requirements in group.values():
            wanted += requirements
    names = {re.match(r"[\w.-]+", text)[0].lower() for text in wanted}
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    assert names <= {name.lower() for name in pins}


def test_make_help_lists_every_target():
    if shutil.which("make") is None:
        pytest.skip("no make here; apt-get install make")
    targets = re.findall(r"(?m)^([a-z][a-z-]*):", (ROOT / "Makefile").read_text())
    listed = re.findall(r"(?m)^  make ([a-z-]+) +\S", run("make", "--no-print-directory", "help"))
    assert sorted(listed) == sorted(targets)
    assert {"demo", "test", "lint", "env", "clean", "bench-quick"} <= set(listed)
    assert run("make", "--no-print-directory") == run("make", "--no-print-directory", "help")
