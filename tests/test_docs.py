"""The documentation agrees with the program: commands are accepted, tables of options are the current ones."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import option_tables
from starseg.cli.help import EXAMPLES, complete_methods
from starseg.cli.main import app
from starseg.config import RunConfig, load_config
from starseg.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "REPRODUCTION.md", "benchmarks/README.md")), *ROOT.glob("docs/*.md")]


def _lines(text: str) -> Iterator[str]:
    """Commands as typed: prompts, variables before them and folders of the program cut off, broken lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if typed := re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(starseg .*)", line.strip()):
            yield typed[1]


def _documented() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
            found += _lines(block)
        found += re.findall(r"`(starseg [^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    # Options of the program itself are left out: they act while they are parsed.
    found += [line for lines in EXAMPLES.values() for line in _lines("\n".join(lines))]
    return [line for line in found if not line.startswith("starseg --")]


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
    for key, inner in getattr(command, "commands", {}).items():
        yield from _leaves(inner, key)


def _parsed(line: str) -> dict[str, Any] | None:
    """The parameters a command would be called with; None where the line only names it."""
    seen: dict[str, Any] = {}
    command: Any = typer.main.get_command(app)
    for _, leaf in _leaves(command, ""):
        leaf.callback = lambda **params: seen.update(params)
    try:
        command.main(shlex.split(line, comments=True)[1:], prog_name="starseg", standalone_mode=False)
    except Exception as error:
        if type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError"):
            return None
        raise AssertionError(f"{line}: {error}") from error
    return seen


@pytest.fixture
def _gentle() -> Iterator[None]:
    """The method of docs/new-method.md, which the commands there name."""
    known = dict(METHODS)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "new-method.md").read_text(), re.S)
    exec(code, {"__name__": "gentle"})
    yield
    METHODS.clear()
    METHODS.update(known)


@pytest.mark.usefixtures("_gentle")
@pytest.mark.parametrize("line", sorted(set(_documented())))
def test_documented_commands_are_accepted(line: str, capsys: pytest.CaptureFixture) -> None:
    params = _parsed(line)
    words = shlex.split(line, comments=True)
    for word in words:
        if word.startswith(("configs/", "benchmarks/")):
            assert (ROOT / word).is_file(), f"{line}: no such file"
    if params and "config" in params and (ROOT / params["config"]).is_file():
        load_config(ROOT / params["config"], params["overrides"] or [])
    if params and "methods" in params:
        assert set(params["methods"].split(",")) <= set(METHODS)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_tables_of_options_are_generated_from_the_code(page: Path) -> None:
    text = page.read_text()
    assert option_tables.fill(text) == text, f"{page} is out of date; run `make docs-tables`"


def test_every_option_is_in_a_table() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    placed = set(re.findall(r"<!-- begin generated: (\S+) -->", text))
    sections = {name for name, field in RunConfig.model_fields.items() if isinstance(field.annotation, type(RunConfig))}
    own = {m for m in METHODS.values() if m.__module__.startswith("starseg.methods.") and m.Options.model_fields}
    assert placed == {
        *("config.run", "config.train.base"),
        *(f"config.{name}" for name in sections),
        *(f"options.{method.section}" for method in own),
    }


def test_every_command_has_examples_that_fit_a_terminal() -> None:
    names = {name for name, _ in _leaves(typer.main.get_command(app), "")}
    assert names | {"starseg"} == set(EXAMPLES)
    assert all(len(line) <= 78 and "[" not in line for lines in EXAMPLES.values() for line in lines)
    assert all(leaf.epilog.startswith("Examples:") for _, leaf in _leaves(typer.main.get_command(app), ""))


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tr", {"train"}),
        ("data c", {"check"}),
        ("train x.yaml --dev", {"--devices"}),
        ("methods ss", {"ssul", "ssul-m"}),
        ("compare x.yaml --methods star,mi", {"star,mib"}),
    ],
)
def test_tab_completion(
    typed: str, offered: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("_STARSEG_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"starseg {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
    with pytest.raises(SystemExit):
        app(prog_name="starseg")
    assert set(capsys.readouterr().out.split()) == offered


def test_all_method_names_are_completed() -> None:
    own = {name for name, method in METHODS.items() if method.__module__.startswith("starseg.methods.")}
    assert set(complete_methods("")) == own
