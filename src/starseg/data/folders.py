"""Listing of the files in a folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from starseg.errors import UserError
from starseg.utils.terminal import print_note

_NAMED = 5
# Files and folders that together tell that a folder is an output of starseg.
_OUTPUTS = (
    ("config.yaml", "step_0"),
    ("config.yaml", ".lock"),
    ("learn", "learn/learn.json"),
    ("learn.json", "classes.txt", "train.txt"),
    ("report.html", "iou.png"),
)


def some(names: Sequence[object]) -> str:
    """Join the first names with commas, followed by the number of the others."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + rest


def list_files(folder: Path, deep: bool = True, skip: Collection[Path] = ()) -> list[Path]:
    """List the files of a folder, sorted by path, and note on stderr which entries cannot be followed.

    Links to files and folders are followed, except links to a folder that contains them. Hidden files and folders are
    left out, and so are the folders in it that a run, `starseg learn` or `starseg report` has made.

    Args:
        folder: the folder.
        deep: list the files in its folders as well.
        skip: folders in it that are left out, under any name.

    Raises:
        UserError: a folder cannot be read.
    """
    skipped = {path.resolve() for path in skip}
    files, dangling, loops, made = [], [], [], []
    pending: list[tuple[Path, tuple[Path, ...]]] = [(folder, (folder.resolve(),))]
    while pending:
        place, above = pending.pop()
        for entry in _visible(place):
            if entry.is_file():
                files.append(entry)
            elif not entry.is_dir():
                dangling.append(entry)
            elif deep and (real := entry.resolve()) not in skipped:
                if any(parent.is_relative_to(real) for parent in above):
                    loops.append(entry)
                elif _is_output(entry):
                    made.append(entry)
                else:
                    pending.append((entry, (*above, real)))
    if dangling:
        print_note(f"left out, as they are no files or links that lead nowhere: {some(sorted(dangling))}")
    if made:
        print_note(f"left out, as starseg made them: {some(sorted(made))}")
    if loops:
        print_note(f"left out, as they are links to folders that contain them: {some(sorted(loops))}")
    return sorted(files)


def _is_output(folder: Path) -> bool:
    """Whether a folder is a run directory, a folder prepared by `starseg learn`, or a report."""
    return any(all((folder / name).exists() for name in names) for names in _OUTPUTS)


def _visible(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"{folder}: cannot read this folder ({error.strerror}); make it readable, or move it"
        ) from error
