"""Foreseen memory (`plan --memory`) beside measured peaks: each method's stage on a model, a process each.

    python -m tests.benchmarks.memory --model tiny --batch-size 16        # 0.3 M parameters, a CPU
    python -m tests.benchmarks.memory --model testbed --batch-size 8
    python -m tests.benchmarks.memory --model sd --device cuda            # SD 1.4's shape, random weights

A stage is done with blank images until its memory was seen, as a rehearsal does it without values. Measured is what it
holds beyond the loaded model: on a GPU by torch's allocator; on a CPU by torch's allocator, as its profiler reports it,
and by the resident memory of the process, of which the stage was done before, so that libraries are loaded. The latter
holds what these allocate by themselves too: some MB, which hide a tiny model's tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.core import registry
from harness.core.sharding import Sharding
from tests import rehearsed_stages, tiny


def main() -> None:
    """Print a table: a row a stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "testbed", "sd"), default="tiny", help="sd: SD 1.4's shape, random")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--vectors", choices=("device", "cpu"), default="device")
    parser.add_argument("--without-originals", action="store_true")
    parser.add_argument("--only", help="stages whose label starts with this text")
    parser.add_argument("--foreseen-only", action="store_true", help="measure nothing")
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    registry.load()
    if given.stage is not None:
        print(json.dumps(_measured(given)))
        return
    print(f"{given.model}, {given.device}, {given.precision}, batch {given.batch_size}; MB beyond the model's weights")
    print("| stage | foreseen | measured, allocator | ratio | measured, process | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        given.folder = given.folder or Path(folder)
        source = _source(given)
        for place, stage in enumerate(_stages(given, source)):
            if given.only and not stage.label.startswith(given.only):
                continue
            foreseen = _foreseen(given, stage, source)
            row = {} if given.foreseen_only else _in_a_process(given, place)
            cells = [f"{foreseen / 1e6:,.1f}"]
            for name in ("allocator", "process"):
                known = row.get(name)
                cells += [f"{known / 1e6:,.1f}", f"{foreseen / known:.2f}"] if known else ["", ""]
            print(f"| {stage.label} | {' | '.join(cells)} |", flush=True)


def _in_a_process(given, place: int) -> dict:
    command = [sys.executable, "-m", "tests.benchmarks.memory", *sys.argv[1:], "--stage", str(place)]
    done = subprocess.run([*command, "--folder", str(given.folder)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _source(given):
    """Return the source of the model, which is made in the folder if it is not there."""
    from harness.model.source import resolve_model
    from harness.suite.spec import ModelSpec

    if given.model == "testbed":
        return resolve_model(ModelSpec(id="testbed"), "benchmark", Path())
    folder = given.folder / given.model
    if not folder.exists():
        if given.model == "tiny":
            tiny.save_pipeline(folder)
        else:
            from tests.benchmarks.bilevel import _sd_pipeline

            _sd_pipeline().save_pretrained(folder)
    return resolve_model(ModelSpec(id=str(folder)), "benchmark", Path())


def _stages(given, source) -> list:
    fitted = {} if given.model == "sd" else rehearsed_stages.FITTED
    return list(rehearsed_stages.all_of_them(source, given.batch_size, given.precision, fitted))


def _sharding(given) -> Sharding:
    return Sharding(
        gradient_checkpointing=given.gradient_checkpointing,
        vectors=given.vectors,
        keep_originals=not given.without_originals,
    )


def _foreseen(given, stage, source) -> int:
    from harness.stages.rehearsal import rehearse

    on_gpu = given.device == "cuda"
    peak = rehearse(stage, source, _sharding(given), on_gpu=on_gpu)
    return peak.bytes - peak.device["weights"] + (0 if on_gpu else peak.host)


def _measured(given) -> dict[str, int]:
    """Return the bytes that a stage holds at most, beyond the loaded model."""
    import gc

    import torch

    from harness.model.pipeline import warm
    from harness.model.run import Run
    from harness.stages.rehearsal import measurable
    from harness.stages.workplace import peak_memory_bytes, reset_peak_memory
    from tests.allocated import peak_bytes
    from tests.benchmarks.bilevel import _held_bytes

    torch.set_num_threads(1)
    source, device = _source(given), torch.device(given.device)
    stage = _stages(given, source)[given.stage]
    model = warm(source, device)
    for parameter in model.parameters().values():  # loaded weights may lie in the file until they are read
        parameter.data = parameter.data.clone()
    with tempfile.TemporaryDirectory() as work:

        def do() -> None:
            model.restore()
            model.keeps_originals = not given.without_originals
            measurable(stage, model, source, Run(1, device, given.precision, Path(work), sharding=_sharding(given)))

        gc.collect()
        if given.device == "cuda":
            idle = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            do()
            return {"allocator": peak_memory_bytes(device) - idle}
        found = {}
        if given.model != "sd":  # the profiler keeps every event
            found["allocator"] = peak_bytes(do)  # this also loads what libraries load at first use
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        reset_peak_memory()
        idle = _held_bytes()
        do()
        return {**found, "process": peak_memory_bytes(device) - idle}


if __name__ == "__main__":
    main()
