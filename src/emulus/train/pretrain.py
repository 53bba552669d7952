"""documents of text, pictures and clips -> a decoder."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from emulus.bundle import Bundle
from emulus.data.loader import Loader, Mixture, ReadingConfig, held_out, parse_part
from emulus.data.tokens import vision_digest
from emulus.device import computes_in_bfloat16, pick_device
from emulus.errors import EmulusError, at_least
from emulus.files import check_out
from emulus.hub import fetch
from emulus.layouts.contents import Contents, inspect_folder
from emulus.model import Decoder, DecoderConfig, sized
from emulus.model.attention import Backend, Row
from emulus.model.loss import Losses
from emulus.model.transformer import fresh
from emulus.model.weights import expected_shapes, read_weight
from emulus.parallel.context import slice_row
from emulus.parallel.processes import Processes, running
from emulus.parallel.spread import fill, spread, whole_tensors
from emulus.pipeline import Emulus
from emulus.presets import GenerationDefaults
from emulus.sequence import Batch, modalities
from emulus.sequence.packing import pad
from emulus.tokenizer.vision import VisionTokenizer
from emulus.tokenizer.vision.weights import load_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.train.checkpoint import latest
from emulus.train.config import TrainConfig
from emulus.train.flops import decoder_flops
from emulus.train.loop import CHECKPOINTS, check_run, mix, train
from emulus.train.objective import Evaluation, Objective, StepLoss
from emulus.weights import check_shapes, on_meta

MODALITIES = ("text", "visual")
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A decoder from scratch, or from another one's weights.

    Attributes:
        tokens: Folders made by ``emulus tokenize``, all of one vocabulary, mixed: ``FOLDER``, ``FOLDER:image``
            (or ``text``, ``video``: only these), each with ``=WEIGHT`` if its share shall not be that of its rows.
        out: Folder of the run.
        size: Named size of the decoder (``emulus info --sizes`` lists them).
        init: Start from this model's weights (a folder or a name on the hub); empty starts from fresh ones.
        codebook_init: Codes that look alike begin with embeddings that are alike: random projections of their vectors
            in the codebook, instead of random ones. Of no use with ``init``.
        context: Longest document, in ids.
        dropout: The released model's one dropout rate (embeddings, attention, residuals).
        row_tokens: Documents are packed end to end into rows of at most this many ids; a row is one forward pass.
        rows_per_step: Rows in each optimiser step, over all processes.
        window: Documents that are packed together; more fill the rows better.
        reading: How documents are made of what is stored.
        attention: How documents attend: ``sdpa`` one by one; ``varlen`` (GPUs, 16 bits, no dropout) and ``flex`` (GPUs,
            no dropout) all at once; ``auto`` takes varlen where it can.
        z_loss: Weight of the squared log-partition in the loss, which keeps logits small; 0 in the paper.
        evaluation_documents: Held-out documents measured at each evaluation, half of each order.
        evaluation_pictures: Held-out captions drawn at each evaluation, on a sheet of true pictures above drawn ones.
        defaults: Generation settings saved with the model.
    """

    tokens: tuple[str, ...]
    out: Path
    size: str = "tiny"
    init: str = ""
    codebook_init: bool = False
    context: int = 2048
    dropout: float = 0.1
    row_tokens: int = 8192
    rows_per_step: int = 2
    window: int = 1024
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    attention: Backend = "auto"
    z_loss: float = 0.0
    evaluation_documents: int = 64
    evaluation_pictures: int = 8
    train: TrainConfig = field(default_factory=TrainConfig)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        at_least(1, context=self.context, rows_per_step=self.rows_per_step, window=self.window)
        at_least(1, evaluation_documents=self.evaluation_documents)
        at_least(0, evaluation_pictures=self.evaluation_pictures, z_loss=self.z_loss)
        if self.row_tokens < self.context:
            raise EmulusError(f"row_tokens ({self.row_tokens}) must be at least context ({self.context})")
        if not self.tokens:
            raise EmulusError("there is nothing to train on; name at least one folder with --tokens")


class PretrainObjective(Objective[Batch, Decoder]):
    """Next-token prediction on packed documents."""

    unit = "tokens"

    def __init__(self, config: PretrainConfig, processes: Processes | None = None) -> None:
        """Open the data and make the model, spread over the processes.

        Args:
            config: What to train on what.
            processes: Who trains; by default this process alone.

        Raises:
            EmulusError: The data and the settings do not fit one another, or the processes.
        """
        self.config = config
        self.processes = processes or Processes(device=pick_device(config.train.device))
        self.device = self.processes.device
        self.mixture = Mixture.open(config.tokens)
        self.vocabulary = self.mixture.vocabulary
        longest = self.mixture.longest()
        if longest.tokens > config.context:
            raise EmulusError(
                f"{longest.name} makes a document of {longest.tokens} ids but the context is {config.context}: raise "
                f"--context (and --row-tokens); or {longest.remedy(config.context)} and another --out"
            )
        # What only evaluations and saves need must not be missed after hours.
        if self.processes.first:
            _ = self.vision
        _ = self.held_out
        self.model = self._make_model()
        self.loader = self._make_loader(None)
        self._numbers: list[int] = []

    @cached_property
    def vision(self) -> VisionTokenizer:
        """The vision tokenizer that made the codes. Only the process that draws and saves reads it."""
        folder, expected = self.mixture.folder / "vision", self.mixture.tokens.vision_sha256
        vision = load_vision_tokenizer(folder, self.device)
        if expected and vision_digest(vision) != expected:
            raise EmulusError(
                f"{folder} is not the vision tokenizer that made these codes; restore it, or tokenize again, to "
                "another folder"
            )
        return vision

    @cached_property
    def held_out(self) -> list[Batch]:
        """The same held-out documents at every evaluation: half begin with their caption, half end with it."""
        config = self.config
        return held_out(self.mixture, config.evaluation_documents, config.reading, row_tokens=config.row_tokens)

    def fingerprint(self) -> str:
        """Of what the ids mean, and of the data."""
        return self.mixture.digest()

    def shape(self) -> DecoderConfig:
        """The decoder's."""
        return shape_of(self.config, self.vocabulary)

    def _make_model(self) -> Decoder:
        config, shape = self.config, self.shape()
        model = on_meta(lambda: Decoder(shape))
        bfloat16 = self.device.type == "cuda" and computes_in_bfloat16(self.device, config.train.precision)
        spread(model, self.processes, bfloat16=bfloat16)
        # A run that goes on needs it no more.
        begins = config.init and latest(config.out / CHECKPOINTS) is None
        stored = stored_decoder(config.init, shape, self.vocabulary) if begins else None

        def make(name: str, size: torch.Size) -> Tensor:
            if stored is not None:
                return read_weight(name, size, stored.decoder_tensors, stored.quantized, self.device)
            # Drawn by name, so that the same seed gives the same model however it is spread.
            generator = torch.Generator().manual_seed(mix(config.train.seed, zlib.crc32(name.encode())))
            weight = fresh(name, size, shape, generator)
            if config.codebook_init and name == EMBEDDING:
                codebook = load_vision_tokenizer(self.mixture.folder / "vision").quantize.embedding.weight.detach()
                first = self.vocabulary.visual_start
                visual = weight[first : first + len(codebook)]
                visual.copy_(like_codebook(visual, codebook, generator))
            return weight.to(self.device)

        fill(model, make, self.device)
        return model

    def _make_loader(self, state: dict[str, Any] | None) -> Loader:
        config, processes = self.config, self.processes
        return Loader(
            self.mixture,
            config.reading,
            seed=config.train.seed,
            row_tokens=config.row_tokens,
            rows_per_step=config.rows_per_step,
            window=config.window,
            rank=processes.data_rank,
            world=processes.data_size,
            state=state,
        )

    def batches(self, step: int) -> Sequence[Batch]:
        """This process's rows of the step; where a row is shared, the whole row."""
        rows = self.loader.step(step)
        self._numbers = rows.numbers
        return rows.rows

    def number(self, place: int) -> int:
        """A row's place in the whole step."""
        return self._numbers[place]

    def weight(self, batch: Batch) -> float:
        """The sum of its targets' weights; processes that share a row each count their part."""
        return float(batch.loss_weights.sum()) / self.processes.sizes.context

    def reading_state(self, step: int) -> dict[str, Any]:
        """Where the loader stands before a step."""
        return self.loader.state(step)

    def load_reading_state(self, state: dict[str, Any]) -> None:
        """Go on reading from there."""
        self.loader = self._make_loader(state)

    def close(self) -> None:
        """Stop reading ahead."""
        self.loader.close()

    def loss(self, batch: Batch, step_weight: float) -> StepLoss:
        """Weighted cross-entropy of one row, as its part of the whole step's weighted mean."""
        losses, counted, items = self._losses(batch)
        figures = {}
        for name, mask in counted.items():
            chosen = mask.to(losses.tokens.device, non_blocking=True)
            figures[name] = ((losses.tokens * chosen).sum(), float(mask.sum()))
        supervised = next(iter(counted.values())).numel()
        flops = decoder_flops(self.model.config, batch.document_lengths, supervised * self.processes.sizes.context)
        return StepLoss(
            total=losses.total / step_weight,
            figures=figures,
            items=items,
            flops=flops / self.processes.sizes.context,
        )

    def _losses(self, batch: Batch) -> tuple[Losses, dict[str, Tensor], int]:
        """Losses of the part of a row that is here; which of them are of each modality; how many ids are here."""
        useful = len(batch.input_ids)
        # Its parts must be equally long; and libraries prepare, and keep what they prepared, for each other length.
        unit = 64 * self.processes.sizes.context
        # Compiled code likes to see one length.
        length = -(-(self.config.row_tokens if self.processes.sizes.compile else useful) // unit) * unit
        batch = pad(batch, length, self.vocabulary) if length > useful else batch
        row, here = slice_row(Row.whole(batch.document_lengths, self.config.attention), self.processes)
        weights = batch.loss_weights[here]
        supervised = (weights > 0).nonzero()[:, 0]
        chosen = here[supervised]
        masks = modalities(batch.targets.numpy(), self.vocabulary)
        on = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        losses = self.model.losses(
            on(batch.input_ids[here]),
            on(batch.position_ids[here]),
            row,
            supervised=on(supervised),
            targets=on(batch.targets[chosen]),
            weights=on(weights[supervised]),
            z_loss=self.config.z_loss,
        )
        counted = {name: torch.from_numpy(masks[name])[chosen] for name in MODALITIES}
        return losses, counted, int((here < useful).sum())

    def evaluate(self, model: Decoder) -> Evaluation:
        """Bits per visual and per text id of held-out documents, and a sheet of drawn pictures."""
        sums = [0.0] * (2 * len(MODALITIES))
        processes = self.processes
        # All make as many calls, since spread weights are fetched together; the last ones may count for nothing.
        for start in range(0, len(self.held_out), processes.data_size):
            place = start + processes.data_rank
            losses, counted, _ = self._losses(self.held_out[min(place, len(self.held_out) - 1)])
            if place < len(self.held_out):
                for number, name in enumerate(MODALITIES):
                    sums[2 * number] += float(losses.tokens[counted[name].to(losses.tokens.device)].sum())
                    sums[2 * number + 1] += float(counted[name].sum())
        sums = processes.sum(sums)
        bits = {
            f"{name}_bits": sums[2 * number] / sums[2 * number + 1] / math.log(2)
            for number, name in enumerate(MODALITIES)
            if sums[2 * number + 1]
        }
        return Evaluation(metrics=bits, pictures=self._drawings(model))

    def save_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write a whole model: decoder, vision tokenizer, text and defaults."""
        self._whole(self._plain(tensors)).save(folder)

    def _plain(self, tensors: Mapping[str, Tensor]) -> Decoder:
        """An ordinary decoder with these weights."""
        model = on_meta(lambda: Decoder(self.shape()))
        model.load_state_dict(dict(tensors), assign=True)
        return model.eval()

    def _whole(self, model: Decoder) -> Emulus:
        bundle = Bundle(
            decoder=model,
            vision=self.vision,
            text=self.mixture.text,
            vocabulary=self.vocabulary,
            defaults=self.config.defaults,
        )
        return Emulus(bundle)

    def _drawings(self, model: Decoder) -> dict[str, PIL.Image.Image]:
        """A sheet of held-out pictures above what the model draws for their captions."""
        chosen = self.mixture.pictures("validation", self.config.evaluation_pictures)
        if not chosen:
            return {}
        if self.processes.world > 1:
            tensors = whole_tensors(model, self.processes)
            if not self.processes.first:
                return {}
            model = self._plain({name: tensor.to(self.device) for name, tensor in tensors.items()})
        whole = self._whole(model)
        true = [whole.decode(item.media) for item in chosen]
        drawn = whole.generate_images([item.captions[0] for item in chosen], best_of=1)
        width, height = drawn[0].size
        sheet = PIL.Image.new("RGB", (width * len(chosen), 2 * height))
        for place, picture in enumerate([*true, *drawn]):
            assert isinstance(picture, PIL.Image.Image), "clips were not chosen"
            row, column = divmod(place, len(chosen))
            # Tokens of several sizes may be mixed; what is drawn has the model's own.
            whole_cell = picture.resize((width, height), PIL.Image.Resampling.NEAREST)
            sheet.paste(whole_cell, (column * width, row * height))
        return {"drawn": sheet}


def like_codebook(
    weight: Float[Tensor, "codes hidden"], codebook: Float[Tensor, "codes width"], generator: torch.Generator
) -> Float[Tensor, "codes hidden"]:
    """Embeddings as spread out as ``weight``, a fifth of whose variance they keep; the rest follows the codes' vectors.

    Args:
        weight: Independent random embeddings.
        codebook: The codes' vectors, in any scale.
        generator: Draws the projection.
    """
    vectors = (codebook - codebook.mean(0)) / codebook.std(0).clamp(min=1e-6)
    projection = torch.randn(codebook.shape[1], weight.shape[1], generator=generator) / codebook.shape[1] ** 0.5
    return 0.2**0.5 * weight + 0.8**0.5 * weight.std() * (vectors @ projection)


def shape_of(config: PretrainConfig, vocabulary: Vocabulary) -> DecoderConfig:
    """The shape of the decoder that a config asks for."""
    return sized(
        config.size,
        vocab_size=vocabulary.size,
        max_position_embeddings=config.context,
        attention_dropout=config.dropout,
        pad_token_id=vocabulary.pad,
    )


def stored_decoder(model: str, shape: DecoderConfig, vocabulary: Vocabulary) -> Contents:
    """Find a decoder of this shape; its weights may have fewer bits, of which training makes whole ones again.

    Args:
        model: A folder, a run or a name on the hub, in any layout that is read.
        shape: What they must fit; its context and dropout are free.
        vocabulary: What their ids must mean, where the model says so.

    Raises:
        EmulusError: There is none, or it is of another shape or vocabulary.
    """
    contents = inspect_folder(fetch(model))
    if contents.decoder is None:
        raise EmulusError(f"{model} has no decoder; name another --init")
    if contents.vocabulary not in (None, vocabulary):
        raise EmulusError(
            f"{model} has another vocabulary than the tokens; make them with emulus tokenize --vocabulary {model}"
        )
    if expected_shapes(contents.decoder) != expected_shapes(shape):
        mine, other = (
            f"{each.num_hidden_layers} blocks of width {each.hidden_size}" for each in (shape, contents.decoder)
        )
        raise EmulusError(f"{model} has {other}, this run {mine} (or other heads or ids); give the same --size")
    check_shapes(contents.folder, expected_shapes(shape, contents.quantized), contents.decoder_tensors)
    return contents


def pretrain(config: PretrainConfig) -> Path:
    """Run (or go on with) the training; the folder of the final model. See :func:`emulus.train.loop.train`."""
    check_run(config.out, config.init)
    for text in config.tokens:
        check_out(config.out, tokens_folder=parse_part(text).folder)
    with running(config.train.parallel, config.train.device) as processes:
        return train(config.train, PretrainObjective(config, processes), config.out)
