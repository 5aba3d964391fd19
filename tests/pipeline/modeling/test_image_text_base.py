from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipeline.errors import InputError
from pipeline.modeling.base_model import BaseModelConfig, load_base, wheel_folder
from pipeline.modeling.image_text_base import (
    VISION_FILE,
    VISION_MODULE,
    VISION_WHEEL,
    efficientnet_lite0,
    make_image_text_base,
    replace_projector,
)

DAISY, PALACE = 985, 698
"""Classes of ImageNet: what scikit-learn's two photographs show."""


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(wheel_folder(VISION_MODULE, VISION_WHEEL) / VISION_FILE, weights_only=True)
    return state


def _same(x: Tensor, weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    """Convolve as TensorFlow's padding SAME does."""
    size, kernel = x.shape[-1], weight.shape[-1]
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before, after = total // 2, total - total // 2
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)


def _lite0(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0 as tensorflow/tpu has it: stages of (blocks, kernel, stride)."""

    def norm(x: Tensor, name: str) -> Tensor:
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-3)

    x = F.relu6(norm(_same(x, state["_conv_stem.weight"], 2), "_bn0"))
    number = 0
    for blocks, kernel, stride in ((1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1)):
        for i in range(blocks):
            name, inputs = f"_blocks.{number}", x
            if number:
                x = F.relu6(norm(F.conv2d(x, state[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
            depthwise = state[f"{name}._depthwise_conv.weight"]
            assert depthwise.shape[-1] == kernel
            x = F.relu6(norm(_same(x, depthwise, stride if i == 0 else 1, x.shape[1]), f"{name}._bn1"))
            x = norm(F.conv2d(x, state[f"{name}._project_conv.weight"]), f"{name}._bn2")
            x = x + inputs if i else x
            number += 1
    return F.relu6(norm(F.conv2d(x, state["_conv_head.weight"]), "_bn1"))


@torch.inference_mode()
def test_the_vision_tower_is_efficientnet_lite0_and_knows_a_daisy(published: dict[str, Tensor]) -> None:
    pixels = [torch.from_numpy(image[:224, 200:424].copy()).permute(2, 0, 1) for image in load_sample_images().images]
    x = (torch.stack(pixels).float() - 127) / 128
    model = efficientnet_lite0()
    states = model(x).last_hidden_state
    torch.testing.assert_close(states, _lite0(published, x), rtol=1e-4, atol=1e-4)
    whole = torch.stack([F.interpolate(torch.from_numpy(image[:427, 100:527].copy()).permute(2, 0, 1)[None].float(),
                                       224, mode="bicubic")[0] for image in load_sample_images().images])  # fmt: skip
    seen = model((whole.clamp(0, 255) - 127) / 128).last_hidden_state.mean((2, 3))
    logits = seen @ published["_fc.weight"].T + published["_fc.bias"]
    assert logits.argmax(-1).tolist() == [PALACE, DAISY]


@pytest.mark.slow
def test_the_base_is_an_ordinary_folder_with_the_parts_own_weights(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    language = BaseModelConfig(num_layers=1, dtype="bfloat16")
    make_image_text_base(language, folder, image_size=64)
    config = BaseModelConfig(base=str(folder), dtype="float32", max_length=64)
    base: Any = load_base(config)
    assert base.packs_images
    text: Any = load_base(language.model_copy(update={"dtype": "float32"}))
    for name, tensor in text.base_model.state_dict().items():
        assert torch.equal(tensor, base.model.language_model.state_dict()[name])
    made = AutoProcessor.from_pretrained(folder)(text="<image>", images=load_sample_images().images[0])
    assert len(made["input_ids"][0]) == 4
    projector = base.model.multi_modal_projector
    torch.nn.init.normal_(projector.linear_1.weight)
    replace_projector(folder, projector)
    again = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in again.state_dict().items():
        expected = base.state_dict()[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-2 if "projector" in name else 0, atol=1e-3)


def test_a_size_that_does_not_divide_into_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image_size must be a multiple of 32, got 100"):
        make_image_text_base(BaseModelConfig(num_layers=1), tmp_path / "base", image_size=100)
