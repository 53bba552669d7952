"""A decoder over processes: tensor parallel, recomputing, compiled, then sharded. The model's code knows none of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from emulus.errors import EmulusError
from emulus.log import logger
from emulus.model import Decoder
from emulus.parallel.config import ParallelConfig
from emulus.parallel.processes import Processes


def spread(model: Decoder, processes: Processes, *, bfloat16: bool = False) -> None:
    """Spread a decoder's weights over the processes, in place. Its parameters may still be on the meta device.

    Args:
        model: A plain decoder.
        processes: Who shares it, and how.
        bfloat16: Whether the processes send one another weights in bfloat16 to compute with; gradients are summed in
            float32.

    Raises:
        EmulusError: The model cannot be shared out so.
    """
    sizes = processes.sizes
    if model.config.tie_word_embeddings:
        raise EmulusError("models whose head is the embedding are not trained; set tie_word_embeddings to false")
    if sizes.float8 and sizes.tensor > 1:
        raise EmulusError("float8 does not go together with tensor parallelism; set one of the two off")
    if sizes.tensor > 1:
        assert processes.weights is not None, "several processes have a mesh"
        _tensor_parallel(model, processes.weights["tensor"])
    for block in model.model.blocks:
        block.recompute = sizes.recompute
    if sizes.float8:
        from emulus.train.float8 import to_float8

        to_float8(model, skip=("lm_head",))
        if not sizes.compile:
            logger.warning("float8 is slower than bfloat16 unless blocks are compiled; add --train.parallel.compile")
    if sizes.compile:
        for block in model.model.blocks:
            # Inside of what is computed again, where compiled code may not begin outside of it.
            block.add = torch.compile(block.add)  # type: ignore[method-assign]
    mesh = _sharding_mesh(processes.weights, sizes)
    if mesh is not None:
        shard(model, mesh, bfloat16=bfloat16)


def shard(model: Decoder, mesh: DeviceMesh, *, bfloat16: bool = False) -> None:
    """Share out weights, gradients and optimiser state, block by block, in place.

    Args:
        model: A decoder; its parameters may be on the meta device.
        mesh: Who shares; of two dimensions, the first has whole copies.
        bfloat16: See :func:`spread`.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32 if bfloat16 else None,
        # The angles of RoPE must stay in float32.
        cast_forward_inputs=False,
    )
    for block in model.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("hidden", "losses"):
        register_fsdp_forward_method(model, method)


def _sharding_mesh(weights: DeviceMesh | None, sizes: ParallelConfig) -> DeviceMesh | None:
    """The dimensions over which gradients are summed."""
    if weights is None or sizes.replicate * sizes.shard * sizes.context == 1:
        return None
    return weights["shard"] if sizes.replicate == 1 else weights["replicate", "shard"]


def _tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Every matrix over the processes of ``mesh``: heads, inner features and ids are dealt out."""
    config, parts = model.config, mesh.size()
    for name in ("num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % parts:
            raise EmulusError(f"tensor {parts} does not divide the model's {name} {getattr(config, name)}; use another")
    if config.qk_norm:
        raise EmulusError("models with norms of queries and keys are not trained tensor-parallel; set tensor to 1")
    columns, rows = ColwiseParallel(), RowwiseParallel()
    layer: dict[str, ParallelStyle] = {f"self_attn.{name}_proj": columns for name in "qkv"} | {"self_attn.o_proj": rows}
    layer |= {"mlp.gate_proj": columns, "mlp.up_proj": columns, "mlp.down_proj": rows}
    plan: dict[str, ParallelStyle] = {f"model.layers.*.{name}": style for name, style in layer.items()}
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)


@torch.no_grad()
def fill(model: nn.Module, make: Callable[[str, torch.Size], Tensor], device: torch.device) -> None:
    """Give every parameter its values, each process its part.

    Args:
        model: May be on the meta device, spread or not.
        make: The whole of the parameter of this name and shape; the same on every process.
        device: Where the parameters shall be.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        whole = make(name, parameter.shape)
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(local_part(whole, parameter))
        else:
            parameter.copy_(whole)


def local_part(whole: Tensor, like: DTensor) -> Tensor:
    """This process's part of a whole tensor, spread as ``like`` is."""
    # The last dimension of the mesh is dealt out first: matrices are split for tensor parallelism before sharding.
    for dimension in reversed(range(like.device_mesh.ndim)):
        # Plain and strided shards have a dimension, replicas none; what tells them apart differs between versions.
        axis: int | None = getattr(like.placements[dimension], "dim", None)
        if axis is not None:
            parts = whole.chunk(like.device_mesh.size(dimension), dim=axis)
            place = like.device_mesh.get_local_rank(dimension)
            whole = parts[place] if place < len(parts) else whole.narrow(axis, 0, 0)
    return whole


@torch.no_grad()
def whole_tensors(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """A spread model's tensors as they would be in one process, on the CPU of the first process; nothing on the others.

    All processes must call it.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.first:
            tensors[name] = whole.cpu()
    return tensors
