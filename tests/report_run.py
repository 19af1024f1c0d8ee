"""A small run folder with its store, made by hand: two defenses beside none, two attacks, a target and an innocent."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from harness.core.files import write_json
from harness.results.rows import COLUMNS, write_csv
from harness.store.store import Store

STEPS = (10, 40)
SEEDS = (0, 1)
PROMPTS = ("a dog on the beach", "a dog & a ball", "a dog, drawn", "a dog in snow")
METRICS = {"clip": "higher", "distance": "lower", "nearest": "none"}
GAIN = {"none": 0.6, "mine": 0.1, "theirs": 0.4}
"""How far an attack comes after the last step; half as far after the first."""
COLOURS = {"none": "black", "mine": "blue", "theirs": "red"}


def key(*parts: Any) -> str:
    """Return a key of the form of stages' keys."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def make(runs: Path, *, text: str = "", images: bool = True) -> Path:
    """Write a run into `runs`; `text` is put into whatever is somebody else's words. Return the run's folder."""
    folder, store = runs / "small", Store(runs / "store")
    folder.mkdir(parents=True)
    rows = [row for trial in trials() for row in _rows(trial, store, text, images)]
    write_csv(folder / "rows.csv", rows, COLUMNS)
    write_csv(folder / "leaderboard.csv", [], COLUMNS)
    write_json(folder / "tables.json", {"of": "x", "is_whole": True})
    (folder / "failures").mkdir()
    write_json(folder / "failures" / "adapt-1.json", {"label": f"adapt lora {text}", "error": f"ValueError: {text}"})
    suite = {
        "name": f"small{text}",
        "description": f"A run made by hand. {text}",
        "model": {"id": f"testbed{text}", "revision": None},
        "seeds": list(SEEDS),
        "tasks": {"relearning": {"erase": {"method": "uce"}}},
        "attacks": [{"method": "lora"}, {"method": "dreambooth"}],
        "gates": {"min_recovery": 0.25, "min_utility": 0.9, "min_headroom": 0.1},
    }
    (folder / "suite.resolved.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    return folder


def trials():
    """Yield (defense, attack, concept, role, seed, steps), as a plan has them."""
    for concept, role in (("dog", "target"), ("cup", "innocent")):
        yield "", "", concept, "real", 0, (0,)
        for seed in SEEDS:
            yield "original", "", concept, role, seed, (0,)
            for defense in GAIN:
                yield defense, "", concept, role, seed, (0,)
                for attack in ("lora", "dreambooth"):
                    yield defense, attack, concept, role, seed, STEPS
    yield "", "", "sky", "floor", 0, (0,)
    for seed, defense in itertools.product(SEEDS, GAIN):
        yield defense, "", "sky", "utility", seed, (0,)


def score(defense: str, attack: str, role: str, seed: int, step: int) -> float:
    """Return a similarity: 0.1 before the attack, 0.8 of real images and before erasure."""
    if role in ("real", "utility") or defense == "original":
        return 0.8
    if role == "floor":
        return 0.1
    gain = GAIN[defense] if role == "target" else 0.6
    place = (0, *STEPS).index(step) / len(STEPS)
    return 0.1 + place * gain * (1.0 if attack == "lora" else 0.9) + 0.01 * seed


def _rows(trial, store: Store, text: str, images: bool):
    defense, attack, concept, role, seed, steps = trial
    sample = key("sample", *trial)
    if images:
        _commit_images(store, sample, defense, role, steps)
    for metric, direction in METRICS.items():
        score_key = key("score", metric, *trial)
        kind = "images" if role in ("real", "floor") else "sample"
        _commit(store, "score", score_key, f"{metric}@1", {kind: sample})
        for step, prompt in itertools.product(steps, range(len(PROMPTS))):
            value = score(defense, attack, role, seed, step) + 0.001 * prompt
            yield {
                "suite": "small", "model": "testbed", "task": "relearning", "defense": defense, "is_weak": False,
                "method": "none" if defense in ("none", "original") else "imma" if defense else "", "profile": "",
                "protected": "dog", "attack": attack, "attacker": "honest" if attack else "", "n_probes": 0,
                "concept": concept, "role": role, "seed": seed, "step": step, "prompt_index": prompt,
                "prompt": PROMPTS[prompt] + text, "metric": metric,
                "value": 1 - value if direction == "lower" else value, "direction": direction, "unit": f"cosine{text}",
                "range": "-1..1", "backbone": f"testbed{text}", "preprocessing": "its own", "library": "open_clip 3",
                "sample_key": sample, "score_key": score_key,
            }  # fmt: skip


def _commit_images(store: Store, sample: str, defense: str, role: str, steps) -> None:
    is_real = role in ("real", "floor")
    kind = "images" if is_real else "sample"
    with store.writing(kind, sample) as (folder, record):
        places = ["reference", "attack"] if is_real else [f"images/step_{step:07d}" for step in steps]
        for place in places:
            (folder / place).mkdir(parents=True)
            for prompt in range(len(PROMPTS)):
                name = f"{prompt:04d}.png" if is_real else f"{prompt:03d}_000.png"
                Image.new("RGB", (8, 8), COLOURS.get(defense, "white")).save(folder / place / name)
        record |= _record(kind, f"{kind}@1", {})


def _commit(store: Store, kind: str, name: str, component: str, inputs: dict[str, str]) -> None:
    with store.writing(kind, name) as (_, record):
        record |= _record(kind, component, inputs)


def _record(kind: str, component: str, inputs: dict[str, str]) -> dict[str, Any]:
    ledger = {"forward_passes": 4.0, "backward_passes": 2.0, "peak_memory_bytes": 5_000_000, "seconds": {kind: 1.5}}
    provenance = {"device": "cpu", "executor": "serial", "python": "3.11", "packages": {"torch": "2.15"},
                  "git": {"revision": "0123456789abcdef", "is_dirty": False}, "threads": 1, "sharding": {}}  # fmt: skip
    identity = {"kind": kind, "component": component, "inputs": inputs}
    return {"identity": identity, "seconds": 2.0, "ledger": ledger, "provenance": provenance}
