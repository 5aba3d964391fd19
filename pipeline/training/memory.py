"""What a rank holds in memory, from counts alone: no weight is needed, and no device.

ZeRO's parts are those of arXiv 1910.02054, section 3, in the bytes that DeepSpeed 0.19.8's own estimators give them
(``runtime/zero/stage3.py`` and ``stage_1_and_2.py``); 4 bit is NF4 with quantised scales, arXiv 2305.14314.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pipeline.contracts import Contract

BYTES_A_QUANTIZED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Of a weight, its share of the scales included."""
RESERVED_BYTES = 1 << 30
"""Of a device that are no tensors of the run: CUDA's context, the communication's buffers, gaps between blocks."""
_STATES, _GRADIENT = 12, 4
"""Bytes a trained parameter of fp32 weight and two moments, and of its gradient as the optimizer takes it."""


class Counts(NamedTuple):
    """The sizes of a model with its adapter, in parameters."""

    linear: int
    """Frozen ones of the linear layers, but for the output head: those that quantization takes."""
    plain: int
    """Frozen ones of embeddings, norms and output head, which stay in the model's type."""
    trained: int
    largest: int
    """Frozen ones of the largest single module: the most that is gathered at once under ZeRO 3."""
    largest_linear: int
    """Of the largest layer that quantization takes, which is dequantised while it runs."""
    token: int
    """Values that a token leaves for the backward, in all layers."""
    token_checkpointed: int
    """The same where each layer's are computed again."""


class RankMemory(Contract):
    """Bytes of a rank by what holds them."""

    weights: int
    """The frozen model's, or this rank's part of it."""
    adapter: int
    """The trained weights in the type that they compute in."""
    gradients: int
    optimizer: int
    """fp32 weights and moments."""
    gathered: int
    """Of the largest module, for the moment that it runs: gathered from the ranks, or dequantised."""
    activations: int
    host: int
    """In the host's memory instead: what is offloaded."""

    @property
    def device(self) -> int:
        """Of the device, all together."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.gathered + self.activations


def rank_memory(
    counts: Counts,
    *,
    num_ranks: int,
    zero_stage: int,
    width: int,
    tokens: int = 0,
    quantization: str | None = None,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    checkpointing: bool = False,
) -> RankMemory:
    """Return what one rank holds at the largest moment of a step.

    Args:
        counts: of the model.
        num_ranks: that a model is trained by.
        zero_stage: 0 to 3.
        width: bytes of a value of the model's type.
        tokens: of a micro-batch.
        quantization: ``4bit`` or ``8bit`` of the linear layers; only with stages 0 to 2.
        offload_optimizer: its states and gradients are kept and stepped on the host; needs stage 1 to 3.
        offload_parameters: this rank's part of the parameters is kept on the host; needs stage 3.
        checkpointing: whether each layer's activations are computed again.
    """
    part = 1 / num_ranks
    weights: float = counts.plain * width + counts.linear * BYTES_A_QUANTIZED.get(quantization or "", width)
    adapter: float = counts.trained * width
    # Gradients stand twice where they are gathered for the optimizer: in the model's type, and as it takes them.
    copied: float = counts.trained * width
    taken: float = counts.trained * _GRADIENT
    states: float = counts.trained * (_STATES if width == 2 or zero_stage else _STATES - 4)
    gathered = counts.largest_linear * width if quantization else 0
    host = 0.0
    if zero_stage >= 1:
        taken, states = taken * part, states * part
    if zero_stage >= 2:
        copied *= part
    if zero_stage == 3:
        # A module's weights and what its backward gives for them, as DeepSpeed's estimator has it.
        copied, gathered = 0, 2 * width * counts.largest if num_ranks > 1 or offload_parameters else 0
        weights, adapter = weights * part, adapter * part
    if offload_optimizer:
        host, copied, taken, states = taken + states, 0, 0, 0
    if offload_parameters:
        host, weights, adapter = host + weights + adapter, 0, 0
    a_token = counts.token_checkpointed if checkpointing else counts.token
    return RankMemory(
        weights=round(weights),
        adapter=round(adapter),
        gradients=round(copied + taken),
        optimizer=round(states),
        gathered=gathered,
        activations=a_token * width * tokens,
        host=round(host),
    )


class Layout(NamedTuple):
    """One way to lay a model over ranks."""

    zero_stage: int
    quantization: Literal["4bit", "8bit"] | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def words(self) -> str:
        """How it is shown, by the keys that ask for it."""
        found = f"zero_stage {self.zero_stage}"
        found += f", quantization {self.quantization}" if self.quantization else ""
        found += ", offload_optimizer" if self.offload_optimizer else ""
        return found + (", offload_param" if self.offload_parameters else "")


LAYOUTS = (
    *(Layout(stage) for stage in (0, 1, 2, 3)),
    Layout(2, offload_optimizer=True),
    Layout(3, offload_optimizer=True),
    Layout(3, offload_optimizer=True, offload_parameters=True),
    Layout(1, "8bit"),
    Layout(1, "4bit"),
)
"""The ways that a plan of memory compares."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DEVICES_GIB = (24, 40, 80, 141)
"""Memory of the devices that a plan of memory looks for: such as L4, A100, H100 and H200."""


class LayoutMemory(Contract):
    """One cell of a plan of memory."""

    layout: str
    zero_stage: int
    quantization: str | None
    ranks: int
    memory: RankMemory
    device_bytes: int
    """Of the run's tensors; a device needs :data:`RESERVED_BYTES` more."""
    fits_gib: int | None
    """The smallest device of :data:`DEVICES_GIB` that holds it; None: none does."""


class MemoryPlan(Contract):
    """What a model takes under every layout on any number of ranks."""

    parameters: int
    trained_parameters: int
    bytes_a_value: int
    micro_batch_tokens: int
    activation_checkpointing: bool
    cells: tuple[LayoutMemory, ...]

    def cell(self, layout: str, ranks: int) -> LayoutMemory:
        """Return the cell of a layout, by its words, on so many ranks."""
        return next(cell for cell in self.cells if (cell.layout, cell.ranks) == (layout, ranks))


def plan_memory(counts: Counts, width: int, tokens: int, checkpointing: bool) -> MemoryPlan:
    """Return what each of :data:`LAYOUTS` takes on each number of :data:`RANKS`.

    Args:
        counts: of the model.
        width: bytes of a value of the model's type.
        tokens: of a micro-batch.
        checkpointing: whether each layer's activations are computed again.
    """
    cells = []
    for layout in LAYOUTS:
        options: dict[str, Any] = layout._asdict()
        for ranks in RANKS:
            found = rank_memory(
                counts, num_ranks=ranks, width=width, tokens=tokens, checkpointing=checkpointing, **options
            )
            need = found.device + RESERVED_BYTES
            cells.append(
                LayoutMemory(
                    layout=layout.words,
                    zero_stage=layout.zero_stage,
                    quantization=layout.quantization,
                    ranks=ranks,
                    memory=found,
                    device_bytes=found.device,
                    fits_gib=next((gib for gib in DEVICES_GIB if need <= gib << 30), None),
                )
            )
    return MemoryPlan(
        parameters=counts.linear + counts.plain,
        trained_parameters=counts.trained,
        bytes_a_value=width,
        micro_batch_tokens=tokens,
        activation_checkpointing=checkpointing,
        cells=tuple(cells),
    )
