"""Whether the model of a suite can be loaded here, checked before any compute."""

from __future__ import annotations

import json
from pathlib import Path

from harness.core.errors import UserMistake, one_line
from harness.model import model_files, resolution
from harness.model.source import ModelSource


def preflight(source: ModelSource) -> None:
    """Check before any compute that the model can be loaded: digests of the testbed, the index of a hub model.

    Raises UserMistake. Contacts the hub only for hub models, and not when HF_HUB_OFFLINE is set.
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
    from huggingface_hub import HfApi, constants, hf_hub_download

    called = f"model '{source.location}' at revision {source.revision}"
    read = ["scheduler/scheduler_config.json", "unet/config.json"]
    read += ["vae/config.json"] if source.resolution is not None else []
    try:
        hf_hub_download(source.location, "model_index.json", revision=source.revision)
        configs = [
            json.loads(
                Path(hf_hub_download(source.location, name, revision=source.revision)).read_text(encoding="utf-8")
            )
            for name in read
        ]
        names = []
        if not constants.HF_HUB_OFFLINE:
            names = HfApi().list_repo_files(source.location, revision=source.revision)
    except Exception as error:  # the hub's client raises many types; all mean the same here
        raise UserMistake(
            f"{called} cannot be downloaded: {type(error).__name__}: {one_line(error, 120)}; download it to a folder "
            "and name the folder, or check the network"
        ) from None
    wrong = list(model_files.settings(*configs[:2]))
    if source.resolution is not None and (what := resolution.fault(source.resolution, *configs[1:])):
        wrong.append(what)
    for component in model_files.COMPONENTS if names else ():
        own = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
        what = model_files.weights(component, own, source.variant)
        wrong += [what] if what is not None else []
    if wrong:
        raise UserMistake([f"{called} {what}" for what in wrong])
