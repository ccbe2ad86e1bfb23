"""Charts as SVG: this module computes coordinates, templates/charts.html writes the elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from medqlora.reporting.numbers import interval, percent, short

WIDTH = 360  # A chart of this size, margins included, is readable at a phone's width.
HEIGHT = 230
LEFT = 46
RIGHT = 14
TOP = 10
BOTTOM = 36
BAR_STEP = 17  # pixels from one bar of a group to the next
BARS = 40  # This many groups are shown at once; further ones fold away.

# Style a is dashed with open circles, style b is solid with filled diamonds.
STYLES = {"base": "a", "evaluation": "a"}

Place = Callable[[float, float], tuple[float, float]]  # values of the data -> pixels


@dataclass
class Line:
    """A curve.

    Attributes:
        name: stands in the legend; a curve without a name has no entry there.
        points: (x, y) in the data's own units.
        spread: (x, low, high); drawn as whiskers where points are marked, else as a band.
        marks: marks each point.
    """

    name: str
    points: list[tuple[float, float]]
    spread: list[tuple[float, float, float]] = field(default_factory=list)
    marks: bool = False


@dataclass(frozen=True)
class Path:
    """An SVG path; `kind` is its class in the stylesheet."""

    d: str
    kind: str


@dataclass(frozen=True)
class Text:
    """A text in a chart; `anchor` is SVG's text-anchor."""

    x: str
    y: str
    text: str
    anchor: str


@dataclass(frozen=True)
class LegendEntry:
    """A curve's name with a short piece of it."""

    name: str
    swatch: list[Path]


@dataclass(frozen=True)
class LineChart:
    """Curves in a frame with ticks, as templates/charts.html draws them."""

    title: str
    label: str
    legend: list[LegendEntry]
    shapes: list[Path | Text]
    note: str
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True)
class Axes:
    """The frame of a chart: the range of x and y, their ticks and how ticks are written."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: list[float]
    y_ticks: list[float]
    form: Callable[[float], str]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixels of a point."""
        right = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        # The y axis of SVG points down.
        down = (self.y_range[1] - y) / (self.y_range[1] - self.y_range[0])
        return LEFT + right * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)


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
) -> LineChart | None:
    """Draw curves in a frame with ticks; None where there are no points.

    Args:
        title, x_label, note: texts above, below the frame and under it.
        lines: the curves.
        x_range, y_range: what the frame covers; by default what the points cover.
        form: writes a tick's value.
        diagonal: draws the line of equal x and y.
        from_zero: makes the y axis begin at zero.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    axes = choose_axes(lines, x_range, y_range, form, from_zero)
    shapes = draw_axes(axes, x_label)
    if diagonal:
        shapes.append(stroke(*axes.place(0, 0), *axes.place(1, 1), "diagonal"))
    for line in lines:
        shapes += draw_line(line, axes.place)
    ends = "; ".join(
        f"{line.name or 'from'} {form(line.points[0][1])} to {form(line.points[-1][1])}"
        for line in lines
    )
    label = f"{title}, over {x_label}, first to last point: {ends}"
    legend = [LegendEntry(line.name, draw_swatch(line)) for line in lines if line.name]
    return LineChart(title, label, legend, shapes, note)


def choose_axes(
    lines: Sequence[Line],
    x_range: tuple[float, float] | None,
    y_range: tuple[float, float] | None,
    form: Callable[[float], str],
    from_zero: bool,
) -> Axes:
    """Choose ranges and ticks that hold all points; see `line_chart`."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    for line in lines:
        for _, low, high in line.spread:
            ys += [low, high]
    x_ticks = make_ticks(*(x_range or (min(xs), max(xs))))
    y_ticks = make_ticks(*(y_range or (0 if from_zero else min(ys), max(ys))))
    if x_range is None:
        # A single point stands at the left end of a frame of width one.
        x_range = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    # The frame grows to the outer ticks in y only; in x it ends with the data.
    x_ticks = [tick for tick in x_ticks if x_range[0] <= tick <= x_range[1]]
    return Axes(x_range, y_range or (y_ticks[0], y_ticks[-1]), x_ticks, y_ticks, form)


def make_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers from at most `low` to at least `high`."""
    if high <= low:
        low, high = (low - 1, high + 1) if low else (0.0, 1.0)
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    # The small terms here keep rounding from choosing a longer step or adding a tick.
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    # Rounding to 12 digits makes 3 * 0.1 equal 0.3.
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def draw_axes(axes: Axes, x_label: str) -> list[Path | Text]:
    """Draw the grid, both axes and their ticks."""
    x_low, x_high = axes.x_range
    y_low = axes.y_range[0]
    shapes: list[Path | Text] = []
    for tick in axes.y_ticks:
        left, y = axes.place(x_low, tick)
        right, _ = axes.place(x_high, tick)
        shapes.append(stroke(left, y, right, y, "grid"))
        shapes.append(write(left - 6, y + 4, axes.form(tick), "end"))
    for number, tick in enumerate(axes.x_ticks):
        x, y = axes.place(tick, y_low)
        # The last label would reach over the chart's right edge.
        at_edge = number > 0 and number == len(axes.x_ticks) - 1 and x > WIDTH - 30
        shapes.append(stroke(x, y, x, y + 4, "axis"))
        shapes.append(write(x, y + 16, axes.form(tick), "end" if at_edge else "middle"))
    left, y = axes.place(x_low, y_low)
    right, _ = axes.place(x_high, y_low)
    shapes.append(stroke(left, y, right, y, "axis"))
    shapes.append(write((left + right) / 2, HEIGHT - 5, x_label, "middle"))
    return shapes


def draw_line(line: Line, place: Place) -> list[Path]:
    """Draw a curve with its spread and marks."""
    style = STYLES.get(line.name, "b")
    shapes = []
    if line.spread and line.marks:
        for x, low, high in line.spread:
            left, bottom = place(x, low)
            _, top = place(x, high)
            ends = f"M{left - 3:.1f} {top:.1f}h6M{left - 3:.1f} {bottom:.1f}h6"
            shapes.append(Path(f"M{left:.1f} {bottom:.1f}V{top:.1f}{ends}", f"whisker {style}"))
    elif line.spread:
        # The outline runs along the upper bounds and back along the lower ones.
        upper = [place(x, high) for x, _, high in line.spread]
        lower = [place(x, low) for x, low, _ in reversed(line.spread)]
        shapes.append(Path(connect(upper + lower) + "Z", f"band {style}"))
    places = [place(x, y) for x, y in line.points]
    shapes.append(Path(connect(places), f"line {style}"))
    if line.marks or len(places) == 1:
        shapes += [mark(x, y, style) for x, y in places]
    return shapes


def connect(places: Sequence[tuple[float, float]]) -> str:
    """Return the path through these pixels."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def mark(x: float, y: float, style: str) -> Path:
    """Draw a point: an open circle in style a, a diamond in style b."""
    if style == "a":
        return Path(f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z", "mark a")
    return Path(f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5Z", f"mark {style}")


def stroke(x1: float, y1: float, x2: float, y2: float, kind: str) -> Path:
    """Draw a straight line."""
    return Path(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", kind)


def write(x: float, y: float, text: str, anchor: str) -> Text:
    """Place a text."""
    return Text(f"{x:.1f}", f"{y:.1f}", text, anchor)


def draw_swatch(line: Line) -> list[Path]:
    """Draw a short piece of a curve for the legend."""
    style = STYLES.get(line.name, "b")
    piece = [Path("M1 7H31", f"line {style}")]
    return [*piece, mark(16, 7, style)] if line.marks else piece


@dataclass(frozen=True)
class Whisker:
    """One of the three strokes of an interval; x as a share of the width, y in pixels."""

    x1: str
    x2: str
    y1: float
    y2: float


@dataclass(frozen=True)
class Bar:
    """One model's bar with its interval; widths are shares, so that text never shrinks."""

    model: str
    style: str
    y: int
    share: str
    accuracy: str
    whisker: list[Whisker]


@dataclass(frozen=True)
class BarGroup:
    """The bars of one group, such as a subject."""

    name: str
    n: str
    label: str
    height: int
    bars: list[Bar]


@dataclass(frozen=True)
class BarChart:
    """Groups of horizontal bars, as templates/charts.html draws them; best groups first."""

    title: str
    models: list[tuple[str, str]]  # name and style
    chance: str | None  # A vertical line here shows the accuracy of guessing.
    groups: list[BarGroup]
    folded: list[BarGroup]


def bar_chart(
    title: str,
    groups: dict[str, dict[str, dict[str, Any]]],
    chance: float | None,
    end: Collection[str] = (),
) -> BarChart:
    """Draw a bar with its 95 % interval for each group and model.

    Args:
        title: names the kind of group.
        groups: model -> group -> its n, accuracy and accuracy_ci95.
        chance: accuracy of guessing, or None.
        end: groups that stand after all others.
    """
    # The last model, which is the tuned one where there are two, orders the groups.
    last = list(groups.values())[-1]

    def rank(name: str) -> tuple[bool, float, str]:
        # Groups that the last model lacks come after those that it has.
        return (name in end, -last[name]["accuracy"] if name in last else 1, name)

    drawn = []
    for name in sorted({name for scores in groups.values() for name in scores}, key=rank):
        scores = {model: some[name] for model, some in groups.items() if name in some}
        drawn.append(draw_group(name, scores))
    models = [(model, STYLES.get(model, "b")) for model in groups]
    line = f"{100 * chance:.1f}%" if chance else None
    return BarChart(title, models, line, drawn[:BARS], drawn[BARS:])


def draw_group(name: str, scores: dict[str, dict[str, Any]]) -> BarGroup:
    """Draw the bars of one group; scores: model -> n, accuracy and accuracy_ci95."""
    bars = []
    for number, (model, score) in enumerate(scores.items()):
        y = BAR_STEP * number
        bars.append(
            Bar(
                model,
                STYLES.get(model, "b"),
                y + 3,
                f"{100 * score['accuracy']:.2f}%",
                percent(score["accuracy"]),
                draw_whisker(y + 8.5, *score["accuracy_ci95"]),
            )
        )
    values = ", ".join(
        f"{model} {percent(score['accuracy'])} (interval {interval(score['accuracy_ci95'])})"
        for model, score in scores.items()
    )
    n = next(iter(scores.values()))["n"]
    return BarGroup(name, f"{n:,}", f"{name}: {values}", BAR_STEP * len(scores), bars)


def draw_whisker(y: float, low: float, high: float) -> list[Whisker]:
    """Draw an interval: a stroke and its two ends."""
    left = f"{100 * low:.2f}%"
    right = f"{100 * high:.2f}%"
    return [
        Whisker(left, right, y, y),
        Whisker(left, left, y - 3, y + 3),
        Whisker(right, right, y - 3, y + 3),
    ]
