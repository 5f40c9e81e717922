"""The frame of every page: one self-contained HTML file, without scripts, that fetches nothing."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from foveate.report.style import CSS


def document(title: str, kicker: str, said: str, body: str, foot: str = "Made by foveate.") -> str:
    """A page as one string.

    Args:
        title: in the browser's tab and as the heading.
        kicker: the small line above the heading.
        said: a sentence below it, without its full stop.
        body: HTML.
        foot: a sentence at the end.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - foveate</title><style>{CSS}</style></head><body><main>"
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1><p class="sub">{escape(said)}.</p>'
        f"</header>{body}<footer><p>{escape(foot)}</p></footer></main></body></html>\n"
    )


def card(value: str, unit: str, text: str) -> str:
    """A figure in large type, its unit, and what it is."""
    return f'<div class="card"><b>{escape(value)} <small>{escape(unit)}</small></b><span>{escape(text)}</span></div>'


def cards(each: Iterable[str]) -> str:
    """Cards beside each other."""
    return f'<div class="cards">{"".join(each)}</div>'


def section(heading: str, text: str, body: str) -> str:
    """A section with a heading, a paragraph, and HTML below it."""
    return f'<section><h2>{escape(heading)}</h2><p class="soft">{escape(text)}</p>{body}</section>'


def listed(sentences: Iterable[str]) -> str:
    """Sentences as a list."""
    return f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in sentences)}</ul>"
