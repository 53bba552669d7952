"""The vision tokenizer of the released size against transformers' Emu3VQVAE with the same random weights.

``python -m benchmarks.vision --json``: one picture of ``--side`` pixels to codes and back, in float32 and in bfloat16,
and the peak memory of decoding one of ``--large`` pixels in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Options, case, conditions, held, interleave, main, require
from emulus.errors import EmulusError
from emulus.layouts.names import shape_in_transformers, vision_to_transformers
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.blocks import heavy_convolutions
from emulus.weights import on_meta

Kind = Literal["fp32", "bf16"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PIXEL_TOLERANCE = 1e-4
"""How far pixels may be from transformers' in fp32."""
NEARNESS = 1e-4
"""How much farther one's code may be than the other's in fp32, as a part of how far latents lie apart: a tie."""
MEMORY_LIMIT = 2.5e9
"""Bytes that decoding the large picture may take."""
CODEBOOK = "quantize.embedding.weight"
SETTINGS = {"side": (256, "pixels of the timed pictures' sides"), "large": (512, "pixels of the memory case's sides")}

TOY = VisionTokenizerConfig(ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,), codebook_size=512)


def tokenizer(kind: Kind, *, toy: bool) -> VisionTokenizer:
    """Random weights, the same for both kinds but for the rounding, and never twice in memory."""
    model = on_meta(lambda: VisionTokenizer(TOY if toy else VisionTokenizerConfig())).eval()
    halves = (model.encoder, model.decoder) if kind == "bf16" else ()
    rounded = {id(conv) for half in halves for conv in heavy_convolutions(half).values()}
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, empty in values.items():
                if empty is not None:
                    tensor = _random(module, name, empty, generator)
                    tensor = tensor.bfloat16() if name == "weight" and id(module) in rounded else tensor
                    setattr(module, name, tensor if values is module._buffers else nn.Parameter(tensor, False))
    return model


def _random(module: nn.Module, name: str, empty: Tensor, generator: torch.Generator) -> Tensor:
    tensor = torch.zeros(empty.shape, dtype=empty.dtype)
    if name == "weight" and tensor.ndim > 1:
        # Convolutions as wide as PyTorch draws them, codes about as wide as latents.
        spread = 1.0 if isinstance(module, nn.Embedding) else (3 * tensor[0].numel()) ** -0.5
        tensor.normal_(0, spread, generator=generator)
    elif name in ("weight", "running_var"):
        tensor.fill_(1)
    return tensor


def reference(model: VisionTokenizer) -> Any:
    """Transformers' Emu3VQVAE on the very same weights: they are shared, not copied."""
    # Not for the process whose memory is measured.
    from transformers import Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

    shape = model.config
    config = Emu3VQVAEConfig(
        codebook_size=shape.codebook_size,
        embed_dim=shape.embed_dim,
        latent_channels=shape.z_channels,
        base_channels=shape.ch,
        channel_multiplier=list(shape.ch_mult),
        num_res_blocks=shape.num_res_blocks,
        attn_resolutions=list(shape.attn_resolutions),
        hidden_size=shape.ch * shape.ch_mult[-1],
        num_attention_heads=1,
    )
    with torch.device("meta"):
        theirs = Emu3VQVAE(config)
    state = {
        vision_to_transformers(name): value.view(shape_in_transformers(name, tuple(value.shape)))
        for name, value in model.state_dict().items()
    }
    theirs.load_state_dict(state, assign=True)
    return theirs.train(False)


def encode(kind: Kind, options: Options) -> Case:
    """A picture to codes."""
    ours, theirs = _pair(kind, options)
    pixels = _pixels(_side(options))
    _fit_codebook(ours, pixels)
    theirs.get_parameter(vision_to_transformers(CODEBOOK)).data.copy_(ours.get_parameter(CODEBOOK))
    # They cut codes to these sizes, an eighth of the pixels' whatever the model.
    sizes = torch.tensor([pixels.shape[-2:]]) * (8 // ours.config.spatial_factor)

    def baseline() -> Tensor:
        with torch.inference_mode():
            return torch.stack(list(theirs.encode(pixels, sizes).image_tokens)).reshape(1, *_grid(ours, pixels))

    found, expected = ours.encode(pixels), baseline()
    flips = found != expected
    if kind == "fp32":
        far = _farther(ours, pixels, found, expected)
        require(far <= NEARNESS, f"a code and transformers' are no tie: {far:.1e} of the latents' spread apart")
    return case(
        f"encode-{kind}",
        interleave(baseline, lambda: ours.encode(pixels), pairs=options.pairs, clock=options.clock),
        options,
        **_about(ours, kind, options),
        codes=flips.numel(),
        different_codes=len(set(found.flatten().tolist())),
        codes_that_differ=int(flips.sum()),
    )


def decode(kind: Kind, options: Options) -> Case:
    """Codes to a picture."""
    ours, theirs = _pair(kind, options)
    codes = _codes(ours, _side(options))

    def baseline() -> Tensor:
        with torch.inference_mode():
            return cast(Tensor, theirs.decode(codes))

    found, expected = ours.decode(codes), baseline()
    error = float((found - expected).abs().max())
    if kind == "fp32":
        require(error <= PIXEL_TOLERANCE, f"pixels are {error:.1e} apart")
    relative = float((found - expected).std() / expected.std())
    return case(
        f"decode-{kind}",
        interleave(baseline, lambda: ours.decode(codes), pairs=options.pairs, clock=options.clock),
        options,
        **_about(ours, kind, options),
        pixels_differ_at_most=error,
        pixels_differ_relatively=relative,
    )


def memory(kind: Kind, options: Options) -> Case:
    """Peak memory of decoding a large picture, weights included, in a process of its own."""
    side = 64 if options.toy else options.settings["large"]
    size = "toy" if options.toy else "released"
    command = [sys.executable, "-m", "benchmarks.vision", "peak", kind, str(side), size, str(options.threads)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if ran.returncode:
        raise EmulusError(f"decoding in a process of its own failed: {ran.stderr.strip()[-300:]}")
    loaded, most = (int(part) for part in ran.stdout.split())
    ratio = MEMORY_LIMIT / most
    sizes = {"loaded_bytes": loaded, "peak_bytes": most, "limit_bytes": int(MEMORY_LIMIT)}
    return Case(
        case=f"memory-decode-{kind}",
        ratio=ratio,
        spread=(ratio, ratio),
        conditions={"weights": kind, "side": side, **sizes, **conditions(options)},
    )


def peak(kind: str, side: str, size: str, threads: str) -> None:
    """Decode, and print the most bytes that the process held before and in all."""
    torch.set_num_threads(int(threads))
    model = tokenizer(cast(Kind, kind), toy=size == "toy")
    codes = _codes(model, int(side))
    loaded = held("VmRSS")
    model.decode(codes)
    print(loaded, held("VmHWM"))


def _pair(kind: Kind, options: Options) -> tuple[VisionTokenizer, Any]:
    """Ours in the kind, theirs in fp32."""
    whole = tokenizer("fp32", toy=options.toy)
    return whole if kind == "fp32" else tokenizer(kind, toy=options.toy), reference(whole)


def _side(options: Options) -> int:
    return 64 if options.toy else options.settings["side"]


def _pixels(side: int) -> Tensor:
    """Smooth colours and some noise."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return (2 * smooth - 1 + 0.1 * torch.randn(1, 3, side, side, generator=generator)).clamp(-1, 1)


def _codes(model: VisionTokenizer, side: int) -> Tensor:
    grid = (1, *[side // model.config.spatial_factor] * 2)
    return torch.randint(model.config.codebook_size, grid, generator=torch.Generator().manual_seed(2))


def _grid(model: VisionTokenizer, pixels: Tensor) -> tuple[int, int]:
    factor = model.config.spatial_factor
    return pixels.shape[-2] // factor, pixels.shape[-1] // factor


@torch.inference_mode()
def _fit_codebook(model: VisionTokenizer, pixels: Tensor) -> None:
    """Spread the codes like the latents of the picture: where all are far away, one code would do for it."""
    latents = model.latents(pixels).movedim(1, -1).flatten(0, -2)
    codes = torch.randn(model.config.codebook_size, latents.shape[1], generator=torch.Generator().manual_seed(3))
    model.get_parameter(CODEBOOK).data.copy_(latents.mean(0) + latents.std(0) * codes)


@torch.inference_mode()
def _farther(model: VisionTokenizer, pixels: Tensor, codes: Tensor, others: Tensor) -> float:
    """Where two choices differ most: how much farther the one is, as a part of the latents' spread."""
    latents = model.latents(pixels)[:, :, 0].double()
    chosen = (model.quantize.decode(each[:, None])[:, :, 0] for each in (codes, others))
    near, far = ((latents - vectors).square().sum(1).sqrt() for vectors in chosen)
    spread = latents.var(dim=(0, 2, 3)).sum().sqrt()
    return float((far - near).abs().max() / spread)


def _about(model: VisionTokenizer, kind: Kind, options: Options) -> dict[str, Any]:
    size = sum(weight.numel() for weight in model.parameters())
    return {"weights": kind, "side": _side(options), "parameters": size}


CASES: dict[str, Callable[[Options], Case]] = {
    **{f"encode-{kind}": partial(encode, kind) for kind in KINDS},
    **{f"decode-{kind}": partial(decode, kind) for kind in KINDS},
    **{f"memory-decode-{kind}": partial(memory, kind) for kind in KINDS},
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(*sys.argv[2:])
    else:
        raise SystemExit(main(CASES, settings=SETTINGS))
