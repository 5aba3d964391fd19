"""Features are those of the output projection, and every method is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.contracts import Sample
from pipeline.modeling.adapter import build_adapter
from pipeline.modeling.adapter_config import AdapterConfig
from pipeline.modeling.answering import sample_encoder
from pipeline.modeling.base_model import load_base
from pipeline.modeling.config import BaseModelConfig
from pipeline.study.figures import features_of, latency, projected, sharing_of
from tests.pipeline.study.test_frozen_part import TASKS, job_on
from tests.pipeline.training.ranks import tiny_encoder


@pytest.mark.parametrize("method", ["lora", "mtl_lora"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
@torch.no_grad()
def test_features_are_what_the_last_output_projection_gives(tmp_path: Path, method: str, pooling: str) -> None:
    config = BaseModelConfig(base=str(tiny_encoder(tmp_path)), dtype="float32", max_length=32, pooling=pooling)
    base = load_base(config)
    adapted = build_adapter(AdapterConfig(method=method, r=2), base, ["tone", "size"], (2, 2)).eval()
    encoder = sample_encoder(config, TASKS)
    samples = [_sample(task, text) for task, text in (("tone", "a b c"), ("size", "d"), ("tone", "e f"))]
    caught: list[torch.Tensor] = []
    module = adapted.base_model.get_submodule("encoder.layer.1.attention.output.dense")
    hook = module.register_forward_hook(lambda m, i, out: caught.append(out))
    for sample in samples:  # each alone, as anyone would
        (example,) = encoder.encode([sample])
        types = torch.tensor(example.token_types)
        adapted(torch.tensor(example.rows), token_type_ids=types, task_ids=sample.task)
    hook.remove()
    expected = [states[0, 0] if pooling == "first" else states[0].mean(0) for states in caught]
    np.testing.assert_allclose(projected(adapted, encoder, samples), np.stack(expected), rtol=1e-4, atol=1e-6)


def _sample(task: str, text: str) -> Sample:
    return Sample(key=text.replace(" ", "-"), task=task, fields={"text": text, "other": ""}, label=0)


def test_the_probe_tells_tasks_that_stand_apart_and_not_those_that_do_not() -> None:
    rng = np.random.default_rng(0)
    samples = [_sample("tone" if i % 2 else "size", f"t{i}") for i in range(60)]
    noise = rng.normal(size=(60, 5))
    apart = noise + 20.0 * (np.arange(60) % 2)[:, None]
    near, far = features_of("x", noise, samples), features_of("x", apart, samples)
    assert far["probe"] == 1.0 and near["probe"] < 0.75
    assert far["silhouette"] > near["silhouette"] + 0.3
    assert len(far["plane"]) == 60


@pytest.mark.parametrize("method", ["lora", "mtl_lora"])
def test_sharing_is_the_mean_over_layers_and_measurements(tmp_path: Path, method: str) -> None:
    base = load_base(BaseModelConfig(base=str(tiny_encoder(tmp_path)), dtype="float32", max_length=32))
    adapted = build_adapter(AdapterConfig(method=method, r=2), base, ["tone", "size"], (2, 2))  # type: ignore[arg-type]
    history = [{"gradient_cosine": {"size|tone": -0.5}}, {"step": 3}, {"gradient_cosine": {"tone|size": 0.25}}]
    found = sharing_of("x", adapted, history)
    assert found["cosine"] == {"size|tone": -0.125}
    if method == "lora":
        assert found["mixing"] == {}
        return
    layers = [adapted.base_model.get_parameter(path) for path in adapted.base_model.state_dict() if "mixing" in path]
    expected = torch.stack([torch.softmax(logits / 0.1, dim=-1) for logits in layers]).mean(0)
    np.testing.assert_allclose(list(found["mixing"].values()), expected.detach(), rtol=1e-5)
    assert list(found["mixing"]) == ["tone", "size"]


def test_every_method_is_timed_mixed_and_merged(tmp_path: Path) -> None:
    job = job_on(tmp_path, tiny_encoder(tmp_path / "base"))
    samples = [_sample(task, f"{word} {task}") for word in ("a", "b", "c", "d") for task in ("tone", "size")]
    methods = {m: AdapterConfig(method=m, r=3) for m in ("lora", "dora", "mtl_lora")}  # type: ignore[arg-type]
    found = latency(job, methods, samples, (1, 3))
    assert set(found["ratios"]) == {"base", "lora", "lora, merged", "dora", "mtl_lora", "mtl_lora, merged"}
    assert found["ratios"]["base"] == [1.0, 1.0]
    assert all(value > 0 for line in found["ratios"].values() for value in line)
