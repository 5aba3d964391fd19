"""What a check finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import masked
from pipeline.progress import tell

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Args:
        what: was looked at.
        found: there.
        status: ``ok``, ``warn`` where a run works but worse, ``fail`` where it cannot.
        remedy: what to do; empty where nothing is.
    """

    what: str
    found: str
    status: Status = "ok"
    remedy: str = ""

    def without_secrets(self) -> Finding:
        """Return it without passwords of URLs, in their queries too, and without the values of secret variables."""
        return Finding(self.what, masked(self.found), self.status, masked(self.remedy))


def first_line(error: BaseException) -> str:
    """Return what an error says in one line of at most 300 characters, its kind where it says nothing."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def show(found: Sequence[Finding]) -> None:
    """Show what was looked at, what was found, and what to do."""
    for each in found:
        tell(f"{each.status:<4}  {each.what}: {each.found}" + (f"; {each.remedy}" if each.remedy else ""))
    counts = {status: sum(each.status == status for each in found) for status in ("ok", "warn", "fail")}
    tell(", ".join(f"{number} {status}" for status, number in counts.items()))
