"""examples/story.sh runs at a tiny size."""

import subprocess
from pathlib import Path

import pytest

STORY = Path(__file__).parents[2] / "examples" / "story.sh"


@pytest.mark.slow
def test_the_story_runs(voc_subset: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = subprocess.run(
        ["bash", STORY, voc_subset, work, "12", "8", "1", "64"], text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("$ starseg learn --new", "--dry-run", "horse (new)", "8 photos, whole", "masks agree"):
        assert line in done.stdout
    assert "Error" not in done.stderr
    for folder in ("before", "after"):
        assert len(list((work / folder / "overlays").iterdir())) == 8
    assert (work / "report.html").is_file() and (work / "onnx" / "photo_mask.png").is_file()
    again = subprocess.run(["bash", STORY, voc_subset, work], text=True, capture_output=True, timeout=60)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_the_story_prints_its_usage() -> None:
    done = subprocess.run(["bash", STORY], text=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and "examples/story.sh VOC [WORK" in done.stderr
