"""Features of images that are kept: the bits of those that the model makes itself, each made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora import AdapterModel
from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import class_scorer, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.config import KeptStatesConfig
from pipeline.modeling.packing import pack
from pipeline.modeling.scoring import ClassScorer, label_loss
from pipeline.training.frozen import kept_features
from tests.pipeline.modeling.test_image_text import READ, SAID, SEEN, samples
from tests.pipeline.modeling.tiny_image_text import tiny_image_text_folder

TAKEN = ("llava", "fast_vlm", "idefics3", "smolvlm", "gemma3")
REFUSED = ("qwen2_5_vl", "qwen3_vl")
"""Families whose language models read more of an image than its features."""


def _adapted(folder: Path, kind: str) -> tuple[BaseModelConfig, AdapterModel]:
    config = BaseModelConfig(base=str(tiny_image_text_folder(folder / kind, kind)), dtype="float32", max_length=160)
    torch.manual_seed(0)
    return config, build_adapter(AdapterConfig(r=2), load_base(config), ["seen", "said", "read"])


def _steps(scorer: ClassScorer, batches: list[Any]) -> list[tuple[Tensor, list[Tensor]]]:
    """Return of each batch the losses and the adapter's gradients."""
    found = []
    for batch in batches:
        scorer.zero_grad()
        torch.manual_seed(1)  # of the dropout
        losses = label_loss(scorer(batch), batch)
        losses.sum().backward()
        found.append((losses.detach(), [p.grad.clone() for p in scorer.parameters() if p.grad is not None]))
    return found


@pytest.mark.parametrize("kind", TAKEN)
def test_kept_features_change_no_bit_and_are_made_once(tmp_path: Path, kind: str) -> None:
    config, adapted = _adapted(tmp_path, kind)
    adapted.train()
    encoder = sample_encoder(config, [SEEN, SAID, READ])
    every = encoder.encode(samples() + samples(SAID) + samples(READ))
    batches = [pack(every), pack(every[:3]), pack(every[6:2:-1]), pack(every[-2:])]
    scorer = class_scorer(adapted)
    together = _steps(scorer, batches)
    asked = KeptStatesConfig(folder=str(tmp_path / "kept"))
    scorer.features = kept_features(adapted, config, asked, 1)
    assert scorer.features is not None
    scorer.features.kept = None
    own = _steps(scorer, batches)
    for (losses, _), (joint_losses, _) in zip(own, together, strict=True):
        torch.testing.assert_close(losses, joint_losses)
    for missed in (3, 0):
        scorer.features = kept_features(adapted, config, asked, 1)
        assert scorer.features is not None and scorer.features.kept is not None
        for (losses, gradients), (own_losses, own_gradients) in zip(_steps(scorer, batches), own, strict=True):
            assert torch.equal(losses, own_losses)
            assert len(gradients) == len(own_gradients) > 0
            assert all(map(torch.equal, gradients, own_gradients))
        assert scorer.features.kept.count_missed == missed


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_reads_more_of_an_image_is_refused(tmp_path: Path, kind: str) -> None:
    config, adapted = _adapted(tmp_path, kind)
    with pytest.raises(InputError, match=f"{kind} cannot be given them"):
        kept_features(adapted, config, KeptStatesConfig(folder=str(tmp_path / "kept")), 1)


def test_features_are_not_kept_of_a_trained_tower_nor_of_one_in_parts(tmp_path: Path) -> None:
    config, adapted = _adapted(tmp_path, "fast_vlm")
    asked = KeptStatesConfig(folder=str(tmp_path / "kept"))
    with pytest.raises(InputError, match="zero_stage"):
        kept_features(adapted, config, asked, 3)
    base: Any = adapted.base_model
    base.model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(InputError, match="is trained"):
        kept_features(adapted, config, asked, 1)
