"""Runs on the frozen network of another run's step (model.frozen_from)."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from starseg.config import parse_config
from starseg.engine.checkpoint import load_info, load_model
from starseg.errors import UserError
from starseg.experiments.train import train

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def network(tiny_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 0 of STAR."""
    run = tmp_path_factory.mktemp("star") / "run"
    return train(parse_config(tiny_tree | {"out": str(run)}), range(1), QUIET) / "step_0"


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("method", ["star", "mib", "ssul", "dft", "constellation", "segacil"])
def test_the_network_stays_that_of_the_other_run(
    method: str, at_once: bool, network: Path, tiny: dict, tmp_path: Path
) -> None:
    tiny |= {
        "method": method,
        "model": {"backbone": "resnet18", "pretrained": True, "frozen_from": str(network)},
        "segacil": {"width": 16},
        "constellation": {"epochs": 1, "crops": 1, "draws": 16},
    }
    tiny["task"] = {**tiny["task"], "at_once": at_once}
    run = train(parse_config(tiny), range(1 if at_once else 2), QUIET)
    source, _ = load_model(network)
    model, info = load_model(run / f"step_{0 if at_once else 1}")
    assert info.architecture == load_info(network).architecture
    assert info.head_sizes == ([5] if at_once else [3, 1])
    for part in ("encoder", "decoder"):
        ours, theirs = getattr(model, part).state_dict(), getattr(source, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not torch.equal(model.heads[0].state_dict().popitem()[1], source.heads[0].state_dict().popitem()[1])


def test_a_folder_without_a_finished_step_is_refused(tiny: dict, tmp_path: Path) -> None:
    tiny["model"] |= {"frozen_from": str(tmp_path / "none")}
    with pytest.raises(UserError, match=r"none: no step directory"):
        train(parse_config(tiny), console=QUIET)
    assert not Path(tiny["out"]).exists()
