"""Line charts as inline SVG, coloured by the page's style sheet (classes ``s0`` .. ``s7`` and ``muted``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

COLOURS = 8
_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 40


@dataclass(frozen=True)
class Line:
    """Line of a chart.

    Attributes:
        name: for the tooltip and the legend.
        points: (x, y), in the order of x.
        style: CSS classes.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    if high <= low:
        return [low]
    values = MaxNLocator(5, integer=integer).tick_values(low, high)
    return [float(v) for v in values if low - 1e-9 <= v <= high + 1e-9]


def line_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str, y_max: float | None = None) -> Markup:
    """Draw a line chart that starts at y = 0 and is as wide as its container.

    Args:
        lines: what to draw, the last on top.
        title: read out instead of the picture.
        x_label: label of the x axis, whose values are whole numbers.
        y_label: label of the y axis.
        y_max: top of the chart; by default the largest y.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    left, right, top = min(xs), max(xs), max(y_max or max(ys), 1e-9)

    def across(x: float) -> float:
        return _LEFT + (x - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - max(0.0, min(y, top)) / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, title)]
    text = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    for y in _ticks(0, top):
        grid = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        parts += [grid.format(_LEFT, _WIDTH - _RIGHT, up(y), up(y)), text.format(_LEFT - 6, up(y) + 4, "end", f"{y:g}")]
    parts += [text.format(across(x), _HEIGHT - _BOTTOM + 18, "middle", f"{x:g}") for x in _ticks(left, right, True)]
    parts.append(text.format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "middle", x_label))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = Markup('<text transform="translate(11 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>')
    parts.append(turned.format(middle, y_label))
    for line in lines:
        places = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(Markup('<g class="line {}"><title>{}</title>').format(line.style, line.name))
        parts.append(Markup('<polyline points="{}"/>').format(places))
        if len(line.points) <= 20:
            parts += [
                Markup('<circle r="3" cx="{:.1f}" cy="{:.1f}"/>').format(across(x), up(y)) for x, y in line.points
            ]
        parts.append(Markup("</g>"))
    return Markup("").join([*parts, Markup("</svg>")])
