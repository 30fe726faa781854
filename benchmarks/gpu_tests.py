"""The tests that are marked ``cuda``, run in a process and told of in a record."""

from __future__ import annotations

import importlib.machinery
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

from benchmarks.gpu_plan import TIME_WAS_UP
from benchmarks.processes import ROOT
from benchmarks.step_tables import Record

MARK = re.compile(r"^(pytestmark = |@)pytest\.mark\.cuda", re.MULTILINE)
ENDING = 15
"""Seconds that pytest has to write what it knows when it is interrupted."""
CORES_OF_A_WORKER = 4
"""All workers share one GPU: there are not as many of them as of the cores."""


def marked_files() -> list[str]:
    """Return the test files that have the mark: no other needs to be imported."""
    return sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK.search(path.read_text(encoding="utf-8"))
    )


def run_tests(
    files: list[str], device: str, limit: float, folder: Path, environment: dict[str, str]
) -> Record:
    """Run the marked tests of some files; return how many did what, and what failed how."""
    # Nothing to run, or nothing to run it with.
    if not files:
        return {"words": "none were asked for"}
    paths = [*environment["PYTHONPATH"].split(os.pathsep), *sys.path]
    find = importlib.machinery.PathFinder.find_spec
    if find("pytest", paths) is None:
        return {"words": "not run: pytest is not installed"}
    workers = (os.cpu_count() or 1) // CORES_OF_A_WORKER if find("xdist", paths) else 0
    # Warnings of another version of torch are no failures here.
    folder.mkdir(parents=True, exist_ok=True)
    report, log = folder / "tests.xml", folder / "tests.txt"
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "--device", device, "-W", "default"]
    command += ["-p", "no:cacheprovider", "--junitxml", str(report), *files]
    command += ["-n", str(workers)] if workers > 1 else []
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            # What a shell starts in the background cannot be interrupted by itself.
            preexec_fn=interruptible,  # noqa: PLW1509 - this process has one thread
        )
        in_time = waited(process, limit)
    if not in_time and not report.exists():
        return {"words": TIME_WAS_UP}
    if not report.exists():
        tail = log.read_text(encoding="utf-8").strip().splitlines()[-12:]
        return {"words": f"no report; pytest ended with {process.returncode}", "tail": tail}
    if not in_time:
        interrupted = 0 if workers > 1 else 1  # workers tell of what has ended alone
        return read(report, interrupted) | {"cut off": "then the time was up"}
    return read(report)


def interruptible() -> None:
    """Take an interruption as every process does by default."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def waited(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Wait for a process, interrupt it when the time is up; return whether it ended before."""
    try:
        process.wait(None if math.isinf(limit) else limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    return True


def read(report: Path, interrupted: int = 0) -> Record:
    """Return the counts and the failures of a report in JUnit's form.

    A test that was interrupted stands there last, as if it had passed, and is left out.
    """
    cases = list(ET.parse(report).getroot().iter("testcase"))
    cases = cases[: len(cases) - interrupted]
    failures = {
        f"{case.get('classname')}::{case.get('name')}": first_line(child)
        for case in cases
        for child in case
        if child.tag in {"failure", "error"}
    }
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    passed = len(cases) - len(failures) - skipped
    return {
        "words": f"{passed} passed, {len(failures)} failed, {skipped} skipped",
        "passed": passed,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
        "seconds": round(sum(float(case.get("time", 0)) for case in cases), 1),
    }


def first_line(failure: ET.Element) -> str:
    """Return the first line of what pytest says about a failure."""
    return (failure.get("message") or failure.text or "").strip().split("\n")[0][:300]
