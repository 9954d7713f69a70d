"""Task sequences: classes, training ids and labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starseg.errors import UserError
from starseg.tasks import TaskSequence, make_task, split_classes

TABLES = {"15-1": ((1, 2), (3,)), "joint": ((1, 2, 3, 4, 5),)}
NAMES = ("background", "ant", "bee", "cat", "dog", "eel")


def test_names_and_ids_give_the_same_task() -> None:
    by_name = make_task(TABLES, NAMES, steps=[["dog", "ant"], ["bee"]])
    assert by_name == make_task(TABLES, NAMES, steps=[[4, 1], [2]])
    assert by_name.class_names(1) == ("background", "dog", "ant", "bee")
    assert by_name.dataset_ids(1) == (0, 4, 1, 2)
    assert by_name.base == 2


def test_joint_exists_for_every_data_set() -> None:
    assert make_task({}, NAMES, "joint").steps == ((1, 2, 3, 4, 5),)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("15-2", None, "unknown task '15-2'.*15-1"),
        (None, [["ant"], ["cow"]], "unknown class 'cow'.*ant, bee"),
        (None, [["ant"], [7]], r"unknown class ids \[7\].*1..5"),
        (None, [["ant"], [0]], r"unknown class ids \[0\]"),
        (None, [["ant", "bee"], ["bee"]], r"listed twice: \['bee'\]"),
        (None, [["ant"], []], "at least one class"),
        (None, [], "at least one class"),
    ],
)
def test_bad_tasks_are_refused(name: str | None, steps: list | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(TABLES, NAMES, name, steps)


@given(st.permutations(range(1, 21)), st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_relabelling_is_undone_by_dataset_ids(order: list[int], sizes: list[int], data: st.DataObject) -> None:
    steps, rest = [], list(order)
    for size in sizes:
        if rest[:size]:
            steps.append(tuple(rest[:size]))
        rest = rest[size:]
    task = TaskSequence("random", tuple(steps), tuple(map(str, range(21))))
    step = data.draw(st.integers(0, len(task) - 1))
    fill = data.draw(st.sampled_from([0, 255]))
    table = task.relabelling(step, "test", fill)
    back = np.array(task.dataset_ids(step))
    for training_id, dataset_id in enumerate(back):
        assert table[dataset_id] == training_id
    unseen = np.setdiff1d(np.arange(1, 255), back)
    assert (table[unseen] == fill).all() and table[255] == 255
    train = task.relabelling(step, "train")
    assert sorted(set(train.tolist()) - {0, 255}) == list(range(1 + len(task.old(step)), len(back)))
    assert (train[list(task.old(step))] == 0).all()


@pytest.mark.parametrize("name", ["15", "15-0", "15-1-1", "a-b"])
def test_the_sizes_in_a_task_s_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"task '{name}': expected '<classes of step 0>-"):
        split_classes(range(1, 21), name)
