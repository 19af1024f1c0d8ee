"""Which code made a stage: recorded with it, and compared with the code that is here.

The key of a bundled method holds its declared version. If the code was edited without a new version, its stages keep
their keys, so they are found by this comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from harness.core import registry
from harness.core.identity import Stage, digest_of_json
from harness.stages.work import class_of
from harness.store.store import Store


def of_stage(stage: Stage) -> str:
    """Return a digest of the code that does a stage: of its kind and its method. Comments do not count.

    Raises ValueError if the stage was planned with other code of a plug-in than this process has.
    """
    kind = registry.get("stage", stage.kind)
    classes = [kind]
    if kind.method_kind is not None:
        classes.append(class_of(kind.method_kind, stage.component))
    elif "metric" in stage.local:  # features: their code is that of the metric that asks for them
        classes.append(class_of("metric", stage.local["metric"]["component"]))
    else:
        class_of("stage", stage.component)
    if registry.is_outside(kind) and kind.method_kind is not None:
        class_of("stage", stage.component.partition("/")[2])
    return digest_of_json([registry.code_digest(cls) for cls in classes])[:16]


def made_by_other(stages: Mapping[str, Stage], committed: Iterable[str], store: Store) -> list[str]:
    """Return the keys of committed stages that were made by other code than is here, in the order of `stages`."""
    known: dict[tuple, bytes] = {}
    found, done = [], set(committed)
    for key, stage in stages.items():
        if key not in done:
            continue
        name = (stage.kind, stage.component, str(stage.local.get("metric", "")))
        if name not in known:
            known[name] = f'"code": "{of_stage(stage)}"'.encode()
        try:
            if known[name] not in store.raw_record(stage.kind, key):  # fast, for thousands of records
                found.append(key)
        except OSError:
            continue  # another process is making it anew
    return found


def with_dependents(stages: Mapping[str, Stage], keys: Iterable[str]) -> frozenset[str]:
    """Return the keys, and those of all stages that read one of them, directly or through others."""
    readers: dict[str, list[str]] = {}
    for key, stage in stages.items():
        for read in stage.inputs.values():
            readers.setdefault(read.key, []).append(key)
    found: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting += readers.get(key, ())
    return frozenset(found)
