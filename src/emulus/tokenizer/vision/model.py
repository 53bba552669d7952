"""pixels <-> codes: the whole vision tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.threads import one_thread
from emulus.tokenizer.vision import on_gpu
from emulus.tokenizer.vision.blocks import CausalConv3d, Past, heavy_convolutions
from emulus.tokenizer.vision.config import VisionTokenizerConfig
from emulus.tokenizer.vision.decoder import Decoder
from emulus.tokenizer.vision.encoder import Encoder
from emulus.tokenizer.vision.quantizer import Quantizer

# Pixels that the spatial layers take together on a CPU: more pictures and frames go through one after the other.
PIECE_PIXELS = 2**18
# So few pixels are decoded by one thread: a second one gains little, and on a busy machine both wait for each other.
ONE_THREAD_PIXELS = 2**15


class VisionTokenizer(nn.Module):
    """Emu3's vision tokenizer: one code per 8x8 pixels and 4 frames (by default).

    Pixels are float in [-1, 1]: an image ``(B, C, H, W)``, a clip ``(B, T, C, H, W)`` with ``T`` a multiple of the
    temporal factor. Codes are ``(B, h, w)`` and ``(B, t, h, w)``. An image stands for a clip of equal frames. Parameter
    names are those of the released checkpoint. Use it in eval mode: its temporal blocks hold batch norms.

    Source: Emu3 (arXiv:2409.18869) section 2.2 and the released ``modeling_emu3visionvq.py``.
    """

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codebook_size, config.embed_dim)
        self.quant_conv = CausalConv3d(config.z_channels, config.embed_dim)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.z_channels)
        self.apply(_initialise)
        self._recordings = on_gpu.Recordings()

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> VisionTokenizer:
        # Recordings would keep the device's memory.
        self._recordings = on_gpu.Recordings()
        return cast(VisionTokenizer, super()._apply(fn, recurse))

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes over: everything but the recordings, which read this one's weights."""
        return {**self.__dict__, "_recordings": on_gpu.Recordings()}

    @torch.inference_mode()
    def encode(self, pixels: Float[Tensor, "b *frames c H W"]) -> Int[Tensor, "b *latent h w"]:
        """Codes of images or clips.

        Args:
            pixels: Images ``(B, C, H, W)`` or clips ``(B, T, C, H, W)`` in [-1, 1].

        Returns:
            Codes in ``[0, codebook_size)``, ``(B, h, w)`` or ``(B, t, h, w)``.

        Raises:
            EmulusError: Sides are not multiples of the spatial factor, or frames of the temporal factor.
        """
        self._check(pixels)
        return self._batched("encode", self._codes_of, pixels, pixels=_area(pixels) * _frames(pixels))

    @torch.inference_mode()
    def encode_stream(self, frames: Iterable[Float[Tensor, "c H W"]]) -> Iterator[Int[Tensor, "h w"]]:
        """Codes of a clip of any length, as its frames come in: those of :meth:`encode` of the whole clip.

        Args:
            frames: Frames of one size in [-1, 1].

        Yields:
            The codes ``(h, w)`` of every ``temporal_factor`` frames.

        Raises:
            EmulusError: Sides are not multiples of the spatial factor or change, or frames are left over at the end.
        """
        past: Past = {}
        features: list[Tensor] = []
        shape: tuple[int, ...] | None = None
        for frame in frames:
            if shape is None:
                self._check(frame[None])
                shape = tuple(frame.shape)
            if tuple(frame.shape) != shape:
                raise EmulusError(f"a clip's frames must have one shape, got {tuple(frame.shape)} after {shape}")
            with on_gpu.exact(frame.device):
                features.append(self.encoder.frames(frame[None]))
            if len(features) == self.config.temporal_factor:
                yield self.quantize.encode(self._latents_of(torch.stack(features, dim=2), past))[0, 0]
                features.clear()
        if features:
            self._check_frames(len(features))

    @torch.inference_mode()
    def decode_stream(self, codes: Iterable[Int[Tensor, "h w"]]) -> Iterator[Float[Tensor, "c H W"]]:
        """Frames of a clip of any length, as its codes come in: those of :meth:`decode` of the whole clip.

        Args:
            codes: Frames of codes of one size, on the host or where the weights are.

        Yields:
            Pixels ``(C, H, W)``, ``temporal_factor`` frames for each frame of codes.

        Raises:
            EmulusError: A code is outside the codebook (known at the end only, if it lies on a GPU: looking at each
                frame would wait for it), or a frame of codes has another shape than the first.
        """
        past: Past = {}
        shape: tuple[int, ...] | None = None
        foreign: Tensor | None = None
        for frame in codes:
            shape = tuple(frame.shape) if shape is None else shape
            if tuple(frame.shape) != shape:
                raise EmulusError(f"a clip's codes must have one shape, got {tuple(frame.shape)} after {shape}")
            if frame.is_cuda:
                known = frame.clamp(0, self.config.codebook_size - 1)
                foreign = (known != frame).any() | (False if foreign is None else foreign)
                frame = known
            else:
                self._check_codes(frame)
            vectors = self.quantize.decode(self._here(frame[None, None]))
            latents, steering = self._spread(vectors, past, first_frame=False)
            for both in zip(latents.unbind(2), steering.unbind(2), strict=True):
                with on_gpu.exact(latents.device):
                    painted = self.decoder.frames(*both)[0].to(self.dtype)
                yield painted
        if foreign is not None and bool(foreign):
            raise self._foreign()

    @torch.inference_mode()
    def decode(self, codes: Int[Tensor, "b *latent h w"]) -> Float[Tensor, "b *frames c H W"]:
        """Pixels of codes (see :meth:`encode`); values may leave [-1, 1] a little.

        Args:
            codes: On the host, where they are best looked at, or where the weights are.

        Raises:
            EmulusError: A code is outside the codebook, or the shape is neither an image's nor a clip's.
        """
        if codes.ndim not in (3, 4):
            raise EmulusError(f"codes must be (B, h, w) or (B, t, h, w), got shape {tuple(codes.shape)}")
        self._check_codes(codes)
        frames = 1 if codes.ndim == 3 else codes.shape[1] * self.config.temporal_factor
        pixels = _area(codes) * self.config.spatial_factor**2 * frames
        with one_thread(len(codes) * pixels <= ONE_THREAD_PIXELS):
            return self._batched("decode", self._pixels_of, self._here(codes), pixels=pixels)

    def to_bfloat16(self, *, encoder: bool = False) -> VisionTokenizer:
        """Hold nearly all weights in bfloat16, in place: half the memory and about twice the speed, for inference only.

        The large spatial convolutions are rounded. The temporal layers, what leads to the codebook and the search, the
        norms and all sums stay in float32.

        Args:
            encoder: The encoder too. Rounding moves some codes to near neighbours (see
                :func:`emulus.tokenizer.vision.metrics.code_flip_rate`); rounding the decoder moves none.

        Returns:
            The tokenizer itself.
        """
        for half in (self.encoder, self.decoder) if encoder else (self.decoder,):
            for conv in heavy_convolutions(half).values():
                conv.weight.requires_grad_(False)
                conv.weight.data = conv.weight.data.bfloat16()
        return self

    def _codes_of(self, pixels: Float[Tensor, "b *frames c H W"]) -> Int[Tensor, "b *latent h w"]:
        codes = self.quantize.encode(self.latents(pixels))
        return codes[:, 0] if pixels.ndim == 4 else codes

    def _pixels_of(self, codes: Int[Tensor, "b *latent h w"]) -> Float[Tensor, "b *frames c H W"]:
        is_image = codes.ndim == 3
        vectors = self.quantize.decode(codes[:, None] if is_image else codes)
        return self.paint(vectors, is_image=is_image).to(self.dtype)

    def _batched(self, name: str, function: Callable[[Tensor], Tensor], x: Tensor, *, pixels: int) -> Tensor:
        """Apply a function of this model to samples; on a GPU to some at a time, and recorded where sizes come again.

        Args:
            name: Key of the function's recordings.
            function: What to apply.
            x: Samples along the first axis.
            pixels: Number of pixels in a sample.
        """
        if x.device.type != "cuda" or not len(x):
            return function(x)
        # A recording knows neither another precision nor that batch norms learn.
        plain = self.training or torch.is_autocast_enabled(x.device.type)
        recorded = function if plain else partial(self._recordings_now(), name, function)
        with on_gpu.exact(x.device):
            return on_gpu.in_batches(function, x, pixels=pixels, recorded=recorded)

    def _recordings_now(self) -> on_gpu.Recordings:
        """Recordings that read the weights from where they are: parts may have been moved, rounded or replaced."""
        addresses = on_gpu.addresses_of(self)
        if self._recordings.addresses != addresses:
            self._recordings = on_gpu.Recordings(addresses=addresses)
        return self._recordings

    def latents(self, pixels: Float[Tensor, "b *frames c H W"]) -> Float[Tensor, "b d t h w"]:
        """Latents before quantisation; an image has ``t`` = 1."""
        self._check(pixels)
        with on_gpu.exact(pixels.device):
            return self._latents(pixels)

    def _latents(self, pixels: Tensor) -> Tensor:
        if pixels.ndim == 4:
            # A still clip: its frames are equal until the temporal part, so they are computed once.
            features = _in_pieces(self.encoder.frames, pixels, pixels=_area(pixels))[:, :, None]
            return self._latents_of(features.expand(-1, -1, self.config.temporal_factor, -1, -1))
        frames = _in_pieces(self.encoder.frames, pixels.flatten(0, 1), pixels=_area(pixels))
        return self._latents_of(frames.unflatten(0, pixels.shape[:2]).transpose(1, 2))

    def paint(self, vectors: Float[Tensor, "b d t h w"], *, is_image: bool) -> Float[Tensor, "b *frames c H W"]:
        """Pixels from codebook vectors: ``(B, C, H, W)`` for an image (``t`` = 1), else ``(B, 4t, C, H, W)``."""
        with on_gpu.exact(vectors.device):
            return self._paint(vectors, is_image=is_image)

    def _paint(self, vectors: Tensor, *, is_image: bool) -> Tensor:
        both = self._spread(vectors, first_frame=is_image)
        batch = vectors.shape[0]
        flat = (each[:, :, 0] if is_image else each.transpose(1, 2).flatten(0, 1) for each in both)
        frames = _in_pieces(self.decoder.frames, *flat, pixels=_area(vectors) * self.config.spatial_factor**2)
        return frames if is_image else frames.unflatten(0, (batch, -1))

    def _latents_of(self, features: Float[Tensor, "b z T h w"], past: Past | None = None) -> Tensor:
        """Latents of the frames' features."""
        # The few channels of the temporal part and of the codebook cost nothing and decide the codes: float32.
        with on_gpu.exact(features.device), torch.autocast(features.device.type, enabled=False):
            return cast(Tensor, self.quant_conv(self.encoder.time(features.to(self.dtype), past), past))

    def _check_codes(self, codes: Tensor) -> None:
        """Look once whether all codes are of this codebook; waits for the device that they are on."""
        if codes.numel():
            least, most = torch.stack(codes.aminmax()).tolist()
            if not 0 <= least <= most < self.config.codebook_size:
                raise self._foreign()

    def _foreign(self) -> EmulusError:
        return EmulusError(f"codes must lie in 0..{self.config.codebook_size - 1}: from another vision tokenizer?")

    def _here(self, codes: Tensor) -> Tensor:
        return codes.to(self.device, non_blocking=True)

    def _spread(self, vectors: Tensor, past: Past | None = None, *, first_frame: bool) -> tuple[Tensor, Tensor]:
        """What the decoder paints each frame from, and what steers its norms."""
        with on_gpu.exact(vectors.device), torch.autocast(vectors.device.type, enabled=False):
            latents = self.post_quant_conv(vectors, past)
            return self.decoder.time(latents, vectors, past, first_frame=first_frame)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.quantize.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quantize.embedding.weight.device

    def _check(self, pixels: Tensor) -> None:
        shape = tuple(pixels.shape)
        if pixels.ndim not in (4, 5) or shape[-3] != self.config.in_channels:
            raise EmulusError(f"pixels must be (B, C, H, W) or (B, T, C, H, W), got shape {shape}")
        factor = self.config.spatial_factor
        if min(shape[-2:]) < factor or shape[-2] % factor or shape[-1] % factor:
            raise EmulusError(
                f"height and width must be multiples of {factor}, got {shape[-2]}x{shape[-1]}: resize first"
            )
        if pixels.ndim == 5:
            self._check_frames(shape[1])

    def _check_frames(self, count: int) -> None:
        factor = self.config.temporal_factor
        if count == 0 or count % factor:
            raise EmulusError(f"the number of frames must be a multiple of {factor}, got {count}: cut or repeat frames")


def _area(grid: Tensor) -> int:
    return grid.shape[-2] * grid.shape[-1]


def _frames(pixels: Tensor) -> int:
    return pixels.shape[1] if pixels.ndim == 5 else 1


def _in_pieces(layers: Callable[..., Tensor], *samples: Tensor, pixels: int) -> Tensor:
    """Apply layers that see each sample alone to some samples at a time, unless gradients need all at once.

    Args:
        layers: Takes the samples.
        *samples: What it takes, by its arguments, the samples along the first axis.
        pixels: Of a sample.
    """
    together = on_gpu.PIECE_PIXELS if samples[0].is_cuda else PIECE_PIXELS
    count, step = len(samples[0]), max(1, together // pixels)
    if torch.is_grad_enabled() or count <= step:
        return layers(*samples)
    result: Tensor | None = None
    for start in range(0, count, step):
        piece = layers(*(each[start : start + step] for each in samples))
        # Written to their place: gathering all pieces at the end would take their memory twice.
        result = piece.new_empty(count, *piece.shape[1:]) if result is None else result
        result[start : start + step] = piece
    return cast(Tensor, result)


def _initialise(module: nn.Module) -> None:
    """From-scratch initialisation, as released: Kaiming normal, fan-out, for every convolution."""
    # Drawing on the meta device would load PyTorch's compiler: 150 MB and seconds for nothing.
    if isinstance(module, nn.Conv2d | nn.Conv3d) and not module.weight.is_meta:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
