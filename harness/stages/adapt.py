"""Attacks: an adaptive attacker's probes, and the adaptation whose trajectory is kept."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import parameters, pictures, search
from harness.core.concept import PRIOR
from harness.core.files import sync_files, write_json
from harness.core.words import Words
from harness.stages.sample import sampling_hooks
from harness.stages.work import StageAtWork
from harness.store.layout import CHECKPOINTS, step_folder

if TYPE_CHECKING:
    from harness.contracts.attack import Checkpoint

log = logging.getLogger("immunitybench")


def adapt(s: StageAtWork) -> None:
    """Run an attack, tuned where probes went before, and keep the adapted model at each step of its trajectory."""
    attack = s.method("attack")
    probes = _probes(s)
    if probes:
        chosen = search.chosen(probes)
        attack = _with(attack, chosen.values)
        found = {"chosen": chosen.values, "score": chosen.score, "probes": [asdict(probe) for probe in probes]}
        if s.run.world.rank == 0:
            write_json(s.folder / "search.json", found)
    saved = _trajectory(s, attack, *_own(s))
    if s.run.world.rank == 0:
        shutil.copytree(saved, s.folder / CHECKPOINTS, copy_function=os.link)


def probe(s: StageAtWork) -> None:
    """Try other settings of an attack on a part of the attacker's images: probe.json says which, and how it went."""
    from harness.model.sampling import sample

    described = s.stage.parameters
    attack = s.method("attack")
    fold = 0
    if "repeat" in described:
        values = search.repeated(_probes(s), described["repeat"])
        fold = described["repeat"] // 2 + 1
        if values is None:
            write_json(s.folder / "probe.json", {"values": None, "score": None})
            return
    else:
        values = search.propose(described["space"], s.run.seed_for("study"), _probes(s), described["place"])
    attack = _with(attack, values)
    own, captions = _own(s)
    own, captions, judged = _split(own, captions, described["held_out"], fold)
    try:
        saved = _trajectory(s, attack, own, captions)
    except FloatingPointError as error:
        log.info("diverged: %s", error)
        write_json(s.folder / "probe.json", {"values": values, "score": None})
        return
    metric = s.method("metric", described["metric"], s.stage.local.get("metric", {}))
    known = metric.known(pictures.read(judged), s.run.device)
    model, protection = s.released()
    hooks = sampling_hooks(protection, described["attacker"])
    attack.load(model, saved / step_folder(described["budget"]["steps"][-1]))
    try:
        with s.run.ledger.phase("sample"):
            drawn: list[list[Any]] = [[] for _ in described["prompts"]]
            for prompt, _, image in sample(
                model, s.run, described["prompts"], described["sampling"],
                images_per_prompt=search.IMAGES, seed=s.run.seed_for("sampling"), hooks=hooks,
            ):  # fmt: skip
                drawn[prompt].append(image)
    finally:
        attack.unload(model)
    with s.run.ledger.phase("score"):
        scored = metric.score(drawn, known, described["descriptions"], s.run.device)
    score = (1 if metric.direction == "higher" else -1) * sum(scored) / len(scored)
    write_json(s.folder / "probe.json", {"values": values, "score": score})


def _probes(s: StageAtWork) -> list[search.Probe]:
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


def _own(s: StageAtWork) -> tuple[list[Path], list[str]]:
    """Return the attacker's images, as many as the budget allows, and a caption for each."""
    described = s.stage.parameters
    files = s.files("images", "attack")[: described["budget"]["images"]]
    return files, described["concept"]["captions"][: len(files)]


def _split(
    files: Sequence[Path], captions: Sequence[str], held_out: int, fold: int
) -> tuple[list[Path], list[str], list[Path]]:
    """Return what to train on, with its captions, and what to judge by: the last images; other ones in each fold."""
    order = [(i - fold * held_out) % len(files) for i in range(len(files))]
    trained, judged = order[: len(files) - held_out], order[len(files) - held_out :]
    return [files[i] for i in trained], [captions[i] for i in trained], [files[i] for i in judged]


def _trajectory(s: StageAtWork, attack: Any, files: Sequence[Path], captions: Sequence[str]) -> Path:
    """Run an attack on images; return the folder with a folder of each step."""
    from harness.contracts.attack import AttackedConcept, Budget

    described = s.stage.parameters
    budget, known = described["budget"], described["concept"]
    prior = attack.prior_images(attack.parameters)
    concept = AttackedConcept(
        kind=known["kind"],
        captions=tuple(captions),
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
