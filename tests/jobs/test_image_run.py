"""A run whose tasks show images: trained by two ranks, cut off and gone on, evaluated, reported, registered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from jobs.config import RunConfig
from jobs.main_job import run_stage
from jobs.run import Run
from pipeline.contracts import TaskSpec
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.modeling.predictor import PREDICTOR_FILE, Predictor, PredictorSpec
from pipeline.orchestration.cluster import cluster as ray_cluster
from pipeline.orchestration.config import RayConfig
from pipeline.stream import read_split
from pipeline.tracking import TrackingConfig
from tests.pipeline.made_images import image_bytes
from tests.pipeline.modeling.tiny_image_text import tiny_image_text_folder
from tests.processes import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
WORKER = Path(__file__).parents[1] / "pipeline" / "training" / "resume_worker.py"
GATES = {"beat_base": False, "min_samples": 1, "min_rarer_class": 1, "gain": "none", "margin": 1.0}
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 220)}
TASKS = (
    TaskSpec(name="is_red", template="{q}", label_words=(" no", " yes"), image_field="image"),
    TaskSpec(name="colour", template="{q}", kind="generation", image_field="image", generation={"max_new_tokens": 3}),
    TaskSpec(name="long", template="{q}\n?", label_words=(" no", " yes")),
)


def _write_records(folder: Path) -> None:
    names = list(COLOURS)
    for task in TASKS:
        (folder / task.name).mkdir(parents=True)
        for split, count in (("train", 24), ("test", 9)):
            rows = []
            for i in range(count):
                colour, name = names[i % 3], f"{split}{i}.png"
                row = {"id": f"{split}{i}", "q": f"{split} {i}", "label": int(i % 2 == 0)}
                if task.image_field:
                    (folder / task.name / name).write_bytes(image_bytes("PNG", COLOURS[colour], (8 + i, 9)))
                    row |= {"image": name, "label": int(colour == "red")}
                if task.is_written:
                    row["answer"] = colour
                    del row["label"]
                rows.append(json.dumps(row) + "\n")
            (folder / task.name / f"{split}.jsonl").write_text("".join(rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The prepared run; beside its folder the ranks' runs ``images_…``."""
    root = tmp_path_factory.mktemp("images")
    _write_records(root / "in")
    base = BaseModelConfig(base=str(tiny_image_text_folder(root / "base", "fast_vlm")), dtype="float32", max_length=64)
    config = RunConfig(
        name="seen",
        run_root=root / "runs",
        data={"source": "records", "root": str(root / "in")},
        tasks=TASKS,
        model=base,
        adapter=AdapterConfig(r=3),
        evaluation={"num_workers": 2},
        promotion={"model_name": "seer", "gates": GATES},
        tracking=TrackingConfig().resolved(root / "runs"),
    )
    run = Run(config)
    run.folder.bind(config.digest())
    run_stage(run, "prepare")
    (root / "tasks.json").write_text(json.dumps([task.model_dump(mode="json") for task in TASKS]))
    runs = ["images_whole:2:float32:4", "images_cut:2:float32:2", "images_cut:2:float32:4"]
    runs += ["images_anew:2:float32:4", "images_kept:2:float32:2", "images_kept:2:float32:4"]
    run_ranks(WORKER, [root, config.manifest_path, base.base, *runs], 2)
    return run


@pytest.mark.parametrize("names", [("images_whole", "images_cut"), ("images_anew", "images_kept")])
def test_images_resume_bit_for_bit_on_two_ranks_their_features_kept_or_made_anew(
    run: Run, names: tuple[str, str]
) -> None:
    root = run.config.run_root.parent
    logs = [(root / name / "history.jsonl").read_text().splitlines() for name in names]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    kept = {folder.name: any(folder.rglob("*.states")) for folder in root.glob("states_*")}
    assert kept == {"states_1": False, f"states_{1 << 30}": True}
    for name in ("optimizer.safetensors", "adapter/adapter_model.safetensors", "state.json"):
        ends = [root / made / "checkpoints" / "step-00000004" / name for made in names]
        assert ends[0].read_bytes() == ends[1].read_bytes(), name


def test_the_registered_model_answers_rows_that_hold_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = run.config, run.folder
    trained = config.run_root.parent / "images_cut" / "checkpoints" / "step-00000004" / "adapter"
    shutil.copytree(trained, folder.adapter)
    PredictorSpec(tasks=TASKS, base=config.model).write(folder.adapter / PREDICTOR_FILE)
    with ray_cluster(RayConfig()):
        run_stage(run, "evaluate")
        run_stage(run, "export")
        decision = run_stage(run, "promote")
        assert decision.verdict == "PROMOTE", decision.reasons
    page = run_stage(run, "report").read_text()
    assert page.count('src="data:image/png;base64,') >= 12 and page.count('class="examples"') == 2
    rows = []
    for sample in read_split(config.manifest_path, "test"):
        rows.append({"task": sample.task, **sample.fields} | ({"image": sample.image} if sample.image else {}))
    frame = pd.DataFrame(rows)
    expected = Predictor.load(folder.adapter).predict(frame)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.tracking.uri)
    found = mlflow.pyfunc.load_model("models:/seer@champion").predict(frame)
    pd.testing.assert_frame_equal(found, expected)
    of_images = found[found.task == "is_red"].score
    assert of_images.nunique() > 3  # what is asked differs by a number alone, what is seen by colour
