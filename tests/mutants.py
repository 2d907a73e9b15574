"""Do the tests bite? Plants the bugs of mutants.yaml one at a time; for each, the tests named beside it must fail.

    python tests/mutants.py [--only WORD]

Works in copies of the tracked files, two at a time. Exit code 1 if a mutant survives or does not apply, or if the tests
do not pass on the code as it is. WORD: only mutants with it in their file, their tests or their description.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
SIDE_BY_SIDE = 2
OPTIONS = ["-x", "-n", "0", "-q", "-m", "", "--timeout=120", "--no-header", "-p", "no:cacheprovider"]


def main() -> int:
    """Run them all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    only = parser.parse_args().only
    mutants = [mutant for mutant in listed() if only in f"{mutant['file']} {mutant['tests']} {mutant['what']}"]
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        copies: Queue[Path] = Queue()
        for number in range(SIDE_BY_SIDE):
            copies.put(copy_of_tracked_files(Path(home) / str(number)))
        tests = sorted({test for mutant in mutants for test in mutant["tests"]})
        if code := run(tests, Path(home) / "0", show=True):
            print(f"the tests do not pass on the code as it is (pytest ended with {code})")
            return 1
        with ThreadPoolExecutor(SIDE_BY_SIDE) as side_by_side:
            outcomes = list(side_by_side.map(lambda mutant: judge(mutant, copies), mutants))
    left = [mutant for mutant, outcome in zip(mutants, outcomes, strict=True) if outcome != "killed"]
    print(f"{len(mutants) - len(left)} of {len(mutants)} killed")
    for mutant in left:
        print(f"  {describe(mutant)}")
    return int(bool(left))


def listed() -> list[dict[str, Any]]:
    """The mutants of mutants.yaml: file, before, after, tests, what."""
    return list(yaml.safe_load((ROOT / "tests/mutants.yaml").read_text()))


def describe(mutant: dict[str, Any]) -> str:
    """Where a mutant is and what it does."""
    return f"{mutant['file']}: {mutant['what']}"


def copy_of_tracked_files(directory: Path) -> Path:
    """The files that git tracks, as they are in the working tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    return directory


def judge(mutant: dict[str, Any], copies: Queue[Path]) -> str:
    """Plant one mutant in a copy that is free, run its tests, take it out again; prints and returns what came of it."""
    copy, started = copies.get(), time.monotonic()
    file = copy / mutant["file"]
    text = file.read_text() if file.is_file() else ""
    outcome = "does not apply"
    if text.count(mutant["before"]) == 1:
        file.write_text(text.replace(mutant["before"], mutant["after"]))
        code = run(mutant["tests"], copy)
        # 1: a test failed. Anything else (no such test, a syntax error) is a mistake in mutants.yaml.
        outcome = {0: "SURVIVED", 1: "killed"}.get(code, f"pytest ended with {code}")
        file.write_text(text)
    copies.put(copy)
    print(f"{outcome:14} {time.monotonic() - started:4.0f} s  {describe(mutant)}", flush=True)
    return outcome


def run(tests: list[str], copy: Path, show: bool = False) -> int:
    """pytest's exit code. No bytecode is written: that of a mutant would look as new as that of the code."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=not show).returncode


if __name__ == "__main__":
    sys.exit(main())
