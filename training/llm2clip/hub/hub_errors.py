"""Errors of the Hub and of the connection, as messages that name the next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from json import JSONDecodeError
from typing import Any

import huggingface_hub
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

# The Hub client lets the connection errors of its HTTP library through and has no public class for them: httpx in
# huggingface_hub 1, httpx2 in huggingface_hub 2.
HTTPError: Any = import_module("httpx" if huggingface_hub.__version__.startswith("1.") else "httpx2").HTTPError

# Seconds to connect, to wait for an answer, to send a piece, and to wait for a free connection. The Hub may take
# minutes over a commit of many files, but by default its client waits for ever.
PATIENCE = (30.0, 600.0, 600.0, 600.0)

NEXT_STEPS = {
    400: "the Hub rejects this request: correct what it names (branch, file or the card's metadata) and push again",
    401: "the token is missing or not valid: log in with `hf auth login`, or set HF_TOKEN",
    402: "the plan of the account does not cover this: free storage, or change the plan in its billing settings",
    403: "the token does not allow this: it needs write access to the repo and its organization",
    404: "the repo does not exist, or the token has no access to it",
    409: "the repo changed or is being created at the same time: push again",
    412: "the repo changed during this push: push again",
    413: "a file is too large for the Hub: remove files that the model does not need, or save its weights in shards "
    "(`save_pretrained(..., max_shard_size='5GB')`)",
    429: "too many requests: wait some minutes and push again",
}


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Raise errors of the Hub and of the connection as a ValueError that names the next step; others pass through.

    A Hub that does not answer is such an error after some minutes.
    """
    client = get_session()
    if client.timeout.read is None:
        client.timeout = PATIENCE
    try:
        yield
    except Exception as error:
        if message := explanation(error, repo_id):
            raise ValueError(message) from error
        raise


def explanation(error: BaseException, repo_id: str) -> str | None:
    """Describe an error of the Hub or of the connection and its next step; None for any other error."""
    # The upload threads of the client wrap their errors.
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    reason = (str(getattr(error, "server_message", None) or error).strip().splitlines() or [type(error).__name__])[-1]
    if isinstance(error, LocalTokenNotFoundError):
        return f"{repo_id}: {NEXT_STEPS[401]}."
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a valid repo name: {error}"
    if isinstance(error, HfHubHTTPError):
        status = http_status(error)
        other = "the Hub had an internal error: push again later" if status >= 500 else "the Hub refuses this request"
        return f"{repo_id}: {NEXT_STEPS.get(status, other)} (HTTP {status}: {reason})."
    if isinstance(error, (HTTPError, ConnectionError)):
        return f"{repo_id}: the connection broke ({reason}); push again: files that were uploaded are not sent twice."
    if isinstance(error, JSONDecodeError):
        # The page of a hotel's network, or that of another address.
        return (
            f"{repo_id}: {constants.ENDPOINT} does not answer as a Hub does ({reason}): correct HF_ENDPOINT, log in "
            "to the network that the machine is in, or push again later."
        )
    return None


def http_status(error: HfHubHTTPError) -> int:
    """The HTTP status of an error; 0 if the Hub did not answer."""
    return error.response.status_code if error.response is not None else 0
