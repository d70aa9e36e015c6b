"""`ARPipeline`: what every pipeline of armm shares, and what diffusers leaves to third parties.

- Hub ids load (diffusers refuses component classes outside itself), also from the cache without a network.
- The modules of our component classes are imported before diffusers looks for them.
- Weights are strict in both directions: a missing or an unknown tensor is an error, not a warning and a `meta` tensor.
- Directories are written whole or not at all.
- Each checkpoint carries the settings its authors used (`generation_config`), which call arguments override.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor

from armm.decoding.acceleration import Acceleration
from armm.decoding.guidance import ContextGuidance, Guidance
from armm.decoding.sampling import Sampler
from armm.hub import fetch_snapshot
from tokenizers_visual.codes import Codes

from . import decodings, loading
from .outputs import ARPipelineOutput, ARVideoOutput
from .settings import check_number, check_setting, sampler_of

__all__ = ["ARPipeline", "DiffusionPipeline", "OUTPUT_TYPES"]

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ARPipeline(DiffusionPipeline):
    """Base of all pipelines. Subclasses register their components and the settings that a checkpoint may preset.

    Class attributes:
        generation_settings: the names and library defaults of the settings a `generation_config` may hold.
        model_cpu_offload_seq: the modules in the order in which a call runs them.
    """

    generation_settings: ClassVar[dict[str, Any]] = {}
    model_cpu_offload_seq = "text_encoder->transformer->tokenizer"
    _optional_components: ClassVar[list[str]] = []
    _guidance_scale: float
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    # Module with `load_single_file(path, ...) -> dict` for files in their authors' own format. It sits above the
    # pipelines, so it is named here and imported when a file is read.
    single_file_loader: ClassVar[str | None] = None
    # Names of pipelines whose directories this one loads as well: other tasks of the same components.
    interchangeable: ClassVar[tuple[str, ...]] = ()
    # Classes of what `enable_acceleration` takes.
    _accelerations: ClassVar[tuple[type[Acceleration], ...]] = ()
    acceleration: Acceleration | None = None

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> ARPipeline:
        """Loads a pipeline from a directory or a hub id.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a directory written by `save_pretrained`, or
                "organisation/repository" on the hub.
            dtype (`torch.dtype` or `dict`, *optional*): dtype of the weights, however they are stored; a dict names components
                and `"default"`, None is float32. `torch_dtype` is accepted as well.
            decoding (`str` or a decoding strategy, *optional*): the name of one of the decodings that the checkpoint offers (a
                wrong one lists them), with the transformer trained for it; or a strategy for the checkpoint's own transformer.
            variant (`str`, *optional*): of the weights, such as "fp16" for files that `save_pretrained(..., variant="fp16")` wrote;
                components without it are loaded as they are.
            kwargs: everything that `DiffusionPipeline.from_pretrained` accepts, components included.
        """
        loading.rename_dtype(kwargs)
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir():
            folder = Path(name)
        else:
            hub_keys = ("cache_dir", "force_download", "local_files_only", "token", "revision", "variant")
            folder = Path(cls.download(name, **{key: kwargs[key] for key in hub_keys if key in kwargs}))
        index, variant = loading.read_index(folder), kwargs.get("variant")
        loading.check_variant(folder, variant)
        offer = None
        if isinstance(kwargs.get("decoding"), str):
            offer = decodings.load(folder, index, kwargs.pop("decoding"), kwargs.get("dtype"), variant)
        stored = (index if offer is None else offer[1])["_class_name"]
        target = loading.pipeline_class({"_class_name": stored}, folder) if cls is ARPipeline else cls
        if stored not in (target.__name__, *target.interchangeable):
            raise ValueError(
                f"{name} holds a {stored}, not a {target.__name__}: load it with `armm.{stored}.from_pretrained` or with "
                "`armm.pipeline`, which reads the class from the directory."
            )
        loading.import_component_modules(index)
        if offer is not None:
            kwargs |= {part: component for part, component in offer[2].items() if part not in kwargs}
            kwargs.setdefault("generation_config", offer[1].get("generation_config"))
        loading.check_component_files(folder, index, skip=set(kwargs), variant=variant)
        pipe = DiffusionPipeline.from_pretrained.__func__(target, str(folder), **kwargs)
        if kwargs.get("quantization_config") is None:
            loading.check_loaded_weights(pipe, folder, index, skip=set(kwargs), variant=variant)
        if offer is not None and offer[2]:
            loading.check_loaded_weights(pipe, offer[0], offer[1], skip=set(), variant=variant)
        pipe.register_to_config(_name_or_path=name)
        pipe.fuse_projections()
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """The local snapshot of a hub repository; taken from the cache where the network cannot be reached."""
        kwargs.pop("variant", None)
        return str(fetch_snapshot(pretrained_model_name, **kwargs))

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: Any, **kwargs: Any) -> ARPipeline:
        """Builds a pipeline from a file in the format its authors published.

        Args:
            pretrained_model_link_or_path (`str` or `os.PathLike`): a local file, a hub link
                (`https://.../org/repo/resolve/main/file.pt`) or `org/repo/file.pt`.
            kwargs: what the family's loader accepts, in every family `config` and `dtype`.
        """
        if cls.single_file_loader is None:
            raise ValueError(
                f"{cls.__name__} has no published single-file format: use `{cls.__name__}.from_pretrained(directory)`."
            )
        loading.rename_dtype(kwargs)
        loader = importlib.import_module(cls.single_file_loader)
        pipe = cls(**loader.load_single_file(pretrained_model_link_or_path, **kwargs))
        pipe.fuse_projections()
        return pipe

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Writes `model_index.json` and one folder per component; on failure nothing is left behind.

        Takes the arguments of `DiffusionPipeline.save_pretrained` (`variant`, `max_shard_size`, `push_to_hub`, ...).
        """
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with loading.atomic_directory(save_directory) as temporary:
            super().save_pretrained(str(temporary), *args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: decoding asks parts of a model, and where they are, thousands of times. A ValueError."""
        raise ValueError(
            f"{type(self).__name__} cannot be offloaded layer by layer: use `enable_model_cpu_offload()`, or a smaller `dtype`."
        )

    def fuse_projections(self) -> None:
        """Merges the transformer's projections for faster decoding; done after loading. Names of parameters do not change."""
        transformer = getattr(self, "transformer", None)
        if transformer is not None and not transformer.training:
            transformer.fuse_projections()

    def unfuse_projections(self) -> None:
        """Undoes `fuse_projections`; adapters, training and loading weights do so by themselves."""
        self.transformer.unfuse_projections()

    # ------------------------------------------------------------------ settings

    def register_generation_config(self, generation_config: dict[str, Any] | None) -> None:
        """Keeps the settings of this checkpoint in `model_index.json`. Unknown names are a ValueError."""
        settings = dict(generation_config or {})
        for name in settings:
            loading.check_choice(name, sorted(self.generation_settings), "`generation_config` key")
        self.register_to_config(generation_config=settings)

    @property
    def generation_config(self) -> dict[str, Any]:
        """The settings a call uses where its arguments do not say otherwise."""
        own = {**self.generation_settings, **(self.config.get("generation_config") or {})}
        return own if self.acceleration is None else {**own, **self.acceleration.settings}

    def setting(self, name: str, value: Any) -> Any:
        """`value`, or this checkpoint's setting `name` where `value` is None."""
        return self.generation_config[name] if value is None else value

    # ------------------------------------------------------------------ acceleration

    def enable_acceleration(self, acceleration: Acceleration) -> None:
        """Makes all calls from now on use `acceleration`, in place of an earlier one.

        Args:
            acceleration (`Acceleration`): of one of the classes this pipeline supports. Its own settings, where it has any,
                take the place of the checkpoint's; arguments of a call override both.

        Raises:
            ValueError: this pipeline, or these components, cannot be accelerated like that.
        """
        if not isinstance(acceleration, self._accelerations):
            kind = (
                type(acceleration).__name__
                if not isinstance(acceleration, type)
                else f"the class {acceleration.__name__}"
            )
            names = ", ".join(supported.__name__ for supported in self._accelerations)
            raise ValueError(
                f"{type(self).__name__} cannot be accelerated with {kind}: "
                + (f"it supports {names}." if names else "it supports no acceleration.")
            )
        for name in acceleration.settings:
            loading.check_choice(name, sorted(self.generation_settings), f"setting of the {acceleration.name}")
        acceleration.check(self)
        self.acceleration = acceleration

    def disable_acceleration(self) -> None:
        """Undoes `enable_acceleration`."""
        self.acceleration = None

    @property
    def strategy(self) -> Any:
        """What decodes a call: the pipeline's `decoding`, or what the acceleration puts in its place."""
        return self.decoding if self.acceleration is None else self.acceleration.strategy(self)

    # ------------------------------------------------------------------ pieces of a call

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running (or last) call; set `_guidance_scale` in a callback to change it."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Decoding steps of the running (or last) call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `_interrupt`."""
        return self._interrupt

    @staticmethod
    def check_output_type(output_type: str) -> None:
        """Raises ValueError unless `output_type` is one of `OUTPUT_TYPES`."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(map(repr, OUTPUT_TYPES))}, got {output_type!r}.")

    @staticmethod
    def check_generator(generator: Any, batch_size: int) -> None:
        """Raises unless `generator` is None, one generator, or a list with one generator for each of `batch_size` images."""
        if generator is None or isinstance(generator, torch.Generator):
            return
        if not isinstance(generator, (list, tuple)) or not all(isinstance(item, torch.Generator) for item in generator):
            raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {type(generator).__name__}.")
        if len(generator) != batch_size:
            raise ValueError(
                f"`generator` holds {len(generator)} generators, but the call makes {batch_size} images: give one for each image."
            )

    def check_callback_inputs(self, names: Sequence[str] | None) -> None:
        """Raises ValueError for tensors that this pipeline does not offer to `callback_on_step_end`."""
        unknown = [name for name in names or () if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got unknown {unknown}."
            )

    check_number = staticmethod(check_number)

    def check_settings(self, **given: Any) -> dict[str, Any]:
        """The settings of a call: the given ones, this checkpoint's where an argument is None. What they cannot be is a ValueError or a
        TypeError, see `pipelines.settings`."""
        settings = {name: self.setting(name, value) for name, value in given.items()}
        for name, value in settings.items():
            if value is not None or self.generation_settings[name] is not None:  # None may be a setting of its own
                settings[name] = check_setting(name, value)
        return settings

    def check_sampling(self, guidance_scale: Any, **filters: Any) -> tuple[float, Sampler]:
        """The guidance scale and the sampler of a call, with this checkpoint's settings where an argument is None."""
        settings = self.check_settings(guidance_scale=guidance_scale, **filters)
        return float(settings.pop("guidance_scale")), sampler_of(**settings)

    def step_end(
        self,
        callback: Callable[..., dict[str, Any]] | None,
        names: Sequence[str],
        step: int,
        tensors: dict[str, Any],
    ) -> dict[str, Any]:
        """Calls a user's `callback_on_step_end` and returns the tensors it replaced."""
        if callback is None:
            return {}
        replaced = callback(self, step, step, {name: tensors[name] for name in names})
        return replaced or {}

    def after_step(
        self,
        bar: Any,
        guidance: Guidance | ContextGuidance,
        callback: Callable[..., dict[str, Any]] | None,
        names: Sequence[str],
    ) -> Callable[[int, torch.Tensor], torch.Tensor | None]:
        """What a decoding strategy calls after each step with the ids so far: moves the bar on, calls the user's callback, takes
        over a guidance scale that it set, and hands back the ids that it replaced."""

        def step_end(step: int, ids: torch.Tensor) -> torch.Tensor | None:
            bar.update()
            replaced = self.step_end(callback, names, step, {"latents": ids})
            guidance.scale = self._guidance_scale
            return replaced.get("latents")

        return step_end

    def make_output(
        self, codes: Codes, output_type: str = "pil", *, return_dict: bool = True, output_codes: bool = False
    ) -> Any:
        """What a call returns for `codes`: an `ARVideoOutput` where `self.tokenizer` codes videos, else an `ARPipelineOutput`.
        Ends the call: models are offloaded again.

        Args:
            return_dict: False returns a tuple.
            output_codes: also return `codes`.
        """
        decode = self.decode_codes_to_frames if self.tokenizer.is_video else self.decode_codes_to_images
        return self.wrap_output(decode(codes, output_type), codes, return_dict=return_dict, output_codes=output_codes)

    def wrap_output(self, pictures: Any, codes: Codes, *, return_dict: bool, output_codes: bool) -> Any:
        """`make_output` of pictures that are decoded already."""
        self.maybe_free_model_hooks()
        if not return_dict:
            return (pictures, codes) if output_codes else (pictures,)
        kept = codes if output_codes else None
        return ARVideoOutput(pictures, kept) if self.tokenizer.is_video else ARPipelineOutput(pictures, kept)

    def decode_codes_to_images(
        self, codes: Codes, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Images of `codes` through `self.tokenizer`, in the asked form; `"latent"` returns the codes' own tensor."""
        self.check_output_type(output_type)
        if output_type == "latent":
            return codes.tensor
        pixels = self.tokenizer.decode(codes)
        return self.pixels_to_images(pixels, output_type)

    @staticmethod
    def pixels_to_images(pixels: torch.Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] (not clamped) as `"pil"`, `"np"` or `"pt"`."""
        pixels = pixels.float() if output_type != "pt" else pixels
        return VaeImageProcessor().postprocess(pixels, output_type=output_type)

    def decode_codes_to_frames(
        self, codes: Codes, output_type: str = "pil"
    ) -> list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor:
        """Videos of `codes` through `self.tokenizer`, in the asked form; `"latent"` returns the codes' own tensor."""
        self.check_output_type(output_type)
        if output_type == "latent":
            return codes.tensor
        return self.pixels_to_frames(self.tokenizer.decode(codes), output_type)

    @staticmethod
    def pixels_to_frames(
        pixels: torch.Tensor, output_type: str
    ) -> list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor:
        """Videos [B, 3, T, H, W] in [-1, 1] (not clamped) as `"pil"` (a list of frames for each), `"np"` or `"pt"`."""
        pixels = pixels.float() if output_type != "pt" else pixels
        return VideoProcessor().postprocess_video(pixels, output_type=output_type)
