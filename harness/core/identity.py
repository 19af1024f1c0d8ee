"""The identity of a stage: one key made from everything that can change its result, and from nothing else.

In the key: the kind, the component (method name and version; for one that is not bundled, the digest of its code), its
resolved parameters, the keys of the stages it reads, the model and its revision, the digest of the data, the seed, the
precision, and `KEY_VERSION`. Not in the key: executor, world size, threads, paths, labels, logging. The plan and the
record of a finished stage give the same key, because both call `key` on the same description.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness.core.described import as_json

KEY_VERSION = 2
"""Increased when a stage's description changes its meaning, or when shared code (training, sampling, stages) changes
its result, so that old records are not taken for new ones. Methods have their own versions. 2: parameters enter by
their digest, so that long ones are hashed once, not for each stage that shares them."""


class Input(NamedTuple):
    """A committed stage that another one reads."""

    kind: str
    key: str


@dataclass(slots=True)  # not frozen, which would take three times as long to make: a plan has hundreds of thousands
class Stage:
    """One unit of work whose result is kept. Plain data: printable, comparable, equal when rebuilt; never changed."""

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
    what: str = field(default="", compare=False)  # before the label in the title; apart, so that stages share labels
    local: Mapping[str, Any] = field(default_factory=dict, compare=False)  # where files are on this machine
    workers: int = field(default=1, compare=False)  # processes that share the stage (world size)
    work: float = field(default=0.0, compare=False)  # UNet sample passes (a backward counts as two)

    @property
    def title(self) -> str:
        """What people read: such as "clip_image of lora on purse (imma, seed 0)"."""
        return f"{self.what} {self.label}" if self.what else self.label


def describe(stage: Stage) -> dict[str, Any]:
    """Return the identity of `stage` as JSON values, as records hold it; `key_of` gives the key."""
    return {**_without_parameters(stage), "parameters": as_json(stage.parameters)}


def _without_parameters(stage: Stage) -> dict[str, Any]:  # `key` writes the same
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


def key(stage: Stage, parameters_digest: str | None = None) -> str:
    """Return the identity of `stage`: 32 hexadecimal digits.

    `parameters_digest`: `digest_of_json` of the stage's parameters, if the caller already has it. It saves time, as
    thousands of stages of a plan share few parameters. The key is the same without it.
    """
    digest = parameters_digest or digest_of_json(as_json(stage.parameters))
    inputs = ",".join([f'{_text(role)}:"{stage.inputs[role].key}"' for role in sorted(stage.inputs)])
    text = (  # the canonical JSON that `key_of` hashes, by hand: a plan has hundreds of thousands of stages
        f'{{"component":{_text(stage.component)},"data":{_small(stage.data)},"inputs":{{{inputs}}},'
        f'"key_version":{KEY_VERSION},"kind":{_text(stage.kind)},"model":{_small(stage.model)},'
        f'"parameters":"{digest}","precision":{_text(stage.precision)},'
        f'"seed":{"null" if stage.seed is None else stage.seed}}}'
    )
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def key_of(description: Mapping[str, Any]) -> str:
    """Return the key of a stage from its description, such as a record's: the parameters count by their digest."""
    return digest_of_json({**description, "parameters": digest_of_json(description["parameters"])})[:32]


_text = json.encoder.encode_basestring_ascii


def _small(value: Mapping[str, str]) -> str:
    return _small_json(tuple(value.items())) if value else "{}"


@functools.lru_cache(maxsize=1024)
def _small_json(items: tuple[tuple[str, str], ...]) -> str:
    return canonical_json(dict(items))


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
