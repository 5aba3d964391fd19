"""The order of the stages, as a list that can be asked; no stage runs here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import main_job
from jobs.config import RunConfig
from jobs.main_job import STAGES, Stage, run_stage
from jobs.run import Run
from pipeline.errors import HeldBack, InputError


def _run(tmp_path: Path, **more: Any) -> Run:
    return Run(RunConfig(name="t", run_root=tmp_path), **more)


def test_a_stage_takes_only_what_earlier_stages_made() -> None:
    names = [stage.name for stage in STAGES]
    assert names[:5] == ["prepare", "plan", "train", "evaluate", "export"]
    assert names[5:] == ["register", "compare", "decide", "promote", "report"]
    for place, stage in enumerate(STAGES):
        assert set(stage.takes) <= set(names[:place]), stage.name


@pytest.mark.parametrize(("verb", "asks_for"), [("evaluate", "train"), ("export", "train"), ("report", "evaluate")])
def test_a_verb_names_the_verb_whose_artefact_is_missing(tmp_path: Path, verb: str, asks_for: str) -> None:
    with pytest.raises(InputError, match=f"run first: mtl-lora {asks_for} with this --config"):
        run_stage(_run(tmp_path), verb)


def _listed(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Put a list in the place of the real one, whose stages only say that they ran."""

    def stage(name: str, *takes: str, stands: bool = False) -> Stage:
        def made(run: Run, *artefacts: str, **_: Any) -> str:
            calls.append(f"{name}({', '.join(artefacts)})")
            return name

        def standing(run: Run) -> str:
            calls.append(f"find {name}")
            return f"old {name}"

        module = SimpleNamespace(standing=standing, **{name: made})
        monkeypatch.setitem(sys.modules, f"jobs.stages.{name}", module)  # type: ignore[arg-type]
        return Stage(name, "is made", takes, stands)

    stages = (
        stage("data"),
        stage("model", "data", stands=True),
        stage("number", "model"),
        stage("scores", "model", stands=True),
        stage("verdict", "number", "scores"),
        stage("promote", "verdict"),
        stage("page"),
    )
    monkeypatch.setattr(main_job, "STAGES", stages)
    monkeypatch.setattr(main_job, "_BY_NAME", {each.name: each for each in stages})


def test_what_must_stand_is_asked_for_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    _listed(monkeypatch, calls)
    assert run_stage(_run(tmp_path), "verdict") == "verdict"
    assert calls == ["find model", "find scores", "number(old model)", "verdict(number, old scores)"]


def test_the_main_job_asks_before_each_stage_until_the_champion_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    _listed(monkeypatch, calls)

    def refuse() -> None:
        calls.append("may go on?")
        if "verdict(number, scores)" in calls:
            raise HeldBack("another champion came")

    with pytest.raises(HeldBack):
        main_job.main_job(_run(tmp_path, may_go_on=refuse))
    assert calls[-2:] == ["verdict(number, scores)", "may go on?"]
    assert calls.count("may go on?") == 5
