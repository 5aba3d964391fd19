"""The order of the stages, stated once: raw records to registry.

    prepare → plan → train → evaluate → export → register → compare → decide → promote → report

A stage takes the artefacts of the stages before it. The main job runs them all; a single verb runs its own stage and
asks the list for what is missing: stages that are cheap or find their work done are run again, the others must stand.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from jobs import tables
from jobs.run import Run
from pipeline.contracts import PromotionDecision
from pipeline.errors import HeldBack
from pipeline.progress import say


@dataclass(frozen=True)
class Stage:
    """One stage of the main job: the function of its name in the module of its name, imported when it is first asked.

    Args:
        name: of the stage and of its artefact.
        takes: stages before it whose artefacts it is given, in order.
        stands: whether a later stage's verb takes the artefact that an earlier call left, by the module's ``standing``,
            and refuses where there is none. Any other stage is run again, since it is cheap or finds its work done.
    """

    name: str
    takes: tuple[str, ...] = ()
    stands: bool = False

    def run(self, run: Run, *artefacts: Any, **options: Any) -> Any:
        """Make the artefact from the run and from the artefacts it takes."""
        return getattr(self._module, self.name)(run, *artefacts, **options)

    def standing(self, run: Run) -> Any:
        """Return the artefact that an earlier call left.

        Raises:
            InputError: there is none.
        """
        return self._module.standing(run)

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"jobs.stages.{self.name}")


STAGES = (
    Stage("prepare"),
    Stage("plan", ("prepare",)),
    Stage("train", ("plan",), stands=True),
    Stage("evaluate", ("train",), stands=True),
    Stage("export", ("train",), stands=True),
    Stage("register", ("evaluate",)),
    Stage("compare", ("register",)),
    Stage("decide", ("register", "compare", "evaluate", "export")),
    Stage("promote", ("register", "decide")),
    Stage("report"),
)
_BY_NAME = {stage.name: stage for stage in STAGES}


def run_stage(run: Run, name: str, **options: Any) -> Any:
    """Run one stage and return its artefact; what it takes is found standing, or made where that is cheap.

    Args:
        run: that the stage is part of.
        name: of the stage.
        options: of the stage itself.

    Raises:
        InputError: an artefact that it takes does not stand.
    """
    stage, made = _BY_NAME[name], dict[str, Any]()
    before = [s for s in STAGES if s.name in _needed(stage)]
    for needed in before:  # what must stand is asked for before anything is made
        if needed.stands:
            made[needed.name] = needed.standing(run)
    for needed in before:
        if not needed.stands:
            made[needed.name] = needed.run(run, *(made[taken] for taken in needed.takes))
    return stage.run(run, *(made[taken] for taken in stage.takes), **options)


def _needed(stage: Stage) -> set[str]:
    """Return the stages whose artefacts a stage takes, and those that must be run to have them."""
    found = set(stage.takes)
    for taken in (_BY_NAME[name] for name in stage.takes):
        if not taken.stands:
            found |= _needed(taken)
    return found


def main_job(run: Run) -> dict[str, Any]:
    """Run every stage in order; each finds what it has done already.

    Raises:
        HeldBack: the gates did not let the candidate pass; everything else is done.
    """
    made: dict[str, Any] = {}
    for stage in STAGES:
        if made and "promote" not in made:
            run.may_go_on()
        made[stage.name] = stage.run(run, *(made[needed] for needed in stage.takes))
    run.tracker().end()
    return passed(_outcome(run, made))


def _outcome(run: Run, made: dict[str, Any]) -> dict[str, Any]:
    """Show what came out and return it as plain values."""
    decision: PromotionDecision = made["promote"]
    tables.show_training(run.history())
    tables.show_evaluation(made["evaluate"].trained, made["evaluate"].base)
    tables.show_decision(decision)
    say(f"model   models:/{run.registry.name}@champion in {run.config.tracking.shown}")
    say(f"exports {run.folder.exports}: {', '.join(made['export'])}")
    say(f"report  {made['report']}")
    say(f"serving {run.folder.exports / 'serving.json'}")
    say("next: open the report; or begin with your own data: mtl-lora init path/to/records --out run.yaml")
    links = {"version": decision.candidate, "report": str(made["report"])}
    return {"verdict": decision.verdict, "reasons": list(decision.reasons), **links}


def passed(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result.

    Raises:
        HeldBack: its verdict is to hold or reject.
    """
    if result["verdict"] in ("HOLD", "REJECT"):
        raise HeldBack(f"{result['verdict']}: {'; '.join(result['reasons'])}", result)
    return result
