"""Released checkpoints run unchanged, with identical tokens: against the released code's outputs and transformers.

``golden/`` holds a tiny model in the released files and what transformers and tiktoken make of it (``make.py`` there).
``official`` is what the released code itself made; tests of it are skipped where it is not.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

import emulus
from emulus.engine import Request
from emulus.errors import EmulusError
from emulus.layouts import convert
from emulus.media import image_to_pixels, read_image, resize, smart_resize, write_image
from emulus.pipeline import Emulus
from emulus.sampling import SamplingParams

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
PUBLISHED_SIZE = 184_622
WORDS = frozenset({"text"})


def follow(ids: Sequence[int], h: int, w: int, special: dict[str, int], codes: Sequence[int]) -> Sequence[int]:
    """The released rule: what may come after these ids."""
    offset = len(ids) - list(ids).index(special["img"])
    if offset % (w + 1) == 0:
        return [special["eol"]]
    after = offset - h * (w + 1)
    return codes if after < 1 else [special[{1: "eof", 2: "eoi", 3: "eos"}.get(after, "pad")]]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def text_ids(model: Emulus, ids: Sequence[int]) -> bool:
    return all(map(model.grammar.vocabulary.is_text, ids))


def greedy(model: Emulus, prompt: list[int], most: int = 24) -> list[int]:
    """The ids of an answer in words."""
    params = SamplingParams(temperature=0, guidance_scale=1, max_new_tokens=most)
    (result,) = model.engine.generate([Request(prompt_ids=prompt, may=WORDS, params=params)])
    return list(result.ids[:most])


# What the released code made.


@pytest.fixture(scope="module")
def whole_folder(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder's folder as on the hub, with the released vocabulary and hardly any weights."""
    folder = tmp_path_factory.mktemp("hub") / "Emu3-Gen"
    folder.mkdir()
    shutil.copy(official / "emu3.tiktoken", folder)
    shutil.copyfile(GOLDEN / "decoder/config.json", folder / "config.json")
    names = [*(GOLDEN / "decoder/emu3_vision_tokens.txt").read_text().split("\n")[:3]]
    names += [f"<|visual token {code:06d}|>" for code in range(32_768)]
    (folder / "emu3_vision_tokens.txt").write_text("".join(f"{name}\n" for name in names))
    roles = {"pad": 151643, "eol": 151846, "eof": 151847, "bos": 151849, "eos": 151850, "img": 151851, "boi": 151852}
    ids = {f"{role}_token_id": id for role, id in {**roles, "eoi": 151853}.items()}
    edit(folder / "config.json", vocab_size=PUBLISHED_SIZE, num_hidden_layers=1, image_area=518400, **ids)
    tensors = {}
    for file in sorted((GOLDEN / "decoder").glob("*.safetensors")):
        tensors |= {name: value for name, value in load_file(file).items() if ".layers.1." not in name}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(PUBLISHED_SIZE, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def whole(official: Path, whole_folder: Path) -> Emulus:
    return emulus.load(whole_folder, vision=official / "vision_tokenizer", device="cpu")


@pytest.fixture(scope="module")
def made(official: Path) -> Any:
    """The released code's answers."""
    return json.loads((official / "expected.json").read_text(encoding="utf-8"))


def test_released_text(whole: Emulus, made: Any) -> None:
    compat = Emulus(whole.bundle, compat="released", device="cpu")
    special = 0
    for entry in made["text"]:
        ids = whole.text.encode(entry["text"])
        assert text_ids(whole, ids)
        assert whole.text.decode(ids) == unicodedata.normalize("NFC", entry["text"])
        as_prompted = [prompter.drawing_prompt(entry["text"])[0] for prompter in (whole, compat)]
        opening = [151852, 24, 15, 9, 24, 15, 151851]
        assert as_prompted == [[151849, *ids, *opening], [151849, *entry["ids"], *opening]]
        if text_ids(whole, entry["ids"]):
            assert ids == entry["ids"]
        else:
            special += 1
    assert special == 1


def test_released_drawing_prompts(whole: Emulus, made: Any) -> None:
    assert len(made["generate_prompts"]) == 4
    for entry in made["generate_prompts"]:
        ids, size = whole.drawing_prompt(entry["text"], ratio=entry["ratio"], image_area=entry["image_area"])
        assert (ids, list(size)) == (entry["ids"], entry["size"])


def test_released_questions(official: Path, whole: Emulus, made: Any) -> None:
    assert len(made["understand_prompts"]) == 3
    for entry in made["understand_prompts"]:
        file, limits = official / entry["image"], {name: entry[name] for name in ("min_pixels", "max_pixels")}
        assert whole.understanding_prompt(entry["question"], [file], **limits) == entry["ids"]
        picture = read_image(file)
        pixels = image_to_pixels(resize(picture, *smart_resize(picture.height, picture.width, **limits)))
        assert [1, *pixels.shape] == entry["pixel_shape"]
        assert pixels.mean().item() == pytest.approx(entry["pixel_mean"], abs=1e-6)
        assert pixels.std().item() == pytest.approx(entry["pixel_std"], abs=1e-6)


def test_released_sizes(made: Any) -> None:
    for entry in made["smart_resize"]:
        if isinstance(entry["result"], list):
            assert list(smart_resize(entry["h"], entry["w"])) == entry["result"]
        else:
            with pytest.raises(EmulusError, match=r"too small|too long"):
                smart_resize(entry["h"], entry["w"])


def test_released_vision_tokenizer(official: Path) -> None:
    model = emulus.load(official / "vision_tokenizer", device="cpu").vision
    expected = load_file(official / "vision_tokenizer/expected.safetensors")
    torch.testing.assert_close(
        model.latents(expected["image"]).transpose(1, 2), expected["image_latent"], atol=1e-5, rtol=0
    )
    for kind in ("image", "video"):
        assert torch.equal(model.encode(expected[kind]), expected[f"{kind}_codes"])
        painted = model.decode(expected[f"{kind}_codes"])
        torch.testing.assert_close(painted, expected[f"{kind}_decoded"], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_released_decoder(official: Path, made: Any) -> None:
    model = emulus.load(official / "language_model", device="cpu")
    expected = load_file(official / "language_model/expected.safetensors")
    torch.testing.assert_close(model.decoder(expected["input_ids"]), expected["logits"], atol=1e-4, rtol=0)
    entry = made["greedy_generation"]
    config = json.loads((official / "language_model/config.json").read_text())
    special = {role: config[f"{role}_token_id"] for role in ("pad", "eos", "img", "eoi", "eol", "eof")}
    new: list[int] = []
    while len(new) < len(entry["tokens"]):
        cond, null = (
            model.decoder(torch.tensor([entry[branch] + new]))[0, -1].log_softmax(-1) for branch in ("cond", "uncond")
        )
        codes = range(entry["visual_base"], config["vocab_size"])
        legal = list(follow(entry["cond"] + new, entry["height"], entry["width"], special, codes))
        new.append(legal[int((null + entry["guidance_scale"] * (cond - null))[legal].argmax())])
    assert new == entry["tokens"]


def test_parts_of_a_release(official: Path, whole_folder: Path, tmp_path: Path) -> None:
    shutil.copy(official / "emu3.tiktoken", tmp_path)
    text = emulus.load(tmp_path, device="cpu")
    assert text.text.encode("a cat") == [64, 8251]
    assert text.drawing_prompt("a cat", ratio="16:9", image_area=518400)[1] == (68, 120)
    decoder = emulus.load(official / "language_model", device="cpu")
    assert decoder.decoder(torch.tensor([[91, 5]])).shape == (1, 2, 300)
    vision = emulus.load(official / "vision_tokenizer", device="cpu")
    assert vision.vision.encode(torch.zeros(1, 3, 16, 24)).shape == (1, 2, 3)
    for model, lacks in ((text, "decoder"), (decoder, "text"), (vision, "decoder"), (vision, "text")):
        with pytest.raises(EmulusError, match=f"no {lacks}"):
            getattr(model, lacks)


# Small copies of our own making.


@pytest.fixture(scope="module")
def golden() -> Emulus:
    return emulus.load(GOLDEN / "decoder", vision=GOLDEN / "vision", device="cpu")


@pytest.fixture(scope="module")
def golden_compat(golden: Emulus) -> Emulus:
    return Emulus(golden.bundle, compat="released", device="cpu")


def test_golden_text(golden: Emulus, golden_compat: Emulus) -> None:
    differ = 0
    for entry in EXPECTED["text"]:
        assert golden.text.encode(entry["text"]) == entry["ids"]
        for model, ids in ((golden, entry["ids"]), (golden_compat, entry["released_ids"])):
            prompt, _ = model.drawing_prompt(entry["text"])
            assert prompt[1 : prompt.index(model.grammar.vocabulary.boi, len(ids) + 1)] == ids
        differ += entry["ids"] != entry["released_ids"]
    assert differ == 1


def test_golden_arithmetic(golden: Emulus) -> None:
    tensors = load_file(GOLDEN / "expected.safetensors")
    with torch.inference_mode():
        logits = golden.decoder(tensors["ids"])[:, -2:]
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-4, rtol=0)
    for kind in ("image", "clip"):
        assert torch.equal(golden.vision.encode(tensors[kind]), tensors[f"{kind}_codes"])
        painted = golden.vision.decode(tensors[f"{kind}_codes"])
        torch.testing.assert_close(painted, tensors[f"{kind}_decoded"], atol=1e-4, rtol=0)


def drawing(model: Emulus, text: str, negative: str, scale: float, **shape: Any) -> Request:
    """What asks for a greedy guided picture."""
    prompt, null = (model.drawing_prompt(words, **shape)[0] for words in (text, negative))
    return Request(prompt_ids=prompt, null_ids=null, params=SamplingParams(temperature=0, guidance_scale=scale))


@pytest.mark.parametrize("compat", [None, "released"])
def test_golden_drawings(golden: Emulus, compat: Any) -> None:
    model = Emulus(golden.bundle, compat=compat, device="cpu")
    assert model.defaults.negative_prompt == EXPECTED["negative_prompt"]
    requests = []
    for entry in EXPECTED["drawings"]:
        shape = {"ratio": entry["ratio"], "image_area": entry["image_area"]}
        assert model.drawing_prompt(entry["text"], **shape) == (entry["ids"], tuple(entry["size"]))
        assert model.drawing_prompt(EXPECTED["negative_prompt"], **shape)[0] == entry["negative_ids"]
        requests.append(drawing(model, entry["text"], EXPECTED["negative_prompt"], entry["guidance_scale"], **shape))
    results = model.engine.generate(requests)
    assert [list(result.ids) for result in results] == [entry["new_ids"] for entry in EXPECTED["drawings"]]
    for entry in EXPECTED["drawings"]:
        options = {name: entry[name] for name in ("ratio", "image_area", "guidance_scale")}
        picture = model.generate_image(entry["text"], temperature=0.0, **options)
        visual = [id - 511 for id in entry["new_ids"] if id >= 511]
        codes = torch.tensor(visual).reshape(entry["size"])
        assert picture.tobytes() == model.decode(emulus.sequence.Image(codes)).tobytes()


def test_golden_answers(golden: Emulus) -> None:
    for entry in EXPECTED["answers"]:
        limits = {name: entry[name] for name in ("min_pixels", "max_pixels")}
        prompt = golden.understanding_prompt(entry["question"], [GOLDEN / entry["image"]], **limits)
        assert prompt == entry["ids"]
        assert greedy(golden, prompt, len(entry["new_ids"])) == entry["new_ids"]


# transformers, on the same files.


@pytest.fixture
def pair(released: Path, released_vision: Path, tmp_path: Path) -> tuple[Emulus, Any, Path]:
    """A checkpoint in Emulus as released, and in transformers."""
    transformers = pytest.importorskip("transformers")
    convert(released, tmp_path / "hf", to="transformers", vision=released_vision)
    theirs = transformers.Emu3ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    return emulus.load(released, vision=released_vision, device="cpu"), theirs, tmp_path / "hf"


def roles(model: Emulus) -> tuple[dict[str, int], range]:
    vocabulary = model.grammar.vocabulary
    return dict(vocabulary.specials), range(*vocabulary.visual_range)


def draw_in_transformers(model: Emulus, theirs: Any, request: Request, size: tuple[int, int]) -> list[int]:
    from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

    special, codes = roles(model)
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        request.params.guidance_scale, theirs, torch.tensor([request.null_ids])
    )
    ids = theirs.generate(
        torch.tensor([request.prompt_ids]),
        logits_processor=[guidance],
        prefix_allowed_tokens_fn=lambda _, ids: list(follow(ids.tolist(), *size, special, codes)),
        do_sample=False,
        max_new_tokens=size[0] * (size[1] + 1) + 3,
    )
    return ids[0, len(request.prompt_ids) :].tolist()


def test_logits_of_transformers(pair: tuple[Emulus, Any, Path]) -> None:
    ours, theirs, folder = pair
    ids = torch.randint(ours.grammar.vocabulary.size, (3, 50))
    with torch.inference_mode():
        logits = theirs(ids).logits
        for model in (ours, emulus.load(folder, device="cpu")):
            torch.testing.assert_close(model.decoder(ids), logits, atol=1e-4, rtol=0)


def test_drawing_like_transformers(pair: tuple[Emulus, Any, Path]) -> None:
    """Guided and held to the grammar, of several sizes at once; theirs one by one."""
    ours, theirs, _ = pair
    cases = [("a red apple", "1:1", 1024, 3.0), ("un été", "16:9", 2000, 3.0), ("USER: a", "2:3", 1500, 6.0)]
    requests, sizes = [], []
    for text, ratio, area, scale in cases:
        shape = {"ratio": ratio, "image_area": area}
        requests.append(drawing(ours, text, ours.defaults.negative_prompt, scale, **shape))
        sizes.append(ours.drawing_prompt(text, **shape)[1])
    assert len(set(sizes)) == 3
    results = ours.engine.generate(requests)
    for request, size, result in zip(requests, sizes, results, strict=True):
        assert list(result.ids) == draw_in_transformers(ours, theirs, request, size)
    assert len({result.ids for result in results}) == 3


def test_sampling_follows_the_distribution_of_transformers(pair: tuple[Emulus, Any, Path]) -> None:
    """Random numbers differ, so the frequencies of a first code are compared with guided, legal, top-k softmax."""
    from transformers.generation.logits_process import (
        PrefixConstrainedLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
    )

    ours, theirs, _ = pair
    request = drawing(ours, "a red apple", "lowres", 2.0, image_area=64)
    special, codes = roles(ours)
    ids = torch.tensor([request.prompt_ids])
    with torch.inference_mode():
        scores = theirs(ids).logits[:, -1]
        for process in (
            UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, theirs, torch.tensor([request.null_ids])),
            PrefixConstrainedLogitsProcessor(lambda _, ids: list(follow(ids.tolist(), 1, 1, special, codes)), 1),
            TemperatureLogitsWarper(1.5),
            TopKLogitsWarper(20),
        ):
            scores = process(ids, scores)
    wanted = scores.softmax(-1)[0]
    assert int((wanted > 0).sum()) == 20
    number = 4000
    params = [SamplingParams(temperature=1.5, top_k=20, guidance_scale=2.0, seed=seed) for seed in range(number)]
    requests = [Request(prompt_ids=request.prompt_ids, null_ids=request.null_ids, params=each) for each in params]
    drawn = torch.tensor([result.ids[0] for result in ours.engine.generate(requests, batch_size=1000)])
    counts = drawn.bincount(minlength=len(wanted)).double()
    assert counts[wanted == 0].sum() == 0
    kept = wanted > 0
    expected = number * wanted[kept].double()
    # Chi-squared with 19 degrees of freedom exceeds 51 once in ten thousand times; the seeds are fixed.
    assert float(((counts[kept] - expected) ** 2 / expected).sum()) < 51


@pytest.mark.parametrize("compat", [None, "released"])
def test_answering_like_transformers(pair: tuple[Emulus, Any, Path], compat: Any, tmp_path: Path) -> None:
    """From the picture's pixels in theirs, and from our ids in the decoder alone."""
    import transformers

    ours, theirs, folder = pair
    ours = Emulus(ours.bundle, compat=compat, device="cpu")
    edit(folder / "preprocessor_config.json", min_pixels=64)
    processor = transformers.Emu3Processor.from_pretrained(folder)
    convert(tmp_path / "released", tmp_path / "lm", to="transformers")
    alone = transformers.Emu3ForCausalLM.from_pretrained(tmp_path / "lm")
    vocabulary = ours.grammar.vocabulary
    # By default words come, and in the released code anything.
    rule: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
    if compat is None:
        words = [*range(vocabulary.text_size), vocabulary.eos]
        rule["prefix_allowed_tokens_fn"] = lambda _, __: words
    for height, width, question in ((32, 48, "what is it?"), (40, 24, "un été?")):
        noise = torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy()
        picture = PIL.Image.fromarray(noise)
        prompt = ours.understanding_prompt(question, [picture], min_pixels=64)
        text = f"You are a helpful assistant. USER: <image>{question}. ASSISTANT:"
        inputs = processor(text=text, images=picture, return_tensors="pt")
        assert inputs["pixel_values"].shape[-2:] == (height, width)
        answer = greedy(ours, prompt)
        assert inputs["input_ids"].shape[1] == len(prompt)
        assert theirs.generate(**inputs, **rule)[0, len(prompt) :].tolist() == answer
        assert alone.generate(torch.tensor([prompt]), **rule)[0, len(prompt) :].tolist() == answer
        assert len(set(answer)) > 3


def test_the_vision_tokenizer_of_transformers(pair: tuple[Emulus, Any, Path]) -> None:
    ours, theirs, _ = pair
    vq = theirs.model.vqmodel
    image, clip = torch.rand(2, 3, 24, 40) * 2 - 1, torch.rand(2, 8, 3, 16, 24) * 2 - 1
    for pixels in (image, clip):
        sides = torch.tensor([pixels.shape[-2:]] * len(pixels))
        with torch.inference_mode():
            codes = torch.stack(list(vq.encode(pixels, sides).image_tokens))
            painted = vq.decode(codes)
        assert torch.equal(ours.vision.encode(pixels), codes)
        assert len(codes.unique()) > 5
        torch.testing.assert_close(ours.vision.decode(codes), painted.reshape(pixels.shape), atol=1e-4, rtol=0)


# More than released.


def noise(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return PIL.Image.fromarray(torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture(scope="module")
def talker(golden: Emulus, tmp_path_factory: pytest.TempPathFactory) -> Emulus:
    """The same model, for pictures as small as it is."""
    folder = tmp_path_factory.mktemp("talker")
    golden.save(folder)
    edit(folder / "generation_config.json", min_pixels=64, max_pixels=256, max_text_tokens=16, height=8, width=8)
    return emulus.load(folder, device="cpu")


def block(model: Emulus, picture: PIL.Image.Image) -> list[int]:
    """The ids of a picture, written out."""
    v = model.grammar.vocabulary
    codes = model.encode(picture).codes
    rows = [id for row in codes.tolist() for id in [*(v.visual_start + code for code in row), v.eol]]
    return [v.boi, *model.text.encode(f"{codes.shape[0]}*{codes.shape[1]}"), v.img, *rows, v.eof, v.eoi]


def answered(model: Emulus, *parts: str | list[int]) -> str:
    """What is answered to a prompt written by hand."""
    v = model.grammar.vocabulary
    prompt = [v.bos] + [id for part in parts for id in (model.text.encode(part) if isinstance(part, str) else part)]
    ids = greedy(model, prompt, model.defaults.max_text_tokens)
    return model.text.decode([id for id in ids if v.is_text(id)]).strip()


def test_drawings_of_all_shapes_at_once(golden: Emulus) -> None:
    texts = ["a red apple", "a", "un été à la plage, ASSISTANT: a blue bird, a red apple", "bird"]
    ratios = ["1:1", "16:9", "2:3", "1:3"]
    together = golden.generate_images(texts, ratio=ratios, image_area=160, seed=5)
    assert len({picture.size for picture in together}) == 4
    for text, ratio, picture in zip(texts, ratios, together, strict=True):
        alone = golden.generate_image(text, ratio=ratio, image_area=160, seed=5)
        assert (alone.size, alone.tobytes()) == (picture.size, picture.tobytes())


def test_seeds_do_not_depend_on_the_batch(golden: Emulus) -> None:
    options = {"ratio": "4:3", "image_area": 200}
    several = golden.generate_images(["a bird", "an apple"], seed=7, num_images_per_prompt=3, **options)
    assert golden.generate_image("an apple", seed=9, **options).tobytes() == several[5].tobytes()
    assert len({picture.tobytes() for picture in several}) == 6


def test_one_set_draws_and_answers_in_turn(talker: Emulus) -> None:
    def both() -> tuple[bytes, str]:
        picture = talker.generate_image("a red apple", seed=1)
        return picture.tobytes(), talker.describe(picture)

    first = both()
    assert both() == first
    assert first[1]


def test_pictures_of_all_sizes_are_described_as_one_by_one(talker: Emulus) -> None:
    shown = [noise(8, 8), noise(12, 20, 1), noise(4, 6, 2), noise(40, 30, 3)]
    together = talker.describe_all(shown)
    assert together == [talker.describe(each) for each in shown]
    assert len(set(together)) == 4
    first = answered(
        talker, "You are a helpful assistant. USER: ", block(talker, shown[1]), "Please describe the image. ASSISTANT:"
    )
    assert together[1] == first


def test_several_pictures_in_one_question(talker: Emulus) -> None:
    one, two = noise(8, 10), noise(10, 8, 1)
    prompt = talker.understanding_prompt("Which?", [one, two])
    v, encode = talker.grammar.vocabulary, talker.text.encode
    before, after = "You are a helpful assistant. USER: ", "Which?. ASSISTANT:"
    assert prompt == [v.bos, *encode(before), *block(talker, one), *block(talker, two), *encode(after)]
    expected = answered(talker, before, block(talker, one), block(talker, two), after)
    assert talker.answer([one, two], "Which?") == expected != talker.answer([two, one], "Which?")
    parts = [{"type": "image", "image": one}, {"type": "image", "image": two}, {"type": "text", "text": "Which?"}]
    assert talker.chat([{"role": "user", "content": parts}]) == expected


def test_a_conversation_word_for_word(talker: Emulus) -> None:
    picture = noise(8, 8)
    shown = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": shown},
        {"role": "assistant", "content": "An apple."},
        {"role": "user", "content": "Red"},
    ]
    rest = "What is it?. ASSISTANT: An apple. USER: Red. ASSISTANT:"
    usual = answered(talker, "You are a helpful assistant. USER: ", block(talker, picture), rest)
    assert talker.chat(messages) == usual
    told = talker.chat([{"role": "system", "content": "You are a bird."}, *messages])
    assert told == answered(talker, "You are a bird. USER: ", block(talker, picture), rest) != usual
    assert talker.chat(messages[:1]) == talker.answer(picture, "What is it?") != usual


@pytest.mark.parametrize("order", ["", "a", "ua", "uu", "us", "usu", "uaa", "aua", "ssu"])
def test_roles_out_of_order(talker: Emulus, order: str) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    with pytest.raises(EmulusError, match=r"conversation"):
        talker.chat([{"role": names[letter], "content": "a"} for letter in order])


def test_a_picture_says_how_it_was_made(golden: Emulus, tmp_path: Path) -> None:
    picture = golden.generate_image("a red apple", ratio="2:1", image_area=128, seed=3, top_k=9)
    write_image(picture, tmp_path / "apple.png")
    with PIL.Image.open(tmp_path / "apple.png") as again:
        record = json.loads(again.info["emulus"])
        assert again.tobytes() == picture.tobytes()
    assert record["model"] == str(GOLDEN / "decoder")
    assert (record["prompt"], record["negative_prompt"]) == ("a red apple", EXPECTED["negative_prompt"])
    assert (record["width"], record["height"], record["seed"], record["top_k"]) == (16, 8, 3, 9)
    names = ("height", "width", "seed", "top_k", "top_p", "temperature", "guidance_scale", "negative_prompt")
    repeated = golden.generate_image(record["prompt"], **{name: record[name] for name in names})
    assert repeated.tobytes() == picture.tobytes()


def test_the_negative_prompt_is_the_unguided_branch(golden: Emulus) -> None:
    options = {"ratio": "1:1", "image_area": 64, "temperature": 0.0, "guidance_scale": 5.0}
    usual = golden.generate_image("a red apple", **options).tobytes()
    assert (
        golden.generate_image("a red apple", negative_prompt=EXPECTED["negative_prompt"], **options).tobytes() == usual
    )
    assert golden.generate_image("a red apple", negative_prompt="", **options).tobytes() != usual
    options.pop("guidance_scale")
    away = {"negative_prompt": "a bird", **options}
    same = [golden.generate_image("a bird", guidance_scale=scale, **away).tobytes() for scale in (1.0, 9.0)]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": "1:1", "height": 8}, "give height and width, or ratio and image_area, not both"),
        ({"image_area": 64, "width": 8}, "not both"),
        ({"ratio": ["1:1"]}, "1 ratios are given for 2 prompts"),
        ({"ratio": "wide"}, "'wide' is not width:height"),
        ({"ratio": "1:1", "image_area": 0}, "under 2 pixels"),
        ({"height": 9}, "height must be a multiple of 2"),
    ],
)
def test_shapes_that_are_none(golden: Emulus, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EmulusError, match=says):
        golden.generate_images(["a", "b"], **options)


@pytest.mark.parametrize(
    ("context", "area", "side", "most", "asked"),
    [
        (9216, 518400, 720, 1024, "You are a helpful assistant. USER: a cat. ASSISTANT:"),
        (131_072, 262144, 512, 1024, "You are a helpful assistant. USER: a cat. ASSISTANT:"),
        (5120, 262144, 512, 512, "a cat"),  # larger pictures would exceed its context
    ],
    ids=["Gen", "Chat", "Stage1"],
)
def test_each_checkpoint_has_its_defaults(
    released: Path, context: int, area: int, side: int, most: int, asked: str
) -> None:
    edit(released / "config.json", max_position_embeddings=context, image_area=area)
    model = emulus.load(released, device="cpu")
    assert (model.defaults.height, model.defaults.width) == (side, side)
    assert (model.defaults.top_k, model.defaults.guidance_scale, model.defaults.temperature) == (2048, 3.0, 1.0)
    assert (model.defaults.min_pixels, model.defaults.max_pixels) == (512 * 512, most * most)
    assert model.defaults.negative_prompt == EXPECTED["negative_prompt"]
    v, encode = model.grammar.vocabulary, model.text.encode
    assert model.understanding_prompt("a cat") == [v.bos, *encode(asked)]
    size = encode(f"{side // 8}*{side // 8}")
    assert model.drawing_prompt("a cat") == ([v.bos, *encode("a cat"), v.boi, *size, v.img], (side // 8, side // 8))


def test_settings_of_a_transformers_folder(tmp_path: Path) -> None:
    convert(GOLDEN / "decoder", tmp_path / "hf", to="transformers", vision=GOLDEN / "vision")
    settings = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert (settings["do_sample"], settings["top_k"]) == (True, 2048)
    edit(tmp_path / "hf/generation_config.json", top_k=7, temperature=0.5)
    model = emulus.load(tmp_path / "hf", device="cpu")
    assert (model.preset.wording, model.defaults.top_k, model.defaults.temperature) == (
        emulus.sequence.EMU3,
        7,
        0.5,
    )
    edit(tmp_path / "hf/generation_config.json", do_sample=False)
    assert emulus.load(tmp_path / "hf", device="cpu").defaults.top_k == 2048


@pytest.mark.parametrize("older", [False, True], ids=["newer keys", "older keys"])
def test_a_transformers_folder_draws_the_same(golden: Emulus, tmp_path: Path, older: bool) -> None:
    transformers = pytest.importorskip("transformers")
    convert(GOLDEN / "decoder", tmp_path / "hf", to="transformers", vision=GOLDEN / "vision")
    theirs = transformers.Emu3ForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "hf", save_original_format=older)
    model = emulus.load(tmp_path / "hf", device="cpu")
    options = {"ratio": "3:2", "image_area": 96, "seed": 2, "top_k": 2048}
    assert model.generate_image("a bird", **options).tobytes() == golden.generate_image("a bird", **options).tobytes()


# compat="released".


@pytest.mark.parametrize(
    ("name", "id"),
    [("<|extra_7|>", 310), ("<|image start|>", 509), ("<|visual token 000003|>", 514), ("<|endoftext|>", 300)],
)
def test_specials_in_a_users_text(golden: Emulus, golden_compat: Emulus, name: str, id: int) -> None:
    bos, encode = golden.grammar.vocabulary.bos, golden.text.encode
    prompts = [model.drawing_prompt(f"a {name} bird", image_area=16)[0] for model in (golden, golden_compat)]
    opening = [509, *encode("2*2"), 508]
    assert prompts[0] == [bos, *encode(f"a {name} bird"), *opening]
    assert prompts[1] == [bos, *encode("a "), id, *encode(" bird"), *opening]
    assert text_ids(golden, prompts[0][1 : -len(opening)])


def test_pictures_padded_to_one_another(golden: Emulus, golden_compat: Emulus) -> None:
    shown = [noise(8, 16), noise(16, 8, 1)]
    limits = {"min_pixels": 64, "max_pixels": 256}
    alone = [golden.encode_all([each], **limits)[0] for each in shown]
    assert golden.encode_all(shown, **limits) == alone == golden_compat.encode_all(shown, **limits)
    padded = golden_compat.encode_all(shown, padding_image=True, **limits)
    assert [each.codes.shape for each in padded] == [each.codes.shape for each in alone]
    assert padded != alone
    with pytest.raises(EmulusError, match="padding_image moves codes"):
        golden.encode_all(shown, padding_image=True, **limits)


def test_a_column_of_codes(golden: Emulus, golden_compat: Emulus) -> None:
    shape = {"ratio": "1:3", "image_area": 12}
    for model, ends in ((golden, ("eof", "eoi", "eos")), (golden_compat, ("eof", "eol", "eos"))):
        special, codes = roles(model)
        request = drawing(model, "a bird", "", 3.0, **shape)
        (result,) = model.engine.generate([request])
        assert model.drawing_prompt("a bird", **shape)[1] == (3, 1)
        assert list(result.ids[1:6:2]) == [special["eol"]] * 3
        assert all(id in codes for id in result.ids[:6:2])
        assert result.ids[6:] == tuple(special[role] for role in ends)


def test_a_column_by_the_released_rule_is_that_of_transformers(pair: tuple[Emulus, Any, Path]) -> None:
    ours, theirs, _ = pair
    compat = Emulus(ours.bundle, compat="released", device="cpu")
    request = drawing(compat, "a bird", "lowres", 3.0, ratio="1:3", image_area=192)
    (result,) = compat.engine.generate([request])
    assert list(result.ids) == draw_in_transformers(compat, theirs, request, (3, 1))


# A decoder without its vision tokenizer.


def test_the_vision_tokenizer_that_belongs_to_it(
    published: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(published.parent)
    monkeypatch.setattr("emulus.log.logger.propagate", True)
    caplog.set_level("INFO", logger="emulus")
    model = emulus.load("BAAI/Emu3-Gen", device="cpu")
    assert model.drawing_prompt("a cat", ratio="16:9", image_area=518400)[1] == (68, 120)
    assert "BAAI/Emu3-VisionTokenizer" not in caplog.text
    assert model.generate_image("a cat", height=16, width=24).size == (24, 16)
    assert "BAAI/Emu3-Gen holds no vision tokenizer: taking BAAI/Emu3-VisionTokenizer" in caplog.text
    (published / "Emu3-VisionTokenizer").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(published / "cache"))
    lonely = emulus.load("BAAI/Emu3-Gen", device="cpu")
    with pytest.raises(EmulusError, match=r"needs the vision tokenizer it was trained with: .*OFFLINE") as caught:
        lonely.generate_image("a cat", height=16, width=24)
    assert "\n" not in str(caught.value)


def test_another_codebook_has_no_default(golden: Emulus) -> None:
    with pytest.raises(EmulusError, match="no vision tokenizer"):
        _ = emulus.load(GOLDEN / "decoder", device="cpu").vision


# Types and memory.


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float16, torch.float16),
        (None, torch.bfloat16),
    ],
)
def test_every_type_draws_and_answers(dtype: Any, stored: torch.dtype) -> None:
    model = emulus.load(GOLDEN / "decoder", vision=GOLDEN / "vision", device="cpu", dtype=dtype)
    assert {value.dtype for value in model.decoder.state_dict().values()} == {stored}
    assert model.vision.dtype == torch.float32
    use(model)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_models_draw_and_answer(released: Path, released_vision: Path, bits: Any) -> None:
    use(emulus.load(released, vision=released_vision, device="cpu", quantize=bits))


def use(model: Emulus) -> None:
    side = 4 * model.vision.config.spatial_factor
    assert model.generate_image("a bird", height=side, width=side).size == (side, side)
    prompt = model.understanding_prompt("what?", [noise(side, side)], min_pixels=64)
    answer = greedy(model, prompt, 8)
    assert 1 <= len(answer) <= 8
    assert text_ids(model, answer[:-1])


def test_types_that_are_none() -> None:
    with pytest.raises(EmulusError, match="unknown dtype 'int3'"):
        emulus.load(GOLDEN / "decoder", device="cpu", dtype="int3")
    with pytest.raises(EmulusError, match=r"int3.*int8|int8.*int3"):
        emulus.load(GOLDEN / "decoder", device="cpu", quantize="int3")  # type: ignore[arg-type]


def test_a_model_that_does_not_fit_says_what_would() -> None:
    needed = 1_600_000  # weights of 0.1 MB, and keys and values of 18,432 tokens
    assert emulus.load(GOLDEN / "decoder", device="cpu", max_memory={"cpu": needed}).decoder
    with pytest.raises(EmulusError, match=r"what fits: dtype bfloat16"):
        emulus.load(GOLDEN / "decoder", device="cpu", max_memory={"cpu": needed // 2})
    with pytest.raises(EmulusError, match="nothing smaller fits either"):
        emulus.load(GOLDEN / "decoder", device="cpu", max_memory={"cpu": 1000})


# What a model is not for, and what is no list


def test_the_vision_tokenizer_is_found_missing_before_anything_is_drawn(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (published / "Emu3-VisionTokenizer").unlink()
    model = emulus.load(published / "Emu3-Gen", device="cpu")
    monkeypatch.setattr(model.engine, "generate", lambda *_, **__: pytest.fail("drawn in vain"))
    with pytest.raises(EmulusError, match=r"needs the vision tokenizer it was trained with"):
        model.generate_image("a cat")


def test_a_task_of_another_checkpoint_is_remarked_once(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = emulus.load(published / "Emu3-Chat", vision=published / "Emu3-VisionTokenizer", device="cpu")
    with caplog.at_level("WARNING", logger="emulus"):
        model.generate_images(["a cat"], guidance_scale=1.0)
        model.generate_images(["a cat"], guidance_scale=1.0)
        model.describe(PIL.Image.new("RGB", (32, 32)), max_new_tokens=1, min_pixels=0, max_pixels=32 * 32)
    assert [record.getMessage().partition(" was ")[2] for record in caplog.records] == [
        "trained to caption, answer and chat, not to draw"
    ]


def test_a_preset_can_be_chosen_and_is_kept(published: Path, tmp_path: Path) -> None:
    chat = emulus.load(published / "Emu3-Stage1", preset="emu3", device="cpu")
    assert chat.text.decode(chat.understanding_prompt("hi")[1:]) == "You are a helpful assistant. USER: hi. ASSISTANT:"
    assert chat.defaults.max_pixels == 1024 * 1024
    chat.save(tmp_path / "kept")
    assert emulus.load(tmp_path / "kept", device="cpu").bundle.preset == "emu3"
    with pytest.raises(EmulusError, match="did you mean 'emu3'"):
        emulus.load(published / "Emu3-Stage1", preset="emu33")


@pytest.mark.parametrize("to", ["emulus", "transformers"])
def test_a_converted_checkpoint_draws_the_same_size(published: Path, tmp_path: Path, to: Any) -> None:
    for name in ("Emu3-Gen", "Emu3-Stage1"):
        convert(published / name, tmp_path / name / to, to=to)
        before, after = (emulus.load(each, device="cpu") for each in (published / name, tmp_path / name / to))
        assert after.defaults == before.defaults
        assert after.bundle.preset == before.bundle.preset


def test_a_vision_tokenizer_alone_takes_pictures_as_its_models_do(published: Path) -> None:
    vision = emulus.load(published / "Emu3-VisionTokenizer", device="cpu")
    assert vision.encode_all([PIL.Image.new("RGB", (60, 40))], min_pixels=0)[0].codes.shape == (5, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model: model.generate_images("a cat"), "put it into a list"),
        (lambda model: model.describe_all(PIL.Image.new("RGB", (9, 9))), "put it into a list"),
        (lambda model: model.understanding_prompt("hi", images="a.png"), "put it into a list"),
        (lambda model: model.chat("hi"), "put it into a list"),
        (lambda model: model.chat(["hi"]), "message 1 of the conversation is not"),
        (lambda model: model.describe(PIL.Image.new("RGB", (9, 9)), min_pixels=9, max_pixels=4), "at most max_pixels"),
        (lambda model: model.describe(PIL.Image.new("RGB", (9, 9)), max_tokens=9), "unknown option 'max_tokens'"),
        (
            lambda model: model.describe(PIL.Image.new("RGB", (999, 999)), max_pixels=10**6),
            "show less, or smaller",
        ),
    ],
)
def test_misuse_is_one_clear_line(published: Path, wrong: Any, message: str) -> None:
    model = emulus.load(published / "Emu3-Gen", vision=published / "Emu3-VisionTokenizer", device="cpu")
    with pytest.raises(EmulusError, match=message):
        wrong(model)


@pytest.mark.parametrize(
    "options", [{"compat": "releasd"}, {"dtype": torch.int8}, {"dtype": "float8"}, {"device": "gpu"}]
)
def test_wrong_ways_of_loading(published: Path, options: dict[str, Any]) -> None:
    with pytest.raises(EmulusError):
        emulus.load(published / "Emu3-Gen", **options)
