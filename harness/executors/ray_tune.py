"""The Ray executor: Ray Tune walks the plan, with one unit per trial.

A Searcher returns units whose inputs are committed, returns None while none is ready, and ends when all units are done.
Units do not wait for each other otherwise; each worker has a process that keeps the model loaded between units
(`reuse_actors`, `Keeper`). As many units are handed out in advance as there are workers: Tune's usual limit is one, and
then workers start one after the other and wait for it. Ray is started on loopback without its dashboard unless an
address is given. Runs resume from the store, so Tune's own experiment state is discarded.
"""

from __future__ import annotations

import contextlib
import json
import platform
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.contracts.stage import to_json
from harness.core import disk, termination
from harness.core.errors import InputsLost, StageFailure, UserMistake, one_line
from harness.core.files import write_json
from harness.core.identity import Stage
from harness.executors import apart, joining, loopback, outcome, probe, rank_actors, ray_session
from harness.executors.events import Listener
from harness.executors.keeper import Keeper
from harness.executors.scratch import own_scratch
from harness.executors.walk import Summary, Walk
from harness.stages import deaths, heartbeat
from harness.stages.execution import log_path, not_committed, record_failure
from harness.stages.workplace import Workplace

RETRIES = 1
"""How often a unit is begun again after its Ray worker died, such as with its machine. Deaths of the process that does
the stages are counted by `Keeper`."""
_MOST_TRIES = 10
"""How often a unit is handed out: Tune may hand it to a worker that is dead already, which then never began."""


def run(
    walk: Walk,
    workplace: Workplace,
    listen: Listener,
    *,
    address: str | None = None,
    last_words: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """Run the walk with Ray Tune. Raises UserMistake if Ray is missing or cannot be reached at `address`.

    `last_words`: called in another thread with the summary, if the head of the cluster is lost and Ray does not let
    this thread go; then the process ends with exit code 1.
    """
    try:
        import ray
        from ray import tune
    except ImportError:
        raise UserMistake("Ray is not installed; install ray[tune] or add --executor serial") from None
    lost = ""
    why = f"the head of the Ray cluster at {address} does not answer any more"
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(own_scratch(workplace.run_folder))
        log = workplace.run_folder / "logs" / "ray.log"
        if address is not None:
            stack.enter_context(ray_session.standard_error_to(log))

        def ending() -> None:
            last_words(walk.summary(lost=why))

        head = stack.enter_context(ray_session.opened(ray, address, workplace, ending))
        stack.enter_context(termination.as_interrupt())  # after init, which sets a handler of Ray's
        stack.enter_context(ray_session.errors_to(log))  # after init, which drops handlers
        if address is not None:
            for line in probe.require(ray, walk, workplace):
                listen("notice", {"message": f"cluster: {line}"})
        if workplace.is_apart:
            apart.do_what_reads_files(walk, workplace, listen)
        is_spread = _is_spread(ray, walk, workplace, address)
        stack.enter_context(joining.variables({"TUNE_MAX_PENDING_TRIALS_PG": str(_most_workers(ray, workplace))}))
        searcher = _make_searcher(walk, listen, scratch, workplace)

        def resources(config: Mapping[str, Any]):
            workers = config.get("workers", 1)
            if is_spread and workers > 1:  # on as few nodes as possible
                return tune.PlacementGroupFactory([_wanted(workplace, 1)] * workers, strategy="PACK")
            return tune.PlacementGroupFactory([_wanted(workplace, workers)])

        place = _Place(str(scratch), workplace, address is None, is_spread)
        trainable = tune.with_resources(tune.with_parameters(_make_trainable(), place=place), resources)
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_make_scheduler(searcher),
                metric="begun",
                mode="max",
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="units",
                storage_path=str(scratch.resolve()),
                verbose=0,
                log_to_file=False,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the store has it all
                failure_config=tune.FailureConfig(max_failures=0),  # it counts one death twice; see on_trial_complete
            ),
        )
        is_interrupted = False
        try:
            with head.watched() if head else contextlib.nullcontext():
                tuner.fit()
        except KeyboardInterrupt:
            is_interrupted = head is None or not head.is_lost
        except Exception as error:
            if head is not None and not head.answers():
                head.is_lost = True  # Ray noticed first
            elif not disk.is_full(error):
                raise
            else:
                walk.stop(one_line(error, 300))  # Tune could not write to its scratch folder
        if head is not None and head.is_lost:
            lost = why
    if lost:
        return walk.summary(lost=lost)
    if not is_interrupted and not walk.stopped and not walk.is_finished:
        walk.abandon("Ray Tune ended before it was done; is the cluster large enough for resources.cpus and gpus?")
    return walk.summary(is_interrupted=is_interrupted)


def _wanted(workplace: Workplace, workers: int) -> dict[str, float]:
    """Return what a unit wants of one node; its processes are started by its Ray worker."""
    bundle = {"CPU": workplace.cpus * workers, "GPU": workplace.gpus * workers}
    return {name: value for name, value in bundle.items() if value}


def _most_workers(ray, workplace: Workplace) -> int:
    """Return how many units may be done at once on the nodes that are there."""
    wanted = _wanted(workplace, 1)
    return max(1, sum(_room(node["Resources"], wanted) for node in ray.nodes() if node["Alive"]))


def _is_spread(ray, walk: Walk, workplace: Workplace, address: str | None) -> bool:
    """Return whether the processes of a shared stage must be on several nodes, since none has room for all.

    Raises UserMistake if there is no room at all: Ray would wait for it for ever.
    """
    units = [walk.unit(index) for index in walk.missing]
    workers = max((walk.plan.stages[key].workers for unit in units for key in unit.stages), default=1)
    wanted = _wanted(workplace, workers)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [_room(node, wanted) for node in nodes]
    if any(rooms):
        return False
    if address and workers > 1 and sum(_room(node, _wanted(workplace, 1)) for node in nodes) >= workers:
        if workplace.is_apart:
            raise UserMistake(
                f"resources.workers: {workers} processes share a training, and no node has room for all of them; on "
                "several nodes they need a results folder that these share: give --store none (see docs/clusters.md), "
                "or change resources"
            )
        return True
    names = ("CPU", "GPU")
    there = sorted({", ".join(f"{node.get(name, 0):g} {name}" for name in names) for node in nodes})
    where = f"--ray-address {address}" if address else "this machine"
    asked = ", ".join(f"{value:g} {name}" for name, value in wanted.items())
    raise UserMistake(
        f"{where}: a unit wants {asked} on one node, but the nodes have {' | '.join(there[:5]) or 'nothing'}; change "
        "resources.cpus, resources.gpus or resources.workers, or add a node"
    )


def _room(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """Return how often a node has the resources that are wanted."""
    return min(int((node.get(name, 0) + 1e-9) // value) for name, value in wanted.items())


def _unit_file(scratch: Path, index: int) -> Path:
    return scratch / f"unit-{index}.json"


def _stop_file(scratch: Path) -> Path:
    return scratch / "stopped"


def _begun_file(scratch: Path, index: int, attempt: str) -> Path:
    return scratch / f"unit-{index}.begun.{attempt}"


_keeper = Keeper()
"""The keeper of this Ray worker: its process outlives the units."""


@dataclass(frozen=True)
class _Place:
    """What the workers of a run share."""

    scratch: str
    workplace: Workplace
    is_private: bool  # Ray was started for this run
    is_spread: bool  # processes of a shared stage are on several nodes


def _make_trainable():
    """Return the Trainable that does units; defined in a function, since its base class needs Ray.

    It is a class: of a function, Tune notices the end only when it looks again, some tenths of a second later.
    """
    from ray.tune import Trainable

    class UnitOfWork(Trainable):
        """Does the unit of a trial; the next trial of this worker resets it."""

        def setup(self, config: dict[str, Any], place: _Place) -> None:
            self._place = place
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._results = _do_unit(new_config, self._place)
            return True

        def step(self) -> dict[str, Any]:
            return next(self._results)

    return UnitOfWork


def _do_unit(config: Mapping[str, Any], place: _Place) -> Iterator[dict[str, Any]]:
    """Do one unit in a worker; yield results for the searcher, the last one `done`. A stage's failure is a result."""
    import ray

    workplace = place.workplace
    node = "" if place.is_private else f"{platform.node()} ({ray.util.get_node_ip_address()})"
    result = {"failure": "", "lost": "", "node": node, "begun": 1, "said": ""}
    if workplace.is_apart:
        yield result
        workplace = apart.here(workplace)
        unit = dict(apart.unpacked(config["stages"]))
    else:
        if _stop_file(Path(place.scratch)).exists():
            yield {**result, "begun": 0, "done": True}
            return
        _begun_file(Path(place.scratch), config["unit"], uuid.uuid4().hex).touch()
        unit = dict(json.loads(_unit_file(Path(place.scratch), config["unit"]).read_text("utf-8")))
    try:
        if place.is_private:
            loopback.require()
        if place.is_spread and config["workers"] > 1:
            _do_spread(unit, workplace, config["workers"], ray.util.get_node_ip_address())
        else:
            _keeper.do(unit, workplace)
    except (StageFailure, UserMistake) as failure:
        result["failure"] = str(failure)
    except InputsLost as lost:
        result["lost"] = json.dumps([lost.keys, lost.messages])
    if workplace.is_apart:
        result["said"] = apart.gathered(workplace, unit)
    yield {**result, "done": True}


def _do_spread(stages: dict[str, dict[str, Any]], workplace: Workplace, workers: int, address: str) -> None:
    """Do a unit whose shared stages have their processes on several nodes, each in a bundle of this trial.

    Raises RuntimeError if it failed since one of the nodes was lost: then the unit is begun again.
    """
    with rank_actors.reserved(workers - 1, _wanted(workplace, 1)) as actors:
        try:
            _keeper.do(stages, replace(workplace, rank_hosts=actors.places, address=address))
        except StageFailure as failure:
            if lost := actors.lost():
                raise RuntimeError(f"node {', '.join(lost)} was lost: {failure}") from failure
            raise


def _make_scheduler(searcher):
    """Return a scheduler that hands the error of a trial to the searcher, which is called next without it."""
    from ray.tune.schedulers import FIFOScheduler

    class ErrorsToSearcher(FIFOScheduler):
        """Runs trials in order."""

        def on_trial_error(self, tune_controller, trial):
            searcher.errors[trial.trial_id] = trial.get_error()

    return ErrorsToSearcher()


def _died(stages: Mapping[str, Stage], workplace: Workplace, error: Exception | None, node: str = "") -> str:
    """Record that the Ray worker of a unit died; return the message. `node`: where, if nodes share no folder."""
    at_work = {beat.key for beat in heartbeat.read(workplace.run_folder)} & stages.keys()
    key = next(iter(at_work or not_committed(stages, workplace) or stages))
    words = one_line(error, 500) if error else "Ray gave no reason"
    if any(name in words for name in ("OutOfMemory", "low on memory", "out of memory")):
        words = f"killed for lack of memory by Ray's memory monitor; {deaths.LESS_MEMORY} ({words})"
    stage = stages[key]
    heartbeat.path_of(workplace.run_folder, stage.kind, key).unlink(missing_ok=True)
    lines = deaths.end_of([log_path(workplace.run_folder, stage.kind, key)])
    ending = f"its log is on node {node}" if node else deaths.in_words(lines)
    message = f"its worker died, with Ray's process: {words}; {ending}"
    return str(record_failure(workplace.run_folder, stage.kind, key, stage.title, message, log=lines))


def _make_searcher(walk: Walk, listen: Listener, scratch: Path, workplace: Workplace):
    """Return the Searcher over the walk; defined in a function, since its base class needs Ray."""
    from ray.tune.search import Searcher

    class PlanSearcher(Searcher):
        """Returns ready units of the plan as Tune trials."""

        def __init__(self):
            super().__init__(metric="begun", mode="max")
            self.units: dict[str, int] = {}
            self.tries: Counter[int] = Counter()
            self.errors: dict[str, Exception | None] = {}
            self.begun: dict[int, list[str]] = {}  # nodes on which a unit was begun, if they share no folder

        def set_search_properties(self, metric, mode, config, **spec):
            return True

        def suggest(self, trial_id):
            if walk.is_finished:
                return Searcher.FINISHED
            index = walk.take()
            if index is None:
                return None
            self.units[trial_id] = index
            self.tries[index] += 1
            # a list, since stages are done in this order
            described = [(k, to_json(walk.plan.stages[k])) for k in walk.unit(index).stages]
            config = {"unit": index, "workers": max(walk.plan.stages[k].workers for k in walk.unit(index).stages)}
            if workplace.is_apart:
                config["stages"] = apart.packed(described)
            else:
                write_json(_unit_file(scratch, index), described)
            listen("unit_started", {"unit": walk.unit(index).name})
            return config

        def on_trial_result(self, trial_id, result):
            if not result["done"] and trial_id in self.units:
                self.begun.setdefault(self.units[trial_id], []).append(result["node"])

        def on_trial_complete(self, trial_id, result=None, error=False):
            index = self.units.pop(trial_id, None)
            if index is None:
                return
            stages = {key: walk.plan.stages[key] for key in walk.unit(index).stages}
            message = (result or {}).get("failure", "")
            if result is not None and result.get("said"):
                apart.received(result["said"], workplace.run_folder, stages, listen)
            if not (error or result is None) and not result["begun"]:  # it was handed out in advance
                walk.give_back(index)
                return
            if not message and (error or result is None):
                begun = self.begun.get(index, []) or list(scratch.glob(_begun_file(scratch, index, "*").name))
                if len(begun) <= RETRIES and self.tries[index] < _MOST_TRIES:
                    walk.give_back(index)
                    return
                node = begun[-1] if workplace.is_apart and begun else ""
                message = _died(stages, workplace, self.errors.pop(trial_id, None), node)
            if message:
                outcome.failed(walk, index, message, listen)
                if walk.stopped:
                    _stop_file(scratch).touch()
            elif result["lost"]:
                outcome.inputs_lost(walk, index, *json.loads(result["lost"]), listen)
            else:
                outcome.done(walk, index, listen, result["node"])

        def save(self, checkpoint_path):
            """Save nothing: the store records what is done."""

        def restore(self, checkpoint_path):
            """Restore nothing: the store records what is done."""

        def __reduce__(self):  # Tune pickles its arguments; nothing needs restoring
            return object, ()

    return PlanSearcher()
