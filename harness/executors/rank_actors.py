"""Reserve nodes of a Ray cluster for the processes of a shared stage that has no room on one node."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from harness.core.counted import counted
from harness.stages.rank_host import Place, RankHost

START_S = 300.0
"""Seconds until the actors answer; a node's first worker is slow to start."""


class RankActor:
    """A Ray actor that keeps the `RankHost` of its node."""

    def __init__(self) -> None:
        import ray

        address = ray.util.get_node_ip_address()
        self._host = RankHost(address, f"{platform.node()} ({address})")

    def place(self) -> Place:
        """Return where its host waits."""
        return self._host.place


class Actors:
    """The actors of a unit, one for each process but the first."""

    def __init__(self, actors: list[Any], places: tuple[Place, ...]):
        self._actors = actors
        self.places = places

    def lost(self) -> list[str]:
        """Return the nodes whose actors answer no more."""
        import ray

        gone = []
        for actor, place in zip(self._actors, self.places, strict=True):
            try:
                ray.get(actor.place.remote(), timeout=60)
            except Exception:
                gone.append(place.node)
        return gone


@contextlib.contextmanager
def reserved(count: int, bundle: Mapping[str, float]) -> Iterator[Actors]:
    """Start an actor in each bundle of this trial's placement group but the first; end them with the block.

    Raises RuntimeError if they do not start.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    actors = [
        ray.remote(RankActor)
        .options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        .remote()
        for index in range(1, count + 1)
    ]
    try:
        try:
            places = tuple(ray.get([actor.place.remote() for actor in actors], timeout=START_S))
        except Exception as error:
            what = counted(count, "other process")
            raise RuntimeError(f"the nodes of {what} did not start within {START_S:g} s: {error}") from error
        yield Actors(actors, places)
    finally:
        for actor in actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
