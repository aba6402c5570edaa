"""The charts as files."""

import re
import xml.etree.ElementTree as ElementTree

from octavo.commands.charts import BAND, INK, RED, Bar, Curve, bar_chart, heatmap, line_chart, to_svg


def drawn(svg: str) -> tuple[list[str], list[str]]:
    """The texts of a drawing, and the values that it tells of its marks."""
    root = ElementTree.fromstring(svg)
    labels = [element.get("aria-label") or "" for element in root.iter()]
    return ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")], labels


def test_curves_and_their_band_are_named_whatever_their_names_are() -> None:
    names = ["bf16", "a.b[0]'\"<x>"]
    curves = [
        Curve(name, [[1, 2.0], [2, None], [3, 4.0], [4, 2.5]], INK, faint=[[1, 2.0], [4, 3.0]])
        for name in names
    ]
    svg = to_svg(
        line_chart(curves, label="loss", title="L", y_range=(0, 8), band=[[1, 0.5], [4, 1]], zero=True)
    )
    texts, _ = drawn(svg)
    assert {*names, BAND, "step", "loss", "L"} <= set(texts)
    assert len(re.findall(r'stroke-width="1.8"', svg)) == 2
    assert "prefers-color-scheme:dark" in svg
    assert svg.count("<line") < 50  # the rules that a page's pointer finds are not drawn


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("a", 2.0, "two", INK), Bar("b", 1.0, "one", RED), Bar("c", None, "not reached", RED)]
    svg = to_svg(bar_chart(bars, title="t"))
    texts, _ = drawn(svg)
    assert {"a", "b", "c", "two", "one", "not reached"} <= set(texts)
    widths = [float(width) for width in re.findall(r'"bar" d="M0,[\d.]+h([\d.]+)v', svg)]
    assert [width / widths[0] for width in widths] == [1, 0.5, 0]


def test_a_heatmap_is_dark_where_it_is_bad_and_empty_where_nothing_was_measured() -> None:
    values = [[0.0, 100.0], [None, 50.0]]
    axes = {"layers": ["w1", "w2"], "steps": [10, 20]}
    bright, dark = "rgb(255, 247, 214)", "rgb(110, 10, 30)"
    for good, bad, expected in ((0, 100, [bright, dark]), (100, 0, [dark, bright])):
        svg = to_svg(heatmap(values, title="t", unit="%", good=good, bad=bad, **axes))
        cells = re.findall(r'<path d="M[^"]*h380v[^"]*" fill="([^"]*)"', svg)
        assert cells[:2] == expected
        assert len(cells) == 3
