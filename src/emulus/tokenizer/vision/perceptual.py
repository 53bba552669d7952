"""How different two pictures look: ST-LPIPS, a distance between a trained network's features.

The weights are those of the package ``stlpips_pytorch`` (the extra ``perceptual``; BSD licence). Its code needs
torchvision, so the forward pass is written here and only the weight files are read. The networks were tuned on
64-pixel patches that people compared, and forgive shifts by a pixel that the plain LPIPS does not; the figures of the
two cannot be compared.

Source: Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric" (arXiv:2207.13686); LPIPS: arXiv:1801.03924.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from emulus.errors import EmulusError, did_you_mean

Backbone = Literal["alex", "vgg"]

PACKAGE = "stlpips_pytorch"
# With fewer pixels the last stage of either network has none left.
SMALLEST_SIDE = 32
_EPSILON = 1e-10


class PerceptualDistance(nn.Module):
    """ST-LPIPS, frozen. 0 for equal pictures; with ``alex`` about 0.15 for one at 22 dB, 0.5 for another picture.

    Pictures of less than 32 pixels along a side are scaled up until both sides have 32.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone) -> None:
        """Lay out the network; :meth:`load` gives it its weights."""
        super().__init__()
        self.backbone = backbone
        layers, ends, widths = _LAYOUTS[backbone]()
        starts = (0, *ends[:-1])
        # Layers are named by their place in the whole network, as in the weight files.
        self.stages = nn.ModuleList(
            nn.Sequential(OrderedDict((str(place), layers[place]) for place in range(start, end)))
            for start, end in zip(starts, ends, strict=True)
        )
        self.heads = nn.ParameterList(torch.zeros(width) for width in widths)
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.requires_grad_(False)

    @classmethod
    def load(cls, backbone: Backbone = "alex", device: torch.device | str = "cpu") -> PerceptualDistance:
        """The network with the package's weights, in eval mode.

        Args:
            backbone: ``alex`` (2.5 M weights, made for measuring and cheap) or ``vgg`` (14.7 M).
            device: Where it shall lie.

        Raises:
            EmulusError: There is no such backbone, the package is not installed, or its file is damaged.
        """
        if backbone not in get_args(Backbone):
            raise EmulusError(
                f"there is no perceptual backbone {backbone!r}{did_you_mean(backbone, get_args(Backbone))}"
            )
        path = _weights(backbone)
        model = cls(backbone)
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(_renamed(tensors))
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise EmulusError(f"{path} is damaged ({reason}); pip install --force-reinstall {PACKAGE}") from None
        return model.eval().to(device)

    def forward(self, first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """Distance of each pair.

        Args:
            first: Pictures in [-1, 1]; the distance can be differentiated in these.
            second: What they are compared with.
        """
        with torch.no_grad():
            theirs = self._outputs(second)
        ours = self._outputs(first)
        total = first.new_zeros(len(first), dtype=torch.float32)
        with torch.autocast(first.device.type, enabled=False):
            for a, b, head in zip(ours, theirs, self.heads, strict=True):
                total = total + F.linear((_unit(a) - _unit(b)).square().mean((2, 3)), head[None])[:, 0]
        return total

    def features(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """The last stage's features, averaged over the picture: 256 (``alex``) or 512 (``vgg``) numbers."""
        return self._outputs(pixels)[-1].float().mean((2, 3))

    def _outputs(self, pixels: Tensor) -> list[Tensor]:
        """What each stage gives."""
        pixels = pixels.float()
        side = min(pixels.shape[-2:])
        if side < SMALLEST_SIDE:
            pixels = F.interpolate(
                pixels, scale_factor=SMALLEST_SIDE / side, mode="bilinear", align_corners=False, antialias=False
            )
        # Sums over channels, and most convolutions on CPUs, are faster with the channels together.
        hidden = ((pixels - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        outputs = []
        for stage in self.stages:
            hidden = stage(hidden)
            outputs.append(hidden)
        return outputs


def available() -> bool:
    """Whether the weights are installed."""
    return find_spec(PACKAGE) is not None


def _weights(backbone: Backbone) -> Path:
    """The backbone's weight file; the package itself is not imported."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EmulusError("the perceptual distance needs its weights: pip install 'emulus[perceptual]'")
    return Path(spec.submodule_search_locations[0]) / "weights" / "vST0.0" / f"{backbone}_shift_tolerant.pth"


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weight file's tensors under our names."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if first == "scaling_layer":
            ours[rest] = tensor
        elif first == "net" and not rest.endswith(".filt"):
            stage, _, layer = rest.partition(".")
            ours[f"stages.{int(stage.removeprefix('slice')) - 1}.{layer}"] = tensor
        elif first != "net":
            ours[f"heads.{int(first.removeprefix('lin'))}"] = tensor.flatten()
    return ours


class _Blur(nn.Module):
    """Halve height and width by the filter 1-2-1 along both, after reflecting two pixels at each border."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c i j"]:
        # As two means of neighbours: the depthwise convolution's gradient in bfloat16 is eight times slower on CPUs.
        return F.avg_pool2d(F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 2, stride=1), 2)


_Layout = tuple[list[nn.Module], tuple[int, ...], tuple[int, ...]]
"""Layers, where each stage ends, and the stages' widths."""


def _alex() -> _Layout:
    layers = [nn.Conv2d(3, 64, 11, padding=2), _Blur(), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, stride=1), _Blur(), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, stride=1), _Blur(), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)]
    for inputs in (384, 256):
        layers += [nn.Conv2d(inputs, 256, 3, padding=1), nn.ReLU(inplace=True)]
    return layers, (3, 7, 11, 13, 15), (64, 192, 384, 256, 256)


def _vgg() -> _Layout:
    widths, depths = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
    layers: list[nn.Module] = []
    ends: list[int] = []
    inputs = 3
    for width, depth in zip(widths, depths, strict=True):
        layers += [nn.MaxPool2d(2, stride=1), _Blur()] if layers else []
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = width
        ends.append(len(layers))
    return layers, tuple(ends), widths


_LAYOUTS = {"alex": _alex, "vgg": _vgg}


def _unit(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Vectors along the channels at length 1."""
    # Places where no feature is active are common; a plain norm has no gradient there.
    x = x.float()
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + _EPSILON)
