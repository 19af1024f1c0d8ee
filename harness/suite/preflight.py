"""Whether the model of a suite can be loaded here, checked before any compute."""

from __future__ import annotations

from harness.core.errors import UserMistake, one_line
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
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(source.location, "model_index.json", revision=source.revision)
        except Exception as error:  # the hub's client raises many types; all mean the same here
            raise UserMistake(
                f"model '{source.location}' at revision {source.revision} cannot be downloaded: "
                f"{type(error).__name__}: {one_line(error, 120)}; download it to a folder and name "
                "the folder, or check the network"
            ) from None
