"""One self-contained HTML page: tables that sort and plots, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reprune.files import write_text
from reprune.reporting.drawing import Plot, svg_of

TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Section:
    """A table of the page: the name in its address, its heading, what it shows, the rows."""

    name: str
    heading: str
    caption: str
    table: pd.DataFrame

    @property
    def html(self) -> Markup:
        """The table as HTML; column names and cells are escaped by pandas, a '|' in a name begins a new line."""
        shown = self.table.where(self.table.notna(), float("nan")).infer_objects()
        shown = shown.rename(columns=lambda name: str(name).strip("|").replace("|", "\n"))
        whole = shown.to_html(index=False, border=0, na_rep="–", float_format="{:.4g}".format, escape=True)
        return Markup(whole)


def write_page(
    path: Path, title: str, about: str, sections: Sequence[Section], plots: Sequence[Plot]
) -> None:
    """Write the page; plots without a figure are named with their reason."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template(TEMPLATE).render(
        title=title,
        about=about,
        tables=sections,
        plots=[
            {
                "name": plot.name,
                "heading": heading_of(plot),
                "caption": plot.caption,
                # matplotlib escapes what it writes into an SVG.
                "svg": Markup(svg_of(plot.figure, plot.name)) if plot.figure else "",
            }
            for plot in plots
        ],
        left_out=[
            {"heading": heading_of(plot), "reason": plot.reason} for plot in plots if plot.figure is None
        ],
    )
    write_text(path, page)


def heading_of(plot: Plot) -> str:
    """A plot's name in words."""
    return plot.name.replace("_", " ").capitalize()
