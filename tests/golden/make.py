"""Makes this folder: a tiny Emu3 in the released files, and what transformers and tiktoken compute with it.

Nothing of Emulus is used, so that its tests compare it with something else. Run it in an environment with the dev extra
and commit what it writes::

    python tests/golden/make.py

``decoder/`` is laid out like BAAI/Emu3-Gen, ``vision/`` like BAAI/Emu3-VisionTokenizer (with two levels, hence 2 pixels
per code, and numbers of 16 bits, to be small). ``expected.json`` and ``expected.safetensors`` hold inputs and outputs.

Sources of names, prompts and sizes: baaivision/Emu3, emu3/mllm and emu3/tokenizer.
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tiktoken._educational import bpe_train
from torch import Tensor
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.models.emu3.image_processing_emu3 import smart_resize

HERE = Path(__file__).parent
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
LEARNT_FROM = (
    "a red apple, a blue bird. You are a helpful assistant. USER: what is it? ASSISTANT: un été à la plage" * 3
)
TEXTS = [
    "a red apple",
    "",
    "  two  spaces\n\nand newlines\t",
    "数字 12345 と 日本語",
    "I'll don't WE'RE",
    "L'e\u0301te\u0301 a\u0300 la plage, 3.14!",
    "emoji 😀👩\u200d👧 ok",
    "<|image start|>9*9<|image token|> and <|extra_7|>",
]
CODES, FACTOR = 64, 2
ROLES = {
    "pad": "<|endoftext|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "img": "<|image token|>",
    "boi": "<|image start|>",
    "eoi": "<|image end|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
}
LINES = ["<|image token|>", "<|image start|>", "<|image end|>", *(f"<|visual token {n:06d}|>" for n in range(CODES))]


class Text:
    """The released text tokenizer, on tiktoken."""

    def __init__(self) -> None:
        ranks = bpe_train(LEARNT_FROM, 300, PATTERN, visualise=None)
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)), *LINES]
        self.specials = {name: len(ranks) + n for n, name in enumerate(names)}
        self.size = len(ranks) + len(names)
        self.encoding = tiktoken.Encoding(
            "golden", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=self.specials
        )

    def plain(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def whole(self, text: str) -> list[int]:
        """Specials in the text are specials, as the released tokenizer has it."""
        return self.encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")


def build(text: Text) -> Any:
    """The model, in transformers, its numbers rounded to what the files will hold."""
    torch.manual_seed(3)
    ids = {role: text.specials[name] for role, name in ROLES.items()}
    decoder = transformers.Emu3TextConfig(
        vocab_size=text.size,
        hidden_size=8,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=9216,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.5,
        **{f"{role}_token_id": ids[role] for role in ("pad", "bos", "eos")},
    )
    vq = transformers.Emu3VQVAEConfig(
        codebook_size=CODES,
        base_channels=32,
        channel_multiplier=[1] * 2,
        num_res_blocks=1,
        attn_resolutions=[1],
        hidden_size=32,
    )
    byte_names = {f"piece {rank}": rank for rank in text.ranks.values()}
    vocabulary = {"<image>" if name == "<|extra_0|>" else name: id for name, id in text.specials.items()}
    model = transformers.Emu3ForConditionalGeneration(
        transformers.Emu3Config(text_config=decoder, vq_config=vq, vocabulary_map=byte_names | vocabulary)
    ).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            value.uniform_(-0.5, 0.5)
        elif name.endswith("quantize.embedding.weight"):
            value.normal_()
        if value.is_floating_point():
            value.copy_(value.to(_stored(name)))
    return model


def _stored(name: str) -> torch.dtype:
    return torch.float16 if "vqmodel" in name else torch.bfloat16


def released_name(name: str) -> str:
    """What the released files call a vision tokenizer's tensor."""
    name = name.removeprefix("model.vqmodel.").replace("middle_block.attn_norm.", "middle_block.attn_1.norm.")
    name = re.sub(r"attn_norms\.(\d+)\.", r"attn.\1.norm.", name)
    for theirs, released in (("down_block.down", "down"), ("up_block.up", "up"), ("middle_block", "mid")):
        name = name.replace(theirs, released)
    return name.replace("out_proj", "proj_out").replace("_proj.", ".")


def write_model(text: Text, model: Any) -> None:
    for folder in ("decoder", "vision"):
        (HERE / folder).mkdir(exist_ok=True)
    stored = {name: value.to(_stored(name)) if value.is_floating_point() else value
              for name, value in model.state_dict().items()}  # fmt: skip
    vision = {}
    for name, value in stored.items():
        if name.startswith("model.vqmodel."):
            kernel = value[..., None, None] if re.search(r"_proj\.weight$", name) else value
            vision[released_name(name)] = kernel.contiguous()
    save_file(vision, HERE / "vision/model.safetensors", metadata={"format": "pt"})
    vq = model.config.vq_config
    write_json(
        HERE / "vision/config.json",
        {
            "architectures": ["Emu3VisionVQModel"],
            "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"},
            "model_type": "Emu3VisionVQ",
            "codebook_size": vq.codebook_size,
            "embed_dim": vq.embed_dim,
            "z_channels": vq.latent_channels,
            "double_z": False,
            "in_channels": 3,
            "out_channels": 3,
            "temporal_downsample_factor": vq.temporal_downsample_factor,
            "ch": vq.base_channels,
            "ch_mult": list(vq.channel_multiplier),
            "num_res_blocks": vq.num_res_blocks,
            "attn_resolutions": list(vq.attn_resolutions),
            "dropout": 0.0,
            "torch_dtype": "float16",
            "transformers_version": "4.44.0",
        },
    )
    decoder = {
        name.replace("model.text_model.", "model."): value for name, value in stored.items() if "vqmodel" not in name
    }
    weight_map = {}
    for number, names in enumerate((list(decoder)[::2], list(decoder)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: decoder[name] for name in names}, HERE / "decoder" / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(value.nbytes for value in decoder.values())
    write_json(
        HERE / "decoder/model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    shape = model.config.text_config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range")
    ids = {f"{role}_token_id": text.specials[name] for role, name in ROLES.items()}
    write_json(
        HERE / "decoder/config.json",
        {
            "architectures": ["Emu3ForCausalLM"],
            "attention_dropout": 0.1,
            "auto_map": {
                "AutoConfig": "configuration_emu3.Emu3Config",
                "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM",
            },
            **{name: getattr(shape, name) for name in same},
            **ids,
            "hidden_act": "silu",
            "image_area": 1024,
            "model_type": "Emu3",
            "pretraining_tp": 1,
            "rope_scaling": None,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.44.0",
            "use_cache": True,
        },
    )
    special = {key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(
        HERE / "decoder/generation_config.json",
        {"_from_model_config": True, **special, "transformers_version": "4.44.0"},
    )
    lines = (f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in text.ranks.items())
    (HERE / "decoder/emu3.tiktoken").write_text("".join(lines))
    (HERE / "decoder/emu3_vision_tokens.txt").write_text("".join(f"{line}\n" for line in LINES))


def write_pictures() -> list[str]:
    """Two pictures: one to be shown as it is, one to be made smaller."""
    names = []
    for seed, (height, width) in enumerate([(12, 16), (30, 22)]):
        rows, columns = np.mgrid[:height, :width]
        waves = [np.sin(rows / (2 + n + seed) + columns / (3 + n)) for n in range(3)]
        pixels = (127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)
        names.append(f"picture_{seed}.png")
        Image.fromarray(pixels).save(HERE / names[-1])
    return names


def drawings(text: Text, model: Any) -> list[dict[str, Any]]:
    """Guided greedy pictures as the released script makes them."""
    found = []
    for caption, ratio, area, scale in (
        ("a red apple", "1:1", 64, 3.0),
        ("un été à la plage", "16:9", 100, 3.0),
        ("a blue bird, 2024", "3:4", 80, 5.0),
    ):
        h, w = transformers.Emu3Processor.calculate_generate_size(None, ratio, area, FACTOR)
        opening = f"<|image start|>{h}*{w}<|image token|>"
        prompt, negative = (text.whole(f"<|extra_203|>{words}{opening}") for words in (caption, NEGATIVE))
        names = {role: text.specials[name] for role, name in ROLES.items()}
        codes = list(range(text.specials[LINES[3]], text.size))

        def follow(_: int, ids: Tensor, h: int = h, w: int = w, names: Any = names, codes: Any = codes) -> list[int]:
            offset = len(ids) - int((ids == names["img"]).nonzero()[0])
            if offset % (w + 1) == 0:
                return [names["eol"]]
            after = {1: "eof", 2: "eoi", 3: "eos"}.get(offset - h * (w + 1))
            return codes if after is None else [names[after]]

        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model, torch.tensor([negative]))
        whole = model.generate(
            torch.tensor([prompt]),
            logits_processor=[guidance],
            prefix_allowed_tokens_fn=follow,
            do_sample=False,
            max_new_tokens=h * (w + 1) + 3,
        )
        found.append(
            {"text": caption, "ratio": ratio, "image_area": area, "size": [h, w], "guidance_scale": scale}
            | {"ids": prompt, "negative_ids": negative, "new_ids": whole[0, len(prompt) :].tolist()}
        )
    return found


def answers(text: Text, model: Any, pictures: list[str]) -> list[dict[str, Any]]:
    """Greedy answers about pictures, the codes put into the prompt as the released processor does."""
    found = []
    for name, question in zip(pictures, ("Please describe the image", "What colour is it?"), strict=True):
        picture = Image.open(HERE / name).convert("RGB")
        least, most = 64, 300
        height, width = smart_resize(picture.height, picture.width, FACTOR, least, most)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.array(picture)).float() / 255 - 0.5) / 0.5
        codes = model.model.vqmodel.encode(pixels.permute(2, 0, 1)[None], torch.tensor([[height, width]])).image_tokens
        rows = ("".join(f"<|visual token {code:06d}|>" for code in row) + ROLES["eol"] for row in codes[0].tolist())
        block = f"<|image start|>{height // FACTOR}*{width // FACTOR}<|image token|>{''.join(rows)}"
        block += f"{ROLES['eof']}{ROLES['eoi']}"
        prompt = f"{ROLES['bos']}You are a helpful assistant. USER: {block}{question}. ASSISTANT:"
        ids = text.whole(prompt)
        # Only text and the end may come, so that an untrained model's answer is words.
        words = [*range(len(text.ranks)), text.specials[ROLES["eos"]]]
        whole = model.generate(
            torch.tensor([ids]),
            prefix_allowed_tokens_fn=lambda _, __, words=words: words,
            do_sample=False,
            max_new_tokens=24,
        )
        found.append(
            {"image": name, "question": question, "min_pixels": least, "max_pixels": most, "ids": ids}
            | {"new_ids": whole[0, len(ids) :].tolist()}
        )
    return found


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n")


@torch.inference_mode()
def main() -> None:
    text = Text()
    model = build(text)
    write_model(text, model)
    pictures = write_pictures()
    torch.manual_seed(4)
    ids = torch.randint(0, text.size, (2, 24))
    image, clip = torch.rand(2, 3, 12, 8) * 2 - 1, torch.rand(1, 8, 3, 8, 8) * 2 - 1
    vq = model.model.vqmodel
    codes = vq.encode(image, torch.tensor([[12, 8]] * 2)).image_tokens
    clip_codes = vq.encode(clip, torch.tensor([[8, 8]])).image_tokens
    tensors = {
        "ids": ids,
        "logits": model(ids).logits[:, -2:],
        "image": image,
        "image_codes": torch.stack(list(codes)),
        "image_decoded": vq.decode(torch.stack(list(codes))),
        "clip": clip,
        "clip_codes": torch.stack(list(clip_codes)),
        "clip_decoded": vq.decode(torch.stack(list(clip_codes))),
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, HERE / "expected.safetensors")
    expected = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "negative_prompt": NEGATIVE,
        "text": [{"text": each, "ids": text.plain(each), "released_ids": text.whole(each)} for each in TEXTS],
        "drawings": drawings(text, model),
        "answers": answers(text, model, pictures),
    }
    (HERE / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=None) + "\n")
    for path in HERE.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
