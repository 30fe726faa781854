"""What a GPU run has measured, as tables that are read and a file that is computed with."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import step_tables
from benchmarks.step_tables import Record, cell, seconds

Sections = dict[str, list[Record]]

EXPLANATION = """\
Each cell: median seconds, peak extra memory, relative distance from the answer of `jacrev` in
float64, which has none itself. Memory is what torch allocates above what it holds before the first
run; on a CPU, what the process takes. A peer is made once, outside of the time; `ddnewton` has
found the model's layers before (`prepare`), `ddnewton-unprepared` finds them in every call,
`ddnewton-compiled` is under `torch.compile`, `ddnewton-graphs` in its mode "reduce-overhead". Plain
float32 is as torch ships it: convolutions may round to TF32. `floor` is a bound: forward pass,
pullback, the fewest flops of the Gram matrix at the rate of a large matrix product of this device
without TF32, the eigensolver in float64, one pullback.
"""
HEADINGS = {"top10": "top 10", "all": "all directions"}
RATIOS = {
    "ViViT / ours": ("vivit", "ddnewton"),
    "jacrev / ours": ("jacrev", "ddnewton"),
    "nngeometry / ours": ("nngeometry", "ddnewton"),
    "curvlinops / ours": ("curvlinops", "ddnewton"),
    "un-prepared / ours": ("ddnewton-unprepared", "ddnewton"),
    "ours / floor": ("ddnewton", "floor"),
    "compiled / floor": ("ddnewton-compiled", "floor"),
    "graphs / floor": ("ddnewton-graphs", "floor"),
}
"""Of seconds in plain float32."""
COUNTS = ("copies to the host", "waits for a stream", "launches", "graphs", "kernels")


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


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def about_tests(records: list[Record]) -> list[str]:
    """Return what became of the tests."""
    (tests,) = records
    lines = [", ".join(filter(None, [tests["words"], tests.get("cut off")])), ""]
    lines += [f"- `{name}`: {message}" for name, message in tests.get("failures", {}).items()]
    lines += [f"    {line}" for line in tests.get("tail", ())]
    return [*lines, ""]


def by_problem(records: list[Record]) -> dict[str, list[Record]]:
    """Return the records of every problem and number of samples."""
    problems: dict[str, list[Record]] = {}
    for record in records:
        problems.setdefault(f"{record['problem']}, N = {record['samples']}", []).append(record)
    return problems


def steps(records: list[Record]) -> list[str]:
    """Return a table of ratios, then one for every problem: a row a peer."""
    lines = [EXPLANATION]
    rates = next((record["rates"] for record in records if "rates" in record), {})
    told = [f"{name} {flops / 1e12:.3g} TFLOP/s" for name, flops in rates.items()]
    lines += [f"Matrix products: {', '.join(told)}.", ""] if told else []
    rows = [
        [
            problem,
            HEADINGS[quantity],
            *(ratio(measured, quantity, *pair) for pair in RATIOS.values()),
        ]
        for problem, measured in by_problem(records).items()
        for quantity in HEADINGS
    ]
    lines += table(["problem", "step", *RATIOS], rows)
    for problem, measured in by_problem(records).items():
        cells = {(r["peer"], r["precision"], r["quantity"]): r for r in measured}
        columns = list(dict.fromkeys((r["precision"], r["quantity"]) for r in measured))
        heads = [f"{precision}: {HEADINGS[quantity]}" for precision, quantity in columns]
        peers = dict.fromkeys(r["peer"] for r in measured)
        rows = [[peer, *(cell(cells.get((peer, *column))) for column in columns)] for peer in peers]
        lines += [f"### {problem}", "", *table(["peer", *heads], rows)]
    return lines


def ratio(records: list[Record], quantity: str, one: str, other: str) -> str:
    """Return how many times the seconds of another peer one takes."""
    times = {
        r["peer"]: r["seconds"]
        for r in records
        if (r["status"], r["precision"], r["quantity"]) == ("ok", "float32", quantity)
    }
    return f"{times[one] / times[other]:.3g}" if one in times and other in times else "–"


def syncs(records: list[Record]) -> list[str]:
    """Return a row a step: its time, what it waits for, and where."""
    rows = []
    for record in records:
        begins = [record["problem"], record["samples"], record["way"], record["name"]]
        if record["status"] != "ok":
            rows.append([*begins, record["status"], *["–"] * (3 + len(COUNTS))])
            continue
        profile = record["profile"]
        counts = [profile[words] for words in COUNTS]
        places = ", ".join(f"{count} × `{place}`" for place, count in record["places"].items())
        times = [seconds(record["seconds"]), seconds(profile["device seconds"])]
        rows.append([*begins, *times, record["waits"], *counts, places])
    columns = ["problem", "N", "way", "step", "time", "device busy", "waits", *COUNTS, "where"]
    words = "Waits are those that torch warns of; on a CPU, values that are read on the host. The "
    words += "profiler counts every copy to the host, of results too."
    return [words, "", *table(columns, rows)]


def accuracy(records: list[Record]) -> list[str]:
    """Return a row a net, options and TF32; a column a damping."""
    dampings = records[0]["dampings"]
    rows = [
        [
            *(record[name] for name in ("net", "directions", "way")),
            "allowed" if record["TF32"] else "no",
            *([f"{e:.1e}" for e in record.get("errors", ())] or [record["status"]]),
        ]
        for record in records
    ]
    columns = ["net", "directions", "way", "TF32", *(f"δ = {delta:g}" for delta in dampings)]
    return ["Float32 steps, relative to dense steps in float64.", "", *table(columns, rows)]


def ratios(records: list[Record]) -> list[str]:
    """Return a row a net: seconds, and how many gradient steps each takes."""
    names = next((list(r["ratios"]) for r in records if r["status"] == "ok"), [])
    rows = [
        [
            f"{record['net']}, N = {record['samples']}",
            *(
                f"{seconds(record['seconds'][name])}, {record['ratios'][name]:.2f}"
                if record["status"] == "ok"
                else record["status"]
                for name in names
            ),
        ]
        for record in records
    ]
    words = "Median seconds, and the median of ratios to the gradient step."
    return [words, "", *table(["net", *names], rows)]


def largest(records: list[Record]) -> list[str]:
    """Return a row a problem and peer: what was run, and where the peaks lead."""
    rows = [
        [
            record["problem"],
            record["peer"],
            record.get("samples", "–"),
            f"{(record.get('peak') or 0) / 2**30:.2f} GiB",
            seconds(record.get("seconds") or 0.0),
            record.get("meets", "–"),
            record.get("note", record["status"]),
        ]
        for record in records
    ]
    columns = ["problem", "peer", "N that was run", "its peak", "its seconds", "4 GiB at N", "note"]
    return table(columns, rows)


def poisson(records: list[Record]) -> list[str]:
    """Return the curve: a row a measurement."""
    rows = [
        [
            record["problem"],
            seconds(record["seconds"]),
            record["updates"],
            f"{record['error']:.2e}",
            f"{record['loss']:.2e}",
        ]
        for record in records
        if record["status"] == "ok"
    ]
    columns = ["problem", "training", "updates", "root mean square error", "loss"]
    words = "`poisson-5d` is 5-64-64-48-48-1 on 3000 + 500 new points an update, in float64."
    return [words, "", *table(columns, rows)]


TITLES = {
    "tests": ("Tests", about_tests),
    "steps": ("Steps", steps),
    "syncs": ("Where a step waits", syncs),
    "accuracy": ("Accuracy", accuracy),
    "ratios": ("Monte-Carlo steps in gradient steps", ratios),
    "largest": ("Largest N whose top-10 step fits in 4 GiB", largest),
    "poisson": ("Poisson's equation on new points", poisson),
}


def write(folder: Path, about: Record, sections: Sections) -> None:
    """Write ``gpu.md`` and ``gpu.json``; how a section's process ended badly is its last record."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = {"machine": about} | sections
    (folder / "gpu.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    lines = ["# On a GPU" if about["device"] == "cuda" else "# On a CPU, to see that it works", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "unpacked"]
    for section, records in sections.items():
        title, words = TITLES[section]
        ends = [r["status"] for r in records if set(r) == {"status"}]
        measured = [r for r in records if set(r) != {"status"}]
        lines += ["", f"## {title}", "", *(words(measured) if measured else ()), *ends]
    (folder / "gpu.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
