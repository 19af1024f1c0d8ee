"""The Ray executor: Ray Tune walks the plan, with one unit per trial.

A Searcher returns units whose inputs are committed, returns None while none is ready, and ends when all units are done.
Units do not wait for each other otherwise; each worker has a process that keeps the model loaded between units
(`reuse_actors`, `Keeper`). Ray is started on loopback without its dashboard unless an address is given. Runs resume
from the store, so Tune's own experiment state is discarded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.contracts.stage import to_json
from harness.core import disk, machine, termination
from harness.core.counted import counted
from harness.core.errors import InputsLost, StageFailure, UserMistake, one_line
from harness.core.files import write_json
from harness.core.identity import Stage
from harness.executors import loopback, outcome
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


def run(walk: Walk, workplace: Workplace, listen: Listener, *, address: str | None = None) -> Summary:
    """Run the walk with Ray Tune. Raises UserMistake if Ray is missing or cannot be reached at `address`."""
    try:
        import ray
        from ray import tune
    except ImportError:
        raise UserMistake("Ray is not installed; install ray[tune] or add --executor serial") from None
    with _environment(), contextlib.ExitStack() as stack:
        scratch = stack.enter_context(own_scratch(workplace.run_folder))
        _start(ray, address, workplace, stack)
        stack.enter_context(termination.as_interrupt())  # after init, which sets a handler of Ray's
        stack.enter_context(_errors_to(workplace.run_folder / "logs" / "ray.log"))  # after init, which drops handlers
        _require_room(ray, walk, workplace, address)
        searcher = _make_searcher(walk, listen, scratch, workplace)

        def resources(config: Mapping[str, Any]):
            return tune.PlacementGroupFactory([_wanted(workplace, config.get("workers", 1))])

        trainable = tune.with_resources(
            tune.with_parameters(_do_unit, scratch=str(scratch), workplace=workplace, is_private=address is None),
            resources,
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_make_scheduler(searcher),
                metric="done",
                mode="max",
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="units",
                storage_path=str(scratch.resolve()),
                verbose=0,
                log_to_file=False,
                failure_config=tune.FailureConfig(max_failures=0),  # it counts one death twice; see on_trial_complete
            ),
        )
        is_interrupted = False
        try:
            tuner.fit()
        except KeyboardInterrupt:
            is_interrupted = True
        except Exception as error:
            if not disk.is_full(error):
                raise
            walk.stop(one_line(error, 300))  # Tune could not write to its scratch folder
    if not is_interrupted and not walk.stopped and not walk.is_finished:
        walk.abandon("Ray Tune ended before it was done; is the cluster large enough for resources.cpus and gpus?")
    return walk.summary(is_interrupted=is_interrupted)


def _wanted(workplace: Workplace, workers: int) -> dict[str, float]:
    """Return what a unit wants of one node; its processes are started by its Ray worker."""
    bundle = {"CPU": workplace.cpus * workers, "GPU": workplace.gpus * workers}
    return {name: value for name, value in bundle.items() if value}


def _require_room(ray, walk: Walk, workplace: Workplace, address: str | None) -> None:
    """Raise UserMistake if a unit wants more than any node has: Ray would wait for such a node for ever."""
    units = [walk.unit(index) for index in walk.missing]
    workers = max((walk.plan.stages[key].workers for unit in units for key in unit.stages), default=1)
    wanted = _wanted(workplace, workers)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes):
        return
    names = ("CPU", "GPU")
    there = sorted({", ".join(f"{node.get(name, 0):g} {name}" for name in names) for node in nodes})
    where = f"--ray-address {address}" if address else "this machine"
    asked = ", ".join(f"{value:g} {name}" for name, value in wanted.items())
    raise UserMistake(
        f"{where}: a unit wants {asked} on one node, but the nodes have {' | '.join(there[:5]) or 'nothing'}; change "
        "resources.cpus, resources.gpus or resources.workers, or add a node"
    )


def _start(ray, address: str | None, workplace: Workplace, stack: contextlib.ExitStack) -> None:
    """Start a private Ray on loopback, or join the cluster at `address`; it ends with the stack."""
    threads = {name: str(workplace.cpus) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": {**threads, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}},
        "log_to_driver": False,
        "configure_logging": False,
    }
    if address is None:
        cores = machine.cores()
        workers = workplace.sharding.workers
        if cores < workplace.cpus * workers:
            shared = f" and resources.workers {workers}" if workers > 1 else ""
            fitting = max(1, cores // workers)
            raise UserMistake(
                f"resources.cpus is {workplace.cpus}{shared}, but a run may use {counted(cores, 'core')} here; use "
                f"--set resources.cpus={fitting}{' --set resources.workers=1' if fitting * workers > cores else ''}"
            )
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": cores}
    else:
        options["address"] = address
    if address is None:
        stack.enter_context(loopback.only())
    try:
        with _quiet():
            ray.init(**options)
    except Exception as error:
        raise UserMistake(
            f"Ray cannot be started{f' at {address}' if address else ''}: {type(error).__name__}: {one_line(error)}; "
            "try --executor serial"
        ) from error
    stack.callback(ray.shutdown)
    if address is None:
        loopback.require()


@contextlib.contextmanager
def _quiet():
    """Drop what Ray says while it starts, such as how to switch its authentication off."""
    ray_log = logging.getLogger("ray")
    before = ray_log.level
    ray_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray_log.setLevel(before)


@contextlib.contextmanager
def _environment():
    """Reduce Ray's output and handle Ctrl-C here while it runs."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONWARNINGS": "ignore",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({n: v for n, v in wanted.items() if before[n] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _errors_to(path: Path):
    """Write Ray's errors (such as tracebacks of workers that die) to a file; drop its warnings."""
    ray_log = logging.getLogger("ray")
    before = ray_log.handlers[:], ray_log.level, ray_log.propagate
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ray_log.handlers[:], ray_log.propagate = [file], False
    ray_log.setLevel(logging.ERROR)  # Tune warns about result files, which are not used
    try:
        yield
    finally:
        file.close()
        ray_log.handlers[:], ray_log.level, ray_log.propagate = before


def _unit_file(scratch: Path, index: int) -> Path:
    return scratch / f"unit-{index}.json"


def _begun_file(scratch: Path, index: int, attempt: str) -> Path:
    return scratch / f"unit-{index}.begun.{attempt}"


_keeper = Keeper()
"""The keeper of this Ray worker: its process outlives the units."""


def _do_unit(config: Mapping[str, Any], scratch: str, workplace: Workplace, is_private: bool) -> None:
    """Do one unit in a worker. A failure of a stage is a result, reported to the searcher."""
    from ray import tune

    _begun_file(Path(scratch), config["unit"], uuid.uuid4().hex).touch()
    try:
        if is_private:
            loopback.require()
        unit = json.loads(_unit_file(Path(scratch), config["unit"]).read_text("utf-8"))
        _keeper.do(dict(unit), workplace)
    except (StageFailure, UserMistake) as failure:
        tune.report({"done": 0, "failure": str(failure), "lost": ""})
    except InputsLost as lost:
        tune.report({"done": 0, "failure": "", "lost": json.dumps([lost.keys, lost.messages])})
    else:
        tune.report({"done": 1, "failure": "", "lost": ""})


def _make_scheduler(searcher):
    """Return a scheduler that hands the error of a trial to the searcher, which is called next without it."""
    from ray.tune.schedulers import FIFOScheduler

    class ErrorsToSearcher(FIFOScheduler):
        """Runs trials in order."""

        def on_trial_error(self, tune_controller, trial):
            searcher.errors[trial.trial_id] = trial.get_error()

    return ErrorsToSearcher()


def _died(stages: Mapping[str, Stage], workplace: Workplace, error: Exception | None) -> str:
    """Record that the Ray worker of a unit died; return the message."""
    at_work = {beat.key for beat in heartbeat.read(workplace.run_folder)} & stages.keys()
    key = next(iter(at_work or not_committed(stages, workplace) or stages))
    words = one_line(error, 500) if error else "Ray gave no reason"
    if any(name in words for name in ("OutOfMemory", "low on memory", "out of memory")):
        words = f"killed for lack of memory by Ray's memory monitor; {deaths.LESS_MEMORY} ({words})"
    stage = stages[key]
    heartbeat.path_of(workplace.run_folder, stage.kind, key).unlink(missing_ok=True)
    lines = deaths.end_of([log_path(workplace.run_folder, stage.kind, key)])
    message = f"its worker died, with Ray's process: {words}; {deaths.in_words(lines)}"
    return str(record_failure(workplace.run_folder, stage.kind, key, stage.title, message, log=lines))


def _make_searcher(walk: Walk, listen: Listener, scratch: Path, workplace: Workplace):
    """Return the Searcher over the walk; defined in a function, since its base class needs Ray."""
    from ray.tune.search import Searcher

    class PlanSearcher(Searcher):
        """Returns ready units of the plan as Tune trials."""

        def __init__(self):
            super().__init__(metric="done", mode="max")
            self.units: dict[str, int] = {}
            self.tries: Counter[int] = Counter()
            self.errors: dict[str, Exception | None] = {}

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
            write_json(_unit_file(scratch, index), [(k, to_json(walk.plan.stages[k])) for k in walk.unit(index).stages])
            listen("unit_started", {"unit": walk.unit(index).name})
            return {"unit": index, "workers": max(walk.plan.stages[k].workers for k in walk.unit(index).stages)}

        def on_trial_complete(self, trial_id, result=None, error=False):
            index = self.units.pop(trial_id, None)
            if index is None:
                return
            message = (result or {}).get("failure", "")
            if not message and (error or result is None):
                begun = list(scratch.glob(_begun_file(scratch, index, "*").name))
                if len(begun) <= RETRIES and self.tries[index] < _MOST_TRIES:
                    walk.give_back(index)
                    return
                stages = {key: walk.plan.stages[key] for key in walk.unit(index).stages}
                message = _died(stages, workplace, self.errors.pop(trial_id, None))
            if message:
                outcome.failed(walk, index, message, listen)
            elif result["lost"]:
                outcome.inputs_lost(walk, index, *json.loads(result["lost"]), listen)
            else:
                outcome.done(walk, index, listen)

        def save(self, checkpoint_path):
            """Save nothing: the store records what is done."""

        def restore(self, checkpoint_path):
            """Restore nothing: the store records what is done."""

        def __reduce__(self):  # Tune pickles its arguments; nothing needs restoring
            return object, ()

    return PlanSearcher()
