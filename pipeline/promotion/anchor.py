"""What the registry remembers for a decision: the best earlier champion, and who was judged on a holdout before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from pipeline.promotion.entries import Entry
from pipeline.promotion.provenance import Provenance


def anchor_of(chain: Sequence[Entry], answers: Callable[[int], Collection[str]], wanted: Collection[str]) -> int | None:
    """Return the version that candidates are held against beside the present champion, so that small falls add up.

    It is the one that stands in the entry by which the champion was last promoted; in entries of earlier releases none
    does, and it is the first champion of all. One that does not answer a wanted task which the champion answers is
    passed over for the next champion that does.

    Args:
        chain: changes of champion that count, oldest first.
        answers: returns the tasks that a version answers.
        wanted: tasks that are judged.

    Returns:
        Its number, the champion's own where there is no better; None where there is no champion yet.
    """
    if not chain:
        return None
    champion = chain[-1].version
    asked = set(wanted) & set(answers(champion))
    recorded = next((e.anchor for e in reversed(chain) if e.version == champion and e.action == "promote"), None)
    versions = list(dict.fromkeys(entry.version for entry in chain))
    first = versions.index(recorded) if recorded in versions else 0
    return next((number for number in versions[first:] if asked <= set(answers(number))), champion)


def looks_before(number: int, versions: Iterable[tuple[int, Provenance]]) -> int:
    """Return how many other versions were judged on a version's holdout before it.

    A holdout is known by its samples of any one task, or by its manifest where an earlier release recorded no samples.

    Args:
        number: of the version.
        versions: every registered version with what it was made from, itself too.
    """
    known = dict(versions)
    own = known[number]
    others = (other for earlier, other in known.items() if earlier < number)
    return sum(
        other.manifest_sha256 == own.manifest_sha256 or bool(own.holdout.items() & other.holdout.items())
        for other in others
    )
