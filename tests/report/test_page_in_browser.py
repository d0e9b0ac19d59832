"""The page in a real browser: nothing fetched, nothing broken, nothing out of reach."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from dvla_fast.cli import main
from tests.engine.runs import write_evaluation
from tests.report.browser import Browser

# Loads every picture, then names each svg and img that shows nothing.
_UNDRAWN = """
(async () => {
  document.querySelectorAll("details").forEach(item => { item.open = true; });
  await Promise.allSettled([...document.images].map(image => image.decode()));
  const bad = [...document.images].filter(image => !image.naturalWidth).map(image => image.alt);
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    const inside = [...svg.querySelectorAll("path, circle, rect")];
    const drawn = inside.some(item => item.getBoundingClientRect().width > 0);
    const broken = /NaN|undefined|Infinity/.test(svg.innerHTML);
    if (box.width < 100 || box.height < 60 || !drawn || broken) bad.push(svg.ariaLabel);
  }
  return bad;
})()
"""
_INVISIBLE = """
[...document.querySelectorAll("svg .line, svg .dot, svg .points, svg text")].filter(item => {
  const style = getComputedStyle(item);
  const paint = item.matches(".dot, text") ? style.fill : style.stroke;
  return paint === "none" || paint === "rgb(0, 0, 0)";
}).length
"""
_FOCUS = "document.activeElement.id || document.activeElement.textContent.trim()"


@pytest.fixture(scope="module")
def html(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything: a whole run, and two evaluations that are compared."""
    folder = tmp_path_factory.mktemp("report")
    one = write_evaluation(folder / "mini", 0.7, dataset="miniImageNet")
    two = write_evaluation(folder / "other", 0.6, dataset="miniImageNet")
    path = folder / "report.html"
    assert main(["report", str(demo), str(one), str(two), f"--output={path}"]) == 0
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everything_is_drawn_and_nothing_fetched(
    browser: Browser, html: Path, width: int, dark: bool
) -> None:
    browser.open(html, width, dark=dark)
    assert browser.evaluate("document.querySelectorAll('figure svg').length") > 20
    assert browser.evaluate("document.images.length") > 60
    assert browser.evaluate(_UNDRAWN) == []
    assert browser.evaluate(_INVISIBLE) == 0  # every mark has a colour of the page's own
    root = "document.documentElement"
    assert browser.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
    foreign = [url for url in browser.requests if not url.startswith(("file:", "data:"))]
    assert foreign == []
    assert [url for url in browser.requests if url.startswith("file:")] == [html.as_uri()]
    assert browser.console == []


def test_the_content_policy_holds(browser: Browser, html: Path, tmp_path: Path) -> None:
    """The checks above can fail: a page that asks for a picture elsewhere is caught."""
    broken = tmp_path / "broken.html"
    text = html.read_text(encoding="utf-8")
    broken.write_text(text.replace("<main", '<img src="http://localhost:9/x.png"><main'), "utf-8")
    browser.open(broken)
    assert browser.evaluate(_UNDRAWN) != []
    assert any("Content Security Policy" in message for message in browser.console)


def test_theme_follows_the_system_and_the_button(browser: Browser, html: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(html)
    browser.evaluate("localStorage.clear()")
    browser.open(html)
    light = browser.evaluate(paper)
    browser.open(html, dark=True)
    dark = browser.evaluate(paper)
    assert light != dark
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(paper) == light
    browser.open(html, dark=True)  # the choice is kept
    assert browser.evaluate(paper) == light
    browser.evaluate("localStorage.clear()")


def test_keyboard(browser: Browser, html: Path) -> None:
    """Skip link first, then the sections, then the button; details open with Enter."""
    browser.open(html)
    browser.press("Tab")
    assert browser.evaluate(_FOCUS) == "Skip to the content"
    assert browser.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    browser.press("Enter")
    assert browser.evaluate("location.hash") == "#main"
    browser.open(html)
    seen = []
    for _ in range(11):
        browser.press("Tab")
        seen.append(browser.evaluate(_FOCUS))
    sections = browser.evaluate("[...document.querySelectorAll('nav a')].map(a => a.textContent)")
    assert seen == ["Skip to the content", *sections, "theme"]
    outline = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # one sees where one is
    before = browser.evaluate("document.documentElement.dataset.theme || 'light'")
    browser.press("Enter")
    assert browser.evaluate("document.documentElement.dataset.theme") != before
    browser.evaluate("document.querySelector('details.look:not([open]) summary').focus()")
    browser.evaluate("window.kept = document.activeElement.parentElement")
    browser.press("Enter")
    assert browser.evaluate("window.kept.open") is True
    browser.evaluate("localStorage.clear()")


def test_words_for_those_who_cannot_see(browser: Browser, html: Path) -> None:
    browser.open(html)
    assert browser.evaluate("document.documentElement.lang") == "en"
    nameless = browser.evaluate(
        "[...document.querySelectorAll('svg')].filter(s => !s.getAttribute('aria-label')).length"
    )
    assert nameless == 0
    assert browser.evaluate("[...document.images].filter(i => !i.hasAttribute('alt')).length") == 0
    levels = browser.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4,h5')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(item => item.id)")
    assert len(ids) == len(set(ids))
    links = json.loads(
        browser.evaluate("JSON.stringify([...document.querySelectorAll('nav a')].map(a => a.hash))")
    )
    assert {link[1:] for link in links} <= set(ids)
