"""Bring the inputs of a stage to this machine, and push what is finished to where other machines find it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from harness.core.errors import InputsLost, one_line
from harness.core.identity import Stage
from harness.stages.workplace import Workplace
from harness.store.object_words import StoreProblem
from harness.store.store import Damaged, Store

log = logging.getLogger("immunitybench")

Notify = Callable[[str], None]
_told: set[str] = set()
"""Problems of the store that the user has read: there may be one for each stage."""


def bring_inputs(stage: Stage, workplace: Workplace, store: Store) -> None:
    """Bring the inputs here. Raises InputsLost if some are not what was committed, after setting them aside.

    Raises StoreProblem if they are elsewhere, and the store cannot be asked for them.
    """
    lost = {}
    for read in stage.inputs.values():
        try:
            if store.bring(read.kind, read.key, is_shared=workplace.is_apart):
                store.require(read.kind, read.key)
                continue
        except Damaged as damaged:
            lost[read.key] = str(damaged)
            store.set_aside(read.kind, read.key)
        lost.setdefault(read.key, f"{read.kind} {read.key} is gone")
    if lost:
        log.warning("inputs must be made anew: %s", "; ".join(lost.values()))
        raise InputsLost(list(lost), list(lost.values()))


def push(kind: str, key: str, workplace: Workplace, store: Store, notify: Notify, *, replace: bool = False) -> None:
    """Push a committed stage to the objects of its store, if it has any; `replace`: in place of one that is there.

    Where that fails `notify` gets one line, and the next run pushes it. Raises StoreProblem for nodes that share no
    folder: what another node needs must be there.
    """
    _push(lambda: store.push(kind, key, replace=replace), workplace, notify)


def push_spare(kind: str, key: str, workplace: Workplace, store: Store, notify: Notify) -> None:
    """Push the spare files of a committed stage; see `push`."""
    _push(lambda: store.push_spare(kind, key), workplace, notify)


def _push(do: Callable[[], None], workplace: Workplace, notify: Notify) -> None:
    try:
        do()
    except StoreProblem as problem:
        words = f"{problem}; the stage is kept in {one_line(workplace.store, 300)}, and the next run there pushes it"
        if workplace.is_apart:
            raise StoreProblem(words, is_passing=problem.is_passing) from None
        log.warning("%s", words)
        if str(problem) not in _told:
            _told.add(str(problem))
            notify(words)
