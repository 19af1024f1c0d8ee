"""open_clip's own tables, read without importing it (it imports torch): where weights are on the hub, and which of them
were trained with QuickGELU.

OpenAI's weights and many later ones were. open_clip builds the activation that the model's name asks for, and only
warns when the weights' tag says otherwise (`open_clip/factory.py`, `create_model`): features and scores are then wrong.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

SUFFIX = "-quickgelu"
"""open_clip's ending of the names of models with QuickGELU."""


def check_activation(model: str, tag: str | None) -> None:
    """Raise ValueError if the weights `tag` need QuickGELU and the model `model` of open_clip is built without it.

    Names that are not in open_clip's tables pass: folders and repositories bring their own configuration.
    """
    name = model.replace("/", "-")  # as open_clip does, "ViT-B/16"
    if tag is None or ":" in name or not _table().get(name, {}).get(_clean(tag), {}).get("quick_gelu"):
        return
    if not _has_quick_gelu(name):
        right = name + SUFFIX
        raise ValueError(
            f"backbone '{model}' is built with GELU, but the weights '{tag}' were trained with QuickGELU: the scores "
            f"would be wrong; use backbone: {right}"
        )


def _folder() -> Path:
    return Path(importlib.util.find_spec("open_clip").origin).parent


def _has_quick_gelu(model: str) -> bool:
    file = _folder() / "model_configs" / f"{model}.json"
    return file.exists() and bool(json.loads(file.read_text(encoding="utf-8")).get("quick_gelu", False))


def hub_file(model: str, tag: str) -> tuple[str, str] | None:
    """Return (repository, file) of the weights `tag` on the hub; None for others. "": a file with the usual name."""
    name = model.replace("/", "-")
    entry = _table().get(name, {}).get(_clean(tag))
    if entry is None and name.endswith(SUFFIX):  # open_clip adds such names for the weights that need them
        entry = _table().get(name.removesuffix(SUFFIX), {}).get(_clean(tag), {})
        entry = entry if entry.get("quick_gelu") else None
    place = (entry or {}).get("hf_hub")
    return (place.rpartition("/")[0], place.rpartition("/")[2]) if place else None


def text_repositories(model: str) -> tuple[str | None, str | None]:
    """Return the repositories on the hub of a model's tokenizer and of its text tower's configuration, if it has any.

    Models with neither bring CLIP's own tokenizer and text tower.
    """
    file = _folder() / "model_configs" / f"{model.replace('/', '-')}.json"
    text = json.loads(file.read_text(encoding="utf-8")).get("text_cfg", {}) if file.exists() else {}
    return text.get("hf_tokenizer_name"), text.get("hf_model_name")


def _clean(tag: str) -> str:
    return tag.lower().replace("-", "_")


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    """Return model -> tag -> the constants of its configuration, from the source of open_clip/pretrained.py."""
    source = (_folder() / "pretrained.py").read_text(encoding="utf-8")
    tables = {
        node.targets[0].id: node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    models = tables["_PRETRAINED"]
    found = {}
    for name, value in zip(models.keys, models.values, strict=True):
        table = tables[value.id] if isinstance(value, ast.Name) else value  # dict(tag=_pcfg(..., quick_gelu=True))
        found[name.value] = {entry.arg: _constants(entry.value) for entry in table.keywords}
    return found


def _constants(entry: ast.expr) -> dict[str, Any]:
    return {
        option.arg: option.value.value
        for option in getattr(entry, "keywords", ())
        if isinstance(option.value, ast.Constant)
    }
