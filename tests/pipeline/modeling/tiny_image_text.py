"""Random image-text models of any family, with their processors, small enough to be built, saved and asked at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.pipeline.modeling.tiny import SPECIAL, tiny_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def _tokenizer(named: dict[str, str], others: tuple[str, ...] = ()) -> Any:
    pad, bos, eos, unk = SPECIAL
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer()._tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        extra_special_tokens=named,
    )
    tokenizer.add_tokens([tf.AddedToken(token, special=True, normalized=False) for token in others])
    return tokenizer


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image_token": "<image>"})
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return config, tf.LlavaProcessor(
        pixels, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _fast_vlm() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image_token": "<image>"})
    vision = tf.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320, hidden_size=320, hidden_act="relu6",
        in_channels=[32], out_channels=[16], kernel_sizes=[3], strides=[2], num_block_repeats=[1], expand_ratios=[1],
    )  # fmt: skip
    config = tf.FastVlmConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    pixels = EfficientNetImageProcessorPil(size={"height": 8, "width": 8})
    return config, tf.LlavaProcessor(
        pixels, tokenizer, patch_size=4, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )


def _idefics(config: Any, vision: Any, pixels: Any) -> tuple[Any, Any]:
    places = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    tokenizer = _tokenizer(IDEFICS, places)
    made = config(
        vision_config=vision(**{**VISION, "image_size": 56}),
        text_config=tf.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    size = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    return made, tf.Idefics3Processor(pixels(**size), tokenizer, image_seq_len=4)


def _qwen(config: Any, text: dict[str, Any], vision: dict[str, Any], patch: int) -> tuple[Any, Any]:
    tokenizer = _tokenizer(QWEN)
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    made = config(
        text_config={**TEXT, "vocab_size": len(tokenizer), **text},
        vision_config={"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32}
        | {"patch_size": patch, **vision},
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    # The whole processor has a part that reads videos, which needs torchvision.
    return made, (
        Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=4 * patch**2, max_pixels=16 * patch**2),
        tokenizer,
    )


def _qwen2_5_vl() -> tuple[Any, Any]:
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    return _qwen(tf.Qwen2_5_VLConfig, rope, {"window_size": 56, "fullatt_block_indexes": [1]}, 14)


def _qwen3_vl() -> tuple[Any, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True}
    vision = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return _qwen(tf.Qwen3VLConfig, {"rope_parameters": rope}, vision, 16)


def _paligemma() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image_token": "<image>"})
    pixels = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    pixels.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(pixels, tokenizer)  # gives the tokenizer further tokens
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.GemmaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    return config, processor


def _gemma3() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"})
    ids = tokenizer.convert_tokens_to_ids
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Gemma3TextConfig(vocab_size=len(tokenizer), **TEXT),
        mm_tokens_per_image=4,
        boi_token_index=ids("<boi>"),
        eoi_token_index=ids("<eoi>"),
        image_token_index=ids("<img>"),
    )
    pixels = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return config, tf.Gemma3Processor(pixels, tokenizer, image_seq_length=4)


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "fast_vlm": _fast_vlm,
    "idefics3": lambda: _idefics(tf.Idefics3Config, tf.Idefics3VisionConfig, Idefics3ImageProcessorPil),
    "smolvlm": lambda: _idefics(tf.SmolVLMConfig, tf.SmolVLMVisionConfig, SmolVLMImageProcessorPil),
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}


def tiny_image_text_folder(folder: Path, kind: str) -> Path:
    """Save a random model of a family with its processor and return the folder."""
    config, processor = FAMILIES[kind]()
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 4:
                torch.nn.init.kaiming_normal_(parameter)  # what is seen must come through many layers
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            elif kind == "fast_vlm":
                parameter.fill_(1.0)
    model.save_pretrained(folder)
    for part in processor if isinstance(processor, tuple) else (processor,):
        part.save_pretrained(folder)
    return folder
