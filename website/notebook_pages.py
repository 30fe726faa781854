"""Notebooks as pages, with the outputs that are stored in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter


def notebook_page(file: Path, linked: Callable[[str], str]) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its images by name, each told apart by the file's name.

    ``linked`` gives the text of a cell its links. An image is described by the heading that it
    stands under.
    """
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source)
    names = {"unique_key": file.stem, "output_files_dir": ""}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=names)
    # Describe the images.
    lines, heading, fenced = [], "", False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        lines.append(re.sub(r"^!\[png\]", f"![{heading}]", line))
    return "\n".join(lines) + "\n", resources["outputs"]
