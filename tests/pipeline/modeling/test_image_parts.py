"""An adapter in a vision tower and a connector: each image meets its own task's, whatever others stand beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora import AdapterModel
from mtl_lora.files import read_description
from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.evaluation.parity import exported_model, own_probabilities
from pipeline.modeling.adapter import AdapterConfig, build_adapter, check_shape, load_adapter
from pipeline.modeling.answering import class_scorer, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.config import KeptStatesConfig
from pipeline.modeling.image_parts import part_finder
from pipeline.modeling.layer_cut import checkpoint_layers
from pipeline.modeling.packing import pack
from pipeline.modeling.predictor import PredictorSpec
from pipeline.modeling.scoring import LabelScorer, Scorer, label_loss
from pipeline.training.frozen import kept_features
from tests.pipeline.modeling.test_image_text import READ, SAID, SEEN, samples
from tests.pipeline.modeling.tiny import tiny_folder
from tests.pipeline.modeling.tiny_image_text import FAMILIES

ALSO = SEEN.model_copy(update={"name": "also"})
NAMES = ["seen", "also", "said", "read"]
ALL = ("language", "connector", "vision")
PARTS = dict.fromkeys(FAMILIES, ALL) | {"fast_vlm": ("language", "connector"), "gemma3": ("language", "vision")}
FAST = ("llava",)
SLOW = [pytest.mark.slow, pytest.mark.timeout(180)]


def _adapted(config: BaseModelConfig, parts: tuple[str, ...], **options: Any) -> AdapterModel:
    """Return an adapter in which every task differs, in parts of a base."""
    torch.manual_seed(0)
    shape = AdapterConfig.model_validate({"r": 2, "parts": parts, "lora_dropout": 0.0, **options})
    adapted = build_adapter(shape, load_base(config), NAMES)
    with torch.no_grad():
        for layer in adapted.adapted_layers().values():
            for parameter in layer.adapter_parameters().values():
                parameter.normal_(0, 0.4)
        for name in adapted.extra_parameter_names:
            adapted.base_model.get_parameter(name).add_(0.1 * torch.randn(()))
    return adapted.eval()


def _asked(kind: str) -> list[Sample]:
    also = [sample.model_copy(update={"task": "also"}) for sample in samples()]
    return samples() + also + ([] if kind == "paligemma" else samples(READ)[:1])


def _probabilities(adapted: AdapterModel, config: BaseModelConfig, asked: list[Sample]) -> list[np.ndarray]:
    tasks = [SEEN, ALSO, SAID, *([READ] if any(sample.task == "read" for sample in asked) else [])]
    return Scorer(LabelScorer(adapted), sample_encoder(config, tasks)).probabilities(asked)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FAST else SLOW) for k in FAMILIES])
def test_a_mixed_batch_scores_each_image_as_its_task_alone_and_merged(
    folders: dict[str, BaseModelConfig], kind: str
) -> None:
    config, asked = folders[kind], _asked(kind)
    adapted = _adapted(config, PARTS[kind])
    together = _probabilities(adapted, config, asked)
    for sample, found in zip(asked, together, strict=True):
        np.testing.assert_allclose(_probabilities(adapted, config, [sample])[0], found, atol=2e-4)
    outside = _adapted(config, PARTS[kind][1:])  # tasks then differ by what they see alone
    seen, also = (_probabilities(outside, config, asked)[i] for i in (0, 4))
    assert max(abs(seen - also)) > 1e-3
    encoder = sample_encoder(config, [SEEN, ALSO])
    for task in ("seen", "also"):
        merged = _adapted(config, PARTS[kind]).merge_and_unload(task)
        mine = [i for i, sample in enumerate(asked) if sample.task == task]
        own = own_probabilities(merged, encoder, [asked[i] for i in mine])
        np.testing.assert_allclose([together[i] for i in mine], own, atol=2e-4)


@pytest.mark.parametrize("kind", ["idefics3", pytest.param("qwen3_vl", marks=SLOW), pytest.param("gemma3", marks=SLOW)])
def test_mixed_batches_write_what_each_task_writes_alone(folders: dict[str, BaseModelConfig], kind: str) -> None:
    config = folders[kind]
    more = SAID.model_copy(update={"name": "also"})
    asked = samples(SAID) + [sample.model_copy(update={"task": "also"}) for sample in samples(SAID)]
    scorer = Scorer(LabelScorer(_adapted(config, PARTS[kind][1:])), sample_encoder(config, [SEEN, more, SAID]))
    together = scorer.texts(asked)
    assert together == [scorer.texts([sample])[0] for sample in asked]
    assert together[:4] != together[4:]


@pytest.mark.parametrize("kind", ["llava", pytest.param("qwen2_5_vl", marks=SLOW)])
def test_gradients_of_a_mixed_batch_are_those_of_its_samples_also_where_layers_run_again(
    folders: dict[str, BaseModelConfig], kind: str
) -> None:
    config, asked = folders[kind], _asked(kind)[:8:2]
    encoder = sample_encoder(config, [SEEN, ALSO])

    def gradients(parts: list[list[Sample]], again: bool) -> dict[str, torch.Tensor]:
        adapted = _adapted(config, PARTS[kind]).train()
        if again:
            checkpoint_layers(adapted.base_model)
        scorer = class_scorer(adapted)
        losses = [label_loss(scorer(batch), batch).sum() for batch in map(pack, map(encoder.encode, parts))]
        torch.stack(losses).sum().backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}

    alone = gradients([[sample] for sample in asked], again=False)
    assert any(".vision" in name or ".visual" in name for name, grad in alone.items() if grad.any())
    for again in (False, True):
        together = gradients([asked], again)
        assert set(together) == set(alone)
        for name, grad in together.items():
            torch.testing.assert_close(grad, alone[name], rtol=2e-3, atol=2e-4)


def test_texts_alone_move_the_same_parameters_as_images(folders: dict[str, BaseModelConfig]) -> None:
    config = folders["llava"]
    adapted = _adapted(config, ALL).train()
    batch = pack(sample_encoder(config, [SEEN, ALSO, SAID, READ]).encode(samples(READ)))
    label_loss(class_scorer(adapted)(batch), batch).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "extras"), [("qwen2_5_vl", {}), ("llava", {"bias": "all", "train_layer_norms": True})]
)
def test_a_saved_adapter_says_its_parts_and_comes_back_and_is_exported_whole(
    tmp_path: Path, folders: dict[str, BaseModelConfig], kind: str, extras: dict[str, Any]
) -> None:
    config, parts = folders[kind], ("language", "vision")
    adapted = _adapted(config, parts, **extras)
    part_of = part_finder(adapted.base_model)
    assert {part_of(path) for path in adapted.adapted_layers()} == set(parts)
    assert {part_of(name) for name in adapted.extra_parameter_names} == (set(parts) if extras else set())
    expected = _probabilities(adapted, config, _asked(kind))
    adapted.save_pretrained(tmp_path / "saved")
    saved = read_description(tmp_path / "saved")["config"]
    assert re.findall(r"\?P<(\w+)>", saved["target_modules"]) == list(parts)
    shape = AdapterConfig.model_validate({"r": 2, "parts": parts, "lora_dropout": 0.0, **extras})
    check_shape(shape, tmp_path / "saved")
    for other in (("language",), ALL):
        with pytest.raises(InputError, match="target_modules is"):
            check_shape(shape.model_copy(update={"parts": other}), tmp_path / "saved")
    loaded = load_adapter(load_base(config), tmp_path / "saved").eval()
    np.testing.assert_array_equal(
        np.concatenate(_probabilities(loaded, config, _asked(kind))), np.concatenate(expected)
    )
    adapted.export_task("also", tmp_path / "also")
    written = json.loads((tmp_path / "also" / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == set(adapted.adapted_layers())
    model = exported_model(tmp_path / "also", PredictorSpec(tasks=(ALSO,), base=config))
    own = own_probabilities(model, sample_encoder(config, [SEEN, ALSO]), _asked(kind)[4:8])
    np.testing.assert_allclose(expected[4:8], own, atol=2e-4)


def test_the_tasks_of_a_plain_forward_are_those_of_its_rows_or_refused(folders: dict[str, BaseModelConfig]) -> None:
    adapted = _adapted(folders["llava"], ALL)
    encoder: Any = sample_encoder(folders["llava"], [SEEN, ALSO])
    prompts = encoder.prompts([samples()[0], samples()[1]])
    row = {
        "input_ids": torch.tensor([prompt.ids for prompt in prompts]),
        "pixel_values": torch.cat([prompt.image.tensors["pixel_values"] for prompt in prompts]),
    }
    with torch.no_grad():
        mixed = adapted(**row, task_ids=torch.tensor([0, 1])).logits
        for task in (0, 1):
            torch.testing.assert_close(adapted(**row, task_ids=task).logits[task], mixed[task], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"one task id an image .* got ids of shape \(2,\) for 1 images"):
        adapted(input_ids=row["input_ids"], pixel_values=row["pixel_values"][:1], task_ids=torch.tensor([0, 1]))


def test_what_cannot_be_adapted_is_refused(tmp_path: Path, folders: dict[str, BaseModelConfig]) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("fast_vlm", {"parts": ("vision",)}, r"'vision' of FastVlm\w+ has none \(.*Conv2d.*; leave it out"),
        ("gemma3", {"parts": ALL}, "'connector' of Gemma3"),
        ("llava", {"target_modules": "all-linear"}, "got connector, language, vision for language, such as"),
        ("llava", {"target_modules": r".*language_model.*q_proj", "parts": ALL}, "got language for connector"),
    ]
    for kind, options, reason in cases:
        with pytest.raises(InputError, match=reason):
            build_adapter(AdapterConfig.model_validate({"r": 2, **options}), load_base(folders[kind]), ["seen"])
    text = BaseModelConfig(base=str(tiny_folder(tmp_path / "llama", "llama")), dtype="float32", max_length=64)
    with pytest.raises(InputError, match="on a base that reads text alone, got"):
        build_adapter(AdapterConfig(parts=ALL), load_base(text), ["seen"])
    adapted = build_adapter(
        AdapterConfig(r=2, target_modules="all-linear", parts=ALL), load_base(folders["llava"]), ["a"]
    )
    with pytest.raises(InputError, match="what makes them is trained"):
        kept_features(adapted, folders["llava"], KeptStatesConfig(folder=str(tmp_path / "kept")), 1)
