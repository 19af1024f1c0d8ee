"""The identity of a stage: one key made from everything that can change its result, and from nothing else.

In the key: the kind, the component (method name and version; for one that is not bundled, the digest of its code), its
resolved parameters, the keys of the stages it reads, the model and its revision, the digest of the data, the seed, the
precision, and `KEY_VERSION`. Not in the key: executor, world size, threads, paths, labels, logging. The plan and the
record of a finished stage give the same key, because both call `key` on the same description.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.described import as_json

KEY_VERSION = 1
"""Increased when a stage's description changes its meaning, or when shared code (training, sampling, stages) changes
its result, so that old records are not taken for new ones. Methods have their own versions."""


@dataclass(frozen=True)
class Input:
    """A committed stage that another one reads."""

    kind: str
    key: str


@dataclass(frozen=True)
class Stage:
    """One unit of work whose result is kept. Plain data: printable, comparable, equal when rebuilt."""

    kind: str  # a registered kind of stage
    component: str  # method and its version, such as "imma@1"
    parameters: Any  # an instance of the kind's Parameters, resolved (defaults filled in)
    inputs: Mapping[str, Input]  # role -> the stage that is read
    model: Mapping[str, str]  # source, id and revision of the base model; {} when none is read
    data: Mapping[str, str]  # role -> digest of files that do not come from a stage
    seed: int | None  # None: the result does not depend on chance
    precision: str  # of `harness.core.precision`: fp32, bf16 or fp16, each also with "+tf32"

    # The fields below describe this machine or are for people. They are not part of the identity.
    label: str = field(default="", compare=False)
    local: Mapping[str, Any] = field(default_factory=dict, compare=False)  # where files are on this machine
    workers: int = field(default=1, compare=False)  # processes that share the stage (world size)
    work: float = field(default=0.0, compare=False)  # UNet sample passes (a backward counts as two)


def describe(stage: Stage) -> dict[str, Any]:
    """Return the description that is hashed: the identity of `stage` as JSON values."""
    return {**_without_parameters(stage), "parameters": as_json(stage.parameters)}


def _without_parameters(stage: Stage) -> dict[str, Any]:
    return {
        "key_version": KEY_VERSION,
        "kind": stage.kind,
        "component": stage.component,
        "inputs": {role: read.key for role, read in stage.inputs.items()},
        "model": dict(stage.model),
        "data": dict(stage.data),
        "seed": stage.seed,
        "precision": stage.precision,
    }


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


def canonical_json(value: Any) -> str:
    """Return `value` as JSON that is the same for equal values: sorted keys, no spaces, no NaN, tuples as lists.

    Raises ValueError for NaN and infinities, TypeError for anything JSON cannot hold.
    """
    return _encode(value)


def digest_of_json(value: Any) -> str:
    """Return the hexadecimal SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def key(stage: Stage, parameters_json: str | None = None) -> str:
    """Return the identity of `stage`: 32 hexadecimal digits.

    `parameters_json`: the canonical JSON of the stage's parameters, if the caller already has it. It saves time, as
    thousands of stages of a plan share few parameters. The key is the same without it.
    """
    if parameters_json is None:
        return digest_of_json(describe(stage))[:32]
    description = _without_parameters(stage)
    after = {name: description.pop(name) for name in ("precision", "seed")}  # sorted after "parameters"
    text = f'{canonical_json(description)[:-1]},"parameters":{parameters_json},{canonical_json(after)[1:]}'
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def digest_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_finite_json(value: Any) -> bool:
    """Return whether `value` holds no NaN and no infinity, at any depth."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(is_finite_json(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_finite_json(v) for v in value)
    return True
