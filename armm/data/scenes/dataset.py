"""Rendered scenes in memory, cached on disk: drawn once, read many times."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .graph import Scenes, sample_scenes
from .render import check_size, render

logger = logging.getLogger(__name__)
_BLOCK = 512


class SceneDataset:
    """N scenes with their pictures: ``images`` uint8 [N, 3, S, S] and ``scenes``, their graphs."""

    def __init__(self, images: Tensor, scenes: Scenes):
        if len(images) != len(scenes):
            raise ValueError(f"images and scenes must be equally many, got {len(images)} and {len(scenes)}")
        self.images = images
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    @classmethod
    def prepare(
        cls,
        n: int,
        size: int = 64,
        seed: int = 0,
        split: str = "train",
        cache_dir: str | os.PathLike | None = None,
        *,
        supersample: int = 3,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> SceneDataset:
        """Renders the first ``n`` scenes of the sequence (seed, split), or reads them from ``cache_dir``.

        Args:
            n: How many scenes.
            size: Width and height of the pictures.
            seed: Names the sequence, as in `sample_scenes`.
            split: "train", "heldout" or "all".
            cache_dir: A folder that keeps the result as safetensors; the file is written whole or not at all.
            supersample: Antialiasing, as in `render`.
            device: Where to render; the result is kept in main memory.
            progress: Show a progress bar while rendering.
        """
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a positive integer, got {n!r}")
        check_size(size)
        path = None
        if cache_dir is not None:
            name = f"scenes-{split}-{n}x{size}-seed{seed}-aa{supersample}-{_recipe_hash()}.safetensors"
            path = Path(cache_dir) / name
            cached = cls._load(path, n, size)
            if cached is not None:
                return cached
        images = torch.empty(n, 3, size, size, dtype=torch.uint8)
        parts = []
        with tqdm(total=n, desc=f"rendering {split} scenes", unit="scene", disable=not progress) as bar:
            for first in range(0, n, _BLOCK):
                part = sample_scenes(min(_BLOCK, n - first), seed, split, start=first)
                images[first : first + len(part)] = render(part, size, supersample, device).cpu()
                parts.append(part)
                bar.update(len(part))
        names = [field.name for field in fields(Scenes)]
        scenes = Scenes(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
        dataset = cls(images, scenes)
        if path is not None:
            dataset._save(path)
        return dataset

    @classmethod
    def _load(cls, path: Path, n: int, size: int) -> SceneDataset | None:
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
            images = tensors.pop("images")
            scenes = Scenes(**tensors)
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            logger.warning("the cached data set %s cannot be read (%s); rendering it again", path.name, error)
            return None
        if images.shape != (n, 3, size, size) or len(scenes) != n:
            logger.warning("the cached data set %s has another size; rendering it again", path.name)
            return None
        return cls(images, scenes)

    def _save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        os.close(handle)
        try:
            save_file({"images": self.images, **self.scenes.tensors()}, temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@functools.cache
def _recipe_hash() -> str:
    """Changes with anything that changes the scenes or their pictures: a cache never serves another recipe's."""
    probe = sample_scenes(24, 0, "all")
    digest = hashlib.sha256(render(probe, 32).numpy().tobytes())
    digest.update((probe.position * 100).round().to(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:10]
