"""The processes of the GPU benchmark, one after another: each has its share of the time left."""

from __future__ import annotations

import importlib.machinery
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_plan import PEERS, SECTIONS, TIME_WAS_UP, Task, planned, recorded, shared
from benchmarks.gpu_tests import ENDING, run_tests
from benchmarks.processes import ROOT, say
from benchmarks.step_tables import Record

STARTING = 8.0
"""Seconds below which no process is started: an import of torch takes as long."""
COMPILED = "ddnewton-compiled"


class Setting(NamedTuple):
    """What all processes share; the last section may have seconds of its own."""

    folder: Path
    device: str
    quick: bool
    deadline: float
    environment: dict[str, str]
    tests: list[str]
    poisson: float | None

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return max(self.deadline - time.monotonic(), 0.0)


def environment(target: Path) -> dict[str, str]:
    """Return the variables of a process that imports this repository and the unpacked wheels."""
    paths = [ROOT / "src", ROOT, target]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    joined = os.pathsep.join([*map(str, paths), *filter(None, inherited)])
    return os.environ | {"PYTHONPATH": joined}


def is_installed(task: Task, setting: Setting) -> bool:
    """Return whether the package that a peer needs can be imported by its process."""
    package = None if task.peer is None else PEERS[task.peer].package
    if package is None:
        return True
    paths = [*setting.environment["PYTHONPATH"].split(os.pathsep), *sys.path]
    return importlib.machinery.PathFinder.find_spec(package, paths) is not None


def limit_of(setting: Setting, task: Task, tasks: list[Task]) -> float:
    """Return the seconds of a task: by its share in those that are left to it and later ones."""
    promised = setting.poisson or 0.0
    if task.section == "poisson" and promised:
        return promised
    shares = {
        t: SECTIONS[t.section] if t.peer is None else PEERS[t.peer].share
        for t in tasks
        if t.section != "poisson" or not promised
    }
    last = any(t.section == "poisson" for t in tasks)
    return shared(max(setting.left() - last * promised, 0.0), shares, task)


def started(setting: Setting, task: Task) -> subprocess.Popen[str] | None:
    """Start a process, which imports and then waits for a word; none if it is too late."""
    if setting.left() < STARTING:
        return None
    command = [sys.executable, "-m", "benchmarks.gpu_process", task.section, str(setting.folder)]
    command += ["--device", setting.device]
    command += [] if task.peer is None else ["--peer", task.peer]
    command += ["--quick"] if setting.quick else []
    with (setting.folder / f"{task.name}.err").open("w", encoding="utf-8") as errors:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=setting.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
            start_new_session=True,
        )


def let_go(process: subprocess.Popen[str], limit: float) -> None:
    """Tell a waiting process until when it may measure."""
    assert process.stdin is not None
    try:
        process.stdin.write(f"{time.monotonic() + limit}\n")
        process.stdin.close()
    except BrokenPipeError:  # it failed before, and has said how
        pass


def stop(process: subprocess.Popen[str]) -> None:
    """End a process that was started here, and those that compile for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ended(setting: Setting, task: Task, process: subprocess.Popen[str], limit: float) -> str:
    """Let a process measure for so many seconds; return in words how it ended."""
    let_go(process, limit)
    try:
        process.wait(None if math.isinf(limit) else limit)
    except subprocess.TimeoutExpired:
        stop(process)
        return TIME_WAS_UP
    if process.returncode == 0:
        return "ok"
    errors = (setting.folder / f"{task.name}.err").read_text(encoding="utf-8").strip().splitlines()
    last = (errors or [f"ended with {process.returncode}"])[-1]
    return f"failed: {last[:100]}".replace("|", "/")


def left_by(setting: Setting, task: Task, status: str) -> list[Record]:
    """Return what a process has left, then what it has not come to."""
    file = setting.folder / f"{task.name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    if task.peer is None:
        return records if status == "ok" else [*records, {"status": status}]
    entries = planned(task.peer, setting.device, quick=setting.quick)[len(records) :]
    return records + [recorded(entry, task.peer, {"status": status}) for entry in entries]


def tested(setting: Setting, tasks: list[Task]) -> Record:
    """Run the tests, and compile beside them what is measured after."""
    if setting.left() < STARTING:
        return {"words": TIME_WAS_UP}
    limit = limit_of(setting, Task("tests"), tasks)
    compiling = Task("steps", COMPILED)
    folder = setting.folder / "compiled"
    folder.mkdir()
    process = None
    if compiling in tasks and setting.device == "cuda":
        process = started(setting._replace(folder=folder), compiling)
    try:
        if process is not None:
            let_go(process, limit)
        return run_tests(
            setting.tests,
            setting.device,
            max(limit - ENDING, 0.0),
            setting.folder,
            setting.environment,
        )
    finally:
        if process is not None:
            stop(process)


def measured(setting: Setting, tasks: list[Task]) -> Iterator[tuple[Task, list[Record]]]:
    """Run one process after another; yield the records of each."""
    processes: dict[Task, subprocess.Popen[str] | None] = {}
    runnable = [t for t in tasks if t.section != "tests" and is_installed(t, setting)]
    try:
        for task in tasks:
            began = time.monotonic()
            status = "not installed"
            if task.section == "tests":
                records = [tested(setting, tasks)]
                status = records[0]["words"]
            elif task in runnable:
                # The next one imports while the present one measures.
                place = runnable.index(task)
                for following in runnable[place : place + 2]:
                    if following not in processes:
                        processes[following] = started(setting, following)
                process, limit = processes[task], limit_of(setting, task, tasks)
                status = TIME_WAS_UP if process is None else ended(setting, task, process, limit)
                records = left_by(setting, task, status)
            else:
                records = left_by(setting, task, status)
            say(f"{task.name}: {status}, {time.monotonic() - began:.1f} s")
            yield task, records
    finally:
        for process in processes.values():
            if process is not None:
                stop(process)
