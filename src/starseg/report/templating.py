"""Loading of the jinja2 templates."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape

from starseg.report.tables import percent


def template(name: str) -> Template:
    """Load a template of ``starseg/report/templates``; HTML templates escape inserted values."""
    environment = Environment(
        loader=PackageLoader("starseg.report"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(name)
