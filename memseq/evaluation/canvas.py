"""A drawing is a list of marks in pixels; it becomes SVG text for a page and PNG for everything
else.

One description serves both, so the picture in a README is the figure of the report. `Panel` adds
axes to a part of a canvas and maps data to pixels.
"""

import dataclasses
import html
import math
import pathlib
from collections.abc import Iterable, Sequence

INK, SOFT, FAINT, PAPER = "#1b1f24", "#57606a", "#d9dee3", "#ffffff"
SANS = "Inter, 'Helvetica Neue', 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"

# Marker name -> corners on the unit circle; None is a circle. Shape repeats what colour says.
MARKERS = {
    "circle": None,
    "square": [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)],
    "diamond": [(0, -1.25), (1.1, 0), (0, 1.25), (-1.1, 0)],
    "up": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
    "down": [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
    "pentagon": [
        (1.1 * math.sin(2 * math.pi * i / 5), -1.1 * math.cos(2 * math.pi * i / 5))
        for i in range(5)
    ],
    "cross": [
        (-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4),
        (0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4),
    ],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mark:
    """One line, polygon, circle or text. `note` is shown when a reader points at it."""

    kind: str
    points: tuple[tuple[float, float], ...]
    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    opacity: float = 1.0
    dashed: bool = False
    radius: float = 0.0
    text: str = ""
    size: float = 12.0
    anchor: str = "start"
    bold: bool = False
    turn: float = 0.0
    note: str = ""


class Canvas:
    """A drawing of `width` by `height` pixels; y grows downwards. `title` says what it shows, for
    who cannot see it.
    """

    def __init__(self, width: float, height: float, title: str):
        self.width, self.height, self.title = width, height, title
        self.marks: list[Mark] = []

    def line(self, points: Iterable[tuple[float, float]], stroke: str = INK, **style) -> None:
        self.marks.append(Mark("line", tuple(points), stroke=stroke, **style))

    def polygon(self, points: Iterable[tuple[float, float]], fill: str, **style) -> None:
        self.marks.append(Mark("polygon", tuple(points), fill=fill, **style))

    def rect(self, x: float, y: float, width: float, height: float, fill: str, **style) -> None:
        corners = ((x, y), (x + width, y), (x + width, y + height), (x, y + height))
        self.polygon(corners, fill, **style)

    def dot(self, x: float, y: float, radius: float, fill: str, shape="circle", **style) -> None:
        corners = MARKERS[shape]
        if corners is None:
            self.marks.append(Mark("circle", ((x, y),), fill=fill, radius=radius, **style))
        else:
            self.polygon(((x + a * radius, y + b * radius) for a, b in corners), fill, **style)

    def text(self, x: float, y: float, text: str, fill: str = INK, **style) -> None:
        """`y` is the baseline; `anchor` is "start", "middle" or "end"; `turn` in degrees,
        anticlockwise.
        """
        self.marks.append(Mark("text", ((x, y),), fill=fill, text=text, **style))

    def svg(self) -> str:
        """The drawing as an `<svg>` element that scales to its container and needs nothing from
        outside.
        """
        head = (
            f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img" '
            f'aria-label="{html.escape(self.title)}" font-family="{SANS}">'
        )
        return head + "".join(_svg_mark(mark) for mark in self.marks) + "</svg>"

    def png(self, path: pathlib.Path, scale: float = 2.0) -> None:
        """Write the drawing as a PNG of `scale` times its size on a white ground."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width / 100, self.height / 100), dpi=100 * scale)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        axes.axis("off")
        for order, mark in enumerate(self.marks):
            _plot_mark(axes, mark, order)
        figure.savefig(path, format="png", facecolor=PAPER, metadata={"Title": self.title})


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _svg_mark(mark: Mark) -> str:
    style = f' fill="{mark.fill or "none"}"'
    if mark.stroke:
        style += f' stroke="{mark.stroke}" stroke-width="{_n(mark.width)}"'
    if mark.dashed:
        style += ' stroke-dasharray="4 3"'
    if mark.opacity < 1:
        style += f' opacity="{mark.opacity:.2f}"'
    note = f"<title>{html.escape(mark.note)}</title>" if mark.note else ""
    points = " ".join(f"{_n(x)},{_n(y)}" for x, y in mark.points)
    x, y = (_n(value) for value in mark.points[0])
    if mark.kind == "text":
        weight = ' font-weight="600"' if mark.bold else ""
        turn = f' transform="rotate({_n(-mark.turn)} {x} {y})"' if mark.turn else ""
        where = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
        return (
            f'<text x="{x}" y="{y}" font-size="{_n(mark.size)}"{style}{weight}{where}{turn}>'
            f"{html.escape(mark.text)}{note}</text>"
        )
    if mark.kind == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{_n(mark.radius)}"{style}>{note}</circle>'
    if mark.kind == "polygon":
        return f'<polygon points="{points}"{style}>{note}</polygon>'
    return f'<polyline points="{points}"{style} stroke-linejoin="round">{note}</polyline>'


def _plot_mark(axes, mark: Mark, order: int) -> None:
    from matplotlib.patches import Circle, Polygon

    points_per_pixel = 0.72  # of a figure at 100 pixels an inch
    if mark.kind == "text":
        axes.text(
            *mark.points[0],
            mark.text,
            color=mark.fill,
            fontsize=mark.size * points_per_pixel * 0.94,  # DejaVu is wider than the page's fonts
            ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
            va="baseline",
            rotation=mark.turn,
            rotation_mode="anchor",
            fontweight="bold" if mark.bold else "normal",
            alpha=mark.opacity,
            zorder=order,
        )
        return
    edge = {"linewidth": mark.width * points_per_pixel} if mark.stroke else {"linewidth": 0}
    common = {"alpha": mark.opacity, "zorder": order, **edge}
    if mark.dashed:
        common["linestyle"] = (0, (4, 3))
    if mark.kind == "line":
        x, y = zip(*mark.points, strict=True)
        axes.plot(x, y, color=mark.stroke, solid_joinstyle="round", **common)
        return
    colours = {"facecolor": mark.fill or "none", "edgecolor": mark.stroke or "none"}
    if mark.kind == "circle":
        axes.add_patch(Circle(mark.points[0], mark.radius, **colours, **common))
    else:
        axes.add_patch(Polygon(mark.points, closed=True, **colours, **common))


@dataclasses.dataclass
class Panel:
    """Axes on a part of a canvas: `left`, `top`, `width`, `height` in pixels, `x` and `y` the
    ranges of the data.
    """

    canvas: Canvas
    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False

    def at_x(self, value: float) -> float:
        low, high = self.x
        if self.log_x:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.left + self.width * (value - low) / (high - low)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return self.top + self.height * (1 - (value - low) / (high - low))

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.at_x(x), self.at_y(y)

    def title(self, text: str, below: str = "") -> None:
        self.canvas.text(self.left, self.top - (27 if below else 12), text, size=14, bold=True)
        if below:
            self.canvas.text(self.left, self.top - 11, below, SOFT, size=11.5)

    def ticks_x(self, ticks: Sequence[tuple[float, str]], label: str = "", grid=False) -> None:
        bottom = self.top + self.height
        for value, text in ticks:
            x = self.at_x(value)
            if grid:
                self.canvas.line(((x, self.top), (x, bottom)), FAINT)
            else:
                self.canvas.line(((x, bottom), (x, bottom + 4)), SOFT)
            self.canvas.text(x, bottom + 17, text, SOFT, size=11.5, anchor="middle")
        if label:
            middle = self.left + self.width / 2
            self.canvas.text(middle, bottom + 35, label, SOFT, size=12, anchor="middle")

    def ticks_y(self, ticks: Sequence[tuple[float, str]], label: str = "") -> None:
        """Labelled horizontal grid lines."""
        for value, text in ticks:
            y = self.at_y(value)
            self.canvas.line(((self.left, y), (self.left + self.width, y)), FAINT)
            self.canvas.text(self.left - 8, y + 4, text, SOFT, size=11.5, anchor="end")
        if label:
            middle = self.top + self.height / 2
            self.canvas.text(self.left - 40, middle, label, SOFT, size=12, anchor="middle", turn=90)

    def base_line(self) -> None:
        bottom = self.top + self.height
        self.canvas.line(((self.left, bottom), (self.left + self.width, bottom)), SOFT)
