"""Patience with storage that fails for a while, and plain words where it fails for good."""

from __future__ import annotations

import errno
import gzip
import logging
from collections.abc import Callable
from typing import TypeVar

import tenacity

from pipeline.errors import InputError
from pipeline.schemes import scheme_of

T = TypeVar("T")
PATIENCE_S = 300.0
"""How long a read is tried again before the run stops: longer than a storage node takes to restart."""
_LONGEST_WAIT_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLIENTS = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "azure", "huggingface_hub", "httpx", "httpx2")
"""Packages whose errors come out of a file system as they are."""
_PASSING = (408, 425, 429)
_REFUSING = (401, 403)
_log = logging.getLogger(__name__)


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: broken connections and server errors, not refusals and missing files."""
    if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError) or is_full(error):
        return False
    name, status = type(error).__name__, _status(error)
    if is_refused(error) or "Certificate" in name:
        return False
    if _package(error) in _CLIENTS and status is not None:
        return status >= 500 or status in _PASSING
    if isinstance(error, OSError | TimeoutError | EOFError):
        return True
    return _package(error) in _CLIENTS and "Param" not in name


def is_refused(error: BaseException) -> bool:
    """Whether storage does not let this one in, whatever package asked it."""
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return True
    if type(error) is OSError and str(error).startswith("Forbidden:"):  # as gcsfs says it
        return True
    return _package(error) in _CLIENTS and (
        _status(error) in _REFUSING or type(error).__name__ in ("ClientAuthenticationError", "RefreshError")
    )


def _package(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in an error of a storage's client; each keeps it in its own place."""
    response = getattr(error, "response", None)
    places = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    found = next((value for value in (*places, getattr(response, "status_code", None)) if value), None)
    return int(found) if isinstance(found, int | str) and str(found).isdigit() else None


def is_outage(error: BaseException) -> bool:
    """Whether storage refused a read or failed at it for a while, where a damaged file fails for good."""
    damaged = isinstance(error, EOFError | gzip.BadGzipFile) or (type(error) is OSError and error.errno is None)
    return is_refused(error) or (is_transient(error) and not damaged)


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
        if is_refused(error):
            scheme = scheme_of(what)
            raise InputError(
                f"{what} must be readable with the credentials at hand, it was refused: {error}; check "
                f"{scheme.credentials if scheme else 'who may read it'}"
            ) from error
        if _package(error) in _CLIENTS:
            raise InputError(f"{what} must be read or written, storage does not do it: {error}; fix the URL") from error
        raise


def _reason(state: tenacity.RetryCallState) -> str:
    return repr(state.outcome.exception()) if state.outcome else ""
