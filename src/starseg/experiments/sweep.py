"""The grid of a comparison of methods at their best settings (:mod:`starseg.experiments.tuning`).

The runs of a comparison in ``out`` with a sweep:

out/sweep/METHOD/SETTING/seedS             tuning, evaluated on the held-out training images
out/best/METHOD/SETTING/seedS              the chosen settings, evaluated on the test images
out/{sweep,best}/METHOD/base_step/...      step 0 of all runs that train it with the same settings
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from starseg.config import RunConfig, load_config
from starseg.engine.setup import check_method, resolve_config
from starseg.errors import UserError
from starseg.experiments.compare import (
    SWEEP,
    check_method_names,
    lends,
    refuse_other_conditions,
)
from starseg.experiments.plan import Plan
from starseg.methods import METHODS, method_options
from starseg.methods.recipes import has_later_steps
from starseg.utils.overrides import override

VALIDATION = 0.2
"""Share of the training images that is held out unless `data.validation` is given."""
BEST = "best"
_BASE_KEYS = (
    "train.base.epochs",
    "train.base.lr",
    "train.warmup",
    "train.weight_decay",
    "train.encoder_lr",
    "recipe",
)
_LATER_KEYS = ("train.later.epochs", "train.later.lr", "memory.size")
_MAX_NAME = 100

Grid = Mapping[str, Sequence[Any]]
"""Values of each key, as the configuration takes them."""


@dataclass(frozen=True)
class Point:
    """Grid point: a method and the values of the swept keys that concern it."""

    method: str
    setting: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The setting as a folder name, such as ``train.base.lr=0.01``; ``default`` without any key."""
        text = ",".join(f"{key}={text_of(value)}" for key, value in sorted(self.setting.items())) or "default"
        safe = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)[:_MAX_NAME]
        return safe if safe == text else f"{safe}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Stage:
    """Runs with the same training images: those of the tuning, or the final ones.

    Attributes:
        out: the folder of the comparison.
        kind: name of the stage's folder in it.
        config: the configuration file.
        overrides: overrides for all runs.
    """

    out: Path
    kind: str
    config: Path
    overrides: Sequence[str]

    def run_dir(self, point: Point, seed: int) -> Path:
        """Return the run directory of a grid point."""
        return self.out / self.kind / point.method / point.name / f"seed{seed}"

    def plan(self, points: Iterable[Point], seeds: Sequence[int]) -> Plan:
        """Configure the runs of grid points, each step 0 before the runs that share it.

        Raises:
            UserError: a configuration is refused, or the folder holds runs under other conditions.
        """
        plan = Plan([], set(), self.out)
        for seed, point in itertools.product(seeds, points):
            run = self.configure(point, seed)
            resolve_config(run)
            if later_steps(run):
                base = self.base_step(point, seed)
                if base.run_dir not in plan.only_base:
                    plan.only_base.add(base.run_dir)
                    plan.runs.append(base)
                run = self.configure(point, seed, None, override("start_from", str(base.run_dir / "step_0")))
            plan.runs.append(run)
        if plan.runs:
            earlier = sorted((self.out / self.kind).glob("*/*/seed*/config.yaml"))
            refuse_other_conditions(earlier, plan.runs[0], self.out)
        return plan

    def configure(self, point: Point, seed: int, place: Path | None = None, *more: str) -> RunConfig:
        """Return the configuration of a grid point's run, by default in its own directory."""
        setting = (override(key, value) for key, value in point.setting.items())
        run = (f"method={point.method}", f"seed={seed}", override("out", str(place or self.run_dir(point, seed))))
        config = load_config(self.config, [*self.overrides, *setting, *run, *more])
        check_method(config)
        return config

    def base_step(self, point: Point, seed: int) -> RunConfig:
        """Return the run that trains step 0 for a grid point: by :attr:`Method.base_step` if its settings are equal."""
        run = self.configure(point, seed)
        for method in (METHODS[point.method].base_step, point.method):
            keys = {key: _key_of(method, point.method, key) for key in point.setting}
            setting = {keys[k]: value for k, value in point.setting.items() if affects_step_0(keys[k], method)}
            base = Point(method, setting)
            place = self.out / self.kind / method / "base_step" / base.name / f"seed{seed}"
            lender = self.configure(base, seed, place)
            if lends(lender, run):
                break
        resolve_config(lender)
        return lender


@dataclass(frozen=True)
class Sweep:
    """Grid points of every method and the two stages of their runs.

    Attributes:
        keys: the swept keys.
        points: grid points by method, in the order of the values on the command line.
        seeds: seeds of the final runs; the first one is that of the tuning.
        share: share of the training images that is held out for the tuning.
        shortlist: number of settings of step 0 from which later steps are tuned; None for all.
        tuning, final: the two stages.
    """

    keys: Sequence[str]
    points: Mapping[str, Sequence[Point]]
    seeds: Sequence[int]
    share: float
    shortlist: int | None
    tuning: Stage
    final: Stage


def parse_grid(assignments: Iterable[str]) -> Grid:
    """Parse assignments such as ``train.base.lr=0.002,0.01``; each value is read as the configuration reads it.

    Raises:
        UserError: an assignment is malformed, a key cannot be swept, or a key or value is given twice.
    """
    grid: dict[str, list[Any]] = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        _check_key(key)
        try:
            values = yaml.safe_load(f"[{text}]")
            names = [text_of(value) for value in values]
        except (yaml.YAMLError, TypeError) as error:
            raise UserError(f"--sweep {assignment}: expected KEY=V1,V2,... with values as in YAML") from error
        if not values:
            raise UserError(f"--sweep {assignment}: expected KEY=V1,V2,..., such as train.base.lr=0.002,0.01")
        if len(set(names)) < len(names):
            raise UserError(f"--sweep {assignment}: gives a value twice; give every value once")
        if key in grid:
            raise UserError(f"--sweep {key}: given twice; give all its values in one option")
        grid[key] = values
    return grid


def make_sweep(
    config: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    overrides: Sequence[str],
    sweep: Sequence[str],
    shortlist: int | None = None,
) -> Sweep:
    """Configure every grid point, so that all mistakes are found before training starts.

    Args:
        config: the configuration file.
        methods: the methods to compare.
        seeds: seeds of the final runs.
        out: the folder of the comparison.
        overrides: "key=value" for all runs.
        sweep: "key=value,value,..." each; a key concerns only those methods that use it.
        shortlist: number of settings of step 0 from which later steps are tuned; all by default.

    Raises:
        UserError: a method or key does not exist, a key concerns no method or may not be swept, a value is refused, or
            ``out`` holds other runs.
    """
    check_method_names(methods)
    if any(out.glob("*_seed*/config.yaml")):
        raise UserError(f"{out} holds a comparison without --sweep; give another folder with --out")
    grid = parse_grid(sweep)
    given = {method: load_config(config, [*overrides, f"method={method}"]) for method in dict.fromkeys(methods)}
    first = given[methods[0]]
    if first.start_from is not None:
        raise UserError(f"{first.source}:\nstart_from: a sweep trains step 0 on its own images; remove the key")
    concerned = {method: [key for key in grid if _concerns(key, run)] for method, run in given.items()}
    if idle := [key for key in grid if not any(key in keys for keys in concerned.values())]:
        raise UserError(f"--sweep {idle[0]}: concerns none of the compared methods ({', '.join(given)})")
    share = first.data.validation or VALIDATION
    found = Sweep(
        list(grid),
        {
            method: [
                Point(method, dict(zip(keys, values, strict=True)))
                for values in itertools.product(*(grid[key] for key in keys))
            ]
            for method, keys in concerned.items()
        },
        list(dict.fromkeys(seeds)),
        share,
        shortlist,
        Stage(out, SWEEP, config, [*overrides, f"data.validation={share}"]),
        Stage(out, BEST, config, [*overrides, "data.validation=null"]),
    )
    found.tuning.plan([point for points in found.points.values() for point in points], seeds[:1])
    return found


def _check_key(key: str) -> None:
    sections = {method.section for method in METHODS.values()}
    section, _, option = key.partition(".")
    if key in (*_BASE_KEYS, *_LATER_KEYS) or (section in sections and option):
        return
    names = [*_BASE_KEYS, *_LATER_KEYS, *(f"{name}.{option}" for name in sections if option)]
    near = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"--sweep {key}: {'is no key that can be swept' if key else 'expected KEY=V1,V2,...'}; {hint}A sweep takes "
        f"{', '.join((*_BASE_KEYS, *_LATER_KEYS))}, and options of methods such as star.pos_weight"
    )


def _concerns(key: str, run: RunConfig) -> bool:
    """Return whether a key can change the result of a run's method."""
    method = METHODS[run.method]
    if key == "memory.size":
        return method.memory is not None
    if key.startswith("train.later."):
        return method.later_schedule and later_steps(run)
    return key in _BASE_KEYS or key.partition(".")[0] == method.section


def _key_of(lender: str, method: str, key: str) -> str:
    """Return a key as a method that lends its step 0 has it: with the lender's section if it has the same option."""
    section, _, option = key.partition(".")
    shared = section == METHODS[method].section and option in METHODS[lender].Options.model_fields
    return f"{METHODS[lender].section}.{option}" if shared else key


def affects_step_0(key: str, method: str) -> bool:
    """Return whether a swept key can change step 0 of a method."""
    section, _, option = key.partition(".")
    return key in _BASE_KEYS or (section == METHODS[method].section and option not in METHODS[method].later_options)


def later_steps(run: RunConfig) -> bool:
    """Return whether a run has steps after step 0."""
    method = METHODS[run.method]
    return has_later_steps(run, method, method.complete_options(method_options(run.method, run), None))


def text_of(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
