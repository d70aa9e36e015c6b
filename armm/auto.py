"""`armm.pipeline`: a pipeline for a task, a published model's name, a directory or a hub id."""

from __future__ import annotations

import difflib
import importlib
import logging
from pathlib import Path
from typing import Any

from armm import weights, zoo
from armm.convert import family_module
from armm.hub import converted_folder, fetch, fetch_snapshot
from pipelines.base import ARPipeline
from pipelines.loading import INDEX_NAME, atomic_directory, read_index
from pipelines.shipped import TASKS, task_pipeline
from tokenizers_visual.base import VisualTokenizer
from tokenizers_visual.loading import CONFIG_NAME, NotATokenizerError, load_tokenizer

logger = logging.getLogger(__name__)

# Family -> (module, pipeline class).
FAMILY_PIPELINES: dict[str, tuple[str, str]] = {
    "llamagen": ("pipelines.llamagen", "LlamaGenPipeline"),
    "chameleon": ("pipelines.chameleon", "ChameleonPipeline"),
    "dar": ("pipelines.dar", "DARPipeline"),
    "elm": ("pipelines.elm", "ELMPipeline"),
    "janus": ("pipelines.janus", "JanusPipeline"),
    "himar": ("pipelines.himar", "HiMARPipeline"),
    "lumina_mgpt": ("pipelines.lumina_mgpt", "LuminaMGPTPipeline"),
    "ming_univision": ("pipelines.ming_univision", "MingUniVisionPipeline"),
    "lavit": ("pipelines.lavit", "LaVITPipeline"),
    "mar": ("pipelines.mar", "MARPipeline"),
    "nar": ("pipelines.nar", "NARPipeline"),
    "par": ("pipelines.par", "PARPipeline"),
    "pure": ("pipelines.pure", "PUREPipeline"),
    "seed": ("pipelines.seed_llama", "SEEDLLaMAPipeline"),
    "var": ("pipelines.var", "VARPipeline"),
    "xar": ("pipelines.xar", "XARPipeline"),
    "flowar": ("pipelines.flowar", "FlowARPipeline"),
}
_HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "force_download", "token")


def pipeline(model: str | Path, **kwargs: Any) -> ARPipeline:
    """A ready pipeline.

    Args:
        model: one of
            - a task: "text-to-image", "image-to-text" or "inpainting", done by the weights shipped with armm;
            - a published model's name, such as "llamagen-c2i-b-256" (see `armm.list_models`): the authors' own files are
              downloaded and converted, and both are cached;
            - a directory written by `save_pretrained`, or a hub id of one.
        kwargs: passed to the pipeline's `from_pretrained` (`dtype`, `decoding`, components, ...).
    """
    name = str(model)
    if name in TASKS:
        return task_pipeline(name, **kwargs)
    if name.lower() in zoo.ZOO:
        return published_pipeline(name, **kwargs)
    if Path(name).is_dir():
        return ARPipeline.from_pretrained(name, **kwargs)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ARPipeline.from_pretrained(name, **kwargs)
    known = [*TASKS, *zoo.list_models()]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"{name!r} is no task ({', '.join(TASKS)}), no published model (`armm zoo` lists them), no directory and no hub id.{hint}"
    )


def published_pipeline(name: str, *, config: dict[str, Any] | None = None, **kwargs: Any) -> ARPipeline:
    """The pipeline of the zoo entry `name`: downloaded and converted once, then read from the cache.

    Args:
        config: options for the converter, added to the entry's.
        kwargs: options of the hub (`revision`, `cache_dir`, `local_files_only`, `force_download`, `token`); the rest goes to
            the pipeline's `from_pretrained`.
    """
    entry = zoo.get(name)
    if entry.task == "tokenizer":
        users = [other.name for other in zoo.ZOO.values() if other.tokenizer == entry.name]
        raise ValueError(
            f"{entry.name} is a tokenizer, not a generator; use `armm.tokenizer({entry.name!r})` for the tokenizer alone"
            + (f", or one of the models that use it: {', '.join(users)}." if users else ".")
        )
    if entry.is_restricted:
        logger.warning("%s is under a licence with restrictions: %s", entry.name, entry.licence)
    options = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
    file, tokenizer_file = (
        None if part is None else fetch(part.repo, part.file, **options) if part.file else fetch_snapshot(part.repo, **options)
        for part in (entry, None if entry.tokenizer is None else zoo.get(entry.tokenizer))  # some files hold their tokenizer
    )
    module, class_name = FAMILY_PIPELINES[entry.family]
    pipeline_class = getattr(importlib.import_module(module), class_name)
    config = {**entry.config, **(config or {})}
    folder = converted_folder(entry.name, [part for part in (file, tokenizer_file) if part is not None], config)
    if not (folder / INDEX_NAME).is_file():
        logger.info("converting %s into %s", entry.file or entry.repo, folder)
        parts = family_module(entry.family).load_single_file(
            file,
            tokenizer=tokenizer_file,
            config=config or None,
            generation_config=entry.generation_config,
        )
        pipeline_class(**parts).save_pretrained(folder)
    if entry.text_encoder and "text_encoder" not in kwargs:
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        kwargs |= pipeline_class.load_text_encoder(entry.text_encoder, dtype=dtype, **options)
    return pipeline_class.from_pretrained(folder, **kwargs)


def tokenizer(model: str | Path | VisualTokenizer, *, dtype: Any = None, **options: Any) -> VisualTokenizer:
    """A visual tokenizer alone, in eval mode.

    Args:
        model: one of
            - a tokenizer's zoo name, such as "dar-tokenizer", or that of a model, whose tokenizer it is: the authors' own file is
              downloaded and converted, and both are cached;
            - a task with shipped weights, such as "text-to-image";
            - a directory of a tokenizer or of a pipeline, or a hub id of either;
            - a file of a zoo entry, known by its name; other files are converted by `armm convert` first.
        dtype: of the weights; None keeps the stored one.
        options: of the hub (`revision`, `cache_dir`, `local_files_only`, `force_download`, `token`).

    Raises:
        ValueError: none of these.
    """
    if isinstance(model, VisualTokenizer):
        return model.eval()
    name = str(model)
    if name in TASKS:
        return tokenizer_of_folder(weights.path(TASKS[name][2]), dtype)
    entry = zoo.ZOO.get(name.lower())
    if entry is not None:
        return published_tokenizer(entry, dtype, options)
    if Path(name).is_dir():
        return tokenizer_of_folder(Path(name), dtype)
    if Path(name).is_file():
        entry = zoo.by_file(Path(name).name)
        if entry is None or entry.task != "tokenizer":
            raise ValueError(
                f"{name} has the name of no published tokenizer's file: convert it with `armm convert FAMILY {Path(name).name} -o DIR` and "
                "give the folder."
            )
        return family_module(entry.family).convert(name, config=entry.config or None, dtype=dtype).eval()
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return tokenizer_of_folder(fetch_snapshot(name, **options), dtype)
    known = [*TASKS, *zoo.list_models()]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{name!r} is no published tokenizer (`armm zoo` lists them), no folder, no file and no hub id.{hint}")


def published_tokenizer(entry: zoo.ZooEntry, dtype: Any, options: dict[str, Any]) -> VisualTokenizer:
    """The tokenizer of a zoo entry, or of the model in it."""
    if entry.task != "tokenizer" and entry.tokenizer is None:
        raise ValueError(
            f"{entry.name} brings its tokenizer along with the model: take `armm.pipeline({entry.name!r}).tokenizer`."
        )
    own = entry if entry.task == "tokenizer" else zoo.get(str(entry.tokenizer))
    if own.is_restricted:
        logger.warning("%s is under a licence with restrictions: %s", own.name, own.licence)
    if "://" in own.repo:
        raise ValueError(f"{own.name} is not on the hub: download {own.repo}/{own.file} and give the file.")
    file = fetch(own.repo, own.file, **options) if own.file else fetch_snapshot(own.repo, **options)
    folder = converted_folder(own.name, [file], own.config)
    if not (folder / CONFIG_NAME).is_file():
        logger.info("converting %s into %s", own.file or own.repo, folder)
        converted = family_module(own.family).convert(file, config=own.config or None)
        with atomic_directory(folder) as temporary:
            converted.save_pretrained(temporary)
    return load_tokenizer(folder, dtype)


def tokenizer_of_folder(folder: Path, dtype: Any = None) -> VisualTokenizer:
    """The tokenizer in a folder of its own, or in a pipeline's."""
    if not (folder / INDEX_NAME).is_file():
        return load_tokenizer(folder, dtype)
    parts = [name for name in read_index(folder) if (folder / name / CONFIG_NAME).is_file()]
    for name in sorted(parts, key=lambda part: part != "tokenizer"):
        try:
            return load_tokenizer(folder / name, dtype)
        except NotATokenizerError:
            continue
    raise ValueError(f"the pipeline in {folder} has no visual tokenizer among its components ({', '.join(parts) or 'none'}).")
