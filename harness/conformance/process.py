"""One of two processes that share a method: `python -m harness.conformance.process`, started by `processes`."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.conformance.processes import SHARING
from harness.conformance.setting import Setting


def main() -> None:
    """Read setting and method from standard input, do this process's part, and report the outcome."""
    from harness.core import registry

    try:
        setting, folder = pickle.load(sys.stdin.buffer)
        registry.load_plugins(setting.plugins)
        _work(pickle.load(sys.stdin.buffer), setting, folder)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # immediately: the other may wait forever in a collective call
    os._exit(0)


def _work(method: Any, setting: Setting, folder: Path) -> None:
    import torch

    from harness.conformance import attacks, defenses
    from harness.contracts.attack import Attack
    from harness.training import sharding

    torch.set_num_threads(1)
    with sharding.joined(torch.device("cpu")) as world:
        if isinstance(method, Attack):
            run = replace(setting.run(1, folder / "work"), sharding=SHARING, world=world)
            attacks.save_last(method, setting, run, folder / "made")
            return
        seed = 1 if "seed" in method.used(method.parameters) else None
        run = replace(setting.run(seed, folder / "work"), sharding=SHARING, world=world)
        released = defenses.protected(method, setting, run).protection
        if world.rank == 0:
            released.save(folder / "made")
        world.wait()


if __name__ == "__main__":
    main()
