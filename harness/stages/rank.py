"""One process of a stage that several share: `python -m harness.stages.rank`, started by `harness.stages.ranks`."""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import sys
import threading
import traceback

from harness.stages import pulse


def main() -> None:
    """Read the stage from standard input, do this process's part, and report the outcome."""
    from harness.core import streams

    streams.prepare()  # what a method prints must not fail here and nowhere else
    faulthandler.enable()
    told = os.dup(1)
    os.dup2(2, 1)  # libraries print too
    pulse.keep_beating(lambda: os.write(told, b"beat\n"))
    described, workplace, work_folder, begun = pickle.load(sys.stdin.buffer)
    rank = int(os.environ["RANK"])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work(described, workplace, work_folder, begun, rank, told)
    except BaseException as error:
        from harness.core.errors import one_line
        from harness.stages.void import DIVERGED

        traceback.print_exc()
        recorded = {"error": f"{type(error).__name__}: {one_line(error, 500)}", "diverged": isinstance(error, DIVERGED)}
        (work_folder / f"rank{rank}.json").write_text(json.dumps(recorded), encoding="utf-8")
        sys.stderr.flush()
        os._exit(1)  # immediately: others may wait forever in a collective call
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent() -> None:
    """End when the pipe closes, which means that the parent process ended."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


def _work(described, workplace, work_folder, begun: tuple[float, float], rank: int, told: int) -> None:
    import torch

    from harness.contracts.stage import from_json
    from harness.core import registry
    from harness.core.files import write_json
    from harness.model.run import Run
    from harness.stages import code, ranks
    from harness.stages.execution import notify
    from harness.stages.work import StageAtWork
    from harness.stages.workplace import computing_in, peak_memory_bytes, prepare_device
    from harness.training import sharding

    registry.load_plugins(workplace.plugins, is_worker=True)
    stage = from_json(described)
    device = prepare_device(workplace, int(os.environ["LOCAL_RANK"]))
    folder = work_folder / ranks.RELEASED
    if rank == 0:
        folder.mkdir()
    with sharding.joined(device) as world:
        report = (lambda done, total: os.write(told, b"%d %d\n" % (done, total))) if rank == 0 else lambda *_: None
        run = Run(
            stage.seed,
            device,
            stage.precision,
            work_folder,
            report=report,
            sharding=workplace.sharding,
            world=world,
            checkpoint_interval_s=workplace.checkpoint_interval_s,
            code=code.of_stage(stage),
            notify=lambda text: notify(stage, workplace, text),
            started=begun[0],
            began=begun[1],  # a clock of one machine: only the first process, which is on it, uses it
        )
        work = StageAtWork(stage, workplace, workplace.open_store(), run, folder)
        with computing_in(stage.precision, device, run.notify if rank == 0 else lambda text: None):
            registry.get("stage", stage.kind)(None).do(stage.parameters, work)
        run.ledger.peak_memory_bytes = peak_memory_bytes(device)
        gathered = [None] * world.size
        torch.distributed.all_gather_object(gathered, run.ledger.as_json())
        if rank == 0:
            total = gathered[0]
            for name in ("forward_passes", "backward_passes"):
                total[name] = sum(each[name] for each in gathered)
            total["peak_memory_bytes"] = max(each["peak_memory_bytes"] for each in gathered)
            total["peak_memory_bytes_of_each"] = [each["peak_memory_bytes"] for each in gathered]
            write_json(work_folder / ranks.OUTCOME, total)


if __name__ == "__main__":
    main()
