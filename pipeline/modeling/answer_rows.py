"""An encoder's last layer where heads read the rows' first tokens alone: attention gives these, and only these go on.

Keys and values are of all nodes, what follows attention (its output projection where it stands apart, the residual,
the norms and the feed-forward network, two thirds of a layer's products) is computed for one node a row, forward and
backward. Each is the very function of its node that the whole layer computes.

Axes: M nodes, P answer nodes, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from mtl_lora.layer import AdaptedLinear
from pipeline.modeling import packed_attention
from pipeline.modeling.layer_cut import numbered_layers


class AnswerRows:
    """Lets a model's last layer give the states of the answer nodes, where packed rows name some.

    Args:
        layer: the last one.
        attention: the module in it that attends.
        norm: what makes the attention's input of the layer's; None where they are the same.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, norm: nn.Module | None) -> None:
        self.layer, self.attention, self.norm = layer, attention, norm
        self._layer_forward, self._attend = layer.forward, attention.forward
        self._states_1MH: Tensor | None = None
        self._answer_P: Tensor | None = None
        # Bound methods: a copy of the model gets its own of these, with its own layer.
        layer.forward, attention.forward = self._forward, self._attention

    def remove(self) -> None:
        """Leave the layer as it was."""
        del self.layer.forward, self.attention.forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        rows: packed_attention.PackedRows | None = kwargs.get("packed_rows")
        if rows is None or rows.answer is None:
            return self._layer_forward(*args, **kwargs)
        layer: Any = self.layer
        if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
            return self._answers(rows.answer, *args, **kwargs)
        # The layer would run its own forward again in the backward, without what stands around it here.
        return layer._gradient_checkpointing_func(partial(self._answers, rows.answer, **kwargs), *args)

    def _answers(self, answer_P: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer from all states to the answers'."""
        states_1MH, put = _states_in(args, kwargs)
        args, kwargs = put(states_1MH[:, answer_P])
        layer: Any = self.layer
        checkpoints = getattr(layer, "gradient_checkpointing", False)
        self._states_1MH = states_1MH if self.norm is None else self.norm(states_1MH)
        self._answer_P, layer.gradient_checkpointing = answer_P, False
        try:
            with self._routed(answer_P):
                return self._layer_forward(*args, **kwargs)
        finally:
            self._states_1MH = self._answer_P = None
            layer.gradient_checkpointing = checkpoints

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        states_1MH, answer_P = self._states_1MH, self._answer_P
        if states_1MH is None or answer_P is None:
            return self._attend(*args, **kwargs)
        args, kwargs = _states_in(args, kwargs)[1](states_1MH)
        kwargs["packed_rows"] = replace(kwargs["packed_rows"], only_answers=True)
        with self._routed(None):
            output = self._attend(*args, **kwargs)
        first, *others = output if isinstance(output, tuple) else (output,)
        return (first[:, answer_P], *others) if isinstance(output, tuple) else first[:, answer_P]

    @contextmanager
    def _routed(self, answer_P: Tensor | None) -> Iterator[None]:
        """Let adapted layers see the answer nodes inside, or with None all."""
        with ExitStack() as stack:
            for router in {module.router for module in self.layer.modules() if isinstance(module, AdaptedLinear)}:
                stack.enter_context(router.narrowed(answer_P))
            yield


def _states_in(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Return a module's states among its arguments, and what puts others in their place."""
    if args:
        return args[0], lambda states: ((states, *args[1:]), dict(kwargs))
    return kwargs["hidden_states"], lambda states: (args, {**kwargs, "hidden_states": states})


def find_attention(model: Any, run: Callable[[], object]) -> tuple[nn.Module, nn.Module, nn.Module | None] | None:
    """Return a model's last layer, what attends in it and the norm before that, if any; None where these are not found.

    Args:
        model: a Hugging Face encoder that takes packed rows.
        run: runs it once on some.
    """
    layers = numbered_layers(model)
    if not layers:
        return None
    layer, made, entered = layers[-1], [], []

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        made.append((module, output))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((module, args[0] if args else kwargs.get("hidden_states")))

    hooks = [module.register_forward_hook(leave) for module in layer.modules()]
    hooks += [module.register_forward_pre_hook(enter, with_kwargs=True) for module in layer.modules()]
    try:
        with packed_attention.recorded_modules() as attending:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    inside = [module for module in attending if any(module is other for other in layer.modules())]
    if len(inside) != 1 or inside[0] is layer:
        return None
    given = [states for module, states in entered if module is inside[0]]
    whole = [states for module, states in entered if module is layer]
    if len(given) != 1 or len(whole) != 1 or not isinstance(given[0], Tensor):
        return None
    if given[0] is whole[0]:
        return layer, inside[0], None
    norms = [module for module, output in made if output is given[0] and not any(module.children())]
    return (layer, inside[0], norms[0]) if len(norms) == 1 else None
