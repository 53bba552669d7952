"""prompt -> media and back, on a whole tiny model."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

import emulus
from emulus.bundle import Bundle
from emulus.engine import Jacobi, Request, Schedule, Sequential, Token, Zipar
from emulus.engine.cache import Lane
from emulus.errors import EmulusError
from emulus.media import Clip, clip_to_pixels, keep_still, pixels_to_clip
from emulus.model import Decoder
from emulus.model.loss import linear_cross_entropy
from emulus.options import EngineOptions
from emulus.pipeline import Emulus, _stripped
from emulus.sequence import Image, Video, caption_last, templates
from tests.unwritten import filled

SCHEDULES = [Sequential(), Jacobi(window=6), Jacobi(), Zipar(window=1)]


def picture(colour: tuple[int, int, int] = (200, 30, 60), size: int = 16) -> PILImage.Image:
    image = PILImage.new("RGB", (size, size), colour)
    image.putpixel((3, 5), (0, 255, 0))
    return image


def test_a_picture_depends_on_its_seed_alone(tiny: Emulus) -> None:
    alone = tiny.generate_image("a red apple", seed=3)
    among = tiny.generate_images(["a blue bird", "a red apple"], seed=2, num_images_per_prompt=2)
    assert among[3].tobytes() == alone.tobytes()
    assert among[2].tobytes() != alone.tobytes()


def test_of_several_pictures_the_one_is_kept_that_the_model_would_caption_so(tiny: Emulus) -> None:
    prompts = ["a red apple", "a blue bird"]
    (apple, other_apple, bird, _) = tiny.generate_images(prompts, seed=5, num_images_per_prompt=2, best_of=3)
    for prompt, seed, kept in ((prompts[0], 5, apple), (prompts[0], 6, other_apple), (prompts[1], 5, bird)):
        tries = [tiny.generate_image(prompt, seed=seed + 2**32 * number) for number in range(3)]
        assert len({each.tobytes() for each in tries}) == 3
        likely = [own_caption_score(tiny, prompt, seed + 2**32 * number) for number in range(3)]
        assert kept.tobytes() == tries[int(np.argmax(likely))].tobytes()
        # The seed that is recorded makes the picture again, by itself.
        made = json.loads(kept.info["emulus"])
        choosy = Emulus(dataclasses.replace(tiny.bundle, defaults=dataclasses.replace(tiny.defaults, best_of=3)))
        again = choosy.generate_image(prompt, seed=made["seed"], best_of=made["best_of"])
        assert again.tobytes() == kept.tobytes()


def own_caption_score(model: Emulus, prompt: str, seed: int) -> float:
    """Logarithm of the probability of the prompt as a caption of what is drawn for it, by one plain forward pass."""
    request = model._request(model._drawing(prompt, None, None, None, None, None), seed)
    (whole,) = model._finish([request])
    ids = model.grammar.build(caption_last(model._medium(whole), prompt))
    start = len(templates.caption(model.grammar, model._medium(whole)).ids)
    with torch.no_grad():
        logs = model.decoder(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_a_model_may_choose_among_several_by_default(tiny: Emulus) -> None:
    defaults = dataclasses.replace(tiny.defaults, best_of=3)
    choosy = Emulus(dataclasses.replace(tiny.bundle, defaults=defaults))
    assert choosy.generate_image("a cat", seed=2).tobytes() == tiny.generate_image("a cat", seed=2, best_of=3).tobytes()
    assert choosy.generate_image("a cat", seed=2, best_of=1).tobytes() == tiny.generate_image("a cat", seed=2).tobytes()
    likeliest = choosy.generate_image("a cat", seed=2, temperature=0.0)
    assert json.loads(likeliest.info["emulus"])["seed"] == 2, "without noise there is nothing to choose from"
    with pytest.raises(EmulusError, match="best_of is 0 but must be"):
        tiny.generate_image("a cat", best_of=0)


def test_sizes(tiny: Emulus) -> None:
    assert tiny.generate_image("a bird", height=8, width=24).size == (24, 8)
    clip = tiny.generate_video("a bird", num_frames=12, fps=5.0)
    assert (len(clip.frames), clip.fps, clip.frames[0].size) == (12, 5.0, (16, 16))


def test_guidance_and_the_negative_prompt_matter(tiny: Emulus) -> None:
    plain = tiny.generate_image("a red apple", guidance_scale=1.0)
    guided = tiny.generate_image("a red apple", guidance_scale=8.0)
    away = tiny.generate_image("a red apple", guidance_scale=8.0, negative_prompt="ein roter Apfel")
    assert len({plain.tobytes(), guided.tobytes(), away.tobytes()}) == 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_streaming_ends_with_the_same_picture(tiny: Emulus, schedule: Schedule) -> None:
    """One picture a row, also where several rows are on their way, or come at once."""
    model = Emulus(tiny.bundle, options=EngineOptions(schedule=schedule))
    shown = list(model.stream_image("a red apple", seed=1))
    whole = model.generate_image("a red apple", seed=1)
    assert len(shown) == 4
    for number, so_far in enumerate(shown, start=1):
        assert [so_far.getpixel((8, row)) == (128, 128, 128) for row in (3, 7, 11, 15)] == [
            row >= number for row in range(4)
        ]
    assert shown[-1].tobytes() == whole.tobytes()
    assert shown[-1].info == whole.info


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_length_of_a_drawing_is_known_before(tiny: Emulus, schedule: Schedule) -> None:
    """So that a progress bar ends where the drawing does."""
    engine = EngineOptions(schedule=schedule).engine(tiny.decoder, tiny.grammar)
    prompts = [templates.draw(tiny.grammar, "a cat", 4, 5), templates.animate(tiny.grammar, "a cat", 2, 3, 2, 8.0)]
    requests = [Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids) for prompt in prompts]
    ids = [event for event in engine.events(requests) if isinstance(event, Token)]
    assert len(ids) == engine.most_new_tokens(requests)


def test_closing_a_stream_frees_its_memory(tiny: Emulus) -> None:
    streams: list[Generator[object]] = [
        tiny.stream_image("a cat"),
        tiny.stream_video("a cat"),
        tiny.stream_answer(picture(), "what is it?"),
    ]
    for stream in streams:
        next(stream)
        assert lanes()
        stream.close()
        assert not lanes()


def lanes() -> list[Lane]:
    """Keys and values of all sequences that there are."""
    return [each for each in gc.get_objects() if type(each) is Lane]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_words_are_the_whole_answer(tiny: Emulus, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 30}
    pieces = list(tiny.stream_description(picture(), **options))
    assert len(pieces) > 1
    assert "".join(pieces) == tiny.describe(picture(), **options)
    question = "what is it?"
    assert "".join(tiny.stream_answer(picture(), question, **options)) == tiny.answer(picture(), question, **options)
    talk = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": question}]}]
    assert "".join(tiny.stream_chat(talk, **options)) == tiny.chat(talk, **options)


@given(pieces=st.lists(st.text(alphabet=" \nab", max_size=3)))
def test_blanks_around_streamed_words_are_left_away(pieces: list[str]) -> None:
    assert "".join(_stripped(pieces)) == "".join(pieces).strip()
    assert all(_stripped(pieces))


def test_streaming_a_clip(tiny: Emulus) -> None:
    shown = list(tiny.stream_video("a bird", num_frames=12, seed=1))
    assert [len(clip.frames) for clip in shown] == [4, 8, 12]
    whole = tiny.generate_video("a bird", num_frames=12, seed=1)
    assert [a.tobytes() for a in shown[-1].frames] == [b.tobytes() for b in whole.frames]
    assert [a.tobytes() for a in shown[0].frames] == [b.tobytes() for b in whole.frames[:4]]


def test_clips_are_brought_to_the_models_rate(tiny: Emulus) -> None:
    frames = tuple(picture((number * 10, 0, 0)) for number in range(24))
    codes = tiny.encode(Clip(frames, 24.0))
    assert codes == tiny.encode(Clip(frames[::3], 8.0))


def test_continuing_keeps_the_start(tiny: Emulus) -> None:
    """Longer than the model's own eight frames, so in more than one pass."""
    start = tiny.generate_video("a bird", num_frames=4, seed=4)
    longer = tiny.continue_video(start, num_frames=16)
    assert len(longer.frames) == 16
    assert [a.tobytes() for a in longer.frames[:4]] == [b.tobytes() for b in start.frames]
    one_pass = tiny.continue_video(start)
    assert [a.tobytes() for a in longer.frames[:8]] == [b.tobytes() for b in one_pass.frames]
    assert longer.frames[8:12] != longer.frames[12:16]
    with pytest.raises(EmulusError, match="must be more"):
        tiny.continue_video(start, num_frames=4)
    with pytest.raises(EmulusError, match="picture cannot be continued"):
        tiny.continue_video(picture())


def test_every_window_of_a_continuation_has_noise_of_its_own(tiny: Emulus) -> None:
    """Each goes on from the last half of the window before, with the next seed."""
    start = tiny.generate_video("a bird", num_frames=4, seed=4)
    for options in ({"prompt": "a bird", "guidance_scale": 3.0}, {"top_k": 5}):
        longer = tiny.continue_video(start, num_frames=16, seed=7, **options).frames
        windows = [tiny.continue_video(Clip(longer[at : at + 4], 8.0), seed=7 + at // 4, **options) for at in (0, 4, 8)]
        for number, window in enumerate(windows, start=1):
            expected = longer[4 * number : 4 * number + 4]
            assert [a.tobytes() for a in window.frames[4:]] == [b.tobytes() for b in expected], number
        same = tiny.continue_video(Clip(longer[4:8], 8.0), seed=7, **options)
        assert [a.tobytes() for a in same.frames[4:]] != [b.tobytes() for b in longer[8:12]]


@pytest.mark.parametrize(("most", "asked"), [(8, 12), (16, 8), (16, 12), (16, 20), (12, 16)])
def test_a_continuation_is_as_long_as_asked(tiny: Emulus, most: int, asked: int) -> None:
    model = Emulus(dataclasses.replace(tiny.bundle, defaults=dataclasses.replace(tiny.defaults, num_frames=most)))
    start = tiny.generate_video("a bird", num_frames=4, seed=4)
    assert len(model.continue_video(start, num_frames=asked).frames) == asked


def test_every_clip_of_a_batch_has_the_same_seed(tiny: Emulus) -> None:
    together = tiny.generate_videos(["a red apple", "a blue bird"], num_frames=4, seed=3)
    for prompt, clip in zip(["a red apple", "a blue bird"], together, strict=True):
        alone = tiny.generate_video(prompt, num_frames=4, seed=3)
        assert [a.tobytes() for a in clip.frames] == [b.tobytes() for b in alone.frames]


def test_what_stands_still_keeps_the_given_pixels(tiny: Emulus) -> None:
    start = tiny.generate_video("a bird", num_frames=4, seed=4)
    further = tiny.continue_video(start).frames[4:]
    video = tiny.encode(start)
    assert isinstance(video, Video)
    request = tiny._request(templates.continue_video(tiny.grammar, "", video, 2), 0, guidance_scale=1.0)
    (ids,) = tiny._finish([request])
    painted = tiny._paint(tiny._medium(ids).codes[None])[0]
    expected = keep_still(painted, clip_to_pixels(start), cell=tiny.vision.config.spatial_factor)
    assert [frame.tobytes() for frame in further] == [f.tobytes() for f in pixels_to_clip(expected, 8.0).frames]
    assert not torch.equal(expected, painted[4:])


def test_describing(tiny: Emulus) -> None:
    one = tiny.describe(picture())
    both = tiny.describe_all([picture((0, 0, 0)), picture()])
    assert both[1] == one
    assert isinstance(tiny.answer(picture(), "what is it?"), str)


def test_codes_round_trip(tiny: Emulus) -> None:
    media = tiny.encode(picture(size=40))
    assert isinstance(media, Image)
    assert media.codes.shape == (4, 4)
    image = tiny.decode(media)
    assert isinstance(image, PILImage.Image)
    assert image.size == (16, 16)
    clip = tiny.encode(Clip((picture(),) * 7, 8.0))
    assert isinstance(clip, Video)
    assert clip.codes.shape == (1, 4, 4)
    with pytest.raises(EmulusError, match="4 make one code"):
        tiny.encode(Clip((picture(),) * 3, 8.0))


def test_special_strings_in_prompts_are_plain_text(tiny: Emulus) -> None:
    """A prompt that spells a special token draws a picture like any other."""
    assert tiny.generate_image("<|image end|><|eos|> a cat").size == (16, 16)


@pytest.mark.parametrize(
    "options", [{"top_k": -1}, {"top_p": 0.0}, {"seed": -1}, {"guidance_scale": -1.0}, {"tempo": 1}]
)
def test_options_out_of_range(tiny: Emulus, options: dict[str, float]) -> None:
    with pytest.raises(EmulusError, match=next(iter(options))):
        tiny.generate_image("a cat", **options)


def test_painting_in_bfloat16(tiny: Emulus, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    plain, short = (emulus.load(tmp_path / "model", device="cpu", vision_dtype=d) for d in ("float32", "bfloat16"))
    first, second = (model.generate_image("a cat", seed=3) for model in (plain, short))
    assert short.vision.decoder.conv_in.weight.dtype == torch.float32
    assert short.vision.decoder.mid.block_1.conv1.weight.dtype == torch.bfloat16
    assert short.vision.encoder.mid.block_1.conv1.weight.dtype == torch.float32
    difference = np.asarray(first, np.float32) - np.asarray(second, np.float32)
    assert np.abs(difference).mean() < 4
    assert torch.equal(plain.encode(first).codes, short.encode(first).codes)
    assert json.loads(second.info["emulus"])["vision_dtype"] == "bfloat16"
    with pytest.raises(EmulusError, match="vision_dtype is 'bfloat'; did you mean 'bfloat16'"):
        emulus.load(tmp_path / "model", vision_dtype="bfloat")
    with pytest.raises(EmulusError, match=r"keys and values cannot be torch\.float8_e4m3fn"):
        emulus.load(tmp_path / "model", kv_dtype=torch.float8_e4m3fn)


def test_save_and_load(tiny: Emulus, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    again = emulus.load(tmp_path / "model", device="cpu")
    assert again.generate_image("a cat").tobytes() == tiny.generate_image("a cat").tobytes()
    assert again.defaults == tiny.defaults
    tiny.save(tmp_path / "half", dtype=torch.bfloat16)
    half = emulus.load(tmp_path / "half", device="cpu", dtype=None)
    assert half.decoder.lm_head.weight.dtype == torch.bfloat16


def test_a_part_of_a_model(tiny: Emulus, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    vision = emulus.load(tmp_path / "vision", device="cpu")
    assert vision.vision.config == tiny.vision.config
    with pytest.raises(EmulusError, match="no decoder"):
        _ = vision.decoder
    with pytest.raises(EmulusError, match="no vision tokenizer"):
        _ = Emulus(Bundle()).vision


NUMBERS = ("3", b"3", [3], {}, True, math.nan, math.inf, -1, 10**400, object(), np.array([1, 2]), 1j)
WHOLE = (*NUMBERS, 1.5)
NO_TEXT: list[Any] = [3, 1.5, b"x", ["x"], {}, object(), np.array(3), True]
NO_MEDIA: list[Any] = [None, 3, 1.5, {}, object(), True]
ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Sequence[Any]]]] = {
    "generate_image": (
        {"prompt": "x"},
        {
            "prompt": [None, *NO_TEXT],
            "negative_prompt": NO_TEXT,
            "ratio": [3, 1.5, b"x", object()],
            **dict.fromkeys(("height", "width", "image_area", "num_images_per_prompt", "best_of"), WHOLE),
            **dict.fromkeys(("seed", "top_k"), WHOLE),
            **dict.fromkeys(("temperature", "top_p", "guidance_scale"), NUMBERS),
        },
    ),
    "generate_images": ({"prompts": ["x"]}, {"prompts": [None, "x", 3, {"x"}, iter("x")], "ratio": [["1:1", "1:1"]]}),
    "stream_image": ({"prompt": "x"}, {"prompt": [None, *NO_TEXT], "seed": NUMBERS, "height": NUMBERS}),
    "generate_video": ({"prompt": "x"}, {"prompt": [None, *NO_TEXT], "num_frames": [*NUMBERS, 8.0], "fps": NUMBERS}),
    "stream_video": ({"prompt": "x"}, {"prompt": [None, *NO_TEXT], "num_frames": [*NUMBERS, 8.0], "fps": NUMBERS}),
    "continue_video": ({"clip": "x.mp4"}, {"clip": NO_MEDIA, "prompt": NO_TEXT, "num_frames": [*NUMBERS, 8.0]}),
    "describe": (
        {"media": PILImage.new("RGB", (16, 16))},
        {"media": NO_MEDIA, **dict.fromkeys(("seed", "min_pixels", "max_pixels", "max_new_tokens"), WHOLE)},
    ),
    "describe_all": ({"media": []}, {"media": [None, "x.png", PILImage.new("RGB", (16, 16)), b"x", {}, 3]}),
    "answer": ({"media": [], "question": "x"}, {"media": NO_MEDIA, "question": [None, *NO_TEXT]}),
    "stream_answer": ({"media": [], "question": "x"}, {"question": [None, *NO_TEXT]}),
    "chat": ({}, {"messages": [None, "hi", 3, [], [3], [{}], [{"role": "user"}], [{"role": 3, "content": "x"}]]}),
    "encode_all": ({"media": []}, {"media": [None, "x.png"], "padding_image": [1, "yes", np.array([1, 2])]}),
    "decode": ({}, {"media": [None, 3, "x.png", torch.zeros(2, 2, dtype=torch.int64)]}),
    "drawing_prompt": ({"text": "x"}, {"text": [None, *NO_TEXT], "ratio": [3, "x"], "image_area": NUMBERS}),
    "save": ({}, {"folder": [None, 3, b"x"]}),
}


@pytest.mark.parametrize(
    ("method", "argument"), [(method, argument) for method, (_, wrong) in ARGUMENTS.items() for argument in wrong]
)
def test_wrong_types_are_one_line_at_the_door(method: str, argument: str, tiny: Emulus) -> None:
    given, wrong = ARGUMENTS[method]
    for value in wrong[argument]:
        with pytest.raises(EmulusError) as raised:
            getattr(tiny, method)(**{**given, argument: value})
        message = str(raised.value)
        assert "\n" not in message
        assert len(message) < 300


def test_numbers_of_numpy_and_torch_are_numbers(tiny: Emulus) -> None:
    plain = tiny.generate_images(["x"], seed=3, height=16, width=16, num_images_per_prompt=2, top_p=0.5)
    ours = {"seed": np.int64(3), "height": np.array(16), "width": torch.tensor(16), "top_p": np.float32(0.5)}
    other = tiny.generate_images(["x"], num_images_per_prompt=np.uint8(2), **ours)
    assert [each.tobytes() for each in plain] == [each.tobytes() for each in other]


@pytest.mark.parametrize("call", ["generate_image", "generate_video", "describe", "answer", "chat", "continue_video"])
def test_none_is_the_models_own_default(call: str, tiny: Emulus) -> None:
    clip = Clip((PILImage.new("RGB", (16, 16)),) * 4, 8.0)
    given = {
        "describe": {"media": clip},
        "answer": {"media": clip, "question": "x"},
        "chat": {"messages": [{"role": "user", "content": "x"}]},
        "continue_video": {"clip": clip},
    }.get(call, {"prompt": "x"})
    own = {
        "generate_image": [
            "negative_prompt",
            "height",
            "width",
            "ratio",
            "image_area",
            "num_images_per_prompt",
            "best_of",
        ],
        "generate_video": ["negative_prompt", "height", "width", "num_frames", "fps"],
        "continue_video": ["prompt", "num_frames"],
    }.get(call, ["min_pixels", "max_pixels", "max_new_tokens"])
    defaults = dataclasses.replace(tiny.defaults, best_of=2, text_temperature=0.7, text_top_k=5, text_top_p=0.8)
    model = Emulus(dataclasses.replace(tiny.bundle, defaults=defaults))
    asked: list[list[Request]] = []
    generate = model._generate

    def generated(requests: Sequence[Request]) -> Any:
        asked.append(list(requests))
        return generate(requests)

    model._generate = generated  # type: ignore[method-assign]
    usual = getattr(model, call)(**given)
    every = dict.fromkeys([*own, "seed", "temperature", "top_k", "top_p", "guidance_scale"])
    same = getattr(model, call)(**given, **every)
    assert asked[: len(asked) // 2] == asked[len(asked) // 2 :]
    if isinstance(usual, Clip):
        assert [frame.tobytes() for frame in usual.frames] == [frame.tobytes() for frame in same.frames]
    else:
        assert usual == same
    if call in ("describe", "answer", "chat"):
        params = asked[0][0].params
        assert (params.temperature, params.top_k, params.top_p, params.guidance_scale) == (0.7, 5, 0.8, 1.0)


def test_texts_that_no_context_can_hold_are_refused_before_they_are_looked_at(tiny: Emulus) -> None:
    long = "a\u0301" * 10_000_000
    for call in (
        lambda: tiny.generate_image(long),
        lambda: tiny.generate_image("x", negative_prompt=long),
        lambda: tiny.answer([], long),
        lambda: tiny.chat([{"role": "user", "content": long}]),
        lambda: tiny.drawing_prompt(long),
    ):
        with pytest.raises(EmulusError, match="20,000,000 characters"):
            call()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_no_product_is_given_memory_that_was_not_written(bfloat16: bool, tiny: Emulus) -> None:
    """Drawing, describing and a training step, at widths that do not divide into registers."""
    with filled(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        image = tiny.generate_image("x", seed=1)
        tiny.describe(image)
        ids = torch.randint(tiny.grammar.vocabulary.size, (1, 75))
        decoder = Decoder(tiny.decoder.config)
        hidden = decoder.hidden(ids, document_lengths=[33, 42])[0]
        losses = linear_cross_entropy(hidden, decoder.lm_head.weight, ids[0], torch.ones(75) / 75)
        losses.total.backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in decoder.parameters())


def test_what_is_longer_than_the_context_is_not_judged(tiny: Emulus) -> None:
    pictures = [Image(torch.zeros(20, 20, dtype=torch.int64))] * 2
    with pytest.raises(EmulusError, match=r"take \d+ ids, but the model's longest sequence is 256; give smaller ones"):
        tiny.likeliest("a red apple", pictures)
