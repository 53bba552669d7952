"""measurements -> the table of figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from emulus.evaluate.answers import Answered, Answers
from emulus.evaluate.bars import Bar
from emulus.evaluate.bounds import Bounds
from emulus.evaluate.choice import Accuracy, Choice, Ranks
from emulus.evaluate.clips import ClipFigures
from emulus.evaluate.drawing_section import DrawingFigures
from emulus.evaluate.likelihood import BitsPerId, Likelihood
from emulus.evaluate.perceptual import NAME
from emulus.evaluate.reconstruction import CodecQuality, Quality, Reconstruction
from emulus.evaluate.report import Figure, Figures, Section
from emulus.evaluate.sweeps import Sweeps


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """All figures of one model; a part that was left out has none.

    Attributes:
        reconstruction: Of the vision tokenizer.
        drawing: Of pictures drawn from held-out captions.
        clips: Of clips drawn and continued.
        answers: Of captions and answers.
        choice: Of the decoder's likelihood, by how groups were made.
        likelihood: Bits per id.
        bounds: Bits of whole pictures and captions.
        sweeps: Of other settings of drawing.
        left_out: By part, why it was left out.
        seconds: By part, of CPU time.
    """

    reconstruction: Reconstruction | None = None
    drawing: DrawingFigures | None = None
    clips: ClipFigures | None = None
    answers: Answers | None = None
    choice: Mapping[str, Choice] = field(default_factory=dict)
    likelihood: Likelihood | None = None
    bounds: Bounds | None = None
    sweeps: Sweeps | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def bars_section(found: Sequence[Bar], text: str) -> Section:
    """What should be reached, and whether it is."""
    rows = tuple(
        Figure(
            name=bar.name,
            value=bar.written(bar.value),
            beside=" · ".join(
                [_REACHED[bar.reached]]
                + ([] if bar.least is None else [f"at least {bar.written(bar.least)}"])
                + [f"aim {bar.written(bar.aim)}"]
            ),
            meaning=bar.meaning,
        )
        for bar in found
    )
    return Section(title="Bars", text=text, blocks=(Figures(rows=rows),))


_REACHED = {"aim": "aim reached", "least": "reached", "no": "not reached", "not measured": "not measured"}


def figures_section(measured: Measurements, text: str) -> Section:
    """The table of figures, under a paragraph that says what was measured on what."""
    rows = [
        *_reconstruction(measured.reconstruction),
        *_likelihood(measured.likelihood),
        *_bounds(measured.bounds),
        *_choice(measured.choice),
        *_answers(measured.answers),
    ]
    return Section(title="Figures", text=text, blocks=(Figures(rows=tuple(rows)),))


def _reconstruction(measured: Reconstruction | None) -> list[Figure]:
    if measured is None:
        return []
    group = "Reconstruction (higher is better)"
    rows = []
    size = measured.codebook_size
    bits = math.log2(size)
    for kind, quality, codecs in (
        ("picture", measured.pictures, measured.codecs),
        ("clip", measured.clips, measured.clip_codecs),
    ):
        if quality is not None:
            rows += _quality(group, kind, quality, codecs, bits)
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


def _quality(
    group: str, kind: str, quality: Quality, codecs: Mapping[str, CodecQuality], code_bits: float
) -> list[Figure]:
    over = "" if kind == "picture" else "mean over frames; "
    found = [
        Figure(
            group=group,
            name=f"PSNR of {quality.count} {kind}s",
            value=f"{quality.psnr:.2f} dB",
            beside="; ".join(f"{name} {codec.psnr:.2f} dB{_misfit(kind, codec)}" for name, codec in codecs.items()),
            meaning=f"{over}median {quality.psnr_median:.2f} dB"
            + (
                "; beside it, the best file of at most as many bits over quality and stored size, headers included"
                f"{_of_how_many(kind, quality, codecs)}"
                if codecs
                else ""
            ),
        ),
        Figure(
            group=group,
            name=f"SSIM of {kind}s",
            value=f"{quality.ssim:.3f}",
            beside="; ".join(f"{name} {codec.ssim:.3f}" for name, codec in codecs.items()),
            meaning=f"{over}median {quality.ssim_median:.3f}",
        ),
    ]
    if quality.stlpips is not None:
        found.append(
            Figure(
                group=group,
                name=f"{NAME} of {kind}s, lower is better",
                value=f"{quality.stlpips:.3f}",
                beside="; ".join(
                    f"{name} {codec.stlpips:.3f}" for name, codec in codecs.items() if codec.stlpips is not None
                ),
                meaning=f"{over}median {quality.stlpips_median or 0:.3f}",
            )
        )
    found.append(
        Figure(
            group=group,
            name=f"Size of a {kind}",
            value=f"{quality.bits:,.0f} bits",
            beside="; ".join(f"{name} {codec.bytes:,.0f} bytes" for name, codec in codecs.items()),
            meaning=f"{quality.codes:,.0f} codes of {code_bits:.3g} bits, {quality.bits / 8:,.0f} bytes",
        )
    )
    return found


def _of_how_many(kind: str, quality: Quality, codecs: Mapping[str, CodecQuality]) -> str:
    """Say so where files were made of some only."""
    count = min(codec.count for codec in codecs.values())
    return "" if count == quality.count else f", of {count} of these {kind}s"


def _misfit(kind: str, codec: CodecQuality) -> str:
    """Say so where a codec had to take more bits."""
    if codec.fits == 1:
        return ""
    which = f"no {kind} fits" if codec.fits == 0 else f"only {codec.fits:.0%} of the {kind}s fit"
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


def _bounds(measured: Bounds | None) -> list[Figure]:
    if measured is None:
        return []
    rows = []
    for what, given, bound in (
        ("A picture's codes", "its caption", measured.pictures),
        ("A caption", "its picture", measured.captions),
    ):
        if bound is not None:
            rows.append(
                Figure(
                    group="Whole pictures and captions in bits (lower is better)",
                    name=what,
                    value=f"{bound.model:,.0f} bits",
                    beside=f"xz that knows the training data {bound.xz_told:,.0f}; gzip {bound.gzip:,.0f}; "
                    f"bigram {bound.bigram:,.0f}; unigram {bound.unigram:,.0f}; as it is {bound.plain:,.0f}",
                    meaning=f"{bound.model_given:,.0f} for one that knows {given}; mean of {bound.count}, "
                    f"{bound.ids:.0f} ids each. gzip: all in one file; xz: what they add to the packed training data",
                )
            )
    if (files := measured.files) is not None:
        rows.append(
            Figure(
                group="Whole pictures and captions in bits (lower is better)",
                name="A WebP file that is as good as what is painted from the codes",
                value=f"{files.as_good:,.0f} bits",
                beside=f"lossless {files.lossless:,.0f}",
                meaning=f"smallest file of at least the same PSNR ({files.psnr:.1f} dB on average), headers included; "
                f"{files.count} pictures",
            )
        )
    return rows


def _choice(measured: Mapping[str, Choice]) -> list[Figure]:
    rows = []
    for kind, choice in measured.items():
        group = f"Choice among {choice.candidates} held-out pictures (chance {choice.chance:.2%}), {kind}"
        questions = f"{choice.caption_pmi.top1.asked} questions in {choice.groups} group{'s' * (choice.groups > 1)}"
        for name, pmi, others in (
            (
                "A caption's picture",
                choice.picture_pmi,
                {
                    "by the caption's likelihood": choice.picture_by_words,
                    "by both": choice.picture_both,
                    "by the picture's raw likelihood": choice.picture_raw,
                },
            ),
            (
                "A picture's caption",
                choice.caption_pmi,
                {
                    "by both likelihoods": choice.caption_both,
                    "by the caption's raw likelihood": choice.caption_raw,
                    "by words of the nearest training picture's caption": choice.caption_neighbour,
                },
            ),
        ):
            shown, beside = (pmi, others) if pmi else (choice.picture_by_words, {})
            way = "its own likelihood, less what a candidate scores by itself" if pmi else "the caption's likelihood"
            rows.append(
                Figure(
                    group=group,
                    name=name,
                    value=_accuracy(shown.top1),
                    beside="; ".join(f"{how} {_ranks(ranks)}" for how, ranks in beside.items() if ranks is not None),
                    meaning=f"among the first five {shown.top5.share:.0%}, the first ten {shown.top10.share:.0%}, "
                    f"median rank {shown.median:g}; picked by {way}; {questions}, 95% interval",
                )
            )
    return rows


def _ranks(ranks: Ranks) -> str:
    return f"{_accuracy(ranks.top1)}, median rank {ranks.median:g}"


def _answers(measured: Answers | None) -> list[Figure]:
    if measured is None:
        return []
    rows = [_answered(each) for each in measured.questions]
    return rows + _captions(measured)


def _answered(figures: Answered) -> Figure:
    beside = [f"always “{figures.majority_answer}” {figures.majority.share:.1%}"]
    if figures.neighbour is not None:
        beside.append(f"nearest training item {figures.neighbour.share:.1%}")
    if figures.neighbour_any_name is not None:
        beside.append(f"by any name {figures.neighbour_any_name.share:.1%}")
    meaning = [f"the data set's own words, {figures.exact.asked} asked, 95% interval"]
    if figures.any_name is not None:
        meaning.append(f"by any of its names or keywords {_accuracy(figures.any_name)}")
    if figures.likeliest is not None:
        meaning.append(f"likeliest of {figures.possible} possible answers {_accuracy(figures.likeliest)}")
    return Figure(
        group="Questions answered right",
        name=figures.question,
        value=_accuracy(figures.exact),
        beside="; ".join(beside),
        meaning="; ".join(meaning),
    )


def _captions(measured: Answers) -> list[Figure]:
    own, peer = measured.captions, measured.neighbour_captions
    asked = f"{own.exact.asked} captions, 95% interval"
    dealt = "" if own.dealt is None else f"; had each been written for another item {own.dealt:.1%}"
    kinds: tuple[tuple[str, Accuracy | None, Accuracy | None, str], ...] = (
        ("One of the item's own captions", own.exact, peer.exact if peer else None, asked),
        ("Names the item", own.named, peer.named if peer else None, "its English name stands in the caption"),
        (
            "Says any of its names",
            own.any_name,
            peer.any_name if peer else None,
            f"or a keyword, or a translation{dealt}",
        ),
        ("Names the style", own.style, peer.style if peer else None, "by the data set's wordings"),
    )
    return [
        Figure(
            group="Captions written",
            name=name,
            value=_accuracy(mine),
            beside="" if theirs is None else f"caption of the nearest training item {theirs.share:.1%}",
            meaning=meaning,
        )
        for name, mine, theirs, meaning in kinds
        if mine is not None
    ]


def _accuracy(accuracy: Accuracy) -> str:
    return f"{accuracy.share:.1%} ({accuracy.low:.0%}–{accuracy.high:.0%})"
