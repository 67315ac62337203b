"""An SVG picture of boxes, lines and text. The same calls give the same bytes: text stays text, no font is measured."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

INK, PALE, PAPER = "#1f2933", "#66727f", "#ffffff"
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"

Point = tuple[float, float]


class Picture:
    """A picture of a size in pixels, on white, so that it can be read on a dark page as well."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.heads: set[str] = set()
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{FONT}" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        ]

    def box(
        self,
        at: Point,
        size: Point,
        fill: str,
        edge: str = INK,
        *,
        dashed: bool = False,
        corner: float = 6,
        weight: float = 1.5,
    ) -> None:
        """A rectangle with its upper left corner at a point."""
        dash = ' stroke-dasharray="5 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{at[0]:g}" y="{at[1]:g}" width="{size[0]:g}" height="{size[1]:g}" rx="{corner:g}" '
            f'fill="{fill}" stroke="{edge}" stroke-width="{weight:g}"{dash}/>'
        )

    def text(
        self,
        at: Point,
        words: str,
        size: float = 14,
        *,
        anchor: str = "middle",
        bold: bool = False,
        italic: bool = False,
        fill: str = INK,
    ) -> None:
        """A line of text on a base line; ``anchor`` is start, middle or end."""
        style = (' font-weight="bold"' if bold else "") + (' font-style="italic"' if italic else "")
        self.parts.append(
            f'<text x="{at[0]:g}" y="{at[1]:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}"{style}>'
            f"{escape(words, quote=False)}</text>"
        )

    def line(
        self, points: Sequence[Point], *, color: str = INK, arrow: bool = True, dashed: bool = False, width: float = 1.8
    ) -> None:
        """Straight pieces from point to point."""
        self.path("M" + " L".join(f"{x:g},{y:g}" for x, y in points), color, arrow, dashed, width)

    def path(self, d: str, color: str = INK, arrow: bool = True, dashed: bool = False, width: float = 1.8) -> None:
        """Any path, in SVG's own words."""
        head = f' marker-end="url(#{self._head(color)})"' if arrow else ""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<path d="{d}" fill="none" stroke="{color}" stroke-width="{width:g}"{dash}{head}/>')

    def _head(self, color: str) -> str:
        """The name of an arrow's head in a colour, which is defined where it is first used."""
        name = f"head-{color.lstrip('#')}"
        if name not in self.heads:
            self.heads.add(name)
            self.parts.append(
                f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0,0.5 L10,5 L0,9.5 z" fill="{color}"/></marker>'
            )
        return name

    def circle(self, at: Point, radius: float, fill: str, edge: str = INK) -> None:
        """A circle around a point."""
        self.parts.append(
            f'<circle cx="{at[0]:g}" cy="{at[1]:g}" r="{radius:g}" fill="{fill}" stroke="{edge}" stroke-width="1.5"/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def write(picture: Picture, name: str) -> None:
    """Write a picture beside the scripts."""
    (Path(__file__).parent / name).write_text(str(picture), encoding="utf-8")
