"""MkDocs hook: pages made of files outside docs/ and of the program's own help, and links that hold in both places."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from starseg.cli.main import app

ROOT = Path(__file__).parents[1]
SHOWN = {
    "index.md": "README.md",
    "reproduction.md": "REPRODUCTION.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
}
PAGES = {source: page for page, source in SHOWN.items()}


def command_line() -> str:
    """Every command's help as Markdown, its examples as code."""
    command: Any = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="starseg", title="Command line")
    text = re.sub(r"(`[^`]*`)|<", lambda m: m[1] or "&lt;", text)
    return re.sub(r"^Examples:\n(.*?)\n\n", r"**Examples**:\n\n```console\n\1\n```\n\n", text, flags=re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    for page, source in SHOWN.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings' roles (:class:`Options`) as plain code."""
    return re.sub(r":(?:attr|class|func|meth|mod):(<code>)~?", r"\1", html)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between the repository's files as links of the site; to what the site does not hold, as text."""
    here = page.file.src_uri
    source = SHOWN.get(here, f"docs/{here}")

    def mended(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        file = normpath(join(dirname(source), target))
        shown = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if shown:
            return f"[{text}]({relpath(shown, dirname(here) or '.')}{anchor or ''})"
        return text if (ROOT / file).exists() else link[0]

    return re.sub(r"\[((?:[^\]\n]|\n(?!\n))*)\]\(([^)#\s:]+)(#[^)\s]*)?\)", mended, markdown)
