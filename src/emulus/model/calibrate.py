"""Weights -> fewer bits, such that products with real inputs change little: GPTQ.

Rounding each weight to the nearest value treats all inputs as equally large and independent. They are neither: what
one weight's rounding does to the product, the weights of like inputs can undo. GPTQ rounds one input's weights after
the other's, and after each moves the weights that are still whole so as to make up for it, given how the inputs of a
layer go together on example documents. The result is of the same kinds and as fast as without.

Source: Frantar et al. 2022 (arXiv:2210.17323), algorithm 1, with its "activation order".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn

from emulus.device import pick_device
from emulus.errors import EmulusError
from emulus.log import progress_bar
from emulus.model.config import DecoderConfig
from emulus.model.linear import GROUP, Packed, Quantization, QuantizedLinear, linear
from emulus.model.quantize import (
    HEAD,
    check_kind,
    kind_of,
    nearest_step,
    pack_int4,
    put_rows,
    replace_layer,
    shared_copy,
)
from emulus.model.transformer import Decoder
from emulus.model.weights import expected_shapes, source_of, whole_names
from emulus.weights import Tensors, check_shapes, fill, on_meta, read_pieces, read_tensor

DAMPING = 0.01
"""Part of the inputs' mean square that is added to each one's: what examples do not show may happen."""

# Columns whose changes are gathered before the later columns are told of them.
_BLOCK = 64
_ROWS_AT_ONCE = 4096

Documents = Sequence[Sequence[int]]


def calibrate_decoder(decoder: Decoder, documents: Documents, kind: Quantization) -> Decoder:
    """Make a quantised copy of a decoder, calibrated on documents; what is not quantised is shared.

    Args:
        decoder: It is left as it is.
        documents: Ids such as it was trained on; some tens of thousands in all are enough.
        kind: How many bits.

    Raises:
        EmulusError: There are no documents, or they are not of this decoder's ids; a weight is not finite, the decoder
            is quantised already, or there is no such kind.
    """
    check_calibration(decoder.config, documents, kind)
    copy = shared_copy(decoder)
    hidden = _calibrate_blocks(copy, documents, kind, lambda name: decoder.get_parameter(name).detach())
    _calibrate_head(copy, hidden, [(0, decoder.get_parameter(HEAD).detach())], kind, HEAD)
    return copy


def calibrate_stored(
    config: DecoderConfig,
    tensors: Tensors,
    documents: Documents,
    kind: Quantization,
    *,
    device: str = "cpu",
    folder: Path,
) -> Decoder:
    """Read a decoder, calibrated on documents; see :func:`calibrate_decoder`.

    One layer is in memory as it was at a time, beside the embedding, the documents' hidden states and what is done.

    Args:
        config: Its shape.
        tensors: Where its tensors are stored, under our names.
        documents: Ids such as it was trained on.
        kind: How many bits.
        device: Where this is computed, and the result lies.
        folder: Where all this comes from, for messages.

    Returns:
        The decoder; what is not quantised is in float32.

    Raises:
        EmulusError: As for :func:`calibrate_decoder`; or a file is damaged or not the config's.
    """
    check_calibration(config, documents, kind)
    place = pick_device(device)
    check_shapes(folder, expected_shapes(config), tensors)
    model = on_meta(lambda: Decoder(config)).eval()
    fill(model, {name: tensors[name] for name in whole_names(config, kind)}, dtype=torch.float32, device=place)
    hidden = _calibrate_blocks(
        model, documents, kind, lambda name: read_tensor(tensors[name], dtype=torch.float32, device=place)
    )
    head = tensors[source_of(HEAD, config)]
    _calibrate_head(model, hidden, read_pieces(head), kind, f"{head.file}: {HEAD}")
    return model


def check_calibration(config: DecoderConfig, documents: Documents, kind: Quantization) -> None:
    """Refuse documents that a decoder cannot be calibrated on, and a kind that does not exist.

    Raises:
        EmulusError: Says why.
    """
    check_kind(kind)
    if not documents:
        raise EmulusError("there are no documents to calibrate on; give some that the model could have been trained on")
    for number, document in enumerate(documents):
        if not 1 <= len(document) <= config.max_position_embeddings:
            raise EmulusError(
                f"calibration document {number} has {len(document)} ids, the decoder takes 1 to "
                f"{config.max_position_embeddings}; leave it out"
            )
        if not 0 <= min(document) <= max(document) < config.vocab_size:
            raise EmulusError(
                f"calibration document {number} has ids that the decoder, of {config.vocab_size}, does not know; take "
                "documents of its own vocabulary"
            )


class _Inputs:
    """How the inputs of a layer go together; kept as long as the next layer has the same ones."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._factor: tuple[Tensor, Tensor] | None = None

    def order_and_factor(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`order_and_factor`; queries, keys and values are asked for one after the other."""
        if self._factor is None or x is not self._last:
            self._last, self._factor = x, order_and_factor(second_moments(x))
        return self._factor


class _Watcher(nn.Module):
    """Stands where a linear layer shall be: at the first input it sees, it makes the quantised layer."""

    def __init__(self, name: str, kind: Quantization, weight: Callable[[], Tensor], inputs: _Inputs) -> None:
        super().__init__()
        self.name, self.kind, self.weight, self.inputs = name, kind, weight, inputs
        self.made: QuantizedLinear

    def forward(self, x: Tensor) -> Tensor:
        """Later layers see what the layer will give them, so that they make up for its errors too."""
        weight = self.weight()
        self.made = QuantizedLinear(weight.shape[1], weight.shape[0], self.kind, weight.device)
        order, factor = self.inputs.order_and_factor(x)
        _put_rows(self.made, 0, weight, order, factor, self.name)
        return linear(x, self.made)


@torch.no_grad()
def _calibrate_blocks(
    model: Decoder, documents: Documents, kind: Quantization, weight: Callable[[str], Tensor]
) -> Float[Tensor, "tokens hidden"]:
    """Quantise every projection of a decoder, in the order in which a token meets them; gives what the head sees."""
    inputs = _Inputs()
    wanted = [name for name in expected_shapes(model.config) if name != HEAD and kind_of(name, kind) is not None]
    with progress_bar(len(wanted), what="calibrating", unit="layer") as bar:

        def fetch(name: str) -> Tensor:
            bar.update(1)
            return weight(name)

        watchers = {name: _Watcher(name, kind, partial(fetch, name), inputs) for name in wanted}
        for name, watcher in watchers.items():
            replace_layer(model, name.removesuffix(".weight"), watcher)
        device = model.model.embed_tokens.weight.device
        ids = torch.cat([torch.as_tensor(document, dtype=torch.int64) for document in documents]).to(device)
        hidden = model.hidden(ids[None], document_lengths=[len(document) for document in documents])[0]
    for name, watcher in watchers.items():
        replace_layer(model, name.removesuffix(".weight"), watcher.made)
    return hidden


@torch.no_grad()
def _calibrate_head(
    model: Decoder, hidden: Tensor, pieces: Iterable[tuple[int, Tensor]], kind: Quantization, name: str
) -> None:
    """Quantise the head, some rows at a time: it is the largest matrix of all."""
    config = model.config
    bits = kind_of(HEAD, kind)
    assert bits is not None, "every kind has one for the head"
    head = QuantizedLinear(config.hidden_size, config.vocab_size, bits, hidden.device)
    order, factor = order_and_factor(second_moments(hidden))
    for start, rows in pieces:
        _put_rows(head, start, rows.to(hidden.device), order, factor, name)
    replace_layer(model, HEAD.removesuffix(".weight"), head)


def _put_rows(layer: QuantizedLinear, start: int, weight: Tensor, order: Tensor, factor: Tensor, name: str) -> None:
    """Quantise some rows of a layer; rounding them plainly first gives the scales, and finds what is not finite."""
    put_rows(layer, start, weight, name=name)
    stop = start + len(weight)
    layer.q[start:stop] = round_by_inputs(weight, layer.packed(start, stop), order, factor, layer.kind)


def second_moments(x: Float[Tensor, "*rows in"]) -> Float64[Tensor, "in in"]:
    """Mean over inputs of the products of every two of their values."""
    flat = x.reshape(-1, x.shape[-1]).float()
    total = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64, device=x.device)
    for part in flat.split(_ROWS_AT_ONCE):
        total += part.T @ part
    return total / max(len(flat), 1)


def order_and_factor(moments: Float64[Tensor, "in in"]) -> tuple[Tensor, Float[Tensor, "in in"]]:
    """In which order inputs are to be rounded, the largest first, and what rounding one does to the later ones.

    Returns:
        The inputs' numbers in order, and the upper Cholesky factor of the inverse of their damped second moments: row
        ``i`` divided by its diagonal says how the weights of later inputs make up for one unit at input ``i``.

    Raises:
        EmulusError: The inputs were not finite.
    """
    if not moments.isfinite().all():
        raise EmulusError("the decoder computes what is not a number for the calibration documents; is it damaged?")
    order = moments.diagonal().argsort(descending=True, stable=True)
    ordered = moments[order][:, order]
    mean = ordered.diagonal().mean()
    # Inputs that are always zero have no say; without any, every order is as good.
    ordered.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def round_by_inputs(
    weight: Float[Tensor, "out in"], plain: Packed, order: Tensor, factor: Float[Tensor, "in in"], kind: Quantization
) -> Shaped[Tensor, "out columns"]:
    """Round weights one input after the other, each time moving those not yet rounded to make up for it.

    Args:
        weight: The weights.
        plain: The same, rounded plainly: its scales and low ends stay.
        order: See :func:`order_and_factor`.
        factor: Likewise.
        kind: Of ``plain``.

    Returns:
        What takes the place of ``plain.q``.
    """
    rows, width = weight.shape
    scale = plain.scale.float()
    low = torch.zeros_like(scale) if plain.low is None else plain.low.float()
    group = width if plain.low is None else GROUP
    places, work = order.tolist(), weight.float()[:, order]
    steps = torch.zeros(rows, scale.shape[1] * group, device=weight.device)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block, errors = work[:, start:stop], torch.empty(rows, stop - start, device=weight.device)
        for column, here in enumerate(range(start, stop)):
            place = places[here]
            unit, base = scale[:, place // group], low[:, place // group]
            step = nearest_step((block[:, column] - base) / unit, kind)
            steps[:, place] = step
            errors[:, column] = (block[:, column] - base - unit * step) / factor[here, here]
            block[:, column + 1 :].addr_(errors[:, column], factor[here, here + 1 : stop], alpha=-1)
        work[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return pack_int4(steps.view(rows, -1, GROUP)) if kind == "int4" else steps.to(plain.q.dtype)
