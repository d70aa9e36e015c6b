"""What the pipelines that read images share: prompts about images, and the text that is written after them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import DiffusionPipeline

from armm.condition import Condition, concatenate
from armm.decoding.acceleration import Acceleration
from armm.decoding.beam import BeamSearch
from armm.decoding.sampling import Sampler
from armm.decoding.text import TextOutput, decode_text, stream_text
from armm.explain import Balance, Explanation
from armm.pruning import Cost, VisualPruning

from .base import ARPipeline
from .outputs import ARTextOutput
from .settings import sampler_of

__all__ = ["DiffusionPipeline", "Reading", "UnderstandingPipeline"]


@dataclass
class Reading:
    """One prompt about images, ready to be continued.

    Args:
        condition: its tokens [1, T, D].
        ids: of the T tokens; what stands for an image token does not matter.
        images: (first, behind the last) of the tokens of each image.
        grids: (height, width) of each image in tokens.
        question: (first, behind the last) of the tokens that ask; what comes after them belongs to the form.
        limit: longest text that can follow.
    """

    condition: Condition
    ids: list[int]
    images: list[tuple[int, int]] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    question: tuple[int, int] = (0, 0)
    limit: int = 1


class UnderstandingPipeline(ARPipeline):
    """Base of pipelines that write text about images. Subclasses say how a request becomes a `Reading`.

    Class attributes:
        pads_readings: whether readings of different lengths go through the model together, padded on the left.
    """

    transformer: Any
    chat: Callable[..., Any]
    pads_readings = True
    _accelerations: ClassVar[tuple[type[Acceleration], ...]] = (VisualPruning,)

    @property
    @abstractmethod
    def stop_id(self) -> int:
        """The id that ends a text."""

    @property
    @abstractmethod
    def text_range(self) -> tuple[int, int]:
        """(low, high) of the ids that may be said."""

    @abstractmethod
    def decode_words(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    # ------------------------------------------------------------------ writing

    @staticmethod
    def check_text_sampling(temperature: Any, top_k: Any, top_p: Any) -> Sampler:
        """The sampler of a text; temperature 0 takes the likeliest token."""
        return sampler_of(temperature, top_k, top_p)

    def check_length(self, readings: Sequence[Reading], max_new_tokens: int | None) -> None:
        """Raises unless `max_new_tokens` is None or fits behind every reading."""
        room = min(reading.limit for reading in readings)
        if room < 1:
            raise ValueError("the prompt fills the model's context and leaves no room for a text: shorten it.")
        if max_new_tokens is not None:
            self.check_number("max_new_tokens", max_new_tokens, low=1, high=room, integer=True)

    @property
    def pruning(self) -> VisualPruning | None:
        """The pruning of image tokens, if it is enabled."""
        return self.acceleration if isinstance(self.acceleration, VisualPruning) else None

    def check_search(self, search: Any, temperature: float = 0.0) -> None:
        """Raises unless `search` is None or a search over texts that can be used as things are."""
        if search is None:
            return
        if not isinstance(search, BeamSearch):
            raise TypeError(f"`search` must be a BeamSearch or an OPERA, got {type(search).__name__}.")
        if temperature > 0:
            raise ValueError("`search` takes the likeliest texts: leave `temperature` at 0.")
        if self.pruning is not None:
            raise ValueError(
                "`search` does not go with the pruning of image tokens: call `disable_acceleration()` first."
            )

    def groups(self, readings: Sequence[Reading], alone: bool = False) -> list[list[int]]:
        """Which readings go through the model together; `alone`: none."""
        if alone:
            return [[row] for row in range(len(readings))]
        if self.pads_readings:
            return [list(range(len(readings)))]
        lengths = sorted({reading.condition.length for reading in readings})
        return [[row for row, item in enumerate(readings) if item.condition.length == length] for length in lengths]

    def write(
        self,
        readings: Sequence[Reading],
        *,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        search: BeamSearch | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> tuple[list[list[int]], Cost | None]:
        """Ids of the texts that follow `readings`, without the stop token, and their cost where image tokens are pruned.

        Args:
            max_new_tokens: longest text; None is as long as the model can say.
            sampler: default greedy.
            search: a `BeamSearch` or `OPERA` instead; texts are then written one after the other, as with pruning.
            generator: one for the call, or one for each text; a text does not depend on what it is written with.
            callback: called as `callback(step, ids)` after each token of a group of readings.
        """
        self.check_length(readings, max_new_tokens)
        if isinstance(generator, torch.Generator):
            # One stream for the call: its texts take independent generators seeded from it, whatever their grouping.
            seeds = torch.randint(2**62, (len(readings),), generator=generator, device=generator.device).tolist()
            generator = [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]
        texts: list[list[int]] = [[] for _ in readings]
        cost = None if self.pruning is None else Cost()
        self._interrupt = False
        self._num_timesteps = max_new_tokens or max(reading.limit for reading in readings)
        for rows in self.groups(readings, search is not None or self.pruning is not None):
            condition = concatenate([readings[row].condition for row in rows])
            length = max_new_tokens or min(readings[row].limit for row in rows)
            noise = None if generator is None else [generator[row] for row in rows]
            output = self._continue(condition, readings[rows[0]], length, sampler, search, noise, callback)
            for row, ids in zip(rows, output.tokens(), strict=True):
                texts[row] = ids
            if cost is not None and output.cost is not None:
                cost += output.cost
        return texts, cost

    def text_length(self, readings: Sequence[Reading], max_new_tokens: int | None) -> int | None:
        """`max_new_tokens`, or the checkpoint's setting, where it has one, as far as it fits."""
        own = self.generation_config.get("max_new_tokens")
        if max_new_tokens is not None or own is None:
            return max_new_tokens
        return min([own, *(reading.limit for reading in readings)])

    def answer(
        self,
        readings: Callable[[], Sequence[Reading]],
        *,
        max_new_tokens: int | None,
        temperature: float,
        top_k: int,
        top_p: float,
        search: BeamSearch | None,
        generator: torch.Generator | list[torch.Generator] | None,
        return_dict: bool,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        finish: Callable[[str], str] = str.strip,
    ) -> ARTextOutput | tuple:
        """A call that reads: checks its arguments, makes the readings, writes behind them.

        Args:
            readings: makes the prompts of the call.
            finish: makes what is returned of a text.
        """
        sampler = self.check_text_sampling(temperature, top_k, top_p)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_search(search, temperature)
        prompts = readings()
        self.check_generator(generator, len(prompts))

        def step_end(step: int, ids: torch.Tensor) -> torch.Tensor | None:
            replaced = self.step_end(callback_on_step_end, callback_on_step_end_tensor_inputs, step, {"latents": ids})
            return replaced.get("latents")

        written, cost = self.write(
            prompts,
            max_new_tokens=self.text_length(prompts, max_new_tokens),
            sampler=sampler,
            search=search,
            generator=generator,
            callback=None if callback_on_step_end is None else step_end,
        )
        texts = [finish(self.decode_words(ids)) for ids in written]
        self.maybe_free_model_hooks()
        return ARTextOutput(texts=texts, cost=cost) if return_dict else (texts,)

    def ask(self, image: Any, question: Any = None, **options: Any) -> ARTextOutput:
        """`chat`, by the name that all pipelines share that read; without a question the image is described."""
        return self.chat(image, question or "Describe the picture.", **options)

    def _continue(
        self,
        condition: Condition,
        reading: Reading,
        length: int,
        sampler: Sampler | None,
        search: BeamSearch | None,
        noise: list[torch.Generator] | None,
        callback: Callable[[int, torch.Tensor], torch.Tensor | None] | None,
    ) -> TextOutput:
        shared: dict[str, Any] = {
            "stop_id": self.stop_id,
            "max_tokens": length,
            "vocabulary": self.text_range,
            "callback": callback,
            "interrupt": lambda: self._interrupt,
        }
        if search is not None:
            image = (reading.images[0][0], reading.images[-1][1]) if reading.images else None
            return search(self.transformer, condition, image=image, **shared)
        return decode_text(
            self.transformer,
            condition,
            sampler=sampler,
            noise=noise,
            check_every=2,
            pruning=self.pruning,
            images=reading.images,
            **shared,
        )

    def stream(self, reading: Reading, max_new_tokens: int | None = None, **options: Any) -> Iterator[str]:
        """The text that follows one reading, piece by piece as it is written; joined, the pieces are the whole text.

        Args:
            options: `sampler` and `noise` of `stream_text`.
        """
        self.check_length([reading], max_new_tokens)
        self._interrupt = False
        said = ""
        for ids in stream_text(
            self.transformer,
            reading.condition,
            stop_id=self.stop_id,
            max_tokens=max_new_tokens or reading.limit,
            vocabulary=self.text_range,
            interrupt=lambda: self._interrupt,
            check_every=1,
            pruning=self.pruning,
            images=reading.images,
            **options,
        ):
            row = ids[0].tolist()
            ended = self.stop_id in row
            text = self.decode_words(row[: row.index(self.stop_id)] if ended else row)
            # An unfinished character decodes to a replacement character: it is held back until it is whole.
            if len(text) > len(said) and (ended or not text.endswith("\ufffd")):
                yield text[len(said) :]
                said = text
        self.maybe_free_model_hooks()

    def stream_chat(
        self, image: Any = None, question: str | None = None, *, max_new_tokens: int | None = None, **options: Any
    ) -> Iterator[str]:
        """The answer to one question, piece by piece as it is written.

        Args:
            options: `sampler` and `noise` of `stream_text`, and what else `readings` takes.
        """
        sampling = {name: options.pop(name) for name in ("sampler", "noise") if name in options}
        with torch.no_grad():
            readings = self.readings(image, question, **options)
        if len(readings) != 1:
            raise ValueError(f"one conversation is streamed at a time, got {len(readings)}.")
        return self.stream(readings[0], self.text_length(readings, max_new_tokens), **sampling)

    # ------------------------------------------------------------------ explaining

    @abstractmethod
    def readings(self, image: Any, question: Any = None, **options: Any) -> list[Reading]:
        """The prompts of a request."""

    @abstractmethod
    def seen(self, image: Any) -> PIL.Image.Image:
        """One image as the model sees it."""

    @torch.no_grad()
    def explain(
        self,
        image: Any,
        question: str | None = None,
        *,
        method: str = "tam",
        scales: Sequence[float] = (0.75, 1.0, 1.25),
        ranking: int = 50,
        kernel: int = 3,
        max_new_tokens: int | None = None,
    ) -> Explanation:
        """Where in the image each word of the answer comes from.

        Args:
            image: one image.
            question (`str`, *optional*): asked about it.
            method: "tam" (Token Activation Map, arXiv 2506.23270) takes away what the words before a word draw from the image;
                "arc" lets words stay that would go on alike, "msea" averages over scales of the picture, "msea+arc" does both
                (after arXiv 2509.22415); "attention" is where the last third of the layers look.
            scales: of "msea".
            ranking: of "arc", how many next words are compared.
            kernel: side of the window that denoises the maps; 1 turns it off.
            max_new_tokens (`int`, *optional*): longest answer.

        Returns:
            [`Explanation`]: the answer's words with a map for each; `overlay` and `image` draw them.
        """
        from . import explaining

        return explaining.explain(self, image, question, method, scales, ranking, kernel, max_new_tokens)

    @torch.no_grad()
    def attention_balance(
        self,
        image: Any,
        question: str | None = None,
        *,
        max_new_tokens: int | None = None,
        ignore_first: bool = False,
    ) -> Balance:
        """How the written words share their attention between the prompt's text and the image (arXiv 2508.10552).

        Args:
            ignore_first: leave out the first token, on which attention that nobody needs comes to rest.

        Returns:
            [`Balance`]: modality dominance and attention efficiency of each layer, and a picture of them.
        """
        from . import explaining

        return explaining.balance(self, image, question, max_new_tokens, ignore_first)
