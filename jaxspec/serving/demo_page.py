"""The page of the demonstration: plain and speculative answers of one seed, side by side, with each round's tree.

It comes from the package alone and loads nothing from elsewhere; text of the model is only ever set as text.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from typing import NamedTuple

from jaxspec.pages.markup import Content, Markup, element, joined
from jaxspec.pages.style import STYLE
from jaxspec.serving.api_request import ServedLimits

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy: script, style and answers come from this server, and nothing else comes at all."""
ARMS = (("plain", "Plain", "one token a call of the target"), ("speculative", "Speculative", "a tree of drafts a call"))


class PageFile(NamedTuple):
    """A file as it is sent."""

    content: bytes
    kind: str
    headers: Mapping[str, str]


def page_files(limits: ServedLimits, drafted: bool, keyed: bool) -> dict[str, PageFile]:
    """Returns the files of the page by their address; `drafted` says that there is a drafter, `keyed` a key."""
    here = importlib.resources.files("jaxspec.serving")
    headers = {"cache-control": "no-cache", "content-security-policy": POLICY}
    style = STYLE + here.joinpath("demo.css").read_text(encoding="utf-8")
    return {
        "/": PageFile(_page(limits, drafted, keyed).encode(), "text/html", headers),
        "/demo.css": PageFile(style.encode(), "text/css", headers),
        "/demo.js": PageFile(here.joinpath("demo.js").read_bytes(), "text/javascript", headers),
    }


def _page(limits: ServedLimits, drafted: bool, keyed: bool) -> str:
    title = f"jaxspec: {limits.model}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("link", rel="stylesheet", href="/demo.css"),
        element("title", title),
        element("script", src="/demo.js", defer=True),
    )
    arms = ARMS if drafted else ARMS[:1]
    main = element(
        "main",
        _form(limits, keyed),
        element("p", id="status", role="status", aria_live="polite"),
        element("div", *(_arm(*arm) for arm in arms), class_="arms"),
        id="main",
        data_model=limits.model,
    )
    lead = "The same prompt and seed, decoded plainly and with drafts. A round of drafting is one call of the target."
    if not drafted:
        lead = "Plain decoding: this server runs without a drafter, so there is nothing to compare."
    body = element(
        "body",
        element("a", "Skip to the answers", class_="skip", href="#main"),
        element("header", element("h1", title), element("p", lead)),
        main,
        element("footer", element("p", "For demonstration and evaluation, not for production.")),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _form(limits: ServedLimits, keyed: bool) -> Markup:
    most = min(limits.most_new, 128)
    prompt = element("textarea", "Why is the sky blue?", id="prompt", name="prompt", rows=3, required=True)
    fields = [
        _field("temperature", "Temperature", type="number", min=0, max=2, step="any", value=0),
        _field("most", "Most tokens", type="number", min=1, max=limits.most_new, step=1, value=most),
        _field("seed", "Seed", type="number", min=0, max=2**32 - 1, step=1, value=0),
    ]
    if keyed:
        fields.append(_field("key", "Key of the server", type="password", autocomplete="off"))
    buttons = element(
        "div",
        element("button", "Answer", id="start", type="submit"),
        element("button", "Stop", id="stop", type="button", disabled=True),
        class_="buttons",
    )
    label = element("label", "Prompt", for_="prompt")
    return element("form", label, prompt, element("div", *fields, class_="fields"), buttons, id="ask")


def _field(name: str, label: str, **attributes: Content) -> Markup:
    shown = element("input", id=name, name=name, **attributes)
    return element("div", element("label", label, for_=name), shown, class_="field")


def _arm(name: str, title: str, about: str) -> Markup:
    figures = [
        ("tokens", "tokens"),
        ("rounds", "rounds: calls of the target"),
        ("tau", "tau: tokens a round"),
        ("speed", "tokens/s in its rounds"),
    ]
    rows = [joined(element("dt", told), element("dd", "-", data_figure=key)) for key, told in figures]
    tree = element(
        "div",
        element("svg", role="img", class_="tree", aria_label="No round yet"),
        class_="scroll treebox",
        role="region",
        tabindex=0,
        aria_label="Tree of the last round",
    )
    drawn = (
        element("h3", "Tree of the last round"),
        tree,
        element(
            "p", "Filled squares and bold lines: accepted. Circles and dashed lines: drafted in vain.", class_="soft"
        ),
    )
    return element(
        "section",
        element("h2", title, id=f"{name}-title"),
        element("p", about, class_="soft"),
        element("dl", *rows),
        element("pre", class_="answer", tabindex=0, aria_label=f"{title} answer"),
        *(drawn if name == "speculative" else ()),
        id=name,
        aria_labelledby=f"{name}-title",
    )
