"""Train constellation on the VOC subset for the tables of docs/constellation.md and benchmarks/README.md.

Usage: python benchmarks/constellation_tables.py OUT JOBS [KEY=VALUE ...]

Three orders of the classes with three seeds, each beside the same frozen network trained on all classes at once; parts
switched off one at a time, from step 0 of the full method where only later steps have the part; and sizes of the bank.
JOBS runs are trained at the same time. Finished runs are not repeated; the tables, in OUT/tables.md, hold those that
are finished.
"""

import statistics
import sys
from pathlib import Path

from rich.console import Console

from starseg.config import RunConfig, load_config
from starseg.experiments.compare import figures, finished_runs
from starseg.experiments.plan import Plan, train_runs
from starseg.methods.constellation import Constellation
from starseg.utils.overrides import override

CONFIG = Path(__file__).with_name("constellation.yaml")
ORDERS = {
    "3-1": "[[cat,cow,dog],[horse],[person],[sheep]]",
    "3-1 permuted": "[[sheep,horse,person],[cow],[dog],[cat]]",
    "2-1": "[[cat,cow],[dog],[horse],[person],[sheep]]",
}
AT_ONCE = "[[cat,cow,dog,horse,person,sheep]]"
SEEDS = (0, 1, 2)
PARTS = {
    "none": "",
    "soft targets": "soft_targets=false",
    "soft targets, doubtful draws kept": "soft_targets=false reject=false",
    "background draws kept": "shift=1",
    "background's mixture kept": "refit=false",
    "replay": "draws=0",
    "warm start": "warm_start=false",
    "pseudo-labels": "pseudo=1",
    "class weights": "balance=0",
    "several modes": "modes=1 background_modes=1",
    "factors": "factors=0",
    "modes and factors": "modes=1 background_modes=1 factors=0",
    "several crops": "crops=1",
    "hidden layer": "hidden=0",
    "local average": "window=0",
    "image average": "image_mean=false",
    "both averages": "window=0 image_mean=false",
    "second map": "maps=1",
    "floor of the whitening": "floor=0",
    "limit of far cells": "limit=1000000",
}
SIZES = {
    "1": "width=128 modes=2 background_modes=2 factors=0",
    "2": "width=128 modes=3 background_modes=8 factors=0",
    "5": "width=128 modes=3 background_modes=5 factors=4",
    "10": "width=128 modes=5 background_modes=16 factors=4",
    "20": "modes=5 background_modes=16 factors=4",
    "40": "modes=12 background_modes=19 factors=4",
    "80": "modes=14 background_modes=25 factors=8",
}


def run(out: Path, name: str, common: list[str], options: str = "", **keys: object) -> RunConfig:
    """Configure a run."""
    given = [f"constellation.{option}" for option in options.split()] + [f"{k}={v}" for k, v in keys.items()]
    return load_config(CONFIG, [*common, *given, override("out", str(out / name.replace(" ", "_")))])


def orders(out: Path, common: list[str]) -> dict[tuple[str, int], RunConfig]:
    """Return the runs of all orders and seeds; "at once" learns all classes in one step."""
    tasks = {**ORDERS, "at once": AT_ONCE}
    return {
        (name, seed): run(
            out, f"{name}_{seed}", common, seed=seed, **{"task.steps": steps, "task.name": name.replace(" ", "-")}
        )
        for seed in SEEDS
        for name, steps in tasks.items()
    }


def part(out: Path, name: str, common: list[str], options: str, full: RunConfig) -> RunConfig:
    """Configure a run without a part; if only later steps have it, from step 0 of the full method."""
    later = {option.partition("=")[0] for option in options.split()} <= Constellation.later_options
    return run(out, f"without_{name}", common, options, **({"start_from": full.run_dir / "step_0"} if later else {}))


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def row(configs: list[RunConfig]) -> list[str]:
    """Return number of finished runs, mIoU of old, new and all classes, bytes of the bank."""
    done = [figures(c.run_dir) for c in configs if finished_runs([c.run_dir])]
    if not done:
        return ["0", "-", "-", "-", "-"]
    groups = [spread([f[g] for f in done]) if done[0][g] is not None else "-" for g in ("old", "new", "all")]
    return [str(len(done)), *groups, f"{done[0]['bank bytes']:,}"]


def main(out: Path, jobs: int, common: list[str]) -> None:
    """Train and write the tables."""
    main_runs = orders(out, common)
    full = main_runs["3-1", 0]
    parts = {name: part(out, name, common, options, full) for name, options in PARTS.items() if options}
    sizes = {name: run(out, f"{name}_KB", common, options) for name, options in SIZES.items()}
    runs = [*main_runs.values(), *parts.values(), *sizes.values()]
    train_runs(Plan(runs, set(), out), Console(), jobs)
    heads = "| {} | runs | old | new | all | bank bytes |\n|---|---|---|---|---|---|\n"
    line = "| {} | {} |\n"
    text = heads.format("order") + "".join(
        line.format(name, " | ".join(row([main_runs[name, seed] for seed in SEEDS]))) for name in (*ORDERS, "at once")
    )
    text += "\n" + heads.format("without")
    text += "".join(line.format(name, " | ".join(row([parts.get(name, full)]))) for name in PARTS)
    text += "\n" + heads.format("KB a class")
    text += "".join(line.format(name, " | ".join(row([config]))) for name, config in sizes.items())
    (out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
