"""measurements -> the table of figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from emulus.evaluate.choice import Accuracy, Choice
from emulus.evaluate.likelihood import BitsPerId, Likelihood
from emulus.evaluate.reconstruction import CodecQuality, Reconstruction
from emulus.evaluate.report import Figure, Figures, Section


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """All figures of one model.

    Attributes:
        reconstruction: Of the vision tokenizer.
        likelihood: Of the decoder.
        choice: Of the decoder, by how groups were made.
    """

    reconstruction: Reconstruction
    likelihood: Likelihood | None = None
    choice: Mapping[str, Choice] = field(default_factory=dict)


def figures_section(measured: Measurements, text: str) -> Section:
    """The table of figures, under a paragraph that says what was measured on what."""
    rows = [*_reconstruction(measured.reconstruction), *_likelihood(measured.likelihood), *_choice(measured.choice)]
    return Section(title="Figures", text=text, blocks=(Figures(rows=tuple(rows)),))


def _reconstruction(measured: Reconstruction) -> list[Figure]:
    group = "Reconstruction (higher is better)"
    rows = []
    size = measured.codebook_size
    bits = math.log2(size)
    if measured.pictures:
        quality, codecs = measured.pictures, measured.codecs
        budget = quality.bits / 8
        rows += [
            Figure(
                group=group,
                name=f"PSNR of {quality.count} pictures",
                value=f"{quality.psnr:.2f} dB",
                beside="; ".join(f"{name} {codec.psnr:.2f} dB{_misfit(codec)}" for name, codec in codecs.items()),
                meaning=f"median {quality.psnr_median:.2f} dB; beside it, the best file of at most as many bits "
                "over quality and stored size, headers included",
            ),
            Figure(
                group=group,
                name="SSIM of pictures",
                value=f"{quality.ssim:.3f}",
                beside="; ".join(f"{name} {codec.ssim:.3f}" for name, codec in codecs.items()),
                meaning=f"median {quality.ssim_median:.3f}",
            ),
            Figure(
                group=group,
                name="Size of a picture",
                value=f"{quality.bits:,.0f} bits",
                beside="; ".join(f"{name} {codec.bytes:,.0f} bytes" for name, codec in codecs.items()),
                meaning=f"{quality.codes:,.0f} codes of {bits:.3g} bits, {budget:,.0f} bytes",
            ),
        ]
    if measured.clips:
        quality = measured.clips
        rows += [
            Figure(
                group=group,
                name=f"PSNR of {quality.count} clips",
                value=f"{quality.psnr:.2f} dB",
                meaning=f"mean over frames; median {quality.psnr_median:.2f} dB; {quality.codes:,.0f} codes a clip",
            ),
            Figure(
                group=group,
                name="SSIM of clips",
                value=f"{quality.ssim:.3f}",
                meaning=f"median {quality.ssim_median:.3f}",
            ),
        ]
    codebook = measured.codebook
    rows.append(
        Figure(
            group=group,
            name="Codebook in use",
            value=f"{codebook['usage']:.1%}",
            beside=f"perplexity {codebook['perplexity']:,.0f} of {size:,}",
            meaning=f"codes that occur in these pictures and clips; entropy {codebook['entropy_bits']:.2f} of "
            f"{bits:.3g} bits a code",
        )
    )
    return rows


def _misfit(codec: CodecQuality) -> str:
    """Say so where a codec had to take more bits."""
    if codec.fits == 1:
        return ""
    which = "no picture fits" if codec.fits == 0 else f"only {codec.fits:.0%} of the pictures fit"
    return f" ({which}: smallest files count, {codec.bytes:,.0f} bytes on average)"


def _likelihood(measured: Likelihood | None) -> list[Figure]:
    if measured is None:
        return []
    group = "Bits per held-out id (lower is better)"
    whole = [(f"{modality.capitalize()} ids", modality, bits) for modality, bits in measured.all.items()]
    rows = [_bits(group, name, bits, _MEANINGS[modality]) for name, modality, bits in whole]
    for part in measured.parts:
        name = f"{part.modality.capitalize()} ids of {part.kind}s, {part.order}"
        rows.append(_bits(group, name, part.bits, _MEANINGS.get(f"{part.modality}, {part.order}", "")))
    return rows


_MEANINGS = {
    "visual": "codes of pictures and clips, given everything before them",
    "text": "words of captions, given everything before them",
    "visual, caption first": "given the words",
    "text, caption last": "given the picture or clip",
}


def _bits(group: str, name: str, bits: BitsPerId, meaning: str) -> Figure:
    return Figure(
        group=group,
        name=name,
        value=f"{bits.model:.2f} bits",
        beside=f"bigram {bits.bigram:.2f}; unigram {bits.unigram:.2f}",
        meaning=f"{meaning}; {bits.ids:,} ids" if meaning else f"{bits.ids:,} ids",
    )


def _choice(measured: Mapping[str, Choice]) -> list[Figure]:
    rows = []
    for kind, choice in measured.items():
        group = f"Choice among {choice.candidates} held-out pictures (chance {choice.chance:.2%}), {kind}"
        questions = f"{choice.picture_pmi.asked} questions in {choice.groups} group{'s' if choice.groups > 1 else ''}"
        for name, pmi, raw in (
            ("A caption's picture", choice.picture_pmi, choice.picture_raw),
            ("A picture's caption", choice.caption_pmi, choice.caption_raw),
        ):
            rows.append(
                Figure(
                    group=group,
                    name=name,
                    value=_accuracy(pmi),
                    beside=f"by raw likelihood {_accuracy(raw)}",
                    meaning=f"picked by the decoder's own likelihood, less what a candidate scores by itself; "
                    f"{questions}, 95% interval",
                )
            )
    return rows


def _accuracy(accuracy: Accuracy) -> str:
    return f"{accuracy.share:.1%} ({accuracy.low:.0%}–{accuracy.high:.0%})"
