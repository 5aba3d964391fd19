"""What the rows of a suite say is to be done next, and what of it is finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.study.search import RateSearch, search_rates
from jobs.study.trials import UNTRAINED, SuiteRuns

if TYPE_CHECKING:
    from pipeline.study.trial import StudyTrial

Row = dict[str, Any]
SEARCH, JUDGE = "validation", "test"
"""The split that a rate is chosen on, and the one that the table is made of."""


@dataclass
class Work:
    """What a suite's rows say is to be done."""

    suite: SuiteRuns
    _rows: dict[str, Row] = field(default_factory=dict)

    def trial(self, arm: str, rate: float, seed: int, split: str) -> tuple[StudyTrial, Row | None]:
        """Return a run, and its row where it is over."""
        from pipeline.study.trial import read_row

        trial = self.suite.trial(arm, rate, seed, split)
        place = str(trial.folder)
        if place not in self._rows and (row := read_row(trial.folder)) is not None:
            self._rows[place] = row
        return trial, self._rows.get(place)

    def search(self, arm: str) -> RateSearch:
        """Return where an arm's search stands."""
        study = self.suite.study
        measured: dict[float, float] = {}
        while True:
            found = search_rates(study.learning_rates, measured, study.widenings)
            rows = {rate: self.trial(arm, rate, study.search_seed, SEARCH)[1] for rate in found.pending}
            known = {rate: row["macro"] for rate, row in rows.items() if row is not None}
            if len(known) < len(rows) or found.chosen is not None:
                return found
            measured |= known

    def pending(self) -> list[StudyTrial]:
        """Return the runs that can be done now: of each arm its search, or then its seeds."""
        study, found = self.suite.study, []
        asked = [(UNTRAINED, study.learning_rates[0], 0, JUDGE)]
        for arm in study.arms_of(self.suite.name):
            search = self.search(arm)
            asked += [(arm, rate, study.search_seed, SEARCH) for rate in search.pending]
            if search.chosen is not None:
                asked += [(arm, search.chosen, seed, JUDGE) for seed in study.seeds]
        for told in asked:
            trial, row = self.trial(*told)
            if row is None:
                found.append(trial)
        return found

    def left(self) -> tuple[int, int]:
        """Return about how many runs are left, and of how many, taking no grid to grow further."""
        study, arms = self.suite.study, self.suite.study.arms_of(self.suite.name)
        open_searches = sum(self.search(arm).chosen is None for arm in arms)
        left = len(self.pending()) + open_searches * len(study.seeds)
        return left, 1 + len(arms) * (len(study.learning_rates) + len(study.seeds))

    def seconds(self) -> float | None:
        """Return what a run took on average so far; None before the first one."""
        times = [row["train_s"] + row["score_s"] for row in self._rows.values() if row["arm"] != UNTRAINED]
        return sum(times) / len(times) if times else None

    def finished(self) -> dict[str, Any]:
        """Return what the results are made of: the rows by arm, the searches, the folders of the scores."""
        study, found = self.suite.study, dict[str, Any]()
        untrained, row = self.trial(UNTRAINED, study.learning_rates[0], 0, JUDGE)
        for arm in study.arms_of(self.suite.name):
            search = self.search(arm)
            seeds = study.seeds if search.chosen is not None else ()
            runs = [self.trial(arm, search.chosen or 0.0, seed, JUDGE) for seed in seeds]
            curve = {
                row["rate"]: row["macro"] for row in self._rows.values() if row["arm"] == arm and row["split"] == SEARCH
            }
            found[arm] = {"search": search, "curve": dict(sorted(curve.items())), "runs": runs}
        return {"arms": found, "untrained": (untrained, row), "config": self.suite.config(UNTRAINED, 1e-3, 0)}
