"""Check the shipped files against their digests; needs the standard library alone."""
import json
from pathlib import Path

from harness.core.paths import DIGESTS, ROOT
from harness.testbed.digests import digest, shipped


def check(root: Path = ROOT) -> int:
    """Number of files checked; ``ValueError`` names the first that is changed, missing or unlisted."""
    table = json.loads((root / DIGESTS.name).read_text(encoding="utf-8"))
    for name, expected in table.items():
        path = root / name
        if not path.is_file():
            raise ValueError(f"testbed file {name} is missing")
        if digest(path) != expected:
            raise ValueError(f"testbed file {name} differs from its digest: it is damaged or was replaced")
    unlisted = {path.relative_to(root).as_posix() for path in shipped(root)} - set(table)
    if unlisted:
        raise ValueError(f"testbed file {min(unlisted)} has no digest")
    return len(table)
