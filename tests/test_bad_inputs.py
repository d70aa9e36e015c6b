"""Bad input of every kind: a specific error that says what is wrong, and nothing left behind.

Each case is a call that must raise; it may write to `w.out` only, and that folder must stay empty. Cases of the command line
must end with exit code 2 and one line on standard error.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llamagen import class_pipeline, text_encoder, text_pipeline
from tiny_unified import unified_pipeline

import armm
from armm.cli.main import main
from armm.convert import CheckpointError, CheckpointKeysError, CheckpointShapeError, UnsafeCheckpointError
from armm.data.scenes import detokenize, render, sample_scenes, tokenize
from armm.training import load_recipe
from armm.training.task import build_task
from pipelines.unified_image_to_text import UnifiedImageToTextPipeline
from pipelines.unified_inpaint import UnifiedInpaintPipeline
from pipelines.unified_text_to_image import UnifiedTextToImagePipeline
from tokenizers_visual import Codes, VQTokenizer

PARITY = Path(__file__).parent / "parity" / "cases" / "llamagen"
TRUNK = {"dim": 32, "num_layers": 2, "num_heads": 2, "mlp_hidden": 48, "rotary_axes": [8, 8]}
PROMPT = "a red sphere"


class Case(NamedTuple):
    name: str
    call: Callable[[Any], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    says: str


class Harmful:
    """Pickles to a call that would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def damaged_copy(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def edit_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    """Tiny pipelines, damaged files, recipes and pictures, made once."""
    root = tmp_path_factory.mktemp("inputs")
    world = SimpleNamespace(root=root, out=tmp_path_factory.mktemp("out"))
    world.c2i, world.t2i = class_pipeline(), text_pipeline(**text_encoder())
    world.tokenizer, world.model = world.c2i.tokenizer, world.c2i.transformer
    world.draw = unified_pipeline()
    parts = {**world.draw.components, "vocabulary": world.draw.words.vocabulary}
    world.read, world.paint = UnifiedImageToTextPipeline(**parts), UnifiedInpaintPipeline(**parts)
    world.picture, world.mask = Image.new("RGB", (32, 32), "gray"), Image.new("L", (32, 32), 255)
    world.words = world.draw.words.vocabulary
    world.generator = torch.Generator().manual_seed(0)

    good = root / "good"
    world.c2i.save_pretrained(good)
    world.good, world.unified = good, root / "unified"
    world.draw.save_pretrained(world.unified)
    world.reader = root / "reader"
    world.read.save_pretrained(world.reader)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    world.folders = {
        "cut weights": lambda d: cut(d / weights),
        "missing tensor": lambda d: edit_weights(d / weights, lambda s: s.pop("head.projection.weight")),
        "extra tensor": lambda d: edit_weights(d / weights, lambda s: s.update(surplus=torch.zeros(2))),
        "wrong shape": lambda d: edit_weights(
            d / weights, lambda s: s.update({"head.projection.weight": torch.zeros(2, 2)})
        ),
        "no weights": lambda d: (d / weights).unlink(),
        "no component": lambda d: shutil.rmtree(d / "tokenizer"),
        "no index": lambda d: (d / "model_index.json").unlink(),
        "broken index": lambda d: (d / "model_index.json").write_text("{"),
        "nameless index": lambda d: edit_json(d / "model_index.json", _class_name=3),
        "unknown pipeline": lambda d: edit_json(d / "model_index.json", _class_name="LlamagenPipeline"),
        "unknown module": lambda d: edit_json(
            d / "model_index.json", tokenizer=["tokenizers_visual.nope", "VQTokenizer"]
        ),
        "unknown class": lambda d: edit_json(d / "model_index.json", tokenizer=["tokenizers_visual.codes", "Nope"]),
        "unknown setting": lambda d: edit_json(d / "model_index.json", generation_config={"guidance": 2.0}),
    }
    for name, change in world.folders.items():
        world.folders[name] = damaged_copy(good, root / name.replace(" ", "_"), change)

    checkpoint = torch.load(PARITY / "c2i" / "checkpoint.pt", weights_only=False)
    state = checkpoint["model"] if "model" in checkpoint else checkpoint
    world.files = {
        name: root / f"{name}.pt" for name in ("cut", "code", "list", "empty", "missing", "extra", "shape", "text")
    }
    shutil.copy(PARITY / "c2i" / "checkpoint.pt", world.files["cut"])
    cut(world.files["cut"])
    torch.save({"model": state, "args": Harmful(world.out / "owned")}, world.files["code"])
    torch.save([1, 2], world.files["list"])
    world.files["empty"].write_bytes(b"")
    torch.save({"model": {k: v for k, v in state.items() if k != "norm.weight"}}, world.files["missing"])
    torch.save({"model": {**state, "surplus.weight": torch.zeros(2)}}, world.files["extra"])
    torch.save({"model": {**state, "norm.weight": torch.zeros(3)}}, world.files["shape"])
    world.files["text"].write_text("not a checkpoint")
    world.files["pickle"] = root / "plain.pkl"
    world.files["pickle"].write_bytes(pickle.dumps({"model": Harmful(world.out / "owned")}, protocol=2))
    world.c2i_file, world.vq_file = PARITY / "c2i" / "checkpoint.pt", PARITY / "tokenizer" / "checkpoint.pt"

    world.recipe = root / "recipe.yaml"
    content = {"task": "vq_tokenizer", "output": str(world.out / "run"), "steps": 2, "batch_size": 2}
    world.recipe.write_text(yaml.safe_dump(content))
    world.broken_recipe, world.list_recipe = root / "broken.yaml", root / "list.yaml"
    world.broken_recipe.write_text("a: [1")
    world.list_recipe.write_text("- 1\n- 2\n")
    world.no_task = root / "no_task.yaml"
    world.no_task.write_text("output: x\nsteps: 3\n")

    world.image = root / "image.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(world.image)
    world.text_file = root / "notes.png"
    world.text_file.write_text("not a picture")
    world.cut_image = root / "cut.png"
    Image.effect_noise((64, 64), 50).save(world.cut_image)
    cut(world.cut_image)
    world.huge_image = root / "huge.png"
    world.huge_image.write_bytes(huge_png())
    world.full = root / "full"
    world.full.mkdir()
    (world.full / "something").write_text("x")
    return world


def huge_png(side: int = 60000) -> bytes:
    """A few bytes that claim to be a picture of `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def recipe_with(**overrides: Any) -> Callable[[Any], Any]:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return lambda w: load_recipe(w.recipe, dotted)


FRONT_DOOR = [
    Case("name", lambda w: armm.LlamagenPipeline, AttributeError, "did you mean LlamaGenPipeline"),
    Case("task", lambda w: armm.pipeline("text-to-imag"), ValueError, "Did you mean 'text-to-image'"),
    Case("model", lambda w: armm.pipeline("llamagen-c2i-b-255"), ValueError, "llamagen-c2i-b-256"),
    Case("tokenizer as model", lambda w: armm.pipeline("llamagen-vq-ds16-c2i"), ValueError, "is a tokenizer"),
    Case("path as model", lambda w: armm.pipeline("./nothing/here"), ValueError, "no directory"),
    Case("zoo task", lambda w: armm.list_models(task="video"), ValueError, "choose from"),
    Case("zoo name", lambda w: armm.zoo.get("llamagen-c2i-b-25"), ValueError, "did you mean"),
    Case("weights", lambda w: armm.weights.path("scene"), FileNotFoundError, "no shipped weights named 'scene'"),
    Case("recipe name", lambda w: armm.weights.recipe("scenes"), FileNotFoundError, "no shipped recipe named"),
    Case("family", lambda w: armm.convert.convert("lamagen", w.c2i_file), ValueError, "did you mean 'llamagen'"),
]

ARGUMENTS = [
    Case("no condition", lambda w: w.c2i(), ValueError, "give `class_labels`, got neither"),
    Case("prompt for classes", lambda w: w.c2i(prompt=PROMPT), ValueError, "conditioned on a class"),
    Case("class for prompts", lambda w: w.t2i(class_labels=1), ValueError, "conditioned on a text"),
    Case("both", lambda w: w.t2i(prompt=PROMPT, prompt_embeds=torch.zeros(1, 8, 24)), ValueError, "give `prompt` or"),
    Case("class too large", lambda w: w.c2i(class_labels=10), ValueError, "between 0 and 9, got 10"),
    Case("class negative", lambda w: w.c2i(class_labels=[1, -1]), ValueError, "got -1"),
    Case("class fraction", lambda w: w.c2i(class_labels=1.5), TypeError, "class numbers or names"),
    Case("class name", lambda w: w.c2i(class_labels="dog"), ValueError, "this checkpoint has 10"),
    Case("no classes", lambda w: w.c2i(class_labels=[]), ValueError, "is empty"),
    Case("prompt number", lambda w: w.t2i(prompt=3), TypeError, "`prompt` must be a string"),
    Case("no prompts", lambda w: w.t2i(prompt=[]), TypeError, "non-empty list of strings"),
    Case(
        "mask alone",
        lambda w: w.t2i(prompt=PROMPT, prompt_attention_mask=torch.ones(1, 8)),
        ValueError,
        "both or neither",
    ),
    Case("embeds width", lambda w: w.t2i(prompt_embeds=torch.zeros(1, 8, 23)), ValueError, "24"),
    Case("embeds shape", lambda w: w.t2i(prompt_embeds=torch.zeros(8, 24)), (ValueError, TypeError), "prompt_embeds"),
    Case("height", lambda w: w.c2i(class_labels=1, height=15), ValueError, "multiple of 4"),
    Case("width zero", lambda w: w.c2i(class_labels=1, width=0), ValueError, "`width` must be at least 4"),
    Case("height text", lambda w: w.c2i(class_labels=1, height="16"), TypeError, "`height` must be an integer"),
    Case("no images", lambda w: w.c2i(class_labels=1, num_images_per_prompt=0), ValueError, "at least 1"),
    Case("guidance text", lambda w: w.c2i(class_labels=1, guidance_scale="4"), TypeError, "`guidance_scale`"),
    Case("guidance nan", lambda w: w.c2i(class_labels=1, guidance_scale=float("nan")), ValueError, "`guidance_scale`"),
    Case(
        "temperature", lambda w: w.c2i(class_labels=1, temperature=-1.0), ValueError, "`temperature` must be at least 0"
    ),
    Case("top_k", lambda w: w.c2i(class_labels=1, top_k=2.5), TypeError, "`top_k` must be an integer"),
    Case("top_p", lambda w: w.c2i(class_labels=1, top_p=1.5), ValueError, "between 0.0 and 1.0, got 1.5"),
    Case("output type", lambda w: w.c2i(class_labels=1, output_type="jpeg"), ValueError, "got 'jpeg'"),
    Case(
        "generator kind",
        lambda w: w.c2i(class_labels=1, generator=7),
        TypeError,
        "`generator` must be a torch.Generator",
    ),
    Case("generators", lambda w: w.c2i(class_labels=[1, 2], generator=[w.generator]), ValueError, "holds 1 generators"),
    Case("latents kind", lambda w: w.c2i(class_labels=1, latents=torch.zeros(1, 16)), TypeError, "int64 tensor"),
    Case("latents shape", lambda w: w.c2i(class_labels=1, latents=torch.zeros(1, 9).long()), ValueError, "[1, 16]"),
    Case("latents range", lambda w: w.c2i(class_labels=1, latents=torch.full((1, 16), 48)), ValueError, "between -1"),
    Case("noise", lambda w: w.c2i(class_labels=1, noise=torch.ones(1, 4, 48)), ValueError, "`noise` must be a tensor"),
    Case(
        "callback tensors",
        lambda w: w.c2i(
            class_labels=1, callback_on_step_end=lambda *a: {}, callback_on_step_end_tensor_inputs=["logits"]
        ),
        ValueError,
        "unknown ['logits']",
    ),
]

UNIFIED = [
    Case("unknown word", lambda w: w.draw("a red spere"), ValueError, "spere"),
    Case("empty prompt", lambda w: w.draw("  "), ValueError, "`prompt` is empty"),
    Case("no prompts", lambda w: w.draw([]), ValueError, "at least one prompt"),
    Case("prompt number", lambda w: w.draw(7), TypeError, "`prompt` must be a string"),
    Case("long prompt", lambda w: w.draw("a red cube " * 20), ValueError, "at most 28"),
    Case("height", lambda w: w.draw(PROMPT, height=64), ValueError, "`height` must be 32"),
    Case("top_p", lambda w: w.draw(PROMPT, top_p=0), ValueError, "`top_p` must be above 0"),
    Case("guidance", lambda w: w.draw(PROMPT, guidance_scale=-1), ValueError, "`guidance_scale` must be at least 0"),
    Case("output type", lambda w: w.draw(PROMPT, output_type="gif"), ValueError, "'gif'"),
    Case("generators", lambda w: w.draw(PROMPT, generator=[w.generator] * 2), ValueError, "holds 2 generators"),
    Case("image kind", lambda w: w.read("picture.png"), TypeError, "`image` must be a PIL image"),
    Case("no images", lambda w: w.read([]), ValueError, "`image` is an empty list"),
    Case("image shape", lambda w: w.read(torch.zeros(1, 32, 32)), ValueError, "must have shape [3, H, W]"),
    Case("image range", lambda w: w.read(torch.full((3, 32, 32), 200.0)), ValueError, "rescale it"),
    Case("image nan", lambda w: w.read(np.full((32, 32, 3), np.nan, np.float32)), ValueError, "[0, 1]"),
    Case("image integers", lambda w: w.read(np.zeros((32, 32, 3), np.int64)), TypeError, "uint8"),
    Case("empty question", lambda w: w.read(w.picture, "?"), ValueError, "`question` is empty"),
    Case("long question", lambda w: w.read(w.picture, "color " * 2000), ValueError, "shorten"),
    Case("question word", lambda w: w.read(w.picture, "where is the unicorn?"), ValueError, "unicorn"),
    Case(
        "questions",
        lambda w: w.read([w.picture] * 3, ["how many objects are there?"] * 2),
        ValueError,
        "2 questions for 3",
    ),
    Case("question kind", lambda w: w.read(w.picture, 3), TypeError, "`question` must be"),
    Case(
        "mask of nothing", lambda w: w.paint(PROMPT, w.picture, Image.new("L", (32, 32))), ValueError, "masks nothing"
    ),
    Case("mask kind", lambda w: w.paint(PROMPT, w.picture, "mask.png"), TypeError, "`mask_image` must be a PIL image"),
    Case(
        "mask shape", lambda w: w.paint(PROMPT, w.picture, torch.ones(32)), ValueError, "`mask_image` must have shape"
    ),
    Case("mask range", lambda w: w.paint(PROMPT, w.picture, torch.full((32, 32), 3.0)), ValueError, "[0, 1]"),
    Case(
        "vocabulary of another model",
        lambda w: UnifiedTextToImagePipeline(**w.draw.components, vocabulary=w.words[:-1]),
        ValueError,
        "do not belong together",
    ),
    Case(
        "no vocabulary", lambda w: UnifiedTextToImagePipeline(**w.draw.components), ValueError, "`vocabulary` must list"
    ),
]

MODELS = [
    Case("dim and heads", lambda w: armm.ARTransformer(dim=30, num_layers=1, num_heads=4), ValueError, "not divisible"),
    Case(
        "rotary sum",
        lambda w: armm.ARTransformer(dim=32, num_layers=1, num_heads=2, rotary_axes=[8, 4]),
        ValueError,
        "add up",
    ),
    Case(
        "qk norm", lambda w: armm.ARTransformer(dim=32, num_layers=1, num_heads=2, qk_norm="x"), ValueError, "qk_norm"
    ),
    Case(
        "kv heads",
        lambda w: armm.ARTransformer(dim=32, num_layers=1, num_heads=4, num_kv_heads=3),
        ValueError,
        "multiple",
    ),
    Case("layers", lambda w: armm.ARTransformer(dim=32, num_layers=0, num_heads=2), ValueError, "num_layers"),
    Case(
        "trunk entry",
        lambda w: armm.AutoregressiveModel(vocab_size=8, transformer={**TRUNK, "depth": 3}),
        ValueError,
        "unknown entries ['depth']",
    ),
    Case("vocabulary", lambda w: armm.AutoregressiveModel(vocab_size=0, transformer=TRUNK), ValueError, "vocab_size"),
    Case(
        "grid",
        lambda w: armm.AutoregressiveModel(vocab_size=8, transformer=TRUNK, grid=(4,)),
        ValueError,
        "grid must be",
    ),
    Case(
        "condition",
        lambda w: armm.AutoregressiveModel(vocab_size=8, transformer=TRUNK, condition={"type": "sound"}),
        ValueError,
        "'class' or 'caption'",
    ),
    Case("labels", lambda w: w.model.condition(labels=torch.tensor([11])), ValueError, "0 .. 9"),
    Case("backend", lambda w: armm.attention_backend("flash").__enter__(), ValueError, "must be one of"),
    Case("sampler temperature", lambda w: armm.Sampler(temperature=-1), ValueError, "temperature"),
    Case("sampler top_k", lambda w: armm.Sampler(top_k=-1), ValueError, "top_k"),
    Case("sampler top_p", lambda w: armm.Sampler(top_p=0.0), ValueError, "top_p"),
    Case("guidance schedule", lambda w: armm.Guidance(2.0, schedule="zigzag"), ValueError, "schedule must be one of"),
    Case("guidance formula", lambda w: armm.Guidance(2.0, formula="sum"), ValueError, "formula must be one of"),
    Case("cache", lambda w: armm.KVCache(torch.zeros(2, 3)), ValueError, "buffer must be"),
]

TOKENIZERS = [
    Case("pixels uint8", lambda w: w.tokenizer.encode(torch.zeros(1, 3, 16, 16).byte()), ValueError, "floating point"),
    Case("pixels unbatched", lambda w: w.tokenizer.encode(torch.zeros(3, 16, 16)), ValueError, "[B, 3, H, W]"),
    Case("pixels gray", lambda w: w.tokenizer.encode(torch.zeros(1, 1, 16, 16)), ValueError, "[B, 3, H, W]"),
    Case("pixels 18x16", lambda w: w.tokenizer.encode(torch.zeros(1, 3, 18, 16)), ValueError, "multiples of 4"),
    Case("codes of both kinds", lambda w: Codes(), ValueError, "exactly one"),
    Case("ids float", lambda w: Codes(ids=torch.zeros(1, 4)), ValueError, "int64"),
    Case("grid of codes", lambda w: Codes(ids=torch.zeros(1, 4).long(), grid=(1, 3, 3)), ValueError, "holds 9 tokens"),
    Case(
        "ids out of range",
        lambda w: w.tokenizer.decode(Codes(ids=torch.full((1, 16), 48), grid=(1, 4, 4))),
        ValueError,
        "48",
    ),
    Case("res blocks", lambda w: VQTokenizer(num_res_blocks=[1, 2]), ValueError, "num_res_blocks"),
]

SCENES = [
    Case("how many", lambda w: sample_scenes(-1), ValueError, "non-negative"),
    Case("split", lambda w: sample_scenes(1, split="test"), ValueError, "split must be one of"),
    Case("size", lambda w: render(sample_scenes(1), size=4), ValueError, "from 8 to 4096"),
    Case("supersample", lambda w: render(sample_scenes(1), supersample=0), ValueError, "from 1 to 16"),
    Case("not scenes", lambda w: render([1, 2]), TypeError, "Scenes batch"),
    Case("word", lambda w: tokenize("a red spere"), ValueError, "spere"),
    Case("text", lambda w: tokenize(3), TypeError, "must be a string"),
    Case("ids", lambda w: detokenize([100000]), ValueError, "ids must lie between"),
]

FOLDERS = [
    Case("cut weights", lambda w: armm.pipeline(w.folders["cut weights"]), ValueError, "truncated"),
    Case(
        "missing tensor", lambda w: armm.pipeline(w.folders["missing tensor"]), ValueError, "missing 'head.projection"
    ),
    Case("extra tensor", lambda w: armm.pipeline(w.folders["extra tensor"]), ValueError, "unknown 'surplus'"),
    Case("wrong shape", lambda w: armm.pipeline(w.folders["wrong shape"]), ValueError, "shape"),
    Case("no weights", lambda w: armm.pipeline(w.folders["no weights"]), ValueError, "holds no weights"),
    Case(
        "no component", lambda w: armm.pipeline(w.folders["no component"]), ValueError, "lacks the folder 'tokenizer'"
    ),
    Case("no index", lambda w: armm.pipeline(w.folders["no index"]), ValueError, "has no model_index.json"),
    Case("broken index", lambda w: armm.pipeline(w.folders["broken index"]), ValueError, "not valid JSON"),
    Case("nameless index", lambda w: armm.pipeline(w.folders["nameless index"]), ValueError, "`_class_name` must be"),
    Case(
        "unknown pipeline",
        lambda w: armm.pipeline(w.folders["unknown pipeline"]),
        ValueError,
        "did you mean 'LlamaGenPip",
    ),
    Case("unknown module", lambda w: armm.pipeline(w.folders["unknown module"]), ValueError, "tokenizers_visual.nope"),
    Case("unknown class", lambda w: armm.pipeline(w.folders["unknown class"]), ValueError, "no class 'Nope'"),
    Case("unknown setting", lambda w: armm.pipeline(w.folders["unknown setting"]), ValueError, "generation_config"),
    Case("dtype", lambda w: armm.LlamaGenPipeline.from_pretrained(w.good, dtype="half"), TypeError, "torch.dtype"),
    Case(
        "dtypes",
        lambda w: armm.LlamaGenPipeline.from_pretrained(w.good, dtype=torch.float16, torch_dtype=torch.float32),
        ValueError,
        "disagree",
    ),
    Case(
        "other pipeline",
        lambda w: UnifiedTextToImagePipeline.from_pretrained(w.good),
        ValueError,
        "holds a LlamaGenPip",
    ),
    Case("save on a file", lambda w: w.c2i.save_pretrained(w.image), ValueError, "is a file"),
    Case("file as folder", lambda w: armm.LlamaGenPipeline.from_pretrained(w.c2i_file), ValueError, "from_single_file"),
]


def published(name: str) -> Callable[[Any], Any]:
    return lambda w: armm.convert.convert("llamagen", w.files[name], config={"n_head": 4})


FILES = [
    Case("cut", published("cut"), CheckpointError, "truncated"),
    Case("code", published("code"), UnsafeCheckpointError, "would run code"),
    Case("plain pickle with code", published("pickle"), UnsafeCheckpointError, "would run code"),
    Case("list", published("list"), CheckpointError, "not a dictionary of tensors"),
    Case("empty", published("empty"), CheckpointError, "is empty"),
    Case("text", published("text"), CheckpointError, "not a torch checkpoint"),
    Case("missing tensor", published("missing"), CheckpointKeysError, "norm.weight"),
    Case("extra tensor", published("extra"), CheckpointKeysError, "surplus.weight"),
    Case("wrong shape", published("shape"), CheckpointShapeError, "norm.weight"),
    Case(
        "no file", lambda w: armm.convert.convert("llamagen", w.root / "no.pt"), CheckpointError, "no checkpoint file"
    ),
    Case("a folder", lambda w: armm.convert.convert("llamagen", w.good), CheckpointError, "is a directory"),
    Case("heads unknown", lambda w: armm.convert.convert("llamagen", w.c2i_file), ValueError, "num_heads"),
    Case(
        "heads", lambda w: armm.convert.convert("llamagen", w.c2i_file, config={"n_head": 5}), ValueError, "`num_heads`"
    ),
    Case(
        "option",
        lambda w: armm.convert.convert("llamagen", w.c2i_file, config={"heads": 4}),
        ValueError,
        "unknown `config`",
    ),
    Case(
        "config kind", lambda w: armm.convert.convert("llamagen", w.c2i_file, config=[4]), TypeError, "`config` must be"
    ),
    Case(
        "no moving average",
        lambda w: armm.convert.convert("llamagen", w.vq_file, use_ema=True),
        CheckpointKeysError,
        "no moving average",
    ),
    Case(
        "files swapped",
        lambda w: armm.LlamaGenPipeline.from_single_file(w.vq_file, tokenizer=w.c2i_file, config=None),
        ValueError,
        "holds a tokenizer",
    ),
]

RECIPES = [
    Case("no file", lambda w: load_recipe(w.root / "no.yaml"), FileNotFoundError, "No recipe"),
    Case("not YAML", lambda w: load_recipe(w.broken_recipe), ValueError, "not valid YAML"),
    Case("a list", lambda w: load_recipe(w.list_recipe), ValueError, "must hold a mapping"),
    Case("no task", lambda w: load_recipe(w.no_task), ValueError, "lacks the keys task"),
    Case("unknown key", recipe_with(stepz=3), ValueError, "did you mean steps"),
    Case("steps", recipe_with(steps=0), ValueError, "at least 1"),
    Case("batch size", recipe_with(batch_size=0), ValueError, "`batch_size`"),
    Case("precision", recipe_with(precision="fp8"), ValueError, "`precision` must be one of"),
    Case("schedule", recipe_with(optimizer__schedule="step"), ValueError, "`optimizer.schedule`"),
    Case("optimizer key", recipe_with(optimizer__lr=1), ValueError, "optimizer.lr"),
    Case("learning rate", recipe_with(optimizer__learning_rate=-1), ValueError, "positive"),
    Case("override of a value", recipe_with(steps__x=1), ValueError, "not a mapping"),
    Case("task", lambda w: build_task(load_recipe(w.recipe, {"task": "vq_tokeniser"})), ValueError, "vq_tokenizer"),
    Case("model key", lambda w: build_task(load_recipe(w.recipe, {"data.scene": 4})), ValueError, "data.scene"),
]

TABLE = {
    "front door": FRONT_DOOR,
    "arguments": ARGUMENTS,
    "unified": UNIFIED,
    "models": MODELS,
    "tokenizers": TOKENIZERS,
    "scenes": SCENES,
    "folders": FOLDERS,
    "files": FILES,
    "recipes": RECIPES,
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{group}: {case.name}") for group, cases in TABLE.items() for case in cases]
)
def test_bad_input_gets_a_specific_error(case, w):
    before = listing(w.root)
    with pytest.raises(case.error) as caught:
        case.call(w)
    assert case.says in str(caught.value)
    assert listing(w.out) == [] and listing(w.root) == before


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Command lines: {out} is an empty folder, {name} a file of the fixture.
COMMANDS = [
    ("no command", "", "COMMAND"),
    ("unknown command", "paint x", "invalid choice: 'paint'"),
    ("no output", "generate PROMPT", "-o/--output"),
    ("no prompt", "generate -o {out}/a.png", "nothing to draw"),
    ("empty prompt", "generate EMPTY -o {out}/a.png", "PROMPT is empty"),
    ("prompt and class", "generate PROMPT --class-labels 1 -o {out}/a.png", "not both"),
    ("extension", "generate PROMPT -o {out}/a.psd", "'.psd'"),
    ("no extension", "generate PROMPT -o {out}/a", "no extension"),
    ("output folder", "generate PROMPT -o {out}", "is a folder"),
    ("output nowhere", "generate PROMPT -o {out}/no/a.png", "does not exist"),
    ("output below a file", "generate PROMPT -o {image}/a.png", "not a folder"),
    ("animation extension", "generate PROMPT -o {out}/a.png --animate {out}/a.png", "--animate"),
    ("seed", "generate PROMPT -o {out}/a.png --seed -1", "--seed"),
    ("seed word", "generate PROMPT -o {out}/a.png --seed x", "not a whole number"),
    ("number of images", "generate PROMPT -o {out}/a.png --num-images 0", "--num-images"),
    ("temperature", "generate PROMPT -o {out}/a.png --temperature -2", "--temperature"),
    ("top-p", "generate PROMPT -o {out}/a.png --top-p 0", "--top-p"),
    ("guidance", "generate PROMPT -o {out}/a.png --guidance-scale nan", "--guidance-scale"),
    ("device", "generate PROMPT -o {out}/a.png --device tpu", "--device"),
    ("missing device", "generate PROMPT -o {out}/a.png --device cuda:99", "--device cpu"),
    ("dtype", "generate PROMPT -o {out}/a.png --dtype int8", "--dtype"),
    ("model", "generate PROMPT -o {out}/a.png --model nothing", "no task"),
    ("class model", "generate PROMPT -o {out}/a.png --model {good}", "conditioned on a class"),
    ("class out of range", "generate --class-labels 99 -o {out}/a.png --model {good} --device cpu", "between 0 and 9"),
    ("damaged model", "generate --class-labels 1 -o {out}/a.png --model {damaged}", "truncated"),
    ("unknown word", "generate a_red_spere -o {out}/a.png --model {unified}", "spere"),
    ("question word", "describe {image} -q unicorn --model {reader}", "unicorn"),
    (
        "option of another model",
        "generate --class-labels 1 -o {out}/a.png --model {unified}",
        "does not take --class-labels",
    ),
    ("unknown option", "generate PROMPT -o {out}/a.png --fast", "--fast"),
    ("no image", "describe {out}/no.png", "no image file"),
    ("image folder", "describe {out}", "is a folder"),
    ("image text", "describe {text_file}", "not a readable image"),
    ("image cut", "describe {cut_image}", "not a readable image"),
    ("image huge", "describe {huge_image}", "not a readable image"),
    ("long question", "describe {image} -q LONG --model {reader}", "shorten"),
    ("question", "describe {image} -q EMPTY", "--question"),
    ("no recipe", "train", "RECIPE"),
    ("unknown recipe", "train nothing", "no shipped recipe named 'nothing'"),
    ("recipe file", "train {out}/no.yaml", "no recipe file"),
    ("broken recipe", "train {broken_recipe}", "not valid YAML"),
    ("override", "train {recipe} --set steps", "KEY=VALUE"),
    ("override key", "train {recipe} --set stepz=3", "stepz"),
    ("training output", "train {recipe} --output {image}", "is a file"),
    ("no evaluation task", "evaluate", "TASK"),
    ("evaluation size", "evaluate reconstruction --images 0", "--images"),
    ("evaluation file", "evaluate reconstruction --json {out}/a.txt", "'.txt'"),
    ("evaluation model", "evaluate reconstruction --model {out}/no --json {out}/a.json", "no"),
    ("family", "convert lamagen {c2i_file} -o {out}/m", "did you mean 'llamagen'"),
    ("no checkpoint", "convert llamagen {out}/no.pt -o {out}/m", "no file"),
    ("no tokenizer", "convert llamagen {c2i_file} --tokenizer {out}/no.pt -o {out}/m", "--tokenizer"),
    ("config", "convert llamagen {c2i_file} --config x=1 -o {out}/m", "neither JSON"),
    ("config list", "convert llamagen {c2i_file} --config [1] -o {out}/m", "JSON object"),
    ("config file", "convert llamagen {c2i_file} --config {out}/c.json -o {out}/m", "no file"),
    ("heads", "convert llamagen {c2i_file} -o {out}/m", "num_heads"),
    ("full folder", "convert llamagen {c2i_file} -o {full}", "not empty"),
    ("folder is a file", "convert llamagen {c2i_file} -o {image}", "is a file"),
    ("damaged checkpoint", "convert llamagen {cut_file} -o {out}/m", "truncated"),
    ("checkpoint with code", "convert llamagen {code_file} -o {out}/m", "would run code"),
    ("zoo", "zoo nothing*", "no published checkpoint"),
    ("benchmark", "bench nothing", "invalid choice: 'nothing'"),
]


@pytest.mark.parametrize(("line", "says"), [pytest.param(line, says, id=name) for name, line, says in COMMANDS])
def test_bad_command_line_gets_one_line(line, says, w, capsys):
    paths = {name: value for name, value in vars(w).items() if isinstance(value, Path)}
    paths |= {"damaged": w.folders["cut weights"], "cut_file": w.files["cut"], "code_file": w.files["code"]}
    words = {"PROMPT": PROMPT, "EMPTY": " ", "LONG": "color " * 2000}
    arguments = [words.get(word, word.format(**paths)) for word in line.split()]
    before = listing(w.root)
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr()
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("armm: error: "), shown.err
    assert says in lines[0] and "Traceback" not in shown.err and shown.out == ""
    assert listing(w.out) == [] and listing(w.root) == before


def test_the_table_is_long_enough():
    assert sum(map(len, TABLE.values())) + len(COMMANDS) >= 60
