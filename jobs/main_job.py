"""The order of the stages, stated once: raw records to registry.

    prepare → plan → train → evaluate → export → register → compare → decide → promote → report

A stage takes the artefacts of the stages before it. The main job runs them all; a single verb runs its own stage and
asks the list for what is missing: stages that are cheap or find their work done are run again, the others must stand.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import tables
from jobs.run import Run
from pipeline.contracts import PromotionDecision
from pipeline.errors import HeldBack
from pipeline.log_lines import name_process
from pipeline.progress import say, tell


@dataclass(frozen=True)
class Stage:
    """One stage of the main job: the function of its name in the module of its name, imported when it is first asked.

    Args:
        name: of the stage and of its artefact.
        words: what it makes, for the person who watches.
        takes: stages before it whose artefacts it is given, in order.
        stands: whether a later stage's verb takes the artefact that an earlier call left, by the module's ``standing``,
            and refuses where there is none. Any other stage is run again, since it is cheap or finds its work done.
    """

    name: str
    words: str
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
    Stage("prepare", "records become shards"),
    Stage("plan", "steps, samples, tokens and memory are counted", ("prepare",)),
    Stage("train", "the workers start and train the adapter", ("plan",), stands=True),
    Stage("evaluate", "adapter and untrained base answer the test samples", ("train",), stands=True),
    Stage("export", "each task becomes a plain LoRA that answers alike", ("train",), stands=True),
    Stage("register", "the adapter becomes a version of the registered model", ("evaluate",)),
    Stage("compare", "it is held against champion and base, sample by sample", ("register",)),
    Stage("decide", "the gates judge the evidence", ("register", "compare", "evaluate", "export")),
    Stage("promote", "the champion changes, or stays", ("register", "decide")),
    Stage("report", "all of it goes on one page"),
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
    try:
        return stage.run(run, *(made[taken] for taken in stage.takes), **options)
    finally:
        run.keep()


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
    name_process(run=run.config.name)
    for number, stage in enumerate(STAGES, 1):
        say(f"[bold]{number:>2}/{len(STAGES)} {stage.name:<8}[/bold] {stage.words}")
        if made and "promote" not in made:
            run.may_go_on()
        try:
            made[stage.name] = stage.run(run, *(made[needed] for needed in stage.takes))
        finally:
            run.keep()
    run.tracker().end()
    return passed(_outcome(run, made))


def _outcome(run: Run, made: dict[str, Any]) -> dict[str, Any]:
    """Show what came out and return it as plain values."""
    decision: PromotionDecision = made["promote"]
    tables.show_training(run.history())
    tables.show_evaluation(made["evaluate"].trained, made["evaluate"].base)
    tables.show_decision(decision)
    say(f"model   models:/{run.registry.name}@champion in {run.config.tracking.shown}")
    say(f"exports {run.folder.exports}: {', '.join(made['export'])}, and how to serve them: serving.json")
    _say_next(run, made["report"])
    links = {"version": decision.candidate, "report": str(made["report"])}
    return {"verdict": decision.verdict, "reasons": list(decision.reasons), **links}


def _say_next(run: Run, report: Path) -> None:
    """Say what a person may do with the run that is done."""
    command = "mtl-lora" if shutil.which("mtl-lora") else str(Path(sys.executable).with_name("mtl-lora"))
    mlflow = command.removesuffix("mtl-lora") + "mlflow"
    say("[bold]what to do next[/bold]")
    for words, what in (
        ("look at the report", f"open {report}"),
        ("all runs and models", f"{mlflow} ui --backend-store-uri {run.config.tracking.shown}"),
        ("any two models in pairs", f"{command} compare --config {run.folder.config} --reference base"),
        ("where a model comes from", f"{command} lineage --config {run.folder.config}"),
        ("begin with your own data", f"{command} init path/to/records --out run.yaml"),
    ):
        tell(f"  {words:<26}{what}")


def passed(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result.

    Raises:
        HeldBack: its verdict is to hold or reject.
    """
    if result["verdict"] in ("HOLD", "REJECT"):
        raise HeldBack(f"{result['verdict']}: {'; '.join(result['reasons'])}", result)
    return result
