"""open_clip's own tables, read without importing it (it imports torch): which weights were trained with QuickGELU.

OpenAI's weights and many later ones were. open_clip builds the activation that the model's name asks for, and only
warns when the weights' tag says otherwise (`open_clip/factory.py`, `create_model`): features and scores are then wrong.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from functools import lru_cache
from pathlib import Path

SUFFIX = "-quickgelu"
"""open_clip's ending of the names of models with QuickGELU."""


def check_activation(model: str, tag: str | None) -> None:
    """Raise ValueError if the weights `tag` need QuickGELU and the model `model` of open_clip is built without it.

    Names that are not in open_clip's tables pass: folders and repositories bring their own configuration.
    """
    name = model.replace("/", "-")  # as open_clip does, "ViT-B/16"
    if tag is None or ":" in name or tag.lower().replace("-", "_") not in _quick_gelu_tags().get(name, ()):
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


@lru_cache(maxsize=1)
def _quick_gelu_tags() -> dict[str, frozenset[str]]:
    """Return model -> tags whose configuration has `quick_gelu`, from the source of open_clip/pretrained.py."""
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
        found[name.value] = frozenset(entry.arg for entry in table.keywords if _is_quick(entry.value))
    return found


def _is_quick(entry: ast.expr) -> bool:
    options = {option.arg: option.value for option in getattr(entry, "keywords", ())}
    return isinstance(options.get("quick_gelu"), ast.Constant) and bool(options["quick_gelu"].value)
