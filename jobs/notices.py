"""Notices to people: what a retraining decided, or why it failed, to the log and to a webhook, a chat, a mailbox."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.errors import masked
from pipeline.progress import tell
from pipeline.settings import Settings

Event = Literal["PROMOTE", "HOLD", "REJECT", "NOTHING_NEW", "FAILED", "MISSED", "TAKEN_BACK", "DRIFT"]
_URL = r"[A-Za-z][A-Za-z0-9+.-]*://"
_TIMEOUT_S = 10


class NoticesConfig(Settings):
    """Where notices go."""

    webhook_env: str = Field(default="MTL_LORA_WEBHOOK", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable with the URLs that notices go to, by commas or spaces: `https://` takes them as JSON, any
    other is one of Apprise's (`slack://`, `msteams://`, `mailtos://` …). They are often secrets; where it is not set,
    notices are logged alone."""
    attempts: int = Field(default=5, ge=1)
    """Tries to deliver one, with waits that double from one second on."""


Send = Callable[[dict[str, Any]], None]
"""Delivers a notice; raises where it is not taken."""


def targets(config: NoticesConfig) -> tuple[dict[str, Send], list[str]]:
    """Return what delivers a notice to each target that the environment names, and why others cannot be targets.

    Neither the words that a target is known by nor those of a refusal hold its URL.
    """
    value = os.environ.get(config.webhook_env, "").strip(", \t\n")
    found: dict[str, Send] = {}
    refused: list[str] = []
    for number, url in enumerate(re.split(rf"[\s,]+(?={_URL})", value) if value else (), 1):
        scheme = url.partition("://")[0].lower() if re.match(_URL, url) else "no URL"
        send = _webhook(url) if scheme in ("http", "https") else _service(url)
        if send is not None:
            found[f"target {number} ({scheme})"] = send
        else:
            refused.append(
                f"{config.webhook_env} must hold https:// URLs or Apprise's, such as slack://…, between commas or "
                f"spaces; number {number} is something else ({scheme}; not shown, it may hold a secret); give it the "
                "form that Apprise's documentation has for the service"
            )
    return found, refused


def notify(config: NoticesConfig, log: Path, event: Event, reasons: list[str], **links: Any) -> bool:
    """Log a notice and deliver it; return whether every target took it.

    A target that stays silent is said and logged, never an error: the retraining it speaks of is done.

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
    found, refused = targets(config)
    for why in refused:
        tell(why)
    delivered = _deliver(found, notice, config.attempts) and not refused
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(json.dumps(notice | {"delivered": bool(found) and delivered}, default=str) + "\n")
    tell(f"notice  {text}")
    return delivered


def _deliver(to: dict[str, Send], notice: dict[str, Any], attempts: int) -> bool:
    from tenacity import Retrying, retry_if_result, stop_after_attempt, wait_exponential

    left, kinds = dict(to), dict[str, str]()

    def attempt() -> bool:
        for words, send in [*left.items()]:
            try:
                send(notice)
                del left[words]
            except Exception as error:  # noqa: BLE001 - each service has its own; whatever it is, the notice is not there
                kinds[words] = type(error).__name__  # what it says may hold the URL
        return bool(left)

    wait, stop = wait_exponential(multiplier=0.5, max=30), stop_after_attempt(attempts)
    Retrying(retry=retry_if_result(bool), wait=wait, stop=stop, retry_error_callback=lambda _: None)(attempt)
    for words in left:
        tell(f"{words} took no notice in {attempts} tries ({kinds[words]})")
    return not left


def _webhook(url: str) -> Send | None:
    import requests

    try:
        requests.Request("POST", url).prepare()
    except (requests.RequestException, ValueError):
        return None

    def send(notice: dict[str, Any]) -> None:
        body, headers = json.dumps(notice, default=str), {"Content-Type": "application/json"}
        # A redirect would hand the notice to a host that nobody named.
        answer = requests.post(url, data=body, headers=headers, timeout=_TIMEOUT_S, allow_redirects=False)
        if not 200 <= answer.status_code < 300:
            raise requests.HTTPError

    return send


def _service(url: str) -> Send | None:
    import logging

    from apprise import Apprise, NotifyFormat, NotifyType

    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # it shows parts of URLs
    service = Apprise.instantiate(url)
    if service is None:
        return None
    service.redirects = False  # whatever the URL says of it
    sender = Apprise()
    sender.add(service)

    def send(notice: dict[str, Any]) -> None:
        title = f"{notice.get('model', 'mtl-lora')}: {notice['event']}"
        links = (f"{key}: {notice[key]}" for key in notice if key not in ("event", "text", "reasons"))
        body = "\n".join([*notice["reasons"], *links])
        kind = NotifyType.FAILURE if notice["event"] == "FAILED" else NotifyType.INFO
        if not sender.notify(body=body, title=title, notify_type=kind, body_format=NotifyFormat.TEXT):
            raise ConnectionError

    return send
