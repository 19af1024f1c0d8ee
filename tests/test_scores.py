"""Scores of any stage are checked before they are committed."""

from __future__ import annotations

import json
import math

import pytest

from harness.store import scores

GOOD = {
    "about": {"unit": "cosine"},
    "values": [{"step": 0, "prompt": None, "value": 1}, {"step": 3, "prompt": 1, "value": -0.5}],
}


def write(folder, content) -> None:
    """Leave scores in a folder."""
    (folder / "scores.json").write_text(content if isinstance(content, str) else json.dumps(content))


def changed(**entry) -> dict:
    """Return scores of one value that is changed."""
    return {"about": {}, "values": [{"step": 0, "prompt": 0, "value": 1.0, **entry}]}


def test_good_scores_pass(tmp_path):
    """Also a folder without any."""
    scores.require(tmp_path)
    write(tmp_path, GOOD)

    scores.require(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ([], "must hold 'about' and 'values'"),
        ({"values": []}, "must hold 'about' and 'values'"),
        ({"about": {"unit": 1}, "values": []}, "mapping of words"),
        ({"about": {}, "values": {}}, "must be a list"),
        ({"about": {}, "values": [{"step": 0, "value": 1.0}]}, r"values\[0\] must hold step, prompt and value"),
        (changed(step=-1), "integers of at least 0"),
        (changed(prompt="0"), "integers of at least 0"),
        (changed(step=True), "integers of at least 0"),
        (changed(value=math.nan), r"finite number \(got nan\)"),
        (changed(value=math.inf), r"finite number \(got inf\)"),
        (changed(value=None), "finite number"),
        (changed(value=True), "finite number"),
    ],
)
def test_bad_scores_fail(tmp_path, content, words):
    """In words that say which entry."""
    write(tmp_path, content)

    with pytest.raises(ValueError, match=words):
        scores.require(tmp_path)
