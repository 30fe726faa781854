"""Which pages the site has, and where links between files of the repository lead on it.

Pages are written to be read in the repository too: their links are paths from file to file. Here
each file has its page. A notebook is rendered as it is stored, a source that a page points to is
shown as code, and a link to what is no page is an error.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from functools import partial
from pathlib import Path, PurePosixPath

from website.notebook_pages import notebook_page

LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
"""What a Markdown link leads to, up to the place on the page."""

WRITTEN = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages that stand in the repository's root, as its readers expect."""


def page_of(path: str) -> str:
    """Return the page of a file or folder of the repository.

    >>> page_of("docs/training.md"), page_of("notebooks/01_steps.ipynb"), page_of("CHANGELOG.md")
    ('training.md', 'notebooks/01_steps.md', 'changelog.md')
    >>> page_of("src/ddnewton/newton.py"), page_of("src/ddnewton/iterative")
    ('source/ddnewton/newton.md', 'source/ddnewton/iterative/index.md')
    """
    if path in WRITTEN:
        return WRITTEN[path]
    folder, _, inside = path.partition("/")
    if folder == "docs":
        return inside
    if folder == "notebooks" and path.endswith(".ipynb"):
        return str(PurePosixPath(path).with_suffix(".md"))
    if folder in {"src", "examples"}:
        place = inside if folder == "src" else path
        return f"source/{place.removesuffix('.py')}" + (
            ".md" if path.endswith(".py") else "/index.md"
        )
    raise ValueError(f"a page links to {path}, which is no page of the site")


def with_links(text: str, *, path: str, page: str, repository: Path, targets: set[str]) -> str:
    """Return the text of a page with links from page to page, code as it is.

    ``path`` is the page's file in the repository. The files that it leads to are added to
    ``targets``.
    """

    def led(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:", match[1]):
            return match[1]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))
        if not (repository / file).exists():
            raise ValueError(f"{path} links to {match[1]}, which is not in the repository")
        targets.add(file)
        return posixpath.relpath(page_of(file), posixpath.dirname(page) or ".")

    lines, fenced = [], False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        lines.append(line if fenced or line.startswith("    ") else LINK.sub(led, line))
    return "\n".join(lines) + "\n"


def with_prompts(text: str) -> str:
    r"""Return a page whose blocks with prompts are sessions, of which only what is typed is copied.

    >>> with_prompts("```python\n>>> 1 + 1\n2\n```")
    '```pycon\n>>> 1 + 1\n2\n```'
    """
    return re.sub(r"^```python\n(?=>>> )", "```pycon\n", text, flags=re.MULTILINE)


def source_page(folder: Path, path: str) -> str:
    """Return the page of a source file, or of all files of a folder, as code."""
    place = folder / path
    files = sorted(place.glob("*.py")) if place.is_dir() else [place]
    parts = [f"# `{path}`"]
    for file in files:
        if place.is_dir():
            parts.append(f"## `{file.name}`")
        parts.append(f"~~~~python\n{file.read_text().rstrip()}\n~~~~")
    return "\n\n".join(parts) + "\n"


def gather(repository: Path, into: Path) -> None:
    """Write the pages of a checkout, and the images on them, into a folder that is made anew."""
    shutil.rmtree(into, ignore_errors=True)
    docs = [file for file in sorted((repository / "docs").rglob("*")) if file.is_file()]
    files = [file.relative_to(repository).as_posix() for file in docs]
    files += [*WRITTEN, *(f"notebooks/{file.name}" for file in notebooks(repository))]
    sources: set[str] = set()
    for path in files:
        page = page_of(path)
        written = into / page
        written.parent.mkdir(parents=True, exist_ok=True)
        # What is no page is on one: an image.
        if not path.endswith((".md", ".ipynb")):
            shutil.copyfile(repository / path, written)
            continue
        linked = partial(with_links, path=path, page=page, repository=repository, targets=sources)
        if path.endswith(".md"):
            written.write_text(linked(with_prompts((repository / path).read_text())))
            continue
        # A notebook, and the images of its outputs.
        text, images = notebook_page(repository / path, linked)
        written.write_text(text)
        for name, image in images.items():
            (written.parent / name).write_bytes(image)
    # The sources that pages point to.
    for path in sorted(file for file in sources if file.startswith(("src/", "examples"))):
        written = into / page_of(path)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(source_page(repository, path))


def notebooks(repository: Path) -> list[Path]:
    """Return the notebooks of a checkout in order."""
    return sorted((repository / "notebooks").glob("*.ipynb"))
