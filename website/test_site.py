"""The site as a reader sees it: in a browser, on a desk and on a phone, by day and by night."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from website.__main__ import REPOSITORY

PAGES = [
    page.parent.relative_to(REPOSITORY / "build/site").as_posix()
    for page in sorted((REPOSITORY / "build/site").rglob("index.html"))
]
RULES = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
    "rules": {"heading-order": {"enabled": True}, "page-has-heading-one": {"enabled": True}},
}
"""The guidelines for content that everybody can read, and the order of headings."""


CONTENT = {"exclude": [[".highlight"], ["details.mkdocstrings-source"]]}
"""What is looked at by them on all pages: not code, of which one page has every colour."""


class Screen(NamedTuple):
    """How a page is looked at."""

    width: int
    height: int
    scheme: str


DESK, PHONE = Screen(1280, 900, "light"), Screen(390, 844, "dark")
SCREENS = {"desk": DESK, "phone": PHONE}


class Visit(NamedTuple):
    """A page that is open, and what went wrong on it so far."""

    page: Page
    complaints: list[str]


@contextmanager
def visit(browser: Browser, address: str, screen: Screen, path: str) -> Iterator[Visit]:
    """Open a page of the site, where nothing but the site answers."""
    context = browser.new_context(
        viewport={"width": screen.width, "height": screen.height},
        color_scheme=screen.scheme,
        permissions=["clipboard-read", "clipboard-write"],
    )
    page, complaints = context.new_page(), []
    page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: sent.url.startswith(address) or complaints.append(sent.url))
    page.on("response", lambda got: got.status < 400 or complaints.append(got.url))
    page.goto(f"{address}/{path}".removesuffix("/.") + "/", wait_until="networkidle")
    yield Visit(page, complaints)
    context.close()


def test_there_are_pages():
    assert {".", "quick_start", "reference/steps", "changelog"} <= set(PAGES)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("path", PAGES)
def test_a_page(browser: Browser, address: str, path: str, screen: str) -> None:
    with visit(browser, address, SCREENS[screen], path) as (page, complaints):
        assert not complaints
        # Everybody can read it.
        content = None if path == "quick_start" else CONTENT
        broken = Axe().run(page, content, RULES).response["violations"]
        assert not broken, [(rule["id"], rule["nodes"][0]["html"]) for rule in broken]
        # No wider than the screen, and every image is there and described.
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= SCREENS[screen].width
        for image in page.locator("article img").all():
            assert image.evaluate("image => image.complete && image.naturalWidth > 0")
            assert len(image.get_attribute("alt") or "") > 4, image.get_attribute("src")
        # What the source says in Markdown or LaTeX is not shown as such.
        shown = page.locator("article").evaluate(WITHOUT_CODE)
        for mark in ("$$", "```", ".. math", "](", "\\frac"):
            assert mark not in shown


WITHOUT_CODE = """article => {
    const copy = article.cloneNode(true);
    copy.querySelectorAll("pre, code, annotation").forEach(code => code.remove());
    return copy.textContent;
}"""
"""The words of an article."""


def test_search_leads_to_the_reference(browser: Browser, address: str) -> None:
    with visit(browser, address, DESK, "quick_start") as (page, complaints):
        page.keyboard.press("Control+k")
        page.keyboard.type("newton_step_and_info")
        # The results are out of reach for others' scripts: go to the first as soon as it is there.
        for _ in range(60):
            page.wait_for_timeout(500)
            page.keyboard.press("Enter")
            if "/reference/steps/" in page.url:
                break
        assert "/reference/steps/?h=newton_step_and_info#ddnewton.newton_step" in page.url
        assert not complaints


@pytest.mark.parametrize("path", ["quick_start", "gotchas"])
def test_what_is_typed_is_copied(browser: Browser, address: str, path: str) -> None:
    with visit(browser, address, DESK, path) as (page, _):
        sessions = page.locator(".language-pycon")
        for session in sessions.all()[:5]:
            shown = session.inner_text()
            session.hover()
            session.locator("button").first.click()
            copied: Any = page.evaluate("navigator.clipboard.readText()")
            # The lines behind a prompt, and they alone.
            prompts = (line.strip()[:4] for line in shown.splitlines())
            typed = [prompt for prompt in prompts if prompt in {">>>", ">>> ", "...", "... "}]
            assert len([line for line in copied.splitlines() if line]) <= len(typed)
            compile(copied, path, "exec")


def test_the_switch_of_colours(browser: Browser, address: str) -> None:
    def colour(page: Page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    with visit(browser, address, DESK, ".") as (page, complaints):
        by_day = colour(page)
        page.locator("label[title='Switch to light mode']").click()
        page.locator("label[title='Switch to dark mode']").click()
        assert colour(page) != by_day
        assert not complaints


def test_a_reference_is_of_a_function_where_a_module_has_its_name(site: Path) -> None:
    pages = [page.read_text() for page in (site / "reference").glob("*/index.html")]
    assert len(pages) == 10
    assert not any("doc-module" in page for page in pages)


def test_pages_are_the_repository_s(site: Path) -> None:
    notebooks = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    assert [site / "notebooks" / file.stem for file in notebooks] == sorted(
        folder for folder in (site / "notebooks").iterdir() if folder.is_dir()
    )
