"""Patience with storage that fails for a while, and plain words where it fails for good."""

from __future__ import annotations

import errno
import gzip
import logging
from collections.abc import Callable
from typing import TypeVar

import tenacity

from pipeline.errors import InputError

T = TypeVar("T")
PATIENCE_S = 300.0
"""How long a read is tried again before the run stops: longer than a storage node takes to restart."""
_LONGEST_WAIT_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger(__name__)


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: broken connections and server errors, not refusals and missing files."""
    if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError) or is_full(error):
        return False
    if isinstance(error, OSError | TimeoutError | EOFError):
        return True
    module = type(error).__module__.split(".")[0]
    if module == "aiohttp":
        return True
    if module in ("botocore", "aiobotocore"):
        return "Credentials" not in type(error).__name__ and "Param" not in type(error).__name__
    return False


def is_outage(error: BaseException) -> bool:
    """Whether storage refused a read or failed at it for a while, where a damaged file fails for good."""
    damaged = isinstance(error, EOFError | gzip.BadGzipFile) or (type(error) is OSError and error.errno is None)
    return isinstance(error, PermissionError) or (is_transient(error) and not damaged)


def persistently(action: Callable[[], T], what: str, patience_s: float = PATIENCE_S) -> T:
    """Return the action's result, trying again with growing pauses while its errors are transient.

    Raises:
        InputError: access is refused, there is no such object, or the patience has run out.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(patience_s),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=_LONGEST_WAIT_S),
        retry=tenacity.retry_if_exception(is_transient),
        before_sleep=lambda state: _log.warning("%s: try %d failed: %s", what, state.attempt_number, _reason(state)),
        reraise=True,
    )
    try:
        return retrying(action)
    except FileNotFoundError as error:
        raise InputError(f"{what} must be there, found nothing ({error}); prepare or upload the data anew") from error
    except Exception as error:  # told apart right here
        if is_transient(error):
            raise InputError(f"{what} must answer within {patience_s:g} s, it did not: {error}; fix it") from error
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            raise InputError(
                f"{what} must be readable with the credentials at hand, it was refused: {error}; "
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
            ) from error
        raise


def _reason(state: tenacity.RetryCallState) -> str:
    return repr(state.outcome.exception()) if state.outcome else ""
