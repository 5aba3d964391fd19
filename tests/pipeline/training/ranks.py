"""Base models small enough to start many processes on."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.contracts import TaskSpec

COLOURS = ("red", "dark blue", "light green", "grey")


def tiny_base(folder: Path, width: int = 32, layers: int = 2) -> Path:
    """Save a random Llama with the embedded base's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.modeling.base_model import BaseModelConfig, load_tokenizer

    tokenizer = load_tokenizer(BaseModelConfig())
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_encoder(folder: Path, layers: int = 2) -> Path:
    """Save a random BERT with the embedded encoder's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from pipeline.modeling.base_model import BaseModelConfig, load_tokenizer

    tokenizer = load_tokenizer(BaseModelConfig(base="minilm-l6"))
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2
    )
    BertModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_tasks() -> list[TaskSpec]:
    """Return tasks that are answered by texts, weighed by sample and by token, beside two of labels, one written."""
    text = {"template": "{text}\nAnswer:", "kind": "generation"}
    label = {"template": "{text}\nShort?", "label_words": (" no", " yes")}
    return [
        TaskSpec(name="colour", **text, generation={"max_new_tokens": 6, "loss": "token"}),
        TaskSpec(name="thing", **text, generation={"max_new_tokens": 6, "num_beams": 2}),
        TaskSpec(name="asked", **label, answer_by="generation", generation={"max_new_tokens": 3}),
        TaskSpec(name="scored", **label),
    ]


def write_text_records(folder: Path, counts: dict[str, int]) -> Path:
    """Write records of :func:`text_tasks`, so many of each split."""
    for task in text_tasks():
        (folder / task.name).mkdir(parents=True, exist_ok=True)
        for split, count in counts.items():
            rows = []
            for i in range(count):
                colour, thing = COLOURS[i % 4], ("ball", "motor car", "bird")[i % 3]
                row = {"id": f"{split}{i}", "text": f"{split} {i}: a {colour} {thing} lay on the way"}
                answer = colour if task.name == "colour" else [thing, f"a {thing}"]
                rows.append({**row, "answer": answer} if task.kind == "generation" else {**row, "label": i % 2})
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task.name / f"{split}.jsonl").write_text(lines)
    return folder
