"""When values are read on the host, which waits for all that a device has been asked to do.

What depends on values, an error or another way to go on, is a question: is an entry of this mask
true? On a CPU it is answered at once. In a call that is made by `read_once` on another device
nothing is read meanwhile: the call goes on as if all answers were no, and they are read together at
its end. If one is yes after all, the call is made again, with an answer to every question, and the
error is raised or the other way taken. What a search goes by is answered in the middle of a call,
and with it all that was asked before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

R = TypeVar("R")

_QUESTIONS: ContextVar[list[Tensor] | None] = ContextVar("questions", default=None)
"""The questions of the call that is under way in this thread, None where each is answered."""


def answered_later() -> bool:
    """Return whether questions are answered at the end of the call that is under way."""
    return not torch.compiler.is_compiling() and _QUESTIONS.get() is not None


def answer(mask: Bool[Tensor, "..."]) -> bool:
    """Return whether an entry is true, or False where that is read later."""
    questions = _QUESTIONS.get()
    if questions is None:
        return bool(mask.any())
    questions.append(mask.any())
    return False


class Doubtful(Exception):
    """A question that was taken as a no in a call that is under way, and is a yes."""


def answers(masks: Sequence[Bool[Tensor, "..."]]) -> list[bool]:
    """Return of masks on one device whether they have a true entry, and settle all before, at once.

    The call under way ends here if a question before is a yes. While compiling all are no.
    """
    if torch.compiler.is_compiling():
        return [False for _ in masks]
    questions = _QUESTIONS.get()
    if questions is None:
        return [bool(mask.any()) for mask in masks]
    # The questions before as one, in front of what is asked now: the bits of one number.
    device, so_far = masks[0].device, list(questions)
    questions.clear()
    before = [question for question in so_far if question.device == device]
    asked = [torch.stack(before).any()] if before else []
    asked += [mask.any() for mask in masks]
    code = int(sum(bit.long() << place for place, bit in enumerate(asked)))
    bits = [bool(code >> place & 1) for place in range(len(asked))]
    elsewhere = {question.device for question in so_far} - {device}
    if (before and bits[0]) or any(_any_on(other, so_far) for other in elsewhere):
        raise Doubtful
    return bits[len(asked) - len(masks) :]


def read_once(call: Callable[[], R], device: torch.device) -> R:
    """Return the result of a call; off the CPU with a single read of its values, at the end.

    The call must be one that can be made twice.
    """
    if device.type == "cpu" or answered_later():
        return call()
    return with_one_read(call)


def with_one_read(call: Callable[[], R]) -> R:
    """Return the result of a call with its questions answered at the end, or one by one."""
    questions: list[Tensor] = []
    token = _QUESTIONS.set(questions)
    try:
        result = call()
        devices = {question.device for question in questions}
        doubtful = any(_any_on(device, questions) for device in devices)
    except Exception:  # noqa: BLE001 - what comes of values that were not looked at
        doubtful = True
    finally:
        _QUESTIONS.reset(token)
    return call() if doubtful else result


def _any_on(device: torch.device, questions: Sequence[Bool[Tensor, ""]]) -> bool:
    """Return whether one of the questions on a device is a yes."""
    return bool(torch.stack([q for q in questions if q.device == device]).any())
