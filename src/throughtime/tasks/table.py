"""The tasks that there are, a row each, and files read for them."""

from __future__ import annotations

from throughtime.data import reading
from throughtime.data.sequences import Columns, Sequences, TargetRole
from throughtime.errors import DataError
from throughtime.tasks.classify import Classify
from throughtime.tasks.tag import Tag
from throughtime.tasks.task import Task

TASKS: dict[str, Task] = {
    Classify.name: Classify(),
    Tag.name: Tag(),
}

DEFAULT = next(iter(TASKS))
"""What is done where nobody says what."""

OPTION = "--task"

WAYS: dict[TargetRole, str] = {task.role: f"{OPTION} {name}" for name, task in reversed(TASKS.items())}
"""What to type for each role of a target; where several tasks share one, the first of them."""


def task_of(name: str) -> Task:
    """The task of this name. Raises `DataError` where there is none."""
    if name not in TASKS:
        raise DataError(f"the task is {name!r}; it is {choices()}")
    return TASKS[name]


def choices() -> str:
    """All names, as a refusal says them: "'a' or 'b'"."""
    *most, last = map(repr, TASKS)
    return f"{', '.join(most)} or {last}" if most else last


def read(
    data: str, columns: Columns | None = None, *, task: Task, labelled: bool = True, splitting: bool = True
) -> Sequences:
    """Read a file, or a data set that ships here, for this task; see `throughtime.data.reading.read`."""
    return reading.read(data, columns, role=task.role, labelled=labelled, splitting=splitting, ways=WAYS)
