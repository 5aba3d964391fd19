"""PEFT's rules for which layers an adapter takes and which rank each has, on modules' paths alone.

The same answers as peft 0.21 (``tuners/tuners_utils.py``: ``check_target_module_exists``, ``utils/other.py``:
``get_pattern_key``), against which tests hold them. Needs no torch.
"""

import re
from collections.abc import Iterable, Sequence

__all__ = ["is_named", "is_of_images", "layer_number", "matching_key"]


def is_named(path: str, name: str) -> bool:
    """Whether a name is a module's path, or the last parts of it."""
    return path == name or path.endswith(f".{name}")


def is_of_images(path: str) -> bool:
    """Whether a module's path names a part that makes of images what a language model reads: a vision tower, or what
    connects it."""
    return any(re.search(r"vision|visual|projector|connector|merger", name) for name in path.split("."))


def layer_number(path: str, patterns: Sequence[str] = ()) -> int | None:
    """Return the number of the layer that a module stands in, None where it stands in none.

    Args:
        path: such as ``model.layers.3.self_attn.q_proj``.
        patterns: what a numbered list of layers may be called, as regular expressions; none: anything that stands below
            something else. The first number counts, not that of an expert inside.
    """
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    for expression in expressions:
        if match := re.match(expression, path):
            return int(match[match.re.groups])
    return None


def matching_key(keys: Iterable[str], path: str) -> str | None:
    """Return the first key, a regular expression, that describes the last parts of a path; None where none does."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)
