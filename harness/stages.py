"""How one stage is done. Each function reads committed stages, computes, and fills a folder that is then committed.

`execute` is what every executor calls, in whichever process: the same stage gives the same result and the same key.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness import parameters, pictures, provenance, registry, search
from harness.concepts import PRIOR, SPLITS
from harness.errors import StageFailure, one_line
from harness.identity import Stage, describe
from harness.model_source import ModelSource
from harness.run import CHECKPOINT_INTERVAL_S, Run, Sharding
from harness.store import Store, sync_files, write_json
from harness.tracking import tracker
from harness.words import Words

if TYPE_CHECKING:
    from attacks.base import Checkpoint
    from harness.protection import Protection

log = logging.getLogger("immunitybench")


@dataclass(frozen=True)
class Workplace:
    """What a process needs to do stages of a run; plain data, so that it can be sent to workers."""

    store: Path
    run_folder: Path  # logs/ and failures/ lie here
    source: ModelSource
    plugins: tuple[str, ...] = ()
    cpus: int = 1
    gpus: float = 0.0
    redo: frozenset[str] = field(default_factory=frozenset)  # keys to do anew although committed (--cache never)
    executor: str = "serial"
    is_tracked: bool = False  # write training curves for TensorBoard
    sharding: Sharding = field(default_factory=Sharding)  # of the stages that can be shared by processes
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S


def execute(
    key: str, stage: Stage, workplace: Workplace, report: Callable[[int, int], None] = lambda done, total: None
) -> bool:
    """Do one stage and commit it; return whether there was something to do.

    Raises StageFailure after recording what went wrong in the run's failures folder. KeyboardInterrupt passes through.
    """
    store = Store(workplace.store)
    redo = key in workplace.redo
    if not redo and store.has(stage.kind, key):
        return False
    failure = failure_path(workplace.run_folder, stage.kind, key)
    with (
        _logged(workplace.run_folder / "logs" / f"{stage.kind}-{key}.log"),
        store.locked_work_folder(stage.kind, key) as work_folder,
    ):
        if not redo and store.has(stage.kind, key):  # another process did it while we waited for the lock
            return False
        try:
            _execute_locked(key, stage, workplace, store, work_folder, report, redo)
        except Exception as error:
            log.exception("stage failed: %s", stage.label)
            _forget_model()
            failure.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                failure,
                {
                    "key": key,
                    "kind": stage.kind,
                    "label": stage.label,
                    "error": f"{type(error).__name__}: {one_line(error, 500)}",
                    "traceback": traceback.format_exc(),
                    "time": time.time(),
                },
            )
            raise StageFailure(f"{stage.label}: {type(error).__name__}: {one_line(error)}") from error
    failure.unlink(missing_ok=True)
    return True


def _forget_model() -> None:
    """Drop the warm model: a method that raised may have left anything behind."""
    models = sys.modules.get("harness.models")
    if models is not None:
        models.forget()


def execute_unit(
    stages: Mapping[str, Stage], workplace: Workplace, report: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Do the stages of a unit in order, each committed by itself; return how many there were to do.

    A stage that fails does not stop those of the unit that do not need it. Raises StageFailure at the end when any
    failed.
    """
    done = 0
    failed: dict[str, str] = {}
    for key, stage in stages.items():
        if failed.keys() & set(stage.inputs.values()):
            failed[key] = ""
            continue
        try:
            done += execute(key, stage, workplace, report)
        except StageFailure as failure:
            failed[key] = str(failure)
    if failed:
        raise StageFailure("; ".join(message for message in failed.values() if message))
    return done


def failure_path(run_folder: Path, kind: str, key: str) -> Path:
    """Return where the failure of a stage is recorded; failures are never part of the store."""
    return run_folder / "failures" / f"{kind}-{key}.json"


def _execute_locked(
    key: str, stage: Stage, workplace: Workplace, store: Store, work_folder: Path, report, redo: bool
) -> None:
    import torch

    device = prepare_device(workplace)
    log.info("%s %s: %s", stage.kind, key, stage.label)
    started = time.time()
    clock = time.perf_counter()
    curves = workplace.run_folder / "tensorboard" / f"{stage.kind}-{key}" if workplace.is_tracked else None
    with tracker(curves) as track, store.writing(stage.kind, key, replace=redo) as (folder, record):
        run = Run(
            stage.seed,
            device,
            stage.precision,
            work_folder,
            report=report,
            track=track,
            checkpoint_interval_s=workplace.checkpoint_interval_s,
        )
        if _is_shared(stage, workplace):
            from harness.training import ranks

            _forget_model()  # it would stand beside those of the processes
            ledger = ranks.run(stage, workplace, work_folder, folder, report)
        else:
            run.sharding = replace(workplace.sharding, workers=1, offload="none")
            _DO[stage.kind](_Stage(stage, workplace, store, run, folder))
            run.ledger.peak_memory_bytes = peak_memory_bytes(device)
            ledger = run.ledger.as_json()
        seconds = time.perf_counter() - clock
        record.update(
            identity=describe(stage),
            key=key,
            label=stage.label,
            work=stage.work,
            seconds=round(seconds, 4),
            started=started,
            finished=time.time(),
            ledger=ledger,
            provenance={
                **provenance.describe(),
                "executor": workplace.executor,
                "threads": workplace.cpus,
                "sharding": asdict(workplace.sharding) if _is_shared(stage, workplace) else {},
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            },
        )
    log.info("done in %.1f s", seconds)


def prepare_device(workplace: Workplace, local_rank: int = 0):
    """Return the torch device of a stage (or of one of its processes), set up so that results can be repeated.

    Raises RuntimeError when the suite gives stages a GPU and there is none here.
    """
    import torch

    torch.set_num_threads(workplace.cpus)  # of this thread: results depend on how sums are split
    if workplace.gpus <= 0:
        _reset_peak_memory()
        return torch.device("cpu")
    if torch.cuda.device_count() <= local_rank:
        raise RuntimeError("the suite gives each stage a GPU, but this worker sees too few")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    torch.cuda.reset_peak_memory_stats(device)
    return device


def _is_shared(stage: Stage, workplace: Workplace) -> bool:
    """Tell whether several processes do the stage: one that trains, by a method that can be spread."""
    sharding = workplace.sharding
    if not sharding.needs_deepspeed or stage.workers != sharding.workers:
        return False
    name = stage.component.partition("@")[0]
    if stage.kind in ("erase", "immunize"):
        return registry.get("defense", name).can_shard
    if stage.kind != "adapt":
        return False
    cls = registry.get("attack", name)
    given = {**stage.parameters["parameters"], **stage.local.get("parameters", {})}
    values, mistakes = parameters.resolve(cls, given)
    return not mistakes and cls.can_share(values)


def _reset_peak_memory() -> None:
    """Start a new peak of this process's memory where the system can (Linux); elsewhere it stays the process's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device) -> int:
    """Return the stage's peak of the device's memory, or on a CPU of this process's."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send logging, stdout and stderr of the block to a file of the stage's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        level, propagate = log.level, root.level
        root.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            root.removeHandler(handler)
            log.setLevel(level)
            root.setLevel(propagate)


# -- the kinds of stage ------------------------------------------------------------------------------------


@dataclass
class _Stage:
    """One stage being done: its description and surroundings, with the steps that several kinds share."""

    stage: Stage
    workplace: Workplace
    store: Store
    run: Run
    folder: Path  # becomes the committed folder

    def input(self, role: str, kind: str) -> Path:
        """Return the folder of a committed input."""
        return self.store.path(kind, self.stage.inputs[role])

    def files(self, role: str, split: str) -> list[Path]:
        """Return the images of a split of an `images` input, in order."""
        return sorted((self.input(role, "images") / split).glob("*.png"))

    def method(
        self, kind: str, described: Mapping[str, Any] | None = None, local: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        """Return the method of the stage, or another that its parameters describe, with its parameters."""
        component = described["component"] if described else self.stage.component
        own = described["parameters"] if described else self.stage.parameters["parameters"]
        cls = registry.get(kind, component.partition("@")[0])
        given = {**own, **(local if described else self.stage.local.get("parameters", {}))}
        values, mistakes = parameters.resolve(cls, given)
        if mistakes:
            raise ValueError("; ".join(message for _, message in mistakes))
        return cls(values)

    def base(self):
        """Return the base model in its released state."""
        from harness.models import warm

        with self.run.ledger.phase("load"):
            return warm(self.workplace.source, self.run.device)

    def released(self):
        """Return (model, protection): the base, erased if the task erases, with the defense's changes over it.

        An attacker who restores components has the base model's tensors there in the place of the defense's.
        """
        from harness.protection import Protection

        model = self.base()
        protection, changed = Protection(), {}
        for role in ("erase", "immunize"):
            if role in self.stage.inputs:
                protection = Protection.load(self.input(role, role))
                changed |= protection.tensors
        restored = tuple(f"{component}." for component in self.stage.parameters.get("restore", ()))
        if restored:
            changed = {n: t for n, t in changed.items() if not (n in protection.tensors and n.startswith(restored))}
        model.overlay(changed)
        return model, protection


def _images(s: _Stage) -> None:
    """Lay out images of a concept or of a class: <split>/<number>.png, drawn by the base model or copied."""
    from PIL import Image

    described = s.stage.parameters
    if "prompts" in described:
        from harness.sampling import sample

        model = s.base()
        total = sum(len(p) for p in described["prompts"].values())
        done = 0
        for split, prompts in described["prompts"].items():
            folder = s.folder / split
            folder.mkdir()
            with s.run.ledger.phase("sample"):
                drawn = sample(
                    model, s.run, prompts, described["sampling"],
                    images_per_prompt=1, seed=s.run.seed_for(split),
                )  # fmt: skip
                for index, _, image in drawn:
                    image.save(folder / f"{index:04d}.png")
                    done += 1
                    s.run.report(done, total)
        return
    local = s.stage.local
    for split in SPLITS:
        folder = s.folder / split
        folder.mkdir()
        if local["source"] == "catalog":
            from harness.testbed import images as testbed_images

            pictures = testbed_images.read(local["images"][split])
        else:
            pictures = [Image.open(Path(local["folder"]) / name).convert("RGB") for name in local["images"][split]]
        for index, picture in enumerate(pictures):
            picture.save(folder / f"{index:04d}.png")


def share_here(stage: Stage, workplace: Workplace, store: Store, run: Run, folder: Path) -> None:
    """Do a stage as one of the processes that share it; the first fills `folder`."""
    _DO[stage.kind](_Stage(stage, workplace, store, run, folder))


def _protect(s: _Stage) -> None:
    """Run a defense (as eraser or immunizer) and keep its protection."""
    from defenses.base import ProtectedConcept

    defense = s.method("defense")
    concepts = {
        role: [
            ProtectedConcept(
                kind=c["kind"],
                phrase=c["phrase"],
                captions=tuple(c.get("captions", ())),
                files=tuple(s.files(f"{role}.{i}", "defense")) if "images" in defense.uses else (),
                prior_captions=tuple(c.get("prior_captions", ())),
                prior_files=tuple(s.files(f"prior.{i}", PRIOR)) if "prior_captions" in c else (),
            )
            for i, c in enumerate(s.stage.parameters.get(role, ()))
        ]
        for role in ("targets", "preserved")
    }
    model, _ = s.released()
    known = {name: p.shape for name, p in model.parameters().items()}
    returned = defense.protect(model, concepts["targets"], concepts["preserved"], s.run)
    # copied at once: a defense may return the model's own tensors, which are put back before the next stage
    tensors = {name: t.detach().to("cpu", copy=True) for name, t in returned.tensors.items()}
    protection = replace(returned, tensors=tensors)
    for name, tensor in protection.tensors.items():
        if known.get(name) != tensor.shape:
            raise ValueError(
                f"{defense.name} returned '{name}' of shape {tuple(tensor.shape)}, but the model has "
                f"{'no such parameter' if name not in known else tuple(known[name])}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{defense.name} returned '{name}' with values that are not finite")
    unknown = sorted(protection.frozen - known.keys())
    if unknown:
        raise ValueError(f"{defense.name} froze '{unknown[0]}', which the model does not have")
    s.run.ledger.numbers["changed_tensors"] = len(protection.tensors)
    s.run.ledger.numbers["frozen_tensors"] = len(protection.frozen)
    if s.run.world.rank == 0:
        protection.save(s.folder)


def _adapt(s: _Stage) -> None:
    """Run an attack, tuned where probes went before, and keep the adapted model at each step of its trajectory."""
    attack = s.method("attack")
    probes = _probes(s)
    if probes:
        chosen = search.best(probes)
        attack = _with(attack, chosen.values)
        found = {"chosen": chosen.values, "score": chosen.score, "probes": [asdict(probe) for probe in probes]}
        if s.run.world.rank == 0:
            write_json(s.folder / "search.json", found)
    saved = _trajectory(s, attack)
    if s.run.world.rank == 0:
        shutil.copytree(saved, s.folder / "checkpoints", copy_function=os.link)


def _probe(s: _Stage) -> None:
    """Try other settings of an attack on a part of the attacker's images: probe.json says which, and how it went."""
    from harness.sampling import sample

    described = s.stage.parameters
    attack = s.method("attack")
    values = search.propose(described["space"], s.run.seed_for("study"), _probes(s), described["place"])
    attack = _with(attack, values)
    try:
        saved = _trajectory(s, attack, described["held_out"])
    except FloatingPointError as error:
        log.info("diverged: %s", error)
        write_json(s.folder / "probe.json", {"values": values, "score": None, "scores": {}})
        return
    metric = s.method("metric", described["metric"], s.stage.local.get("metric", {}))
    count = described["budget"]["images"]
    own = pictures.read(s.files("images", "attack")[:count][-described["held_out"] :])
    model, protection = s.released()
    hooks = _sampling_hooks(protection)
    scores = {}
    for step in described["budget"]["steps"]:
        attack.load(model, saved / step_folder(step))
        try:
            with s.run.ledger.phase("sample"):
                drawn = [
                    [image]
                    for _, _, image in sample(
                        model, s.run, described["prompts"], described["sampling"],
                        images_per_prompt=1, seed=s.run.seed_for("sampling"), hooks=hooks,
                    )
                ]  # fmt: skip
        finally:
            attack.unload(model)
        with s.run.ledger.phase("score"):
            scored = metric.score(drawn, own, described["descriptions"], s.run.device)
        scores[step] = (1 if metric.direction == "higher" else -1) * sum(scored) / len(scored)
    mean = sum(scores.values()) / len(scores)
    write_json(s.folder / "probe.json", {"values": values, "score": mean, "scores": scores})


def _probes(s: _Stage) -> list[search.Probe]:
    """Return the probes that the stage knows of, in order."""
    roles = sorted((r for r in s.stage.inputs if r.startswith("probe.")), key=lambda r: int(r.partition(".")[2]))
    found = [json.loads((s.input(role, "probe") / "probe.json").read_text(encoding="utf-8")) for role in roles]
    return [search.Probe(each["values"], each["score"]) for each in found]


def _with(attack: Any, values: Mapping[str, Any]) -> Any:
    """Return an attack with some parameters changed."""
    given = {**parameters.as_json(attack.parameters), **values}
    resolved, mistakes = parameters.resolve(type(attack), given)
    if mistakes:
        raise ValueError("; ".join(message for _, message in mistakes))
    return type(attack)(resolved)


def _trajectory(s: _Stage, attack: Any, held_out: int = 0) -> Path:
    """Run an attack on all but the last `held_out` images; return the folder with a folder of each step."""
    from attacks.base import AttackedConcept, Budget

    described = s.stage.parameters
    budget, known = described["budget"], described["concept"]
    files = s.files("images", "attack")[: budget["images"]]
    files = files[: len(files) - held_out]
    prior = attack.prior_images(attack.parameters)
    concept = AttackedConcept(
        kind=known["kind"],
        captions=tuple(known["captions"][: len(files)]),
        files=tuple(files),
        words=Words(**known.get("words", {"name": known["called"]})),
        called=known["called"],
        prior_captions=tuple(known["prior_captions"][:prior]) if prior else (),
        prior_files=tuple(s.files("prior", PRIOR)[:prior]) if prior else (),
    )
    model, protection = s.released()
    saved = s.run.folder / "checkpoints"  # survives a kill, like the state that training goes on from
    saved.mkdir(exist_ok=True)
    steps = tuple(budget["steps"])
    kept = s.run.load_state()
    if kept is not None and any(step <= kept[0] and not (saved / step_folder(step)).is_dir() for step in steps):
        s.run.drop_state()  # a checkpoint that was passed is gone: only a fresh start can give it again
    s.run.world.wait()  # before any process saves one
    for checkpoint in attack.adapt(
        model, concept, protection, Budget(steps, budget["batch_size"], described["attacker"]), s.run
    ):
        if s.run.world.rank == 0:
            _keep(checkpoint, saved)
        s.run.world.wait()
    missing = [step for step in steps if not (saved / step_folder(step)).is_dir()]
    if missing:
        raise RuntimeError(f"{attack.name} yielded no checkpoint at steps {missing}")
    return saved


def _keep(checkpoint: Checkpoint, saved: Path) -> None:
    """Save a checkpoint into a folder of its step, whole or not at all."""
    final = saved / step_folder(checkpoint.step)
    temporary = saved / f".{final.name}"
    for folder in (temporary, final):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir()
    checkpoint.save(temporary)
    sync_files(temporary)  # before the state that is beyond this step is kept
    temporary.rename(final)


def _sample(s: _Stage) -> None:
    """Draw the evaluation images at every step asked for: images/<step>/<prompt>_<image>.png."""
    from harness.sampling import sample

    described = s.stage.parameters
    settings = described["sampling"]
    model, protection = s.released()
    hooks = _sampling_hooks(protection)
    attack, checkpoints = None, None
    if "adapt" in s.stage.inputs:
        record = s.store.record("adapt", s.stage.inputs["adapt"])
        attack = registry.get("attack", record["identity"]["component"].partition("@")[0])(None)
        checkpoints = s.input("adapt", "adapt") / "checkpoints"
    saved = s.run.folder / "images"
    saved.mkdir(exist_ok=True)
    total = len(described["steps"]) * len(described["prompts"]) * settings["images_per_prompt"]
    done = 0
    for step in described["steps"]:
        final, temporary = saved / step_folder(step), saved / f".{step_folder(step)}"
        if final.is_dir():  # drawn before a kill
            done += len(list(final.iterdir()))
            continue
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if checkpoints is not None:
            attack.load(model, checkpoints / step_folder(step))
        try:
            with s.run.ledger.phase("sample"):
                for prompt, index, image in sample(
                    model, s.run, described["prompts"], settings,
                    images_per_prompt=settings["images_per_prompt"], seed=s.run.seed, hooks=hooks,
                ):  # fmt: skip
                    image.save(temporary / f"{prompt:03d}_{index:03d}.png")
                    done += 1
                    s.run.report(done, total)
        finally:
            if checkpoints is not None:
                attack.unload(model)
        temporary.rename(final)
    shutil.copytree(saved, s.folder / "images", copy_function=os.link)


def _sampling_hooks(protection: Protection) -> list[Any]:
    """Return what the publisher runs before images are drawn."""
    from harness.protection import make_hooks

    return make_hooks("sampling_hook", protection.sampling)


def _score(s: _Stage) -> None:
    """Score images against references: scores.json with one value a step and prompt."""
    metric = s.method("metric")
    references = pictures.read(s.files("references", metric.compares_with))
    descriptions = s.stage.parameters["descriptions"]
    values = []
    with s.run.ledger.phase("score"):
        for step, groups in _groups(s, len(descriptions), metric.compares_with):
            opened = [pictures.read(group) for group in groups]
            scored = metric.score(opened, references, descriptions, s.run.device)
            if len(scored) != len(opened):
                raise ValueError(f"{metric.name} gave {len(scored)} values for {len(opened)} prompts")
            for prompt, value in enumerate(scored):
                if not math.isfinite(value):
                    raise ValueError(f"{metric.name} is {value} for '{descriptions[prompt]}' at step {step}")
                values.append({"step": step, "prompt": prompt, "value": value})
    about = {
        "direction": metric.direction,
        "unit": metric.unit,
        "range": f"{metric.range[0]:g}..{metric.range[1]:g}",
        **metric.about(),
    }
    (s.folder / "scores.json").write_text(json.dumps({"about": about, "values": values}), encoding="utf-8")


def _groups(s: _Stage, prompts: int, compared_with: str) -> list[tuple[int, list[list[Path]]]]:
    """Return (step, files by prompt) of what is to be scored: a sample, or real images.

    Those are of the attack split, or of the reference split where the attack's images are what is compared with.
    """
    if "images" in s.stage.inputs:
        split = "attack" if compared_with == "reference" else "reference"
        return [(0, [[file] for file in s.files("images", split)][:prompts])]
    folder = s.input("sample", "sample") / "images"
    return [
        (int(step.name.removeprefix("step_")), [sorted(step.glob(f"{p:03d}_*.png")) for p in range(prompts)])
        for step in sorted(folder.iterdir())
    ]


def step_folder(step: int) -> str:
    """Return the folder name of a step; names sort as numbers do."""
    return f"step_{step:07d}"


_DO: dict[str, Callable[[_Stage], None]] = {
    "images": _images,
    "erase": _protect,
    "immunize": _protect,
    "adapt": _adapt,
    "probe": _probe,
    "sample": _sample,
    "score": _score,
}
