"""Definitions of all numbers: the general ones, and those of every registered diagnostic.

    python -m harness.results.definitions          # prints the page `docs/definitions.md`
"""

from __future__ import annotations

from harness.analysis.definitions import OURS, SECTIONS, Definition
from harness.core import registry


def sections() -> list[tuple[str, tuple[Definition, ...]]]:
    """Return (title, definitions) of each section: general sections, then one for each diagnostic with definitions."""
    diagnostics = [registry.get("diagnostic", name) for name in registry.names("diagnostic")]
    own = [(cls.title or cls.name, tuple(cls.definitions)) for cls in diagnostics if cls.definitions]
    return [*SECTIONS, *own]


def markdown() -> str:
    """Return all definitions as a page."""
    parts = [
        "# What the numbers mean\n",
        "Made by `python -m harness.results.definitions` from `harness/analysis/definitions.py` and from the "
        "diagnostics' own definitions.\n",
        "M is a metric's mean over a concept's evaluation prompts and images, for one seed: M_none on the undefended "
        "model after the attack, M_defense on the defended one after it, M_before on the undefended released model "
        "before the attack, M_real that of real images of the concept.\n",
    ]
    for title, own in sections():
        parts.append(f"## {title}\n")
        for found in own:
            heading = f"**`{found.name}`**" + (f" {found.title}" if found.title != found.name else "")
            formula = f" `{found.formula}`." if found.formula else ""
            source = "" if found.source == OURS else f" *Source: {found.source}.*"
            parts.append(f"- {heading}.{formula} {found.meaning}{source}")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
