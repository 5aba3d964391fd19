"""An exported task asked through a server that speaks OpenAI's completions protocol, as vLLM does.

Each class's label word is sent behind the prompt as token ids, never as text: a tokenizer could merge the two. The
server echoes the log-probability of every token (``echo`` with ``logprobs``), and those of the label word are summed.
Answer format: vLLM's ``vllm/entrypoints/openai/completion/serving.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.contracts import Sample
from pipeline.errors import InputError, masked
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.packing import Example
from pipeline.record import Rejected, choices_of, texts_of
from pipeline.serving.exported_task import ExportedTask

_FINITE = 1e300


class LabelClient:
    """Class probabilities of one exported task from a completions server.

    Args:
        url: of the server, without the ``/v1``: ``http://host:8000``.
        task: the ``task.json`` of the export that the server loaded.
        tokenizer: the base's.
        model: what the server calls the adapter; None for the task's name, as ``serving.json`` has it.
        api_key: where the server asks for one.
        timeout_s: for one request.
        prompts_per_request: most prompts of a request; a row is one prompt a class.

    Raises:
        InputError: the tokenizer is not the one that the task was trained with, or the task has a head.
    """

    def __init__(
        self,
        url: str,
        task: ExportedTask,
        tokenizer: Any,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        prompts_per_request: int = 64,
    ) -> None:
        self.url, self.model = f"{url.rstrip('/').removesuffix('/v1')}/v1/completions", model or task.name
        self.timeout_s, self.prompts_per_request = timeout_s, prompts_per_request
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        if task.pooling is not None:
            raise InputError(
                f"a task must be answered by label words to be asked of a completions server, {task.name!r} has a "
                "head on an encoder; load its folder as its README.md says"
            )
        if task.answer_by == "generation":
            raise InputError(
                f"a task must be answered by the scores of label words to be asked here, {task.name!r} is answered by "
                "a text: take the text of the server's completion of its template, with generation's max_new_tokens"
            )
        self._spec = task.spec
        self._encoder = Encoder(tokenizer, [self._spec], task.max_length)
        found = self._encoder.label_tokens(self._spec.name)
        if found != task.label_tokens:
            raise InputError(
                f"task {task.name!r} must be asked with the tokenizer of its base {task.base.name!r}, under which its "
                f"label words are the tokens {task.label_tokens}, got {found}; load that base's tokenizer"
            )

    def probabilities(self, rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """Return each row's class probabilities in label order, fp64: the softmax over the label words.

        Args:
            rows: the fields that the task's template names, and its choices where it has no label words.

        Raises:
            InputError: a row lacks a field, or the server does not answer, refuses, or echoes no log-probabilities.
        """
        examples = self._encoder.encode([self._sample(str(number), row) for number, row in enumerate(rows)])
        prompts = [[*example.prompt, *word] for example in examples for word in example.words]
        echoed = iter(
            logprobs
            for start in range(0, len(prompts), self.prompts_per_request)
            for logprobs in self._ask(prompts[start : start + self.prompts_per_request])
        )
        return [_softmax([self._score(example, word, next(echoed)) for word in example.words]) for example in examples]

    def _sample(self, key: str, row: Mapping[str, Any]) -> Sample:
        spec = self._spec
        try:
            fields, choices = texts_of(row, spec.text_fields), choices_of(row, spec)
        except Rejected as reason:
            raise InputError(
                f"row {key} must hold what task {spec.name!r} asks for, {reason}; it has {sorted(map(str, row))}"
            ) from None
        label = spec.label_values[0] if spec.label_values else 0.0  # not asked for, but a sample has one
        return Sample(key=key, task=spec.name, fields=fields, choices=choices, label=label)

    def _score(self, example: Example, word: Sequence[int], logprobs: Sequence[float | None]) -> float:
        answer = logprobs[len(example.prompt) : len(example.prompt) + len(word)]
        if len(answer) < len(word):
            raise InputError(
                f"{masked(self.url)} must echo the log-probabilities of the {len(example.prompt) + len(word)} tokens "
                f"that it was sent, got {len(logprobs)}; use a server that takes echo with logprobs, as vLLM does"
            )
        if not all(isinstance(each, int | float) and -_FINITE < each < _FINITE for each in answer):
            raise InputError(
                f"{masked(self.url)} must echo finite log-probabilities, got {str(answer)[:200]} for a label word; use "
                "a server that takes echo with logprobs, as vLLM does"
            )
        total = float(np.sum(np.asarray(answer, dtype=np.float64)))
        return total / len(word) if example.length_normalized else total

    def _ask(self, prompts: list[list[int]]) -> list[list[float | None]]:
        """Return the log-probabilities of each prompt's tokens, None for the first, which follows nothing."""
        import requests

        # One token is generated and ignored: not every server takes max_tokens 0.
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompts,
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,
            "temperature": 0,
        }
        try:
            answer = requests.post(self.url, json=body, headers=self._headers, timeout=self.timeout_s)
        except requests.RequestException as error:
            raise InputError(f"{masked(self.url)} must answer, it did not: {error}; start the server") from error
        if not answer.ok:
            raise InputError(
                f"{masked(self.url)} must answer for the model {self.model!r}, got {answer.status_code}: "
                f"{answer.text[:300]}; start it with the command in serving.json"
            )
        try:
            choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
            found = [list(choice["logprobs"]["token_logprobs"]) for choice in choices]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{masked(self.url)} must answer with choices that hold logprobs.token_logprobs, got "
                f"{answer.text[:300]}; use a server that takes echo with logprobs, as vLLM does"
            ) from error
        if len(found) != len(prompts):
            raise InputError(
                f"{masked(self.url)} must answer each of {len(prompts)} prompts, got {len(found)} choices; "
                "use a server that takes several prompts a request, or set prompts_per_request=1"
            )
        return found


def _softmax(scores: Sequence[float]) -> np.ndarray:
    shifted = np.exp(np.asarray(scores) - np.max(scores))
    return np.asarray(shifted / shifted.sum())
