"""Whether the model of a suite can be loaded here, checked before any compute."""

from __future__ import annotations

from dataclasses import replace

from harness.core.errors import UserMistake, one_line
from harness.core.fetched import Silent
from harness.model import model_files, resolution
from harness.model.source import ModelSource, fetches

SMALL = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")
"""Files of a hub model that say whether it can be loaded."""
VAE = "vae/config.json"
"""Says, with the UNet's, which resolutions can be."""


def preflight(source: ModelSource) -> None:
    """Check before any compute that the model can be loaded: digests of the testbed, the index of a hub model.

    Raises UserMistake. Contacts the hub only for a hub model that is not in the cache.
    """
    if source.identity["source"] == "testbed":
        from harness.testbed import verify

        try:
            verify.check()
        except ValueError as error:
            raise UserMistake(f"the embedded testbed is damaged: {one_line(error)}; install it again") from None
    elif source.identity["source"] == "hub":
        _check_hub(source)


def _check_hub(source: ModelSource) -> None:
    """Fetch the small files of a hub model and list its others: what cannot be loaded is not fetched."""
    from huggingface_hub import constants

    (whole,) = fetches(source)
    names = (*SMALL, *((VAE,) if source.resolution is not None else ()))
    small = replace(whole, parts=tuple((name,) for name in names), beside=())
    if not small.is_cached():
        if constants.HF_HUB_OFFLINE:
            return  # that the model is missing is said elsewhere (`fetching.require_offline`)
        small.fetch(Silent())
    folder = small.folder()
    configs = [model_files.read(folder / name) for name in names[1:]]
    wrong = list(model_files.settings(*configs[:2]))
    if source.resolution is not None and (what := resolution.fault(source.resolution, *configs[1:])):
        wrong.append(what)
    if wrong:
        called = f"model '{source.location}' at revision {source.revision}"
        raise UserMistake([f"{called} {what}" for what in wrong])
