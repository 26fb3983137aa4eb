"""Break each promise in a copy of the tree, and see its tests fail: `python -m tests.promises.run [NAME ...]`.

Exit status 1 if some break went unnoticed. A test that also fails without the break proves nothing: the suite itself
runs them all on the tree as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.promises.breaks import BREAKS, Break

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 150  # of a test, which may well hang when it is broken
TESTS_FAILED = 1  # pytest's exit status


def copy_of_tree(into: Path) -> Path:
    """What git knows of the tree, as it lies here."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, into / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return into


def unnoticed(each: Break, tree: Path) -> list[str]:
    """Those of its tests that do not fail; the tree is sound again afterwards."""
    file = tree / each.file
    sound = file.read_text()
    file.write_text(sound.replace(each.sound, each.broken))
    try:
        return [test for test in each.tests if _status(test, tree) != TESTS_FAILED]
    finally:
        file.write_text(sound)


def _status(test: str, tree: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--timeout={LIMIT_S}", test]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    silent = subprocess.DEVNULL
    done = subprocess.run(command, cwd=tree, env=environment, stdout=silent, stderr=silent, timeout=2 * LIMIT_S)
    return done.returncode


def main(names: list[str]) -> int:
    wanted = [each for each in BREAKS if not names or each.name in names]
    if unknown := set(names) - {each.name for each in BREAKS}:
        print(f"no break is called {', '.join(sorted(unknown))}; there are {', '.join(each.name for each in BREAKS)}")
        return 2
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_tree(Path(folder))
        for number, each in enumerate(wanted, 1):
            missed = unnoticed(each, tree)
            failures += bool(missed)
            outcome = f"UNNOTICED by {', '.join(missed)}" if missed else "noticed"
            print(f"[{number}/{len(wanted)}] promise {each.promise}, {each.name}: {outcome}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
