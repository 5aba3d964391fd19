"""One task of an encoder with heads as an ordinary sequence classifier: a PEFT folder, or a merged model.

A head scores the state of a row's first token, logits = W h + b. The classifiers of Hugging Face put a dense layer and
a tanh before their last matrix, and have no form without. With the dense layer at ε times the identity and the last
matrix at W / ε they compute W tanh(ε h) / ε + b, which is W h + b but for a share of (ε h)² / 3: at ε = 2⁻¹⁴, a power
of two that rounds nothing, and values of 10 in a state that is 1e-7, a last digit of fp32. Both ways are compared with
the model by outputs; a PEFT folder before it is put in place.

Other forms are refused: classifiers that pool otherwise, or normalise in between, cannot be made to compute W h + b.
Needs torch alone: the classifier comes from the caller, by ``AutoModelForSequenceClassification.from_config``.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtl_lora.core import AdapterCore
from mtl_lora.errors import ExportMismatchError, MTLLoRAError
from mtl_lora.export import lora_config, lora_ranks, put_in_place
from mtl_lora.files import WEIGHTS_FILE
from mtl_lora.hashes import write_hashes
from mtl_lora.heads import HEADS
from mtl_lora.verification import OUTPUT_TOLERANCE, load_plain, plain_base

__all__ = ["CLASSIFIERS", "EPSILON", "export_classifier", "merge_classifier"]

EPSILON = 2.0**-14
"""Scale of a state within the tanh; see the module's docstring."""
CLASSIFIERS = {
    **dict.fromkeys(("BertForSequenceClassification",), ("bert.pooler.dense", "classifier")),
    **dict.fromkeys(
        ("RobertaForSequenceClassification", "XLMRobertaForSequenceClassification"),
        ("classifier.dense", "classifier.out_proj"),
    ),
    "CamembertForSequenceClassification": ("classifier.dense", "classifier.out_proj"),
}
"""Classifiers that read the first token through a dense layer, a tanh and a matrix, with the paths of both layers."""
_PREFIX = "base_model.model."


def _layers_of(classifier: nn.Module, pooling: str) -> tuple[str, str]:
    """Return the paths of a classifier's dense and last layer.

    Raises:
        MTLLoRAError: it cannot express a head on the pooled state.
    """
    name = type(classifier).__name__
    if pooling != "first":
        raise MTLLoRAError(
            f"a sequence classifier of transformers reads the first token of a row, got pooling {pooling!r}, which "
            f"{name} cannot compute; train with model.pooling=first, or serve the run by the product itself"
        )
    if name not in CLASSIFIERS:
        raise MTLLoRAError(
            f"a head must be expressible by the classifier of transformers, which {name} is not known to do; known are "
            f"{sorted(CLASSIFIERS)}: take a base of one of these, or serve the run by the product itself"
        )
    return CLASSIFIERS[name]


def _head(model: AdapterCore, task: int) -> tuple[Tensor, Tensor]:
    heads = model.task_heads
    if heads is None:
        raise MTLLoRAError("a sequence classifier needs a task with a head, got a model without; use export_task()")
    rows = heads.rows(task)
    return heads.weight.detach()[rows].float().cpu(), heads.bias.detach()[rows].float().cpu()


def _head_tensors(model: AdapterCore, task: int, paths: tuple[str, str]) -> dict[str, Tensor]:
    """Return the dense layer and the last one that compute a task's head, by their names in the classifier."""
    weight_CH, bias_C = _head(model, task)
    size = weight_CH.shape[1]
    dense, last = paths
    return {
        f"{dense}.weight": EPSILON * torch.eye(size),
        f"{dense}.bias": torch.zeros(size),
        f"{last}.weight": weight_CH / EPSILON,
        f"{last}.bias": bias_C,
    }


@torch.no_grad()
def _with_base(model: AdapterCore, classifier: Any) -> Any:
    """Return the classifier with the base's weights in its encoder, as they stand: merged where a task is."""
    own = classifier.base_model
    # A head reads no pooler, nor do some classifiers have one.
    state = plain_base(model).state_dict()
    plain = {name: p for name, p in state.items() if not name.startswith((f"{HEADS}.", "pooler."))}
    found = own.load_state_dict(plain, strict=False)
    missing = [name for name in found.missing_keys if not name.startswith("pooler.")]
    if missing or found.unexpected_keys:
        raise MTLLoRAError(
            f"the classifier's encoder must be the base's, {type(classifier).__name__} lacks {missing[:3]} and has no "
            f"place for {found.unexpected_keys[:3]}; make it from the base's own configuration"
        )
    return classifier.eval()


def _own_logits(model: AdapterCore, task: int, inputs: Mapping[str, Tensor]) -> Tensor:
    training = model.training
    try:
        states_BSH = model.eval()(**inputs, task_ids=task).last_hidden_state
    finally:
        model.train(training)
    weight_CH, bias_C = _head(model, task)
    return states_BSH[:, 0].float().cpu() @ weight_CH.t() + bias_C


def _check(model: AdapterCore, got: Tensor, expected: Tensor, what: str) -> str:
    """Compare logits, as exactly as the model's own type allows; return the verdict in words.

    Raises:
        ExportMismatchError: they differ by more.
    """
    dtype = next(model.base_model.parameters()).dtype
    allowed = OUTPUT_TOLERANCE.get(dtype, OUTPUT_TOLERANCE[torch.float32])
    difference, is_half = got.float() - expected, dtype in (torch.float16, torch.bfloat16)
    # On a half-precision base single values may be units apart (see OUTPUT_TOLERANCE): there the mean square counts.
    size = (lambda x: x.norm()) if is_half else (lambda x: x.abs().max())
    share = float(size(difference) / size(expected).clamp_min(1e-30))
    if not share <= allowed:
        raise ExportMismatchError(
            f"a classifier ({what}) must give the model's logits within a share of {allowed:g}, got a difference of "
            f"{share:g}; check the adapter for values that are not finite"
        )
    return f"logits {what} differ by a share of {share:.1e} (allowed {allowed:g})."


@torch.no_grad()
def export_classifier(
    model: AdapterCore,
    task: int | str,
    folder: str | os.PathLike[str],
    classifier: nn.Module,
    example_inputs: Mapping[str, Tensor],
    *,
    pooling: str = "first",
    base_name: str = "",
    further_files: Mapping[str, str] | None = None,
) -> Path:
    """Write one task as a PEFT sequence-classification LoRA whose head stands in ``modules_to_save``.

    Whoever loads it makes ``AutoModelForSequenceClassification.from_pretrained(base, num_labels=C)`` first.

    Args:
        model: an encoder under any adapter of LoRA pairs, with heads; not merged.
        task: name or id.
        folder: replaced as a whole once the new one is verified through PEFT.
        classifier: of the base's own configuration, with as many labels as the task's head has rows; used up.
        example_inputs: of the encoder, whose logits are compared.
        pooling: of the states that the heads were trained on.
        base_name: how the base is called elsewhere.
        further_files: texts by file name that belong to the folder.

    Raises:
        MTLLoRAError: the classifier cannot express the head, or the model has none.
        ExportMismatchError: PEFT does not reproduce the logits; what stood at ``folder`` is left as it was.
    """
    index, target, paths = model.task_id(task), Path(folder), _layers_of(classifier, pooling)
    expected = _own_logits(model, index, example_inputs)
    prefix = f"{_PREFIX}{classifier.base_model_prefix}."
    pairs = {path: pair for path, pair in model.lora_pairs(index).items() if not path.startswith("pooler.")}
    tensors = {f"{prefix}{path}.{name}": tensor for path, pair in pairs.items() for name, tensor in pair.items()}
    config = lora_config(model, lora_ranks(tensors), base_name)
    saved = sorted({path if path.startswith("bert.") else path.split(".")[0] for path in paths})
    config |= {"task_type": "SEQ_CLS", "modules_to_save": saved, "target_modules": _whole_paths(classifier, pairs)}
    config.pop("layers_to_transform", None)
    tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in _head_tensors(model, index, paths).items()}
    further = dict(further_files or {})
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, staged / WEIGHTS_FILE)
        (staged / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        loaded, way = load_plain(_with_base(model, copy.deepcopy(classifier)), staged)
        verdict = _check(model, loaded(**example_inputs).logits.cpu(), expected, way)
        further["README.md"] = _card(model.task_names[index], base_name, len(expected[0]), verdict)
        for name, text in further.items():
            (staged / name).write_text(text, encoding="utf-8")
        write_hashes(staged, WEIGHTS_FILE, "adapter_config.json", *further)
        put_in_place(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def _whole_paths(classifier: Any, pairs: Mapping[str, Any]) -> list[str]:
    """Return the targets by their whole paths: the last part of one, ``dense``, is that of the classifier's too."""
    return sorted(f"{classifier.base_model_prefix}.{path}" for path in pairs)


@torch.no_grad()
def merge_classifier(
    model: AdapterCore,
    task: int | str,
    folder: str | os.PathLike[str],
    classifier: Any,
    example_inputs: Mapping[str, Tensor],
    *,
    pooling: str = "first",
) -> Path:
    """Write one task merged into its base as an ordinary model of transformers, and compare it as loaded again.

    Args:
        model: an encoder under any adapter, with heads; not merged, and left as it is.
        task: name or id.
        folder: for ``save_pretrained``; a tokenizer is the caller's to add.
        classifier: as in :func:`export_classifier`; used up.
        example_inputs: of the encoder, whose logits are compared.
        pooling: of the states that the heads were trained on.

    Raises:
        MTLLoRAError: the classifier cannot express the head, or the model has none.
        ExportMismatchError: the model as written does not reproduce the logits.
    """
    index, paths = model.task_id(task), _layers_of(classifier, pooling)
    expected = _own_logits(model, index, example_inputs)
    model.merge(index)
    try:
        whole = _with_base(model, classifier)
    finally:
        model.unmerge()
    whole.load_state_dict(_head_tensors(model, index, paths), strict=False)
    whole.save_pretrained(folder)
    again = type(classifier).from_pretrained(folder).eval()
    _check(model, again(**example_inputs).logits.cpu(), expected, "of the merged model")
    return Path(folder)


def _card(task: str, base: str, labels: int, verdict: str) -> str:
    named = json.dumps(base or "BASE_MODEL")
    return f"""---
library_name: peft
tags: [lora, mtl-lora]
---
# Classifier for the task `{task}`

* LoRA pairs and, in `modules_to_save`, the task's head. The dense layer before it scales a state by 2⁻¹⁴ and the last
  matrix takes that back, so that the tanh between them does nothing that fp32 could show.
* Verified before it was written: {verdict}
* `sha256sum -c SHA256SUMS` tells whether the files are still what was written.

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({named}, num_labels={labels})
model = PeftModel.from_pretrained(base, FOLDER)
```
"""
