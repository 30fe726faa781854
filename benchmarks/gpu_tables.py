"""What a GPU run has measured, as a table that is read and a file that is computed with."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks import step_tables
from benchmarks.step_tables import Record, cell

EXPLANATION = """\
Each cell: median seconds, peak extra memory, relative distance from the answer of `jacrev` in
float64, which has none itself. Memory is what torch allocates above what it holds before the first
run; on a CPU, what the process takes. A peer is made once, outside of the time; `ddnewton` has
found the model's layers before (`prepare`), `ddnewton-unprepared` finds them in every call. Plain
float32 is as torch ships it: convolutions may round to TF32.
"""
HEADINGS = {"top10": "top 10", "all": "all directions"}


def driver() -> str:
    """Return the version of NVIDIA's driver, where its tool is there to tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return told[0] if told else "unknown: nvidia-smi said nothing"


def machine(device: str) -> Record:
    """Return what a time and a digit depend on."""
    about = step_tables.machine(device, torch.get_num_threads())
    about |= {
        "CUDA": torch.version.cuda,
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "TF32 in matmul": torch.backends.cuda.matmul.allow_tf32,
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "driver": driver(),
            "cuDNN": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "GPU memory": f"{properties.total_memory / 2**30:.0f} GiB",
        }
    return about


def details(problem: str, samples: int, records: list[Record]) -> list[str]:
    """Return the table of one problem: a row a peer, a column a precision and quantity."""
    cells = {(r["peer"], r["precision"], r["quantity"]): r for r in records}
    columns = list(dict.fromkeys((r["precision"], r["quantity"]) for r in records))
    heads = [f"{precision}: {HEADINGS[quantity]}" for precision, quantity in columns]
    lines = [f"### {problem}, N = {samples}", ""]
    lines += [f"| peer | {' | '.join(heads)} |", f"|---|{'---|' * len(columns)}"]
    for peer in dict.fromkeys(r["peer"] for r in records):
        row = [cell(cells.get((peer, *column))) for column in columns]
        lines.append(f"| {peer} | {' | '.join(row)} |")
    return [*lines, ""]


def about_tests(tests: Record) -> list[str]:
    """Return what became of the tests."""
    lines = ["## Tests", "", ", ".join(filter(None, [tests["words"], tests.get("cut off")])), ""]
    lines += [f"- `{name}`: {message}" for name, message in tests.get("failures", {}).items()]
    lines += [f"    {line}" for line in tests.get("tail", ())]
    return [*lines, ""]


def write(folder: Path, about: Record, tests: Record, records: list[Record]) -> None:
    """Write ``gpu.md`` and ``gpu.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# On a GPU" if about["device"] == "cuda" else "# On a CPU, to see that it works", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "unpacked"]
    lines += ["", *about_tests(tests), "## Steps", "", EXPLANATION]
    problems: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        problems.setdefault((record["problem"], record["samples"]), []).append(record)
    for (problem, samples), measurements in problems.items():
        lines += details(problem, samples, measurements)
    (folder / "gpu.md").write_text("\n".join(lines), encoding="utf-8")
    everything = {"machine": about, "tests": tests, "records": records}
    (folder / "gpu.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
