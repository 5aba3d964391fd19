"""A model's numbered layers run in two parts: those below a cut alone, or those above it on states that are given.

The model's own forward makes both runs, with its own positions and masks: layers of the other part hand on what they
are given. Where a layer is the first whose output depends on something trained, gradients end at its input, and what
lies below is the same in every epoch.

Axes: M nodes, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.modeling.architecture import text_settings

Part = Literal["whole", "below", "above"]


def numbered_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a Hugging Face model from the input on; none where it has no plain list of them."""
    number = getattr(text_settings(model.config), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    return []


def checkpoint_layers(model: Any) -> None:
    """Let a Hugging Face model compute its layers' activations again in the backward."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers asks for gradients of the embedded tokens, which old checkpoints needed: they would be taken through
    # every frozen layer for nothing.
    model.disable_input_require_grads()


def states_of(output: Any) -> Tensor | None:
    """Return the states in a layer's output, None where it hands on more than these."""
    first, *others = output if isinstance(output, tuple) else (output,)
    return first if isinstance(first, Tensor) and all(other is None for other in others) else None


def count_frozen(model: Any, run: Callable[[], object]) -> tuple[int, bool]:
    """Return how many layers at the input give states that no gradient flows through, and whether states are all that
    these hand on.

    Args:
        model: a Hugging Face model whose trained parameters require gradients.
        run: runs it once, anyhow.
    """
    outputs: list[Any] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        for layer in numbered_layers(model)
    ]
    try:
        with torch.enable_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if len(outputs) != len(hooks):
        return 0, False
    states = [states_of(output) for output in outputs]
    frozen = 0
    while frozen < len(states) and (found := states[frozen]) is not None and not found.requires_grad:
        frozen += 1
    return frozen, not (frozen < len(states) and states[frozen] is None)


class LayerCut:
    """Lets a model run its layers below a cut, or above it; otherwise the model is as it was.

    Args:
        model: a Hugging Face model.
        cut: layers below it, at least one.
    """

    def __init__(self, model: Any, cut: int) -> None:
        self.model, self.cut = model, cut
        self._part: Part = "whole"
        self._states: Tensor | None = None
        for number, layer in enumerate(numbered_layers(model)):
            layer.forward = self._switched(number, layer.forward)

    def _switched(self, number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        """Return a layer's forward that hands on its input while the other part runs."""
        is_last_below, part = number == self.cut - 1, "below" if number < self.cut else "above"

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._part in ("whole", part):
                output = own(*args, **kwargs)
                if is_last_below and self._part == "below":
                    self._states = states_of(output)
                self._is_tuple = isinstance(output, tuple)
                return output
            # Above the cut the given states come out of the last layer below it: that is what activation checkpointing,
            # which runs a layer again from its input, keeps of them.
            states = args[0] if args else kwargs["hidden_states"]
            if is_last_below and self._states is not None:
                states = self._states
            return (states,) if self._is_tuple else states

        return forward

    def below(self, inputs: dict[str, Any]) -> Tensor:
        """Return the states (M, H) that leave the last layer below the cut, without gradients.

        Args:
            inputs: arguments of the model, packed rows.
        """
        with self._running("below"), torch.no_grad():
            self.model.base_model(**inputs)
            if self._states is None:
                raise RuntimeError(f"a layer must give states, the one below the cut at {self.cut} did not run")
            return self._states[0]

    @contextmanager
    def above(self, states_MH: Tensor) -> Iterator[None]:
        """Let the model run inside on these states instead of its layers below the cut."""
        with self._running("above"):
            self._states = states_MH[None]
            yield

    @contextmanager
    def _running(self, part: Part) -> Iterator[None]:
        self._part, self._states = part, None
        try:
            yield
        finally:
            self._part, self._states = "whole", None
