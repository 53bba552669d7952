"""pixels <-> codes: the whole vision tokenizer."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.tokenizer.vision.blocks import CausalConv3d
from emulus.tokenizer.vision.config import VisionTokenizerConfig
from emulus.tokenizer.vision.decoder import Decoder
from emulus.tokenizer.vision.encoder import Encoder
from emulus.tokenizer.vision.quantizer import Quantizer


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
        codes = self.quantize.encode(self.latents(pixels))
        return codes[:, 0] if pixels.ndim == 4 else codes

    @torch.inference_mode()
    def decode(self, codes: Int[Tensor, "b *latent h w"]) -> Float[Tensor, "b *frames c H W"]:
        """Pixels of codes (see :meth:`encode`); values may leave [-1, 1] a little.

        Raises:
            EmulusError: A code is outside the codebook, or the shape is neither an image's nor a clip's.
        """
        if codes.ndim not in (3, 4):
            raise EmulusError(f"codes must be (B, h, w) or (B, t, h, w), got shape {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise EmulusError(f"codes must lie in 0..{self.config.codebook_size - 1}: from another vision tokenizer?")
        is_image = codes.ndim == 3
        vectors = self.quantize.decode(codes[:, None] if is_image else codes)
        return self.paint(vectors, is_image=is_image)

    def latents(self, pixels: Float[Tensor, "b *frames c H W"]) -> Float[Tensor, "b d t h w"]:
        """Latents before quantisation; an image has ``t`` = 1."""
        self._check(pixels)
        if pixels.ndim == 4:
            # A still clip: its frames are equal until the temporal part, so they are computed once.
            features = self.encoder.frames(pixels)[:, :, None].expand(-1, -1, self.config.temporal_factor, -1, -1)
        else:
            features = self.encoder.frames(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).transpose(1, 2)
        # The few channels of the temporal part and of the codebook cost nothing and decide the codes: float32.
        with torch.autocast(pixels.device.type, enabled=False):
            return cast(Tensor, self.quant_conv(self.encoder.time(features.to(self.dtype))))

    def paint(self, vectors: Float[Tensor, "b d t h w"], *, is_image: bool) -> Float[Tensor, "b *frames c H W"]:
        """Pixels from codebook vectors: ``(B, C, H, W)`` for an image (``t`` = 1), else ``(B, 4t, C, H, W)``."""
        with torch.autocast(vectors.device.type, enabled=False):
            latents, steering = self.decoder.time(self.post_quant_conv(vectors), vectors, first_frame=is_image)
        if is_image:
            return self.decoder.frames(latents[:, :, 0], steering[:, :, 0])
        batch = latents.shape[0]
        flat = (both.transpose(1, 2).flatten(0, 1) for both in (latents, steering))
        return self.decoder.frames(*flat).unflatten(0, (batch, -1))

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
        frames = self.config.temporal_factor
        if pixels.ndim == 5 and (shape[1] == 0 or shape[1] % frames):
            raise EmulusError(
                f"the number of frames must be a multiple of {frames}, got {shape[1]}: cut or repeat frames"
            )


def _initialise(module: nn.Module) -> None:
    """From-scratch initialisation, as released: Kaiming normal, fan-out, for every convolution."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
