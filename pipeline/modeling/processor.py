"""The processor of an image-text folder: what makes pixels of an image, and its place among a prompt's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.json_text import parse_json
from pipeline.modeling.architecture import short

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files of which a folder with a processor holds at least one."""


def processor_of(folder: Path, tokenizer: Any) -> Any:
    """Return the processor of an image-text folder, without the part that reads videos where that is not at hand.

    Args:
        folder: of the base.
        tokenizer: of the same folder.

    Raises:
        InputError: it does not load.
    """
    from transformers import AutoImageProcessor, ProcessorMixin

    try:
        kind = _processor_class(folder)
        if "video_processor" not in kind.get_attributes():
            return kind.from_pretrained(folder)
        settings = _settings(folder)
        parts = {"image_processor": AutoImageProcessor.from_pretrained(folder), "tokenizer": tokenizer}
        names = set(kind.__init__.__code__.co_varnames[: kind.__init__.__code__.co_argcount])
        given = {name: value for name, value in settings.items() if name in names and name not in parts}
        given.pop("video_processor", None)
        still = type(kind.__name__, (kind,), {"check_argument_for_proper_class": _unless_missing})
        found: ProcessorMixin = still(**parts, **given)
        return found
    except Exception as error:  # processors end in errors of many types, ImportError among them
        raise InputError(
            f"a task with image_field needs the base's own processor, that of {str(folder)!r} does not load: "
            f"{short(error)}; install what it names, or save it anew with processor.save_pretrained(folder)"
        ) from error


def _processor_class(folder: Path) -> Any:
    """Return the class of a folder's processor.

    SmolVLM's is Idefics3's for still images, and asks for a package that writes the numbers of a video's frames.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import is_num2words_available

    kind = AutoConfig.from_pretrained(folder).model_type
    name = _settings(folder).get("processor_class") or PROCESSOR_MAPPING_NAMES.get(kind)
    if name == "SmolVLMProcessor" and not is_num2words_available():
        name = "Idefics3Processor"
    found = getattr(transformers, str(name), None)
    if found is None:
        raise ValueError(f"models of type {kind!r} have no processor")
    return found


def _settings(folder: Path) -> dict[str, Any]:
    """Return what a folder's own files say of its processor, as a whole before its part for images."""
    found: dict[str, Any] = {}
    for name in reversed(PROCESSOR_FILES):
        if (folder / name).is_file():
            found |= parse_json((folder / name).read_bytes())
    return found


def _unless_missing(self: Any, name: str, part: Any) -> Any:
    return None if part is None else super(type(self), self).check_argument_for_proper_class(name, part)
