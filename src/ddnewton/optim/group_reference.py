"""A process group as an optimizer keeps it: copies share it, and no file can hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddnewton.distributed.agreement import Processes
from ddnewton.errors import BadType, sentence


@dataclass(frozen=True, eq=False)
class GroupReference:
    """The processes that hold the samples together, None for one by itself."""

    processes: Processes

    def __deepcopy__(self, _memo: dict[int, Any]) -> GroupReference:
        """Return the same processes: a copy lives among them, too."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the parts of a pickle, which cannot hold a group of running processes."""
        if self.processes is not None:
            rule = "an optimizer that is pickled must have no process_group"
            remedy = "Save its state, and make it anew in every process, with the group there."
            raise BadType(sentence(rule, type(self.processes).__name__, remedy))
        return GroupReference, (None,)
