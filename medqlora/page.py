"""Numbers as text, HTML that is escaped by default, charts as SVG, and the page around them.
Nothing here knows about runs.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

BARS = 40  # groups shown at once; further ones fold away
LONGEST = 2000  # characters of a question or answer shown; pages stay under a megabyte

# ---- numbers as text -----------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def percent_short(value: float) -> str:
    return f"{100 * value:.0f} %"


def points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0 turns -0.0 into 0.0


def interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.1f} – {100 * bounds[1]:.1f}"


def interval_points(bounds: Sequence[float]) -> str:
    return f"{points(bounds[0])} to {points(bounds[1])}"


def p_text(p: float) -> str:
    return "< 1e-12" if p < 1e-12 else f"= {p:.2g}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3f}"


def share(part: int, whole: int) -> str:
    return f"{part:,} ({percent(part / whole)})"


def short(value: float) -> str:
    """A tick's label: 1500 -> 1500, 20000 -> 20k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:.6g}"


def cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST else text[:LONGEST] + " … (cut)"


# ---- markup --------------------------------------------------------------------------------------


class Html(str):
    """Text that is markup already. All other text is escaped when it becomes part of an element."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element; class_ stands for class, aria_label for aria-label."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    return Html(
        "".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children)
    )


def section(id: str, title: str, level: int, *children: Html, class_: str = "part") -> Html:
    return tag(
        "section",
        tag(f"h{level}", title, id=f"{id}-title"),
        *children,
        id=id,
        class_=class_,
        aria_labelledby=f"{id}-title",
    )


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1) -> Html:
    """A table that scrolls by itself where the window is narrow; `texts`: how many columns at its
    left are no numbers.
    """
    of = ["text" if i < texts else "" for i in range(len(head))]
    cells = [
        tag("th", name, scope="col", **({"class_": kind} if kind else {})) if name else tag("td")
        for name, kind in zip(head, of, strict=True)
    ]
    lines = []
    for row in rows:
        rest = [
            tag("td", cell, **({"class_": kind} if kind else {}))
            for cell, kind in zip(row[1:], of[1:], strict=True)
        ]
        lines.append(tag("tr", tag("th", row[0], scope="row", class_="text"), *rest))
    inside = tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *lines))
    return tag(
        "div", inside, class_="scroll", role="region", tabindex=0, aria_label=f"Table: {label}"
    )


def definitions(facts: Iterable[tuple[str, Any]]) -> Html:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts))


def caption(text: str) -> Html:
    return tag("p", tag("strong", text), class_="caption")


def fold(summary: str, *children: Html) -> Html:
    return tag("details", tag("summary", summary), *children)


# ---- charts --------------------------------------------------------------------------------------


@dataclass
class Line:
    """A curve: its points; spread: (x, low, high), whiskers where points are marked, else a
    band.
    """

    name: str
    points: list[tuple[float, float]]
    spread: list[tuple[float, float, float]] = field(default_factory=list)
    marks: bool = False


WIDTH = 360
HEIGHT = 230
LEFT = 46
RIGHT = 14
TOP = 10
BOTTOM = 36  # of a chart and its margins: readable at a phone's width
# dashed with open circles; all others are solid with filled diamonds
STYLES = {"base": "a", "evaluation": "a"}


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str = "optimizer step",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    form: Callable[[float], str] = short,
    diagonal: bool = False,
    from_zero: bool = False,
    note: str = "",
) -> Html | None:
    """Curves in a frame with ticks; None where there are no points."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [
        y for line in lines for _, *ends in line.spread for y in ends
    ]
    x_ticks = make_ticks(*(x_range or (min(xs), max(xs))))
    y_ticks = make_ticks(*(y_range or (0 if from_zero else min(ys), max(ys))))
    x_low, x_high = x_range or (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    y_low, y_high = y_range or (y_ticks[0], y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_low) / (x_high - x_low)
        down = (y_high - y) / (y_high - y_low)
        return LEFT + right * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    drawn = draw_axes(
        place,
        x_low,
        x_high,
        y_low,
        [t for t in x_ticks if x_low <= t <= x_high],
        y_ticks,
        form,
        x_label,
    )
    if diagonal:
        (x1, y1), (x2, y2) = place(0, 0), place(1, 1)
        drawn.append(stroke(x1, y1, x2, y2, "diagonal"))
    for line in lines:
        drawn += draw_line(line, place)
    names = [tag("li", swatch(line), line.name) for line in lines if line.name]
    facts = "; ".join(
        f"{line.name or 'from'} {form(line.points[0][1])} to {form(line.points[-1][1])}"
        for line in lines
    )
    label = f"{title}, over {x_label}, first to last point: {facts}"
    picture = tag(
        "svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="chart"
    )
    legend = [tag("ul", *names, class_="legend")] if names else []
    return tag(
        "figure",
        tag("figcaption", title),
        *legend,
        picture,
        *([tag("p", note, class_="small")] if note else []),
    )


def make_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if high <= low:
        low, high = (low - 1, high + 1) if low else (0.0, 1.0)
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def draw_axes(place, x_low, x_high, y_low, x_ticks, y_ticks, form, x_label) -> list[Html]:
    drawn = []
    for tick in y_ticks:
        x1, y = place(x_low, tick)
        drawn.append(stroke(x1, y, place(x_high, tick)[0], y, "grid"))
        drawn.append(write(x1 - 6, y + 4, form(tick), "end"))
    for i, tick in enumerate(x_ticks):
        x, y = place(tick, y_low)
        drawn.append(stroke(x, y, x, y + 4, "axis"))
        drawn.append(
            write(
                x,
                y + 16,
                form(tick),
                "end" if i and i == len(x_ticks) - 1 and x > WIDTH - 30 else "middle",
            )
        )
    (x1, y1), (x2, _) = place(x_low, y_low), place(x_high, y_low)
    return [
        *drawn,
        stroke(x1, y1, x2, y1, "axis"),
        write((x1 + x2) / 2, HEIGHT - 5, x_label, "middle"),
    ]


def draw_line(line: Line, place) -> list[Html]:
    style = STYLES.get(line.name, "b")
    drawn = []
    if line.spread and line.marks:
        for x, low, high in line.spread:
            (left, bottom), (_, top) = place(x, low), place(x, high)
            drawn.append(
                tag(
                    "path",
                    d=(
                        f"M{left:.1f} {bottom:.1f}V{top:.1f}M{left - 3:.1f}"
                        f" {top:.1f}h6M{left - 3:.1f} {bottom:.1f}h6"
                    ),
                    class_=f"whisker {style}",
                )
            )
    elif line.spread:
        around = [place(x, high) for x, _, high in line.spread] + [
            place(x, low) for x, low, _ in reversed(line.spread)
        ]
        drawn.append(tag("path", d=path_of(around) + "Z", class_=f"band {style}"))
    at = [place(x, y) for x, y in line.points]
    drawn.append(tag("path", d=path_of(at), class_=f"line {style}"))
    return drawn + [mark(x, y, style) for x, y in at if line.marks or len(at) == 1]


def path_of(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def mark(x: float, y: float, style: str) -> Html:
    shape = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z"
        if style == "a"
        else f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5Z"
    )
    return tag("path", d=shape, class_=f"mark {style}")


def stroke(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=kind)


def write(x: float, y: float, text: str, anchor: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def swatch(line: Line) -> Html:
    style = STYLES.get(line.name, "b")
    inside = [
        tag("path", d="M1 7H31", class_=f"line {style}"),
        *([mark(16, 7, style)] if line.marks else []),
    ]
    return tag("svg", *inside, width=32, height=14, viewBox="0 0 32 14", aria_hidden="true")


def bar_chart(
    title: str, groups: dict[str, dict[str, dict[str, Any]]], chance: float | None
) -> Html:
    """A horizontal bar with its 95 % interval for each group (subject) and model, best groups
    first.

    groups: model -> group -> its n, accuracy and accuracy_ci95. Positions are shares of the width,
    so text never shrinks.
    """
    last = list(groups.values())[-1]
    names = sorted(
        {name for of in groups.values() for name in of},
        key=lambda name: (-last.get(name, {"accuracy": -1})["accuracy"], name),
    )
    models = [
        tag(
            "li",
            tag("svg", bar(0.5, 1, style_of(model)), width=24, height=12, aria_hidden="true"),
            model,
        )
        for model in groups
    ]
    extra = (
        [
            tag(
                "li",
                tag(
                    "svg",
                    tag("path", d="M12 0V12", class_="chance"),
                    width=24,
                    height=12,
                    aria_hidden="true",
                ),
                "by guessing",
            )
        ]
        if chance
        else []
    )
    items = [
        draw_group(name, {model: of[name] for model, of in groups.items() if name in of}, chance)
        for name in names
    ]
    shown = [tag("ul", axis(), *items[:BARS], axis(), class_="bars")]
    if len(items) > BARS:
        shown.append(
            fold(
                f"{len(items) - BARS:,} more, of lower accuracy",
                tag("ul", *items[BARS:], class_="bars"),
            )
        )
    caption = f"{title}: share of right answers with 95\u00a0% interval"
    return tag(
        "figure",
        tag("figcaption", caption),
        tag("ul", *models, *extra, class_="legend"),
        *shown,
        class_="wide",
    )


def style_of(model: str) -> str:
    return STYLES.get(model, "b")


def draw_group(name: str, scores: dict[str, dict[str, Any]], chance: float | None) -> Html:
    facts = ", ".join(
        f"{model} {percent(s['accuracy'])} (interval {interval(s['accuracy_ci95'])})"
        for model, s in scores.items()
    )
    drawn = [
        tag("line", x1=f"{x}%", x2=f"{x}%", y1=0, y2="100%", class_="grid")
        for x in (0, 25, 50, 75, 100)
    ]
    for i, (model, s) in enumerate(scores.items()):
        drawn += [
            bar(3 + 17 * i, s["accuracy"], style_of(model)),
            *whisker(8.5 + 17 * i, *s["accuracy_ci95"]),
        ]
    if chance:
        drawn.append(
            tag(
                "line",
                x1=f"{100 * chance:.1f}%",
                x2=f"{100 * chance:.1f}%",
                y1=0,
                y2="100%",
                class_="chance",
            )
        )
    picture = tag(
        "svg",
        *drawn,
        width="100%",
        height=17 * len(scores),
        role="img",
        aria_label=f"{name}: {facts}",
    )
    values = [
        tag("span", tag("span", model, class_="small"), f" {percent(s['accuracy'])}")
        for model, s in scores.items()
    ]
    n = next(iter(scores.values()))["n"]
    return tag(
        "li",
        tag("span", name, " ", tag("span", f"n = {n:,}", class_="small"), class_="name"),
        picture,
        tag("span", *values, class_="values"),
    )


def bar(y: float, value: float, style: str) -> Html:
    return tag("rect", x=0, y=y, width=f"{100 * value:.2f}%", height=11, class_=f"bar {style}")


def whisker(y: float, low: float, high: float) -> list[Html]:
    ends = [(low, high, y, y), (low, low, y - 3, y + 3), (high, high, y - 3, y + 3)]
    return [
        tag("line", x1=f"{100 * a:.2f}%", x2=f"{100 * b:.2f}%", y1=c, y2=d, class_="whisker")
        for a, b, c, d in ends
    ]


def axis() -> Html:
    labels = [
        tag("text", f"{x} %", x=f"{x}%", y=12, text_anchor=anchor)
        for x, anchor in ((0, "start"), (50, "middle"), (100, "end"))
    ]
    return tag(
        "li",
        tag("svg", *labels, width="100%", height=16, aria_hidden="true"),
        class_="axis-row",
        aria_hidden="true",
    )


# ---- the page ------------------------------------------------------------------------------------

# The policy forbids the page every request and every script, whatever stands in the data.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<main id="main">
{body}
</main>
<footer>
<p><strong>Not medical advice.</strong> These are scores of language models on test questions. A model that answers them well is not fit
to diagnose or treat, and a right answer here does not make the next one right.</p>
<p class="small">Made by medqlora {version} from the files of the run; intervals are 95 %, tests are two-sided.</p>
</footer>
</body>
</html>
"""

STYLE = """
:root { --page: #ffffff; --card: #f5f6f8; --ink: #1b1f24; --soft: #545d68; --line: #d3d8de; --axis: #7d8793; --link: #0b57a4;
  --a: #a35200; --b: #0b5fad; --fill: #9cc3ea; --better: #146c34; --worse: #b3261e; --even: #545d68; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1e2329; --ink: #e8eaed; --soft: #aab3bd;
  --line: #363d46; --axis: #76808c; --link: #8cc0ff; --a: #f0a452; --b: #6fb1f5; --fill: #2b5d90; --better: #6fd193; --worse: #ff9d94;
  --even: #aab3bd; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3, h4 { line-height: 1.2; margin: 0 0 .75rem; text-wrap: balance; }
h3, h4 { margin-top: 1.5rem; } .part > h3:first-child, .part > h2 + h3 { margin-top: 0; }
h1 { font-size: 1.9rem; } h2 { font-size: 1.35rem; } h3 { font-size: 1.15rem; } h4 { font-size: 1rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 2px; }
.skip { position: absolute; left: -100rem; padding: .5rem 1rem; background: var(--page); }
.skip:focus { left: 1rem; top: .5rem; z-index: 1; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.kicker, .small, .legend { color: var(--soft); font-size: .875rem; }
.kicker { margin: 0; letter-spacing: .02em; }
nav ul, .legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; }
nav { margin: 0 0 1rem; font-size: .9375rem; }
nav a { display: inline-block; padding: .25rem 0; }
.verdict { border-left: .4rem solid var(--even); background: var(--card); border-radius: .25rem; padding: 1rem 1.25rem; margin: 0 0 1.25rem;
  font-size: 1.2rem; line-height: 1.45; }
.verdict p:last-child { margin: 0; max-width: none; text-wrap: pretty; }
.verdict .label { margin: 0 0 .25rem; font-size: .9375rem; color: var(--even); }
.better { border-color: var(--better); } .better .label { color: var(--better); }
.worse { border-color: var(--worse); } .worse .label { color: var(--worse); }
.note { margin: 0 0 1.25rem; padding: .75rem 1rem .75rem 2rem; border: 1px solid var(--line); border-radius: .25rem; font-size: .9375rem; }
.part { border-top: 1px solid var(--line); padding: 1.5rem 0 .75rem; }
.run { border-top: 3px solid var(--ink); padding-top: 1.25rem; margin-top: 2.5rem; }
/* a shade at the side where a table goes on: page-coloured covers move with the content, the shades stay */
.scroll { overflow-x: auto; margin: 0 0 1rem; max-width: 100%;
  background: linear-gradient(to right, var(--page) 40%, transparent) left / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--page) 40%, transparent) right / 2rem 100% no-repeat local,
    linear-gradient(to right, var(--axis), transparent) left / .5rem 100% no-repeat scroll,
    linear-gradient(to left, var(--axis), transparent) right / .5rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .375rem .75rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
thead td { border-bottom-color: var(--axis); }
thead th { color: var(--soft); font-weight: 600; font-size: .875rem; vertical-align: bottom; border-bottom-color: var(--axis); }
tbody th { font-weight: 500; min-width: 7rem; max-width: 20rem; }
thead th { max-width: 12rem; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; min-width: 9rem; }
details table { font-size: .9rem; } details tbody th { min-width: 1.5rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); gap: .75rem 1.5rem; margin: 0 0 1.25rem; }
.caption { margin: 0 0 .25rem; }
dt { color: var(--soft); font-size: .875rem; } dd { margin: 0; }
details { border: 1px solid var(--line); border-radius: .25rem; margin: 0 0 .5rem; padding: 0 .9rem; }
summary { margin: 0 -.9rem; padding: .6rem .9rem; cursor: pointer; }
summary:hover { background: var(--card); }
details[open] > summary { border-bottom: 1px solid var(--line); margin-bottom: .75rem; }
pre { overflow-x: auto; background: var(--card); padding: .75rem; font-size: .875rem; overflow-wrap: normal; }
.right { color: var(--better); white-space: nowrap; }
figure { margin: 0 0 1.25rem; min-width: 0; }
figcaption { font-weight: 600; margin: 0 0 .25rem; }
figure > .small { margin: .25rem 0 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .5rem 2rem; }
.charts figure { max-width: 28rem; }
.legend li { display: flex; align-items: center; gap: .4rem; }
svg { display: block; overflow: visible; }
.chart { width: 100%; height: auto; }
svg text { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--axis); stroke-width: 1; }
.diagonal { stroke: var(--axis); stroke-width: 1.5; stroke-dasharray: 1 4; stroke-linecap: round; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .line.a { stroke: var(--a); stroke-dasharray: 6 4; } .line.b { stroke: var(--b); }
.mark { stroke-width: 2; } .mark.a { stroke: var(--a); fill: var(--page); } .mark.b { stroke: var(--b); fill: var(--b); }
.band { stroke: none; fill-opacity: .22; } .band.a { fill: var(--a); } .band.b { fill: var(--b); }
.chart .whisker { fill: none; stroke-width: 1; opacity: .7; } .chart .whisker.a { stroke: var(--a); } .chart .whisker.b { stroke: var(--b); }
.bars { list-style: none; margin: .75rem 0 0; padding: 0; }
.bars li { display: grid; grid-template-columns: 16rem 1fr 8rem; gap: 0 1rem; align-items: center; padding: .2rem 0; }
.bars .axis-row svg { grid-column: 2; }
.name .small { white-space: nowrap; }
.values { display: grid; grid-auto-rows: 17px; line-height: 17px; font-variant-numeric: tabular-nums; font-size: .9375rem; }
.values .small { display: inline-block; min-width: 3.2rem; }
.bar { stroke-width: 1.5; } .bar.a { stroke: var(--a); fill: none; } .bar.b { stroke: var(--b); fill: var(--fill); }
.bars .whisker { stroke: var(--ink); stroke-width: 1.5; }
.chance { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 3; }
footer { border-top: 1px solid var(--line); margin-top: 1.5rem; padding-top: 1rem; }
@media (max-width: 44rem) {
  body { padding: 1rem 1rem 2rem; } h1 { font-size: 1.5rem; } .verdict { font-size: 1.0625rem; padding: .75rem 1rem; }
  dl:not(details dl) { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem 1rem; }
  details { padding: 0 .7rem; } summary { margin: 0 -.7rem; padding: .6rem .7rem; } details table { font-size: .85rem; }
  th, td { padding: .35rem .3rem; } td.text { min-width: 6rem; } tbody th { min-width: 5.5rem; }
  .bars li { grid-template-columns: 1fr; padding: .45rem 0; } .bars .axis-row svg { grid-column: 1; }
  .values { display: flex; flex-wrap: wrap; gap: 0 1rem; line-height: 1.4; } .values .small { min-width: 0; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } nav, .skip { display: none; } .scroll { overflow: visible; }
  figure, tr, details, .verdict, .bars li { break-inside: avoid; } h2, h3, h4 { break-after: avoid; }
  .charts { grid-template-columns: 1fr 1fr; } a { color: inherit; text-decoration: none; }
}
"""
