"""Memory of an accelerator that a run will take, before anything is loaded: plain arithmetic on parameter counts.

Weights, trained parameters, gradients, optimizer and averages are exact; activations are an estimate and say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
KEPT_PER_BLOCK = 17
"""Numbers that a transformer block keeps for its gradient, per token and channel, without attention maps.

34 bytes at two bytes a number: Korthikanti et al., Reducing Activation Recomputation (2205.05198), section 4.1.
"""


@dataclass(frozen=True)
class Network:
    """The denoising network as far as memory goes. blocks x width: its transformer; 0 where it is none (a UNet).

    tokens: of one sample, picture and text; layers: (outputs, inputs) of each layer that LoRA would be added to.
    """

    parameters: int
    tensors: int
    blocks: int = 0
    width: int = 0
    tokens: int = 0
    layers: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class ModelSize:
    """Numbers held by each part of a pipeline (parameters and saved buffers), by its name; network: those that are trained.

    encoders: names of the parts that encode text; shape: of one latent.
    """

    parts: Mapping[str, int]
    networks: Sequence[Network]
    encoders: Sequence[str]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of a run decides its memory; the names are the config's."""

    lora_rank: int = 0
    dtype: str = "fp32"
    ema: bool = False
    micro_batch: int = 1
    branches: int = 1
    """Calls with gradient that are held at once: 2 where guidance is differentiated whole."""
    activation_checkpointing: bool = False
    free_text_encoders: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose. activations: an estimate for one call with gradient, None where there is none."""

    weights: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    reference: int
    activations: int | None
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def certain(self) -> int:
        """What is held throughout the update, activations aside. Trained LoRA stands beside the weights; else it is in them."""
        return self.weights + self.trained + self.gradients + self.optimizer + self.average + self.reference

    @property
    def total(self) -> int:
        return self.certain + (self.activations or 0)


def lora_parameters(network: Network, rank: int) -> int:
    """A is [rank, inputs] and B is [outputs, rank]: rank (inputs + outputs) numbers a layer."""
    return rank * sum(outputs + inputs for outputs, inputs in network.layers)


def memory_of(size: ModelSize, settings: Settings) -> Memory:
    """What ``settings`` make of a model. AdamW holds two averages of each gradient and a step count of each tensor.

    Full fine-tuning keeps float32 weights of every part, and a copy of the trained ones as they were at the start.
    """
    lora = settings.lora_rank > 0
    each = BYTES[settings.dtype] if lora else 4
    freed = size.encoders if settings.free_text_encoders else ()
    parts = {name: count * each for name, count in size.parts.items() if name not in freed}
    if lora:
        trained = sum(lora_parameters(network, settings.lora_rank) for network in size.networks)
        tensors = sum(2 * len(network.layers) for network in size.networks)
    else:
        trained = sum(network.parameters for network in size.networks)
        tensors = sum(network.tensors for network in size.networks)
    return Memory(
        weights=sum(parts.values()),
        trained=trained * 4 if lora else 0,
        gradients=trained * 4,
        optimizer=trained * 8 + tensors * 4,
        average=trained * 4 if settings.ema else 0,
        reference=0 if lora else trained * 4,
        activations=activations(size, settings),
        parts=parts,
    )


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a network lies in ``world`` processes: ``distributed.sharding`` and ``distributed.gather``, which fsdp2 alone reads."""

    world: int = 1
    gather: str = "rollout"
    sharding: str = "fsdp2"


def memory_of_part(size: ModelSize, settings: Settings, split: Division) -> Memory:
    """What one of ``split.world`` processes holds at its fullest, buffers of collectives aside.

    fsdp2: weights of the networks are in parts; with full fine-tuning so are their optimizer state, average and reference.
    Gradients stay whole until an update ends, and LoRA always. "gathered": what is whole beside the parts, two blocks (one
    at work, the next on its way) or the network. Under ``rollout`` the rollout may be fuller than the update.
    """
    whole = memory_of(size, settings)
    if split.world == 1:
        return whole
    if split.sharding != "fsdp2":
        return _by_zero(size, settings, split)
    lora = settings.lora_rank > 0
    network, block = _weights(size, settings)
    held, beside = -(-network // split.world), whole.weights - network

    def divided(gathered: int) -> Memory:
        rest = {name: getattr(whole, name) for name in ("optimizer", "average", "reference")}
        if not lora:
            rest = {name: -(-count // split.world) for name, count in rest.items()}
        parts = {"network in parts": held, "gathered": gathered, "other models": beside}
        return replace(whole, weights=sum(parts.values()), parts=parts, **rest)

    if split.gather == "iteration":
        return divided(network)
    update = divided(min(2 * block, network))
    if split.gather == "block":
        return update
    rollout = replace(divided(network), gradients=0, activations=0)
    return max(update, rollout, key=lambda made: made.total)


def _weights(size: ModelSize, settings: Settings) -> tuple[int, int]:
    """Bytes of the trained networks' weights, and about those of one block."""
    each = BYTES[settings.dtype] if settings.lora_rank > 0 else 4
    block = max((n.parameters // max(n.blocks, 1) for n in size.networks), default=0)
    return each * sum(n.parameters for n in size.networks), each * block


def _by_zero(size: ModelSize, settings: Settings, split: Division) -> Memory:
    """As `memory_of_part` by DeepSpeed: zero1 cuts what Adam holds, zero2 gradients too, zero3 weights too.

    Its optimizer steps a float32 copy of the part of the weights. zero3 cuts a network that was loaded whole.
    """
    whole, stage = memory_of(size, settings), int(split.sharding.removeprefix("zero"))

    def cut(count: int) -> int:
        return -(-count // split.world)

    made = replace(whole, optimizer=cut(whole.optimizer) + cut(whole.gradients))
    if stage > 1:
        made = replace(made, gradients=cut(whole.gradients))
    if stage < 3:
        return made
    network, block = _weights(size, settings)
    parts = {"network in parts": cut(network), "gathered": block, "other models": whole.weights - network}
    made = replace(
        made, weights=sum(parts.values()), parts=parts, average=cut(whole.average), reference=cut(whole.reference)
    )
    loading = replace(whole, gradients=0, optimizer=0, average=0, reference=0, activations=0)
    return max(made, loading, key=lambda held: held.total)


def activations(size: ModelSize, settings: Settings) -> int | None:
    """An estimate of what one call with gradient keeps: (blocks + 17) or 17 blocks numbers a token and channel.

    The first with activation checkpointing: the input of each block, and one block whole while it is computed again.
    """
    network = max(size.networks, key=lambda each: each.blocks * each.width, default=None)
    if network is None or not network.blocks * network.width * network.tokens:
        return None
    kept = KEPT_PER_BLOCK * network.blocks
    if settings.activation_checkpointing:
        kept = network.blocks + KEPT_PER_BLOCK
    return kept * network.width * network.tokens * settings.micro_batch * settings.branches * BYTES[settings.dtype]
