"""Loading of plug-ins: modules of other packages, and single files, that register something when imported."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from starseg.errors import UserError


def load_entry_points(group: str, what: str) -> None:
    """Import everything that installed packages list in an entry point group.

    Args:
        group: name of the group, such as "starseg.methods"; each entry names a module, or an object in it.
        what: kind of thing that an entry registers, for the error message.

    Raises:
        UserError: an entry cannot be imported.
    """
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:  # importing another package's code may raise anything
            raise UserError(
                f"{what} {entry.name!r} of the installed package {entry.dist.name if entry.dist else '?'} cannot be "
                f"loaded ({entry.value}): {type(error).__name__}: {error}"
            ) from error


def load_files(variable: str) -> None:
    """Import the Python files listed in an environment variable, separated by ``:``.

    Processes started by a run inherit the variable and also import the files. A file that has already been imported, or
    that is being run as a script, is not imported again.

    Args:
        variable: name of the environment variable.

    Raises:
        UserError: a file is missing or cannot be imported.
    """
    for path in map(Path, filter(None, os.environ.get(variable, "").split(os.pathsep))):
        if any(_is_module(name, path) for name in ("__main__", path.stem)):
            continue
        spec = spec_from_file_location(path.stem, path)
        if path.suffix != ".py" or not path.is_file() or spec is None or spec.loader is None:
            raise UserError(
                f"{variable}: {path} is no Python file; give one, or several with {os.pathsep!r} between them"
            )
        sys.modules[path.stem] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # importing another package's code may raise anything
            del sys.modules[path.stem]
            raise UserError(f"{variable}: {path} cannot be loaded: {type(error).__name__}: {error}") from error


def _is_module(name: str, path: Path) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and Path(file).resolve() == path.resolve()
