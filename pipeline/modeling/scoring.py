"""Label scoring: the language model itself answers each task, no extra head.

The model's own forward makes the logits, whatever its head does besides its matrix; only answer positions reach it.
Axes as in :mod:`pipeline.modeling.packing`: M nodes, E examples, C classes, P answer positions, K terms.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtl_lora import AdapterModel
from pipeline.answer import written_class
from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.modeling import packed_attention
from pipeline.modeling.encoding import SampleEncoder
from pipeline.modeling.frozen_part import FrozenPart
from pipeline.modeling.image_features import ImageFeatures
from pipeline.modeling.image_inputs import ImageInputs, image_arguments
from pipeline.modeling.image_parts import nothing_of_images
from pipeline.modeling.packing import Batch, micro_batches


def answer_logits(model: Any, inputs: Mapping[str, Any], answer: Tensor) -> tuple[Tensor, Tensor]:
    """Run a model's own forward and return its logits where they are asked for, which costs its head only those.

    Args:
        model: a Hugging Face causal language model.
        inputs: arguments of its forward, B rows of S tokens.
        answer: (P,) places in the flattened rows.

    Returns:
        The logits (P, V) in fp32, and what reached the output embedding there, (P, H).
    """
    kept: list[Tensor] = []

    def keep_answers(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        kept.append(args[0].flatten(0, 1)[answer])
        return (kept[-1][None],)

    with model.get_output_embeddings().register_forward_pre_hook(keep_answers):
        logits_1PV = model(**inputs, use_cache=False).logits
    return logits_1PV[0].float(), kept[0]


def _in_type_of(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a model, pixels in its own type."""
    return {n: x.to(model.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}


class ClassScorer(nn.Module):
    """Scores the classes of mixed-task batches, by label words or by heads.

    Args:
        adapted: a model under any adapter: callable with ``task_ids``, or a plain Hugging Face model.

    Attributes:
        frozen: makes the states that the model begins with above its frozen layers; None: it runs as a whole.
        features: makes what the language model reads of images, each by itself; None: the model does, of a batch's
            together.
    """

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__()
        self.adapted = adapted
        self.frozen: FrozenPart | None = None
        self.features: ImageFeatures | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Return log-probabilities of the classes, (E, C), ``-inf`` where an example has no such class."""
        return self.answer(batch)[0]

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what :meth:`forward` does, and the hidden state from which each example is answered, (E, H)."""
        raise NotImplementedError

    def explain(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what :meth:`forward` does, and from what it comes, (E, C): the log-likelihood of each class's label
        word after the prompt, over its tokens, or the mean over them where the task says so; with heads, which have
        no words, once more the log-probabilities."""
        log_p = self.forward(batch)
        return log_p, log_p

    def generate(self, *, task_ids: Tensor, **inputs: Any) -> Tensor:
        """Return what the model writes after prompts, as its own ``generate`` does, each row with its task's adapter.

        Args:
            task_ids: (B,) one a prompt.
            inputs: go to ``generate`` unchanged.
        """
        inputs = _in_type_of(self.language_model, inputs)
        if isinstance(self.adapted, AdapterModel):
            return self.adapted.generate(task_ids=task_ids, **inputs)
        return self.adapted.generate(**inputs)  # type: ignore[operator]

    def fixed_weights(self) -> AbstractContextManager[None]:
        """Promise that no weight changes inside, so that each task is folded once."""
        return self.adapted.fixed_weights() if isinstance(self.adapted, AdapterModel) else nullcontext()

    @property
    def language_model(self) -> Any:
        """The Hugging Face model inside, its target layers adapted."""
        return self.adapted.base_model if isinstance(self.adapted, AdapterModel) else self.adapted

    def _routed(self, task_ids: Tensor, image_ids: Tensor | None = None) -> AbstractContextManager[None]:
        adapted = self.adapted
        return adapted.router.route(task_ids, image_ids) if isinstance(adapted, AdapterModel) else nullcontext()

    @contextmanager
    def _begun(self, batch: Batch, task_ids: Tensor, image_ids: Tensor | None = None) -> Iterator[None]:
        """Route a batch's tasks inside, where the model runs from its frozen states on."""
        with self.frozen.begun(batch) if self.frozen is not None else nullcontext(), self._routed(task_ids, image_ids):
            yield

    def _without_adapter(self) -> AbstractContextManager[None]:
        return self.adapted.disable_adapter() if isinstance(self.adapted, AdapterModel) else nullcontext()


class LabelScorer(ClassScorer):
    """Scores the label words of mixed-task batches, the adapted model being a causal language model.

    Raises:
        InputError: the model is none: it has no logits of words.
    """

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__(adapted)
        if self.language_model.get_output_embeddings() is None:
            raise InputError(
                f"label words are scored by a language model, got {type(self.language_model).__name__}, which has no "
                "logits of words; an encoder answers by heads: take class_scorer, or a causal model as base"
            )

    def forward(self, batch: Batch) -> Tensor:
        """Return log-probabilities of the classes, (E, C), ``-inf`` where an example has no such class.

        Of an answer that is written it is the mean log-probability of its tokens, in the first place.
        """
        return self.explain(batch)[0]

    def explain(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what :meth:`forward` does, and the log-likelihoods of the label words, (E, C) each."""
        likelihoods_EC = self._likelihoods(self.answer_logits(batch)[0], batch)
        return self._label_scores(likelihoods_EC, batch), likelihoods_EC

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what :meth:`forward` does, and the hidden state at the end of each example's prompt, (E, H)."""
        logits_PV, hidden_PH = self.answer_logits(batch)
        examples, classes = batch.class_mask.shape
        # The first answer position of an example is its prompt's end; further ones are within long words.
        first_E = torch.full((examples,), len(hidden_PH), device=hidden_PH.device)
        first_E = first_E.scatter_reduce(0, batch.term_slot // classes, batch.term_answer, "amin")
        return self._label_scores(self._likelihoods(logits_PV, batch), batch), hidden_PH[first_E]

    @staticmethod
    def _likelihoods(logits_PV: Tensor, batch: Batch) -> Tensor:
        word_K = logits_PV[batch.term_answer, batch.term_token] - logits_PV.logsumexp(-1)[batch.term_answer]
        examples, classes = batch.class_mask.shape
        scores = word_K.new_zeros(examples * classes).index_add(0, batch.term_slot, word_K * batch.term_weight)
        return scores.view(examples, classes).masked_fill(~batch.class_mask, float("-inf"))

    @staticmethod
    def _label_scores(likelihoods_EC: Tensor, batch: Batch) -> Tensor:
        if batch.is_written is None:
            return likelihoods_EC.log_softmax(-1)
        return torch.where(batch.is_written[:, None], likelihoods_EC, likelihoods_EC.log_softmax(-1))

    def answer_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the model's logits at the answer positions, (P, V) in fp32, and what reached its output embedding
        there, (P, H)."""
        model = self.language_model
        images: Sequence[ImageInputs] = batch.images
        image_ids = batch.image_task
        kinds: dict[str, Tensor] = {}
        if packed_attention.is_packed(model) and not (images and not model.packs_images):
            inputs = packed_attention.packed_inputs(batch.input_ids, batch.position, batch.rows, batch.owner)
            task_ids, answer = batch.token_task[None], batch.answer
        else:
            input_ids, attention_mask, task_ids, answer = batch.padded()
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            images, image_ids, kinds = batch.row_images()
        inputs |= kinds
        if self.features is not None:
            inputs |= self.features.arguments(images)
        else:
            inputs |= image_arguments(images, batch.input_ids.device, model.dtype)
        with self._begun(batch, task_ids, image_ids):
            logits_PV, hidden_PH = answer_logits(model, inputs, answer)
        if isinstance(self.adapted, AdapterModel) and torch.is_grad_enabled():
            logits_PV = logits_PV + nothing_of_images(self.adapted)
        return logits_PV, hidden_PH


class UntrainedScorer(LabelScorer):
    """The base model alone, asked the same way: the adapter inside is switched off."""

    def _routed(self, task_ids: Tensor, image_ids: Tensor | None = None) -> AbstractContextManager[None]:
        return self._without_adapter()

    def generate(self, *, task_ids: Tensor, **inputs: Any) -> Tensor:
        """Return what the base alone writes; the tasks do not count."""
        with self._without_adapter():
            return self.language_model.generate(**_in_type_of(self.language_model, inputs))


def label_loss(scores: Tensor, batch: Batch, target: Tensor | None = None) -> Tensor:
    """Return each example's loss, (E,): the cross-entropy against its target distribution; of a multilabel example
    the mean over its classes of each one's own; of a regression example the squared error on its head's scale.

    Args:
        scores: (E, C) what a :class:`ClassScorer` returns.
        batch: of the examples.
        target: (E, C) instead of the batch's own.
    """
    target = batch.target if target is None else target
    known = scores.masked_fill(~batch.class_mask, 0.0)
    loss = -(target * known).sum(-1)
    if not batch.has_links:
        return loss
    is_sigmoid, is_number = batch.links("sigmoid"), batch.links("identity")
    least = -torch.finfo(known.dtype).tiny  # the log of a probability that rounds to 1
    log_p = torch.where(batch.class_mask & is_sigmoid, known, -1.0).clamp(max=least)
    otherwise = torch.where(batch.class_mask & is_sigmoid, (1 - target) * (-torch.expm1(log_p)).log(), 0.0)
    each = (loss - otherwise.sum(-1)) / batch.class_mask.sum(-1)
    error = torch.where(is_number, known - target, 0.0).square().sum(-1)
    return torch.where(is_sigmoid[:, 0], each, torch.where(is_number[:, 0], error, loss))


def even_target(batch: Batch) -> Tensor:
    """Return the target (E, C) that label smoothing mixes in: all classes alike; a number stays its own."""
    even = batch.class_mask / batch.class_mask.sum(-1, keepdim=True)
    even = torch.where(batch.links("sigmoid"), 0.5 * batch.class_mask, even)
    return torch.where(batch.links("identity"), batch.target, even)


@dataclass(frozen=True)
class Reply:
    """What a model answers to one sample."""

    probabilities: np.ndarray
    """Of the classes in label order, fp64. Where a label is written, 1 for the class whose word it is, and all zero
    for any other text; where the answer is a free text, empty."""
    text: str | None = None
    """What the model wrote; None where the label words were scored."""


class Scorer:
    """Class probabilities of samples, in packed batches.

    Several threads may ask one, as those of a server do: tokenizer and model serve one of them at a time.

    Args:
        model: scores classes, in evaluation mode afterwards.
        encoder: tokenises for it.
        batch_tokens: most tokens that go through the model at once.
    """

    def __init__(self, model: ClassScorer, encoder: SampleEncoder, batch_tokens: int = 2048) -> None:
        self.model, self.encoder, self.batch_tokens = model.eval(), encoder, batch_tokens
        self.device = next(model.parameters()).device
        self._one_at_a_time = threading.Lock()

    def probabilities(
        self, samples: Sequence[Sample], progress: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """Return each sample's class probabilities in label order, fp64, in the order given; a regression task's number
        alone.

        Args:
            samples: of any tasks, mixed; of an answer that is written see :class:`Reply`.
            progress: called with the number of samples that were just scored.
        """
        return [reply.probabilities for reply in self.replies(samples, progress)]

    def replies(self, samples: Sequence[Sample], progress: Callable[[int], None] | None = None) -> list[Reply]:
        """Return what the model answers to samples of any tasks, mixed, in the order given; none need be labelled.

        Args:
            samples: what is asked.
            progress: called with the number of samples that were just answered.
        """
        texts = self.texts(samples, progress)
        replies = [self._written(sample, text) for sample, text in zip(samples, texts, strict=True)]
        scored = [i for i, text in enumerate(texts) if text is None]
        for i, (probabilities, _) in zip(scored, self.answers([samples[i] for i in scored], progress), strict=True):
            replies[i] = Reply(probabilities)
        return replies

    def evaluated(self, samples: Sequence[Sample]) -> list[tuple[Reply, np.ndarray]]:
        """Return the reply to each labelled sample with the hidden state (H,), fp32, from which it was answered.

        A free text's reply has the probability of the first right answer, the geometric mean over its tokens.
        """
        found = []
        for sample, text, (own, state) in zip(samples, self.texts(samples), self.answers(samples), strict=True):
            is_free = text is None or self.encoder.spec_of(sample).kind == "generation"
            found.append((Reply(own, text) if is_free else self._written(sample, text), state))
        return found

    def _written(self, sample: Sample, text: str | None) -> Reply:
        spec = self.encoder.spec_of(sample)
        words = sample.choices if spec.kind == "choice" else spec.class_names
        probabilities = np.zeros(len(words))
        if text is not None and (label := written_class(text, words)) is not None:
            probabilities[label] = 1.0
        return Reply(probabilities, text)

    @torch.inference_mode()
    def texts(self, samples: Sequence[Sample], progress: Callable[[int], None] | None = None) -> list[str | None]:
        """Return the text that the model writes for each sample, None for those of tasks whose labels are scored."""
        mine = [i for i, sample in enumerate(samples) if self.encoder.spec_of(sample).is_written]
        found: list[str | None] = [None] * len(samples)
        if not mine:
            return found
        from pipeline.modeling.writing import text_of, written_tokens  # transformers' generation, which few need

        encoder: Any = self.encoder  # one of encoders takes no such task
        asked = [samples[i] for i in mine]
        with self._one_at_a_time, self.model.fixed_weights():
            answers = written_tokens(self.model.generate, encoder, asked, self.batch_tokens, self.device, progress)
        for i, tokens in zip(mine, answers, strict=True):
            found[i] = text_of(tokens, self.encoder.spec_of(samples[i]).generation, encoder.tokenizer)
        return found

    def answers(
        self, samples: Sequence[Sample], progress: Callable[[int], None] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return each sample's class probabilities and the hidden state (H,), fp32, from which it was answered."""
        return self._each(samples, self.model.answer, progress)

    def explained(self, samples: Sequence[Sample]) -> list[tuple[Reply, np.ndarray]]:
        """Return the reply to each sample and its log-likelihoods (see :meth:`ClassScorer.explain`), (C,); none where
        the answer is written."""
        texts = self.texts(samples)
        found = [(self._written(sample, text), np.empty(0)) for sample, text in zip(samples, texts, strict=True)]
        scored = [i for i, text in enumerate(texts) if text is None]
        rows = self._each([samples[i] for i in scored], self.model.explain)
        for i, (probabilities, likelihoods) in zip(scored, rows, strict=True):
            found[i] = Reply(probabilities), likelihoods[: len(probabilities)]
        return found

    @torch.inference_mode()
    def _each(
        self,
        samples: Sequence[Sample],
        answer: Callable[[Batch], tuple[Tensor, Tensor]],
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return of each sample its class probabilities, fp64, and its row of what else is answered, fp32."""
        with self._one_at_a_time:
            return self._each_alone(samples, answer, progress)

    def _each_alone(
        self,
        samples: Sequence[Sample],
        answer: Callable[[Batch], tuple[Tensor, Tensor]],
        progress: Callable[[int], None] | None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        examples = self.encoder.encode(samples)
        results = [(np.empty(0), np.empty(0))] * len(examples)
        for chunk in micro_batches(examples, self.batch_tokens):
            batch = self.encoder.collate([examples[i] for i in chunk]).to(self.device)
            scores, others = answer(batch)
            rows = zip(batch.answers(scores).cpu().numpy(), others.float().cpu().numpy(), strict=True)
            for i, (row, other) in zip(chunk, rows, strict=True):
                results[i] = row[: examples[i].num_classes], other
            if progress is not None:
                progress(len(chunk))
        return results
