"""Build the site: ``python -m website`` gathers its pages, and Zensical makes it of them.

A page that is not there, a name without a reference, or a link to nothing ends the build.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from website.pages import gather

REPOSITORY = Path(__file__).parents[1]


def build(folder: Path) -> Path:
    """Build the site inside a folder, and return where it is."""
    gather(REPOSITORY, folder / "pages")
    for name in ("zensical.toml", "docstrings.py"):
        shutil.copyfile(REPOSITORY / "website" / name, folder / name)
    for name in ("style.css", "focus.js"):
        shutil.copyfile(REPOSITORY / "website" / name, folder / "pages" / name)
    command = ["zensical", "build", "--strict", "--clean", "-f", str(folder / "zensical.toml")]
    subprocess.run(command, check=True)
    return folder / "site"


def main() -> None:
    """Build the site, and say where it is."""
    parser = argparse.ArgumentParser(prog="python -m website", description=__doc__)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build")
    print(f"built {build(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
