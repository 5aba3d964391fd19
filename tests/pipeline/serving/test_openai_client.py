"""Asked through a completions server that runs the exported adapters, each task gives the adapter's own answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from mtl_lora.serving import write_serving
from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.scoring import LabelScorer, Scorer
from pipeline.serving.base import served_base
from pipeline.serving.exported_task import TASK_FILE, ExportedTask
from pipeline.serving.openai_client import LabelClient
from tests.pipeline.serving.completions_server import CompletionsServer, serving

TASKS = (
    TaskSpec(name="clicks", template="{text}\nRelevant?", label_words=(" no", " yes")),
    TaskSpec(
        name="topic",
        kind="multiclass",
        template="{title}: {text}\nTopic:",
        label_words=(" travel", " unparliamentary speech", " money"),
        length_normalized=True,
    ),
    TaskSpec(name="answer", kind="choice", template="{text}\nAnswer:", choices_field="options"),
    TaskSpec(
        name="stars",
        kind="ordinal",
        template="{text}\nStars:",
        label_words=(" one star", " ten stars"),
        label_values=(1, 10),
    ),
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "clicks": [{"text": "red shoes"}, {"text": "a much longer text about shoes " * 9}, {"text": "ünïcode 🙂"}],
    "topic": [{"title": "News", "text": "the bank"}, {"title": "Trips", "text": "a beach"}],
    "answer": [{"text": "2 + 2?", "options": ["four", "five hundred"]}, {"text": "Sky?", "options": ["b", "c", "d"]}],
    "stars": [{"text": "good"}],
}


@pytest.fixture(scope="module")
def base() -> BaseModelConfig:
    return BaseModelConfig(num_layers=2, dtype="float32", max_length=48)


@pytest.fixture(scope="module")
def tokenizer(base: BaseModelConfig) -> Any:
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def exported(base: BaseModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scorer]:
    """The folder of all exports, and the multi-task model that they came from."""
    folder = tmp_path_factory.mktemp("run") / "export"
    torch.manual_seed(0)
    adapted: Any = build_adapter(AdapterConfig(), load_base(base), [task.name for task in TASKS])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    encoder = Encoder(load_tokenizer(base), TASKS, base.max_length)
    served = served_base(base, adapted.base_fingerprint()["sha256"], folder.parent / "adapter", folder)
    for task in TASKS:
        asked = ExportedTask.of(task, base, served, encoder.label_tokens(task.name))
        adapted.export_task(task.name, folder / task.name, base=served, further_files={TASK_FILE: asked.text})
    write_serving(folder, [task.name for task in TASKS], served)
    return folder, Scorer(LabelScorer(adapted), encoder)


@pytest.fixture(scope="module")
def server(exported: tuple[Path, Scorer], base: BaseModelConfig, tokenizer: Any) -> Iterator[CompletionsServer]:
    folder, first = exported[0], TASKS[0].name
    plain: Any = load_base(base.model_copy(update={"packed_rows": False}))
    model = PeftModel.from_pretrained(plain, str(folder / first), adapter_name=first)
    for task in TASKS[1:]:
        model.load_adapter(str(folder / task.name), adapter_name=task.name)
    with serving(model, tokenizer) as running:
        yield running


def _client(server: CompletionsServer, exported: tuple[Path, Scorer], tokenizer: Any, **options: Any) -> LabelClient:
    name = options.pop("task", "clicks")
    return LabelClient(server.url, ExportedTask.read(exported[0] / name), tokenizer, **options)


def _own(scorer: Scorer, task: TaskSpec) -> list[np.ndarray]:
    samples = [
        Sample(
            key=str(i),
            task=task.name,
            fields={field: row[field] for field in task.text_fields},
            label=task.label_values[0] if task.label_values else 0,
            choices=tuple(row.get("options", ())),
        )
        for i, row in enumerate(ROWS[task.name])
    ]
    return scorer.probabilities(samples)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_server_gives_the_adapter_s_own_probabilities(
    server: CompletionsServer, exported: tuple[Path, Scorer], tokenizer: Any, task: TaskSpec
) -> None:
    # 4 prompts a request: some rows' classes are asked in two.
    client = _client(server, exported, tokenizer, task=task.name, prompts_per_request=4)
    found, expected = client.probabilities(ROWS[task.name]), _own(exported[1], task)
    for mine, own in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, own, atol=1e-3)
        np.testing.assert_allclose(np.log(mine), np.log(own), atol=1e-3)  # each class counts where one is sure
        assert mine.sum() == pytest.approx(1)


def test_label_words_are_sent_as_tokens_behind_the_prompt_s(
    server: CompletionsServer, exported: tuple[Path, Scorer], tokenizer: Any
) -> None:
    server.requests.clear()
    _client(server, exported, tokenizer).probabilities(ROWS["clicks"][:1])
    (request,) = server.requests
    prompt = tokenizer("red shoes\nRelevant?")["input_ids"]
    tokens = ExportedTask.read(exported[0] / "clicks").label_tokens
    assert request["prompt"] == [[*prompt, *word] for word in tokens]
    assert request["model"] == "clicks"


def test_no_rows_ask_nothing(server: CompletionsServer, exported: tuple[Path, Scorer], tokenizer: Any) -> None:
    server.requests.clear()
    assert _client(server, exported, tokenizer).probabilities([]) == []
    assert server.requests == []


def test_a_server_that_does_not_serve_the_task_is_told_with_its_own_words(
    server: CompletionsServer, exported: tuple[Path, Scorer], tokenizer: Any
) -> None:
    client = _client(server, exported, tokenizer, model="other")
    with pytest.raises(InputError, match=r"for the model 'other', got 404.*does not exist.*serving\.json"):
        client.probabilities(ROWS["clicks"][:1])


def test_a_server_that_does_not_echo_is_refused(
    server: CompletionsServer, exported: tuple[Path, Scorer], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "echoes", False)
    with pytest.raises(InputError, match=r"must echo the log-probabilities of the \d+ tokens .* got 1"):
        _client(server, exported, tokenizer).probabilities(ROWS["clicks"][:1])


def test_a_server_may_ask_for_a_key(
    server: CompletionsServer, exported: tuple[Path, Scorer], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "api_key", "open-sesame")
    with pytest.raises(InputError, match="got 401"):
        _client(server, exported, tokenizer).probabilities(ROWS["clicks"][:1])
    assert _client(server, exported, tokenizer, api_key="open-sesame").probabilities(ROWS["clicks"][:1])


def test_an_absent_server_is_told(exported: tuple[Path, Scorer], tokenizer: Any) -> None:
    client = LabelClient("http://127.0.0.1:9", ExportedTask.read(exported[0] / "clicks"), tokenizer)
    with pytest.raises(InputError, match=r"must answer, it did not: .*start the server"):
        client.probabilities(ROWS["clicks"][:1])


def test_a_row_without_a_field_is_refused_before_anything_is_asked(
    server: CompletionsServer, exported: tuple[Path, Scorer], tokenizer: Any
) -> None:
    server.requests.clear()
    with pytest.raises(InputError, match=r"row 1 must hold what task 'clicks' asks for, field 'text' is missing"):
        _client(server, exported, tokenizer).probabilities([{"text": "a"}, {"texts": "b"}])
    assert server.requests == []


def test_another_tokenizer_is_refused(server: CompletionsServer, exported: tuple[Path, Scorer], tokenizer: Any) -> None:
    task = ExportedTask.read(exported[0] / "clicks")
    other = task.model_copy(update={"label_tokens": tuple((token + 1,) for (token,) in task.label_tokens)})
    with pytest.raises(InputError, match="with the tokenizer of its base 'HuggingFaceTB/SmolLM2-135M-Instruct'"):
        LabelClient(server.url, other, tokenizer)
