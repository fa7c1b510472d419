"""Answers coloured by round: a span a piece of text, two tints in turn, and a slider that shows them round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxspec.data.chat import ChatTokenizer
from jaxspec.evaluation.rows import Row
from jaxspec.pages.markup import Markup, element, joined
from jaxspec.pages.page import DataTable, folded, paragraph, table
from jaxspec.report.pieces import BONUS, PREFILL, ColouredPiece, pieces_of, rejected_texts
from jaxspec.report.wording import at_temperature, counted, spoken

STYLE = """
:root { --even: #d6e8fb; --odd: #fde3c8; }
@media (prefers-color-scheme: dark) { :root { --even: #17395e; --odd: #5a3413; } }
.side { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.side > * { min-width: 0; }
.side table { min-width: min(100%, 17rem); }
.coloured { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .7rem; margin: .4rem 0; line-height: 1.9; max-width: 60rem; max-height: 32rem;
  overflow-y: auto; }
.coloured span, .keys span { padding: .12em 0; }
.coloured .even, .keys .even { background: var(--even); }
.coloured .odd, .keys .odd { background: var(--odd); }
.coloured .begins, .keys .begins { margin-left: 2px; }
.coloured .bonus, .keys .bonus { text-decoration: underline; text-decoration-thickness: 1.5px;
  text-underline-offset: 3px; }
.coloured .prefill, .keys .prefill { outline: 2px solid var(--ink); outline-offset: -1px; padding: .12em 2px; }
.coloured .later { visibility: hidden; }
.coloured .rejected { display: none; }
.coloured.drafts .rejected { display: inline; text-decoration: line-through; color: var(--soft); padding: .12em 0; }
.keys .rejected { text-decoration: line-through; color: var(--soft); }
.keys { font-size: .9rem; line-height: 1.9; }
.keys span { padding: .12em .3em; }
.slider { display: flex; flex-wrap: wrap; gap: .3rem .7rem; align-items: center; font-size: .9rem; margin: .4rem 0; }
.slider[hidden] { display: none; }
.slider input[type=range] { flex: 1 1 12rem; min-width: 0; max-width: 30rem; accent-color: var(--link);
  height: 1.6rem; }
@media print { .slider { display: none; } .coloured { max-height: none; overflow: visible; }
  .coloured .later { visibility: visible; } .coloured span, .keys span { print-color-adjust: exact;
  -webkit-print-color-adjust: exact; } }
"""
SCRIPT = """
"use strict";
for (const slider of document.querySelectorAll(".slider")) {
  const input = slider.querySelector("[type=range]"), told = slider.querySelector("output");
  const text = document.getElementById(slider.dataset.of);
  const spans = Array.from(text.querySelectorAll("[data-round]")), drafts = slider.querySelector("[type=checkbox]");
  const show = () => {
    const upTo = Number(input.value);
    let tokens = 0, accepted = 0;
    for (const span of spans) {
      const later = Number(span.dataset.round) > upTo;
      span.classList.toggle("later", later);
      tokens += later ? 0 : Number(span.dataset.tokens);
      accepted += Number(span.dataset.round) === upTo ? Number(span.dataset.drafted) : 0;
    }
    const now = upTo === 0 ? "prefill" : "round " + upTo + " of " + input.max + ": " + accepted + " drafted accepted";
    told.textContent = now + ", " + tokens + " tokens so far";
    input.setAttribute("aria-valuetext", told.textContent);
  };
  input.addEventListener("input", show);
  if (drafts) drafts.addEventListener("change", () => text.classList.toggle("drafts", drafts.checked));
  slider.hidden = false;
  show();
}
"""


def coloured_answers(rows: Sequence[Row], tokenizer: ChatTokenizer, method: str) -> Markup:
    """Returns the texts of a method's answers, with what their colours and lines mean.

    Raises ValueError as `pieces_of` does.
    """
    found = [
        _answer(number, row, (pieces_of(row, tokenizer), rejected_texts(row, tokenizer)), method)
        for number, row in enumerate(rows, 1)
    ]
    return joined(_keys(any(row.rejected for row in rows)), *found)


def _keys(with_rejected: bool) -> Markup:
    rejected = [" ", element("del", "rejected draft", class_="rejected")] if with_rejected else []
    return paragraph(
        element(
            "span",
            element("span", "prefill token", class_="even prefill"),
            " ",
            element("span", "drafted and accepted", class_="odd begins"),
            element("span", "bonus token", class_="odd bonus"),
            " ",
            element("span", "the next round", class_="even begins"),
            *rejected,
            class_="keys",
        ),
        " A round ends with its bonus token, and tints take turns. A pointer on a text tells its round and depth.",
    )


Shown = tuple[Sequence[ColouredPiece], Mapping[int, str]]
"""An answer's pieces, and the text of the drafts that each round rejected."""


def _answer(number: int, row: Row, shown: Shown, method: str) -> Markup:
    tau = sum(row.emitted) / row.calls if row.calls else 1.0
    told = f"{counted(row.length, 'token')} in {counted(row.calls, 'round')}, tau {tau:.2f}"
    name = f"{spoken(row.task)}, question {row.id}" + (f", turn {row.turn + 1}" if row.turn else "")
    anchor = f"text-{number}"
    words = element("div", *_spans(*shown), id=anchor, class_="coloured", tabindex=0, role="region", aria_label=name)
    columns = ["round", "accepted", "tokens", "text", *(["rejected drafts"] if row.rejected else [])]
    lines = [line[: len(columns)] for line in _by_round(row, *shown)]
    return joined(
        element("h3", name),
        paragraph(f"{method}, {at_temperature(row.temperature)}: {told}.", soft=True),
        _slider(anchor, row.calls, bool(shown[1])),
        words,
        folded("Round by round", table(DataTable(f"Rounds of {name}", columns, lines))),
    )


def _spans(pieces: Sequence[ColouredPiece], rejected: Mapping[int, str]) -> list[Markup]:
    found, before, left = [], -1, dict(rejected)
    for piece in pieces:
        last = piece.last
        # Drafts were rejected where the round's bonus token stands; a cut round has none, and its drafts end it.
        for number in [n for n in left if n < last.round or (n == last.round and last.kind == BONUS)]:
            found.append(_rejected(number, left.pop(number)))
        classes = ["odd" if last.round % 2 else "even"]
        classes += [last.kind] if last.kind in (PREFILL, BONUS) else []
        classes += ["begins"] if last.round != before and last.round else []
        before = last.round
        found.append(
            element(
                "span",
                piece.text,
                class_=" ".join(classes),
                title=piece.told,
                data_round=last.round,
                data_tokens=len(piece.tokens),
                data_drafted=sum(token.round == last.round and token.depth > 0 for token in piece.tokens),
            )
        )
    return found + [_rejected(number, text) for number, text in left.items()]


def _rejected(number: int, text: str) -> Markup:
    drafted = {"data_round": number, "data_tokens": 0, "data_drafted": 0}
    return element("del", text, class_="rejected", title=f"round {number}, rejected drafts", **drafted)


def _slider(anchor: str, rounds: int, with_rejected: bool) -> Markup | None:
    """Returns the slider, hidden until the script shows it; None for an answer without rounds."""
    if not rounds:
        return None
    name = element("label", "Up to round", for_=f"{anchor}-slider")
    slider = element("input", type="range", min=0, max=rounds, value=rounds, step=1, id=f"{anchor}-slider")
    told = element("output", for_=f"{anchor}-slider")
    drafts = element("label", element("input", type="checkbox"), " rejected drafts") if with_rejected else None
    return element("div", name, slider, told, drafts, class_="slider", hidden=True, data_of=anchor)


def _by_round(row: Row, pieces: Sequence[ColouredPiece], rejected: Mapping[int, str]) -> list[list[object]]:
    texts: dict[int, str] = {}
    for piece in pieces:
        texts[piece.last.round] = texts.get(piece.last.round, "") + piece.text
    counts = zip(row.accepted, row.emitted, strict=True)
    numbered = [(0, (0, 1)), *enumerate(counts, 1)]
    return [[n or "prefill", a, e, texts.get(n, ""), rejected.get(n, "")] for n, (a, e) in numbered]
