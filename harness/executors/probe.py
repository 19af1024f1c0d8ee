"""Ask every node of a cluster, before any work, whether it can do the work and gives the results that others give.

Otherwise the first sign would be the death of a worker, or rows that were made by two versions of a package.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.core.files import sync_folder
from harness.executors import apart, node
from harness.executors.node import Answer, Question
from harness.executors.walk import Walk
from harness.stages.workplace import Workplace
from harness.store.object_words import StoreProblem
from harness.store.objects import Objects

ANSWER_S = 180.0
"""Seconds for a node's answer; the start of its first worker is included."""
ARRIVE_S = 15.0
"""Seconds until a file that a node wrote is seen here: network file systems keep what they know of a folder."""
SKEW_S = 20.0
"""Clocks may differ by so many seconds: a heartbeat of another machine is read by its age."""
PREFIX = ".probe-"
"""Folders of probes begin with this."""


def require(ray: Any, walk: Walk, workplace: Workplace) -> list[str]:
    """Ask all nodes that may do units; return lines for the user that describe them.

    Raises UserMistake with one line for each problem of each node.
    """
    nodes = [each for each in ray.nodes() if each["Alive"] and _works(each["Resources"])]
    nodes.sort(key=name_of)
    own = list(dict.fromkeys(str(folder) for folder in (workplace.run_folder, workplace.store)))
    folders = [] if workplace.is_apart else own
    with _probe_folders(folders) as probe, _probe_object(workplace, probe):
        question: Question = {
            "plugins": list(workplace.plugins),
            "reads": read_paths(walk, workplace),
            "shared": folders,
            "probe": probe,
            "store": workplace.store_url if workplace.is_apart else "",
            "own": own,
        }
        here = node.answer(question, "here")
        answers = _ask(ray, nodes, question)
        problems = []
        for each in nodes:
            given = answers[each["NodeID"]]
            named = name_of(each)
            if isinstance(given, str):
                problems.append(f"node {named}: {given}")
                continue
            unread = _not_arrived(folders, probe, each["NodeID"], given)
            problems += [f"node {named}: {line}" for line in differences(here, given, unread)]
    if problems:
        raise UserMistake(problems)
    return described(nodes, [answers[each["NodeID"]] for each in nodes])


def name_of(about: Mapping[str, Any]) -> str:
    """Return how a node is called in messages, from an entry of `ray.nodes()`."""
    return f"{about['NodeManagerHostname']} ({about['NodeManagerAddress']})"


def read_paths(walk: Walk, workplace: Workplace) -> list[str]:
    """Return what the stages to do read from outside the store: the model's folder, folders of images, files."""
    found: set[str] = set()
    if os.path.isabs(workplace.source.location):
        found.add(workplace.source.location)
    for index in walk.missing:
        stages = walk.unit(index).stages
        if workplace.is_apart and apart.reads_files_alone(walk.plan.stages[key] for key in stages):
            continue  # this machine does it
        for key in stages:
            for path in _paths_in(walk.plan.stages[key].local):
                found.add(path if os.path.isdir(path) else os.path.dirname(path))
    return sorted(found)


def _paths_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = value.values()
    elif isinstance(value, (str, Path)):
        if os.path.isabs(value):
            yield str(value)
        return
    if isinstance(value, Iterable):
        for each in value:
            yield from _paths_in(each)


def differences(here: Answer, there: Answer, unread: Sequence[str] = ()) -> Iterator[str]:
    """Yield what prevents a node from doing what this machine does: one line each, with what to do.

    `unread`: shared folders in which this machine does not see the file that the node wrote.
    """
    if there["error"]:
        yield (
            f"cannot import immunitybench ({one_line(there['error'])}) with {there['program']}; install it in the "
            "environment from which `ray start` is given there"
        )
    else:
        yield from _other_versions(here, there)
    for file, digest in there["plugins"].items():
        if not digest:
            yield f"does not see --plugin {file}; put the file where all nodes see it under one path"
        elif digest != here["plugins"][file]:
            yield f"--plugin {file} is another file there; put it where all nodes see the same one"
    for folder in there["unseen"]:
        yield (
            f"does not see the folder {folder} of this machine; results go to a file system that all nodes share under "
            "one path: name a folder on it with --runs, or give a store that needs none: --store s3://..."
        )
    for folder, why in there["unwritten"].items():
        yield f"cannot write into {folder}: {one_line(why)}; let the user that started Ray there write into it"
    for folder, why in there["unkept"].items():
        yield (
            f"cannot write into {folder}: {one_line(why)}; let the user that started Ray there write into it, or set "
            f"{apart.FOLDER} to another folder before `ray start` there"
        )
    if there["unstored"]:
        yield f"{there['unstored']} (variables are those with which `ray start` was given there)"
    for folder in unread:
        yield f"what it writes into {folder} does not arrive here within {ARRIVE_S:g} s; is it one file system?"
    if missing := [path for path in there["missing"] if path not in here["missing"]]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield f"does not see {missing[0]}{more}, which the suite reads; put it where all nodes see it under one path"
    skew = there["time"] - here["time"]  # the answer came later, so a clock that is ahead looks more so
    if not -SKEW_S <= skew <= SKEW_S + ANSWER_S:
        yield f"its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}; set the clocks of all nodes by NTP"


def _other_versions(here: Answer, there: Answer) -> Iterator[str]:
    if there["python"] != here["python"]:
        yield f"has Python {there['python']}, this machine {here['python']}; use one version"
    if there["immunitybench"] != here["immunitybench"]:
        yield (
            f"has immunitybench {there['immunitybench']}, this machine {here['immunitybench']}; install one version on "
            "all nodes"
        )
    elif there["code"] != here["code"]:
        yield "has other code of immunitybench than this machine, of the same version; bring both to one revision"
    names = sorted(here["packages"].keys() | there["packages"].keys())
    other = [name for name in names if here["packages"].get(name) != there["packages"].get(name)]
    if other:
        theirs, ours = (
            ", ".join(f"{name} {packages.get(name, 'missing')}" for name in other)
            for packages in (there["packages"], here["packages"])
        )
        yield f"has {theirs}, this machine {ours}; results would differ: install the same versions"


def described(nodes: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> list[str]:
    """Return lines that say which nodes there are, and whether their GPUs differ."""
    each = []
    for about, given in zip(nodes, answers, strict=True):
        cores = counted(int(about["Resources"].get("CPU", 0)), "CPU")
        gpus = [f"{name} {memory / 1024:.0f} GB" for name, memory in given["gpus"]]
        cards = [f"{gpus.count(card)} x {card}" for card in dict.fromkeys(gpus)]
        each.append(f"{name_of(about)} with {', '.join([cores, *cards])}")
    lines = [f"{counted(len(nodes), 'node')}: {'; '.join(each[:10])}{'; ...' if len(each) > 10 else ''}"]
    if len({name for given in answers for name, _ in given["gpus"]}) > 1:
        lines.append("the nodes have different GPUs: results of equal stages may differ in the last digits")
    return lines


def _works(resources: Mapping[str, float]) -> bool:
    """Return whether a node may get units: a head that was started with --num-cpus=0 does not."""
    return resources.get("CPU", 0) > 0


def _ask(ray: Any, nodes: Sequence[Mapping[str, Any]], question: Question) -> dict[str, Answer | str]:
    """Return each node's answer by its id, or why there is none."""
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.cloudpickle.register_pickle_by_value(node)  # also where the package is missing
    try:
        ask = ray.remote(num_cpus=0, max_retries=0)(node.answer)
        asked = {
            each["NodeID"]: ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(each["NodeID"], soft=False)
            ).remote(question, each["NodeID"])
            for each in nodes
        }
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node)
    answers: dict[str, Answer | str] = {}
    deadline = time.monotonic() + ANSWER_S
    for key, reference in asked.items():
        try:
            answers[key] = ray.get(reference, timeout=max(1.0, deadline - time.monotonic()))
        except GetTimeoutError:
            answers[key] = f"gave no answer within {ANSWER_S:g} s; see `ray status` and the logs of Ray there"
        except Exception as error:
            why = f"{type(error).__name__}: {one_line(error, 300)}"
            answers[key] = f"could not answer ({why}); see the logs of Ray there"
    return answers


@contextlib.contextmanager
def _probe_object(workplace: Workplace, name: str) -> Iterator[None]:
    """Write the object that each node must see in the store, if nodes share nothing else."""
    if not workplace.is_apart:
        yield
        return
    objects = Objects(workplace.store_url)
    objects.write(f"probes/{name}", name.encode())
    try:
        yield
    finally:
        with contextlib.suppress(StoreProblem):
            objects.remove(f"probes/{name}")


@contextlib.contextmanager
def _probe_folders(folders: Sequence[str]) -> Iterator[str]:
    """Make the probe folder with this machine's file in each folder; yield its name. Removed at the end."""
    name = f"{PREFIX}{uuid.uuid4().hex[:12]}"
    places = [Path(folder, name) for folder in folders]
    try:
        for place in places:
            place.mkdir(parents=True)
            place.chmod(0o777)  # a node's user may be another one
            (place / "driver").write_text(name, encoding="utf-8")
            sync_folder(place)
        yield name
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def _not_arrived(folders: Sequence[str], probe: str, name: str, given: Answer) -> list[str]:
    """Return the folders in which this machine does not see what the node wrote."""
    missing = [f for f in folders if f not in given["unseen"] and f not in given["unwritten"]]
    deadline = time.monotonic() + ARRIVE_S
    while missing and time.monotonic() < deadline:
        missing = [folder for folder in missing if name not in os.listdir(Path(folder, probe))]
        if missing:
            time.sleep(0.2)
    return missing
