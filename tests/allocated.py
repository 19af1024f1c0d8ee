"""The most that torch's CPU allocator holds in a block, by its profiler: each allocation and each release."""

from __future__ import annotations

from collections.abc import Callable


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that were held at a moment of `work()` beyond those held before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    seen = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(seen, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
