"""Charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from medqlora.reporting.markup import Html, fold, tag
from medqlora.reporting.numbers import interval, percent, short

BARS = 40  # groups shown at once; further ones fold away


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
