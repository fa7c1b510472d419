"""Tests of self-contained pages: escaping, tables, axes, plots, and Chromium as it shows them."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_checks import check_in_chromium, check_page

from jaxspec.pages import chromium
from jaxspec.pages.axes import Axis, axis_over, doubling_axis
from jaxspec.pages.charts import Bar, Cell, GridAxis, bar_chart, cell_grid
from jaxspec.pages.lines import Frame, Reference, Series, legend, line_plot
from jaxspec.pages.markup import Markup, element, escape, joined
from jaxspec.pages.page import (
    DataTable,
    Picture,
    Section,
    bullets,
    document,
    facts,
    figure,
    folded,
    grid,
    paragraph,
    table,
)

HOSTILE = """<script>alert("1")</script> & ' </style></title><img src=http://x/y onerror=z>"""
NEEDS_CHROMIUM = pytest.mark.skipif(chromium.find_chromium() is None, reason="Chromium is not installed")


def test_all_that_is_not_markup_is_escaped():
    assert escape("<b>") == "&lt;b&gt;" and escape(Markup("<b>")) == "<b>" and escape(None) == ""
    assert element("p", "a<b", Markup("<br>"), 3) == "<p>a&lt;b<br>3</p>"
    assert element("a", "x", href='"><script>') == '<a href="&quot;&gt;&lt;script&gt;">x</a>'
    assert joined("<", Markup("<")) == "&lt;<"


def test_attributes_are_named_as_in_html_and_numbers_are_short():
    made = element("path", stroke_width=0.6666, class_="line", hidden=True, id=None, aria_hidden=False, x=3.0)
    assert made == '<path stroke-width="0.67" class="line" hidden x="3"></path>'
    assert element("meta", name="a", content="b") == '<meta name="a" content="b">'


def whole_page(text: str) -> str:
    """Returns a page with every block, all texts of which are `text`."""
    numbers = DataTable(text, [text, "n"], [[text, 1], [text, None], [text, float("nan")]])
    one = Series(text, [1, 2, 4], [1, float("nan"), 3], [0, 0, 0], [2, 2, 4], best=(4, 3), best_name=text)
    frame = Frame(doubling_axis(text, [1, 4]), axis_over(text, [1, 3]))
    dots = one._replace(joined=False, best=None)
    plot = line_plot(text, text, frame, [one, dots], [Reference(text, (1, 4), (1, 2))])
    cells = cell_grid(
        text, text, GridAxis(text, [text]), GridAxis(text, [text, "2"]), [[Cell(text, text, 0.5, text), Cell("-")]]
    )
    bars = bar_chart(text, text, [Bar(text[:20], 0.5, text[:20]), Bar("b", 2.0, "")], full=1.0)
    pictures = [
        Picture("one", text, plot, numbers, text, legend([text, text])),
        Picture("two", text, cells, numbers, scrolls=True, more=folded(text, text)),
        Picture("three", text, bars, numbers, wide=True),
    ]
    blocks = joined(grid(pictures), bullets([text]), facts([(text, text)]), table(numbers), paragraph(text, soft=True))
    return document(text, paragraph(text), [Section("all", text, blocks)], text)


def test_a_page_is_whole_and_loads_nothing_whatever_its_texts():
    read = check_page(whole_page(HOSTILE))
    assert read.names.count("table") == 4
    policy = next(given["content"] for _, given in read.attributes if given.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")


@given(st.text(max_size=30))
def test_no_text_breaks_a_page(text: str):
    check_page(whole_page(text))


def test_a_table_names_its_columns_and_rows_and_scrolls_by_the_keyboard():
    made = table(DataTable("c", ["name", "value"], [["a", 0.123456], ["b", None]]))
    assert made.startswith('<div class="scroll" role="region" tabindex="0" aria-label="c">')
    assert '<th scope="row">a</th><td class="number">0.1235</td>' in made
    assert '<th scope="col" class="number">value</th>' in made and '<td class="number">-</td>' in made


def test_a_figure_has_the_numbers_behind_its_plot():
    made = figure(Picture("f", "c", Markup("<svg></svg>"), DataTable("t", ["x"], [[1]])))
    assert made.index("<figcaption>") < made.index("<svg>") < made.index("<summary>The numbers") < made.index("<table>")


@pytest.mark.parametrize(
    ("values", "options", "ticks"),
    [
        ([0.3, 4.2], {}, [0, 1, 2, 3, 4, 5]),
        ([0, 6], {"whole": True}, [0, 1, 2, 3, 4, 5, 6]),
        ([1, 6], {"whole": True, "from_zero": False}, [1, 2, 3, 4, 5, 6]),
        ([130.0], {}, [0, 50, 100, 150]),
        ([], {}, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([3, 3], {"from_zero": False}, [2.4, 2.6, 2.8, 3, 3.2, 3.4, 3.6]),
        ([float("nan"), 0.02], {}, [0, 0.005, 0.01, 0.015, 0.02]),
    ],
)
def test_ticks_are_round_and_hold_all_values(values, options, ticks):
    axis = axis_over("a", values, **options)
    assert axis.ticks == pytest.approx(ticks)
    assert (axis.low, axis.high) == (axis.ticks[0], axis.ticks[-1])


@given(st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_with_few_ticks(values, from_zero, whole):
    axis = axis_over("a", values, from_zero=from_zero, whole=whole)
    slack = 1e-6 * max(1.0, *map(abs, values))
    assert axis.low - slack <= min(values) and max(values) <= axis.high + slack
    assert 2 <= len(axis.ticks) <= 11


def test_equal_factors_are_equally_far_apart_on_a_doubling_axis():
    axis = doubling_axis("n", [1, 60])
    assert (axis.low, axis.high) == (1, 64) and axis.ticks == (1, 2, 4, 8, 16, 32, 64)
    assert [axis.place(n) for n in (1, 8, 64)] == pytest.approx([0, 0.5, 1])
    assert axis.place(0.5) == 0 and axis.place(1000) == 1
    assert Axis("s", 0, 1, percent=True).name(0.25) == "25 %" and axis.name(12345) == "12,345"


def test_points_that_are_no_numbers_are_left_out_of_a_line():
    frame = Frame(axis_over("x", [0, 4]), axis_over("y", [0, 4]))
    made = line_plot("t", "d", frame, [Series("s", [0, 1, 2], [0, math.nan, 2])])
    assert "nan" not in made and made.count('class="mark c0"') == 2


def test_without_chromium_pictures_are_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="pictures need Chromium, and none is installed"), chromium.open_page(tmp_path):
        pass


def test_a_chromium_that_ends_at_once_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "chromium").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "chromium").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ValueError, match="Chromium has ended"), chromium.open_page(tmp_path / "page.html"):
        pass


@NEEDS_CHROMIUM
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_a_page_with_every_block_fits_desktop_and_phone(tmp_path: Path, width: int, dark: bool):
    path = tmp_path / "page.html"
    path.write_text(whole_page("a text of " + "some" * 30 + HOSTILE), encoding="utf-8")
    check_in_chromium(path, width=width, dark=dark)


@NEEDS_CHROMIUM
def test_complaints_of_a_page_are_heard(tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text("<img src='gone.png'><script>console.error('a', 1); window.none.x</script>", encoding="utf-8")
    with chromium.open_page(path, width=700) as shown:
        told = " | ".join(shown.complaints)
        assert "asked for file://" in told and "a 1" in told and "Uncaught" in told
        assert shown.evaluate("innerWidth") == 700
        with pytest.raises(ValueError, match="cannot evaluate"):
            shown.evaluate("nothing.at.all")
    with pytest.raises(ValueError, match="Chromium cannot show it"), chromium.open_page(tmp_path / "gone.html"):
        pass
