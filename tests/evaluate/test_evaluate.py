"""The whole evaluation of a tiny random model: figures, page, galleries."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from emulus.data.source import open_source
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.dual import DualConfig, DualEncoder
from emulus.errors import EmulusError
from emulus.evaluate import EvaluateConfig, Gallery, GalleryCounts, Section, encode_examples, evaluate, galleries
from emulus.evaluate.evaluate import PartName, quickly
from emulus.evaluate.galleries import GIVEN, MADE, marked
from emulus.media import Clip
from emulus.pipeline import Emulus

SHOW = GalleryCounts(reconstructions=2, reconstructed_clips=1, pictures=2, clips=1, continuations=1, captions=4)


NOTHING = GalleryCounts(**dict.fromkeys(dataclasses.asdict(SHOW), 0))


@pytest.fixture(scope="module")
def config(model: Emulus, data: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    folder = tmp_path_factory.mktemp("evaluated")
    model.save(folder / "model")
    (folder / "model" / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "visual": 3, "text": 2}\n')
    return EvaluateConfig(
        model=folder / "model",
        data=data,
        out=folder / "out",
        files=2,
        drawings=4,
        various=2,
        continuations=1,
        animations=1,
        choice_size=4,
        choice_groups=1,
        rank_size=6,
        sweeps=2,
        show=SHOW,
    )


def test_whole_evaluation(config: EvaluateConfig, check_page: Callable[[Path], Any]) -> None:
    figures = evaluate(config, more=[Section(title="And more")])
    written = json.loads((config.out / "figures.json").read_text())
    assert written == json.loads(json.dumps(figures))
    assert written["reconstruction"]["pictures"]["count"] == 8
    assert written["reconstruction"]["clips"]["count"] == 1
    assert set(written["likelihood"]["all"]) == {"visual", "text"}
    assert written["likelihood"]["documents"] == 18
    assert {kind: choice["candidates"] for kind, choice in written["choice"].items()} == {
        "mixed styles": 4,
        "same style": 4,
        "mixed styles, more": 6,
    }
    page = check_page(config.out / "report.html")
    words = "".join(page.words)
    for title in ("Figures", "Reconstructions", "Pictures drawn from names", "Clips drawn from names"):
        assert title in words
    for title in ("Clips continued from their first half", "Captions written", "Training of model", "And more"):
        assert title in words
    for title in ("Bars", "How right, how real and how new drawings are", "Clips", "Settings of drawing"):
        assert title in words
    # These, and the drawings beside training pictures.
    assert len(page.images) > 2 * 3 + 2 * 2 + 2 * 1 + 2 * 1 + 4
    # Of these, one clip is reconstructed, one drawn and one continued, each beside its original; one is described.
    assert sum(getattr(image, "n_frames", 1) > 1 for image in page.images) >= 4


def test_every_part_has_figures_and_a_time(config: EvaluateConfig) -> None:
    written = json.loads((config.out / "figures.json").read_text())
    fields = ("reconstruction", "drawing", "clips", "answers", "choice", "likelihood", "bounds", "sweeps")
    assert all(written[name] for name in fields)
    assert set(written["seconds"]) == {*get_args(PartName), "training items", "pictures shown"}
    assert all(seconds >= 0 for seconds in written["seconds"].values())
    assert written["left_out"] == {}
    by_name = {bar["name"]: bar for bar in written["bars"]}
    psnr = by_name["Pictures, reconstructed (16 pixels)"]
    assert psnr["value"] == written["reconstruction"]["pictures"]["psnr"]
    assert (psnr["least"], psnr["aim"], psnr["reached"]) == (24, 30, "no")
    assert (
        by_name["A picture's caption found"]["value"] == written["choice"]["same style"]["caption_pmi"]["top1"]["share"]
    )
    # Nobody asked for a style, and there is no dual encoder.
    assert by_name['"Which style?" answered right']["reached"] == "not measured"
    assert by_name["Drawings whose name is found among ten"]["value"] is None


def test_parts_that_are_not_asked_for(config: EvaluateConfig, tmp_path: Path) -> None:
    quiet = dataclasses.replace(config, show=NOTHING, out=tmp_path, parts=("tokenizer", "answers"), answers=2)
    written = evaluate(quiet)
    assert written["reconstruction"]
    assert written["answers"]["items"] == 2
    assert not any(written[name] for name in ("drawing", "clips", "choice", "likelihood", "bounds", "sweeps"))
    assert set(written["seconds"]) == {"tokenizer", "answers", "training items", "pictures shown"}


def test_what_cannot_be_measured_is_left_out(
    config: EvaluateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, check_page: Callable[[Path], Any]
) -> None:
    """One picture, no clip: no drawings, no continuations, nothing to choose from."""
    quiet = dataclasses.replace(
        config, show=NOTHING, out=tmp_path, parts=("drawing", "clips", "choice", "sweeps"), training_items=3
    )
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, split in {"a": "train", "b": "validation"}.items():
        Image.new("RGB", (16, 16)).save(pictures / f"{name}.png")
        with (pictures / "captions.jsonl").open("a") as table:
            table.write(f'{{"file": "{name}.png", "caption": "{name}", "split": "{split}"}}\n')
    with caplog.at_level("WARNING", logger="emulus"):
        written = evaluate(dataclasses.replace(quiet, data=pictures))
    assert set(written["left_out"]) == {"drawing", "clips", "sweeps"}
    assert written["choice"] == {}
    assert "clips is left out: there are no held-out clips" in caplog.text
    assert "there are no held-out clips" in "".join(check_page(tmp_path / "report.html").words)


def test_a_dual_encoder_beside_the_model_judges(config: EvaluateConfig, tmp_path: Path) -> None:
    dual = DualEncoder(DualConfig(size=16, widths=(8, 8), dimensions=8, buckets=64, piece_width=8, hidden=8)).eval()
    shutil.copytree(config.model, tmp_path / "model")
    dual.save(tmp_path / "model" / "dual")
    quiet = dataclasses.replace(
        config, show=NOTHING, out=tmp_path, parts=("drawing", "sweeps"), model=tmp_path / "model"
    )
    written = evaluate(quiet)
    assert written["drawing"]["retrieval"]["names"] == 8
    assert all(point["found"]["top10"]["asked"] == 2 for point in written["sweeps"]["points"])
    reached = {bar["name"]: bar["reached"] for bar in written["bars"]}
    assert reached["Drawings whose name is found among ten"] in ("no", "least", "aim")
    with pytest.raises(EmulusError, match="dual"):
        evaluate(dataclasses.replace(quiet, dual=tmp_path / "nowhere"))


def test_quickly_takes_fewer_of_everything(config: EvaluateConfig) -> None:
    default = EvaluateConfig(model=config.model, data=config.data, out=config.out)
    few = quickly(default)
    assert (few.pictures, few.training_items, few.sweeps) == (32, 100, 0)
    assert few.show.pictures < default.show.pictures
    fewer = quickly(dataclasses.replace(default, pictures=3, answers=2, choice_size=4))
    assert (fewer.pictures, fewer.answers, fewer.choice_size) == (3, 2, 4)


def test_training_ids_from_a_tokens_folder_or_a_few_items(config: EvaluateConfig, tmp_path: Path) -> None:
    quiet = dataclasses.replace(config, show=NOTHING, documents=2, parts=("choice", "bits"))
    tokenize(
        TokenizeConfig(
            sources=(config.data,),
            vision=config.model / "vision",
            out=tmp_path / "tokens",
            size=16,
            views=1,
            text_size=300,
        )
    )
    with_tokens = evaluate(dataclasses.replace(quiet, tokens=tmp_path / "tokens", out=tmp_path / "a"))
    in_memory = evaluate(dataclasses.replace(quiet, training_items=1000, out=tmp_path / "b"))
    assert with_tokens["likelihood"]["documents"] == in_memory["likelihood"]["documents"] == 4
    assert not (tmp_path / "b" / "tokens").exists()
    few = evaluate(dataclasses.replace(quiet, training_items=3, out=tmp_path / "c", choice_groups=0, rank_groups=0))
    assert few["likelihood"]["training_ids"] < in_memory["likelihood"]["training_ids"]
    assert few["choice"] == {}


def test_tokens_of_another_tokenizer_are_refused(config: EvaluateConfig, model: Emulus, tmp_path: Path) -> None:
    other = Emulus(dataclasses.replace(model.bundle, vision=copy.deepcopy(model.vision)))
    other.vision.quantize.embedding.weight.data += 0.01
    other.save(tmp_path / "other")
    tokens = tokenize(
        TokenizeConfig(
            sources=(config.data,),
            vision=tmp_path / "other" / "vision",
            out=tmp_path / "t",
            size=16,
            views=1,
            text_size=300,
        )
    )
    with pytest.raises(EmulusError, match="another vision tokenizer"):
        evaluate(dataclasses.replace(config, tokens=tokens, out=tmp_path / "out"))


def test_no_held_out_items(config: EvaluateConfig, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": "a", "split": "train"}')
    with pytest.raises(EmulusError, match="nothing to measure"):
        evaluate(dataclasses.replace(config, data=tmp_path, out=tmp_path / "out"))


@pytest.mark.parametrize("wrong", [{"pictures": -1}, {"choice_size": 1}, {"sweeps": -1}])
def test_bad_config(config: EvaluateConfig, wrong: dict[str, int]) -> None:
    with pytest.raises(EmulusError, match="must be at least"):
        dataclasses.replace(config, **wrong)


def test_unknown_part(config: EvaluateConfig) -> None:
    with pytest.raises(EmulusError, match="unknown parts taste; there are tokenizer"):
        dataclasses.replace(config, parts=("taste",))


def test_galleries_without_clips_leave_those_sections_out(model: Emulus, data: Path) -> None:
    pictures = [item for item in open_source(data) if item.split == "validation" and item.kind == "image"]
    sections = galleries(model, encode_examples(model, pictures), SHOW)
    assert [section.title for section in sections] == [
        "Reconstructions",
        "Pictures drawn from names",
        "Captions written",
    ]
    drawn = sections[1].blocks[0]
    assert isinstance(drawn, Gallery)
    assert [tile.text for tile in drawn.tiles] == [item.captions[0] for item in (pictures[0], pictures[4])]


def test_mark_where_the_model_takes_over() -> None:
    frames = tuple(Image.new("RGB", (32, 32), (n, 0, 0)) for n in range(4))
    clip = marked(Clip(frames, fps=8.0), given=3)
    bottoms = [frame.getpixel((5, frame.height - 1)) for frame in clip.frames]
    assert bottoms == [GIVEN, GIVEN, GIVEN, MADE]
    for frame, original in zip(clip.frames, frames, strict=True):
        assert (np.asarray(frame)[:32] == np.asarray(original)).all()
