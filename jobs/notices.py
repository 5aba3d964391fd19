"""Notices to people: what a retraining decided, or why it failed, to the log and to a webhook."""

from __future__ import annotations

import datetime as dt
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.errors import masked
from pipeline.progress import say
from pipeline.settings import Settings

Event = Literal["PROMOTE", "HOLD", "REJECT", "NOTHING_NEW", "FAILED", "MISSED", "TAKEN_BACK", "DRIFT"]


class NoticesConfig(Settings):
    """Where notices go."""

    webhook_env: str = Field(default="MTL_LORA_WEBHOOK", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable with the webhook's URL, which is often a secret; where it is not set, notices are logged
    alone."""
    attempts: int = Field(default=5, ge=1)
    """Tries to deliver one, with waits that double from one second on."""


def notify(config: NoticesConfig, log: Path, event: Event, reasons: list[str], **links: Any) -> bool:
    """Log a notice and post it as JSON; return whether every place took it.

    A webhook that stays silent is said and logged, never an error: the retraining it speaks of is done.

    Args:
        config: where to.
        log: file of all notices, one JSON object a line.
        event: what happened.
        reasons: why, in words; passwords of URLs in them are masked.
        links: what else is known: model, run, version, report.
    """
    reasons = [masked(reason) for reason in reasons]
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    text = f"{links.get('model', 'mtl-lora')}: {event}. {'; '.join(reasons)}"
    notice = {"time": now, "event": event, "text": text, "reasons": reasons} | {k: v for k, v in links.items() if v}
    url = os.environ.get(config.webhook_env, "")
    delivered = not url or _post(url, notice, config.attempts)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(json.dumps(notice | {"delivered": bool(url) and delivered}, default=str) + "\n")
    say(f"notice  {text}")
    return delivered


def _post(url: str, notice: dict[str, Any], attempts: int) -> bool:
    import requests
    from tenacity import RetryError, Retrying, stop_after_attempt, wait_exponential

    body = json.dumps(notice, default=str)
    try:
        for attempt in Retrying(stop=stop_after_attempt(attempts), wait=wait_exponential(multiplier=0.5, max=30)):
            with attempt:
                headers = {"Content-Type": "application/json"}
                requests.post(url, data=body, headers=headers, timeout=10).raise_for_status()
    except RetryError as error:
        # The URL itself may be a secret: only the kind of the failure is said.
        say(f"the webhook took no notice in {attempts} tries ({type(error.last_attempt.exception()).__name__})")
        return False
    return True
