"""Names from configurations and checkpoints never lead out of a run's directory."""

from pathlib import Path

import pytest
from PIL import Image

from starseg.compat.settings import parse_published, read_published
from starseg.config import parse_config
from starseg.data.datasets.base import NO_FILES, Split
from starseg.engine.exemplars import Memory, kept, locate
from starseg.errors import UserError
from starseg.replay.memory import Exemplar
from starseg.utils.files import read_json

CONFIGS = Path(__file__).parents[2] / "configs"
ESCAPES = ["../x", "/etc/x", "a/../../x", "a\\x", "..\\x", "x\0"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_task_name_cannot_be_a_path(name: str) -> None:
    with pytest.raises(UserError, match=r"task.name: .*expected one without / and"):
        parse_config({"task": {"name": name, "steps": [["disc"]]}})
    published = read_published(CONFIGS / "config_voc.json")
    with pytest.raises(UserError, match=r"name: .*expected one without / and"):
        parse_published({**published, "name": name}, "test")


@pytest.mark.parametrize("name", [".", "..", " "])
def test_a_name_of_dots_stays_inside(name: str) -> None:
    run = parse_config({"task": {"name": name, "steps": [["disc"]]}}).run_dir
    assert run.parent == Path("runs") and run.name.startswith("voc_")


@pytest.mark.parametrize("name", ["/../../out.jpg /../../out.png", "../../out", "/etc/passwd", "..", ".", "", " "])
def test_exemplars_are_copied_into_the_step_whatever_their_names(name: str, tmp_path: Path) -> None:
    image, mask = tmp_path / "data" / "a.jpg", tmp_path / "data" / "a.png"
    image.parent.mkdir()
    for path in (image, mask):
        Image.new("L", (4, 4)).save(path)
    outside = set(tmp_path.rglob("*"))
    step = tmp_path / "runs" / "run" / "step_1"
    memory = Memory((Exemplar(name, (1,)),), Split((image,), (mask,), (name,)))
    memory.save(step, tmp_path / "runs" / "run" / "step_0", 1, copy=True)
    written = {p for p in set(tmp_path.rglob("*")) - outside if p.is_file()}
    assert len(written) == 3 and all(step in p.parents for p in written)
    assert [e.name for e in kept(step, 1)] == [name] and read_json(step / "memory.json")
    found = locate([name], NO_FILES, step)
    assert all(step in p.resolve().parents for p in (*found.images, *found.masks))
    with pytest.raises(UserError, match="neither in the data set nor among the copies"):
        locate([name], NO_FILES, tmp_path / "runs" / "run" / "step_0")
