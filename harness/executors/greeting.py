"""Ask the head of a Ray cluster how it is joined: `python -m harness.executors.greeting HOST:PORT`.

It prints one line of JSON: {"variables": {...}} to be set by who joins, or {"problem": ..., "words": ...}. It is a
process apart since Ray's client may wait for minutes, prints to standard error, and keeps what it once read of its
environment.
"""

from __future__ import annotations

import json
import os
import sys

MODE = "RAY_AUTH_MODE"


def main(address: str) -> None:
    """Print the answer."""
    print(json.dumps(answer(address)), flush=True)
    os._exit(0)  # Ray's threads may wait on


def answer(address: str) -> dict:
    """Return the answer; the token is used where one is here and the head demands it."""
    from ray._private import services
    from ray._raylet import AuthenticationTokenLoader, Config, GcsClient
    from ray.exceptions import AuthenticationError

    has_token = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    variables = {}
    if os.environ.get(MODE, "").lower() == "token" and not has_token:
        return {"problem": "no_token"}
    try:
        try:
            head = GcsClient(address=address)
        except AuthenticationError:
            if MODE in os.environ:
                return {"problem": "wrong_token" if os.environ[MODE].lower() == "token" else "disabled"}
            if not has_token:
                return {"problem": "no_token"}
            # `ray start --head` demands a token where it finds one; `ray.init` with an address does not look for it
            variables = {MODE: "token"}
            os.environ.update(variables)
            Config.initialize("")
            try:
                head = GcsClient(address=address)
            except AuthenticationError:
                return {"problem": "wrong_token"}
    except Exception as error:
        words = " ".join(str(error).split())
        problem = "silent" if "Timed out" in words or "http2 header" in words else "other"
        return {"problem": problem, "words": f"{type(error).__name__}: {words}"[:500]}
    try:
        services.get_node_to_connect_for_driver(head, timeout_seconds=5)
    except Exception:
        return {"problem": "no_node"}
    return {"variables": variables}


if __name__ == "__main__":
    main(sys.argv[1])
