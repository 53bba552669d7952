"""How many processes share what (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from emulus.errors import at_least


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over processes; the four sizes multiply to their number.

    Attributes:
        replicate: Whole copies of the model; 0 takes what the other three leave.
        shard: Processes that share the weights, gradients and optimiser state of a copy (FSDP).
        context: Processes that share a row's ids.
        tensor: Processes that share every matrix.
        recompute: Compute each block again in the backward pass instead of keeping what it computed.
        compile: Compile the blocks.
        float8: Compute the blocks' products in 8-bit floats (NVIDIA Hopper or newer; needs ``torchao``). Pays with
            ``compile`` only.
    """

    replicate: int = 0
    shard: int = 1
    context: int = 1
    tensor: int = 1
    recompute: bool = False
    compile: bool = False
    float8: bool = False

    def __post_init__(self) -> None:
        at_least(0, replicate=self.replicate)
        at_least(1, shard=self.shard, context=self.context, tensor=self.tensor)
