"""documents of text, pictures and clips -> a decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from emulus.bundle import Bundle
from emulus.data.source import even
from emulus.data.tokens import SETTINGS, Tokens
from emulus.device import pick_device
from emulus.errors import EmulusError, at_least
from emulus.model import Decoder, sized
from emulus.pipeline import Emulus
from emulus.presets import GenerationDefaults
from emulus.sequence import (
    Batch,
    Document,
    Grammar,
    Image,
    MediaSize,
    caption_first,
    caption_last,
    collate,
    modalities,
    pack,
)
from emulus.tokenizer.vision.weights import load_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.train.config import TrainConfig
from emulus.train.loop import train
from emulus.train.objective import Evaluation, Objective, StepLoss

# Positions whose logits are computed at a time; 256 to 512 are fastest on the CPUs tried.
LOSS_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A decoder from scratch.

    Attributes:
        tokens: A folder made by ``emulus tokenize``.
        out: Folder of the run.
        size: Named size of the decoder (``emulus info --sizes`` lists them).
        context: Longest document, in ids.
        dropout: The released model's one dropout rate (embeddings, attention, residuals).
        documents_per_step: Documents in each optimiser step.
        row_tokens: Documents are packed end to end into rows of at most this many ids; one row is in memory at a time.
        caption_first: Share of documents that begin with their caption (drawing); the others end with it (captioning).
        null_caption: Share of caption-first documents without a caption, from which guidance learns.
        visual_weight: Weight of visual ids in the loss; all others weigh 1 (0.5 in the paper).
        evaluation_documents: Held-out documents measured at each evaluation, half of each order.
        evaluation_pictures: Held-out captions drawn at each evaluation, on a sheet of true pictures above drawn ones.
        defaults: Generation settings saved with the model.
    """

    tokens: Path
    out: Path
    size: str = "tiny"
    context: int = 2048
    dropout: float = 0.1
    documents_per_step: int = 32
    row_tokens: int = 8192
    caption_first: float = 0.5
    null_caption: float = 0.1
    visual_weight: float = 0.5
    evaluation_documents: int = 64
    evaluation_pictures: int = 8
    train: TrainConfig = field(default_factory=TrainConfig)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        at_least(1, context=self.context, documents_per_step=self.documents_per_step)
        at_least(1, evaluation_documents=self.evaluation_documents)
        at_least(0, visual_weight=self.visual_weight, evaluation_pictures=self.evaluation_pictures)
        if self.row_tokens < self.context:
            raise EmulusError(f"row_tokens ({self.row_tokens}) must be at least context ({self.context})")
        for name in ("caption_first", "null_caption"):
            if not 0 <= getattr(self, name) <= 1:
                raise EmulusError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Packed documents, and the loss weight of the whole step they are a part of."""

    documents: Batch
    step_weight: float


class PretrainObjective(Objective[Row, Decoder]):
    """Next-token prediction on packed documents."""

    unit = "tokens"

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.device = pick_device(config.train.device)
        self.tokens = Tokens.open(config.tokens)
        vocabulary = self.tokens.vocabulary
        self.grammar = Grammar(vocabulary, self.tokens.text)
        self.items = self.tokens.items("train")
        if not self.items:
            raise EmulusError(f"{config.tokens} has no training items")
        self._check_lengths()
        torch.manual_seed(config.train.seed)
        shape = sized(
            config.size,
            vocab_size=vocabulary.size,
            max_position_embeddings=config.context,
            attention_dropout=config.dropout,
            pad_token_id=vocabulary.pad,
        )
        self.model = Decoder(shape).to(self.device)
        self.vision = load_vision_tokenizer(config.tokens / "vision", self.device)
        self.held_out = self._held_out_rows()

    def fingerprint(self) -> str:
        """Of the ids and what they mean."""
        digest = hashlib.sha256()
        for name in (SETTINGS, "vocabulary.json", "tokenizer.json"):
            digest.update((self.config.tokens / name).read_bytes())
        return digest.hexdigest()

    def _check_lengths(self) -> None:
        """Refuse documents that are longer than the context, before the run instead of in the midst of it."""
        words: dict[str, int] = {}
        blocks: dict[MediaSize, int] = {}
        for item in [*self.items, *self.tokens.items("validation")]:
            size = item.media.size
            if size not in blocks:
                blocks[size] = len(self.grammar.build(caption_last(item.media, "")))
            for caption in item.captions:
                if caption not in words:
                    words[caption] = len(self.tokens.text.encode(caption))
            length = blocks[size] + max((words[caption] for caption in item.captions), default=0)
            if length > self.config.context:
                raise EmulusError(
                    f"{item.id} is {length} ids long but the context is {self.config.context}: "
                    "raise --context (and --row-tokens), or tokenize at a smaller size or fewer frames"
                )

    def batches(self, step: int) -> list[Row]:
        """The step's documents, packed into rows. Every item comes once per epoch, in an order of its own."""
        count, total = self.config.documents_per_step, len(self.items)
        chosen = []
        for place in range(step * count, (step + 1) * count):
            epoch, position = divmod(place, total)
            chosen.append(self._document(self._order(epoch)[position], place))
        rows = self._rows(chosen)
        step_weight = sum(float(row.loss_weights.sum()) for row in rows)
        return [Row(documents=row, step_weight=step_weight) for row in rows]

    def _order(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self.config.train.seed, epoch]).permutation(len(self.items))

    def _document(self, index: int, place: int) -> Document:
        """Choose caption and order for one reading of an item."""
        item = self.items[index]
        draw = np.random.default_rng([self.config.train.seed, 1, place])
        caption = item.captions[int(draw.integers(len(item.captions)))] if item.captions else ""
        if draw.random() < self.config.caption_first or not caption:
            return caption_first("" if draw.random() < self.config.null_caption else caption, item.media)
        return caption_last(item.media, caption)

    def _rows(self, documents: Sequence[Document]) -> list[Batch]:
        """Documents as ids, packed into rows."""
        ids = [self.grammar.build(document) for document in documents]
        rows = pack([len(document) for document in ids], self.config.row_tokens)
        weight = self.config.visual_weight
        return [
            collate([ids[i] for i in row], self.tokens.vocabulary, visual_weight=weight).to(self.device) for row in rows
        ]

    def _held_out_rows(self) -> list[Batch]:
        """The same held-out documents at every evaluation: half begin with their caption, half end with it."""
        items = [item for item in self.tokens.items("validation") if item.captions]
        chosen = even(items, self.config.evaluation_documents)
        orders = (
            caption_first(item.captions[0], item.media) if number % 2 else caption_last(item.media, item.captions[0])
            for number, item in enumerate(chosen)
        )
        return self._rows(list(orders))

    def loss(self, batch: Row) -> StepLoss:
        """Weighted cross-entropy of one row, as its part of the whole step's weighted mean."""
        losses = token_losses(self.model, batch.documents)
        total = (losses * batch.documents.loss_weights).sum() / batch.step_weight
        figures = split_by_modality(losses.detach(), batch.documents, self.tokens.vocabulary)
        return StepLoss(total=total, figures=figures, items=losses.numel())

    def evaluate(self, model: Decoder) -> Evaluation:
        """Bits per visual and per text id of held-out documents, and a sheet of drawn pictures."""
        sums: dict[str, list[float]] = {}
        for batch in self.held_out:
            for name, (total, count) in split_by_modality(
                token_losses(model, batch), batch, self.tokens.vocabulary
            ).items():
                sums.setdefault(name, [0.0, 0.0])
                sums[name][0] += float(total)
                sums[name][1] += count
        bits = {f"{name}_bits": total / count / np.log(2) for name, (total, count) in sums.items()}
        return Evaluation(metrics=bits, pictures=self._drawings(model))

    def save_model(self, model: Decoder, folder: Path) -> None:
        """Write a whole model: decoder, vision tokenizer, text and defaults."""
        self._whole(model).save(folder)

    def _whole(self, model: Decoder) -> Emulus:
        bundle = Bundle(
            decoder=model,
            vision=self.vision,
            text=self.tokens.text,
            vocabulary=self.tokens.vocabulary,
            defaults=self.config.defaults,
        )
        return Emulus(bundle)

    def _drawings(self, model: Decoder) -> dict[str, PIL.Image.Image]:
        """A sheet of held-out pictures above what the model draws for their captions."""
        items = [item for item in self.tokens.items("validation") if isinstance(item.media, Image) and item.captions]
        chosen = even(items, self.config.evaluation_pictures)
        if not chosen:
            return {}
        whole = self._whole(model)
        true = [whole.decode(item.media) for item in chosen]
        drawn = whole.generate_images([item.captions[0] for item in chosen])
        width, height = drawn[0].size
        sheet = PIL.Image.new("RGB", (width * len(chosen), 2 * height))
        for place, picture in enumerate([*true, *drawn]):
            assert isinstance(picture, PIL.Image.Image), "clips were not chosen"
            row, column = divmod(place, len(chosen))
            sheet.paste(picture, (column * width, row * height))
        return {"drawn": sheet}


def token_losses(model: Decoder, batch: Batch) -> Float[Tensor, " tokens"]:
    """Cross-entropy in nats of each position's target (0 where there is none), in float32."""
    hidden = model.hidden(
        batch.input_ids[None], position_ids=batch.position_ids[None], document_lengths=batch.document_lengths
    )[0]
    # A few positions at a time, so that their logits stay in the processor's cache.
    parts = zip(hidden.split(LOSS_CHUNK), batch.targets.split(LOSS_CHUNK), strict=True)
    losses = torch.cat([F.cross_entropy(model.head(part), targets, reduction="none") for part, targets in parts])
    return losses * (batch.loss_weights > 0)


def split_by_modality(
    losses: Float[Tensor, " tokens"], batch: Batch, vocabulary: Vocabulary
) -> dict[str, tuple[Tensor, float]]:
    """Sum and number of the losses of visual and of text targets; ids that the grammar writes count as neither."""
    parts = {}
    for name, mask in modalities(batch.targets.cpu().numpy(), vocabulary).items():
        chosen = torch.from_numpy(mask).to(losses.device) & (batch.loss_weights > 0)
        if count := int(chosen.sum()):
            parts[name] = (losses[chosen].sum(), float(count))
    return parts


def pretrain(config: PretrainConfig) -> Path:
    """Run (or go on with) the training; the folder of the final model. See :func:`emulus.train.loop.train`."""
    return train(config.train, PretrainObjective(config), config.out)
