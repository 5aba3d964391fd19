"""Records of two small tasks with three splits, a tiny base model, and a search's configuration over both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

WORDS = {"tone": ("good", "bad"), "size": ("big", "small")}
TUNE: dict[str, Any] = {
    "space": {"training.learning_rate": {"log_uniform": [1e-3, 3e-2]}, "adapter.r": {"choice": [2, 4]}},
    "trials": 4,
    "asha": {"grace_steps": 4, "reduction": 2},
    "max_concurrent": 2,
}


def write_ground(root: Path, base: str = "smollm2-135m", steps: int = 16, **changes: Any) -> Path:
    """Write records and a configuration under a folder, and return the configuration's path."""
    for task, words in WORDS.items():
        folder = root / "data" / task
        folder.mkdir(parents=True)
        for split, count in {"train": 48, "validation": 16, "test": 16}.items():
            rows = [{"text": f"{split} {i} is {words[i % 2]}", "label": i % 2} for i in range(count)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = ("train", "validation", "test")
    files = {task: {split: f"{task}/{split}.jsonl" for split in splits} for task in WORDS}
    spec = {"template": "{text}:", "label_words": [" no", " yes"]}
    values = {
        "name": "t",
        "run_root": str(root / "runs"),
        "data": {"source": "records", "root": str(root / "data"), "files": files},
        "tasks": dict.fromkeys(WORDS, spec),
        "model": {"base": base, "dtype": "float32"},
        "adapter": {"r": 4},
        "training": {
            "num_workers": 1,
            "global_batch_size": 8,
            "max_steps": steps,
            "checkpoint_steps": 2,
            "log_steps": 2,
            "validation": {"every_steps": 2, "samples_per_task": 8},
        },
        "tune": TUNE,
    }
    path = root / "search.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path
