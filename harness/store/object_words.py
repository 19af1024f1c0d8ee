"""What is wrong with a store of objects, in one line: from the errors of the libraries that talk to it."""

from __future__ import annotations

import re

from harness.core.errors import UserMistake, one_line


class StoreProblem(UserMistake):
    """A store cannot be used, in one line. `is_passing`: it may work again later."""

    def __init__(self, message: str, *, is_passing: bool = False):
        super().__init__(message)
        self.is_passing = is_passing

    def __reduce__(self):
        return (_made, (self.messages[0], self.is_passing))


def _made(message: str, is_passing: bool) -> StoreProblem:
    return StoreProblem(message, is_passing=is_passing)


_NO_PERMISSION, _NO_ANSWER = "no permission", "no answer"
_CREDENTIALS = (
    "its credentials come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or "
    "AWS_PROFILE for s3://, GOOGLE_APPLICATION_CREDENTIALS for gs://"
)
_CODES_OF_CREDENTIALS = (
    "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN", "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION", "INVALID_TOKEN", "InvalidToken", "EXPIRED_TOKEN", "ExpiredToken", "REQUEST_EXPIRED",
    "INVALID_SIGNATURE", "HTTP status 401", "UNAUTHENTICATED", "invalid_grant",
    "Could not load the default credentials", "OAuth2 access token",
)  # fmt: skip
_KNOWN: tuple[tuple[str, str, bool], ...] = (
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist|bucket '[^']*' (was )?not found",
        "there is no such bucket; make it first",
        False,
    ),
    ("|".join(_CODES_OF_CREDENTIALS), f"the credentials are not accepted; {_CREDENTIALS}", False),
    (
        r"ACCESS_DENIED|AccessDenied|PERMISSION_DENIED|HTTP status 403|Permission denied|Read-only file system"
        r"|Operation not permitted",
        _NO_PERMISSION + " to {verb} it",
        False,
    ),
    (
        r"HTTP status 301|PermanentRedirect|AuthorizationHeaderMalformed|wrong region",
        "the bucket is in another region; set AWS_REGION",
        False,
    ),
    (
        r"NETWORK_CONNECTION|curlCode|UNAVAILABLE|DEADLINE_EXCEEDED|REQUEST_TIMEOUT|Timeout"
        r"|[Cc]ould ?n.t (connect|resolve)",
        _NO_ANSWER + " ({why})",
        True,
    ),
    (
        r"SLOW_DOWN|SlowDown|THROTTLING|INTERNAL_FAILURE|InternalError|HTTP status 5\d\d|SERVICE_UNAVAILABLE",
        "the server fails ({why})",
        True,
    ),
)
"""(pattern in the error, words, whether it may pass), the first that is found."""


def problem(url: str, verb: str, error: Exception) -> StoreProblem:
    """Return the problem that an error of a library means; `verb`: what was tried, such as "read"."""
    text = one_line(error, 2000)
    for pattern, words, is_passing in _KNOWN:
        if re.search(pattern, text):
            said = words.format(verb=verb, why=_why(text))
            if words.startswith(_NO_PERMISSION) and not url.startswith("file:"):
                said += f"; {_CREDENTIALS}"
            if words.startswith(_NO_ANSWER) and url.startswith("s3:"):
                said += "; the server is that of AWS_ENDPOINT_URL, or Amazon's"
            return StoreProblem(f"{url}: {said}", is_passing=is_passing)
    return StoreProblem(f"{url}: cannot {verb} it ({_why(text)})", is_passing=True)


def _why(text: str) -> str:
    """Return the middle of a library's message: without its place and its numbers of requests."""
    text = re.sub(r" ?\(Request ID: [^)]*\)", "", text)
    text = re.sub(r"^When .*?: (?=AWS Error)", "", text)
    text = re.sub(r"^AWS Error (\S+) during \S+ operation: ", r"\1: ", text)
    text = re.sub(r"curlCode: \d+, .*?; Details: ", "", text)
    return one_line(text, 200)
