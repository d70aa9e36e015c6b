"""Trains one `AutoregressiveModel` on words and image codes: draws from captions, describes, answers questions.

Two kinds of rows, each of one fixed length (T caption slots, N image tokens, K questions):

- drawing rows `[caption, T slots] <image> [N codes]`: the loss falls on the codes, in the way of the decoding strategy that
  the model is trained for. A share of them has the null prompt, which is what guidance subtracts;
- reading rows `[null prompt, T slots] <image> [N codes] [caption segment] [K question segments]`: the loss falls on the words
  that follow the image, which is seen whole. Segments see the image and themselves, never each other, and all start at the same
  position; so an image is read once for K + 1 texts.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armm.data.scenes import SceneDataset
from armm.decoding import build_strategy
from armm.model import AutoregressiveModel
from armm.training.recipe import Recipe, take
from armm.training.task import Batch
from pipelines.text import WordTokenizer
from pipelines.unified_text_to_image import UnifiedTextToImagePipeline
from tokenizers_visual.vq_tokenizer import VQTokenizer

from .captioned import CaptionedImagesTask
from .unified_data import UnifiedData, prepare_codes, prepare_texts, scene_vocabulary
from .unified_infilling import caption_with_hole, holed_images, holed_loss
from .unified_rows import reading_mask, reading_positions
from .unified_start import start_from

logger = logging.getLogger(__name__)

_IGNORED = -100


class UnifiedTask(CaptionedImagesTask):
    """Recipe mappings:

    model: `text_slots` (words of a prompt), `answer_slots` (tokens of a text after the image), `bidirectional_prompt` (the
        words of a prompt see each other whole), `bidirectional_image` (so does an image that is read), `decoding` (the
        strategy: `type`, a name of `armm.decoding.DECODING_STRATEGIES`, and its arguments), `holes` (sentinels in the
        vocabulary, for infilling), `transformer` (arguments of `ARTransformer`), `head` and `shuffle` (of
        `AutoregressiveModel`, as the strategy needs them), `start` (directory of trained weights to go on from: this
        model's, or one's with another decoding), `compile` (the trunk; needs a C++ compiler), `generation` (generation config
        of the export).
    data: `tokenizer` (directory of a trained `VQTokenizer`), scenes, size, seed, validation (scenes), `cache` (directory of
        what is made once; by default beside the output directory), captions and questions (written per scene),
        `reading_share` (of the rows), `questions_per_row`, `null_share` (of the drawing rows, without their caption),
        `count_weights` (how often a scene of one, two, three objects is drawn from, relative to its share of the scenes),
        `infilling_share` (of the drawing rows once more as images with holes, and of the captions).
    loss: weights of `caption`, `answer` and `infilling` relative to the codes of drawing rows.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.settings = take(
            recipe.model,
            "model",
            text_slots=28,
            answer_slots=32,
            bidirectional_prompt=True,
            bidirectional_image=True,
            start=None,
            decoding={"type": "next_token"},
            head=None,
            shuffle=None,
            holes=0,
            transformer={},
            compile=False,
            generation={"guidance_scale": 3.0, "temperature": 0.7, "top_k": 0, "top_p": 1.0},
        )
        self.data = take(
            recipe.data,
            "data",
            tokenizer=None,
            scenes=60000,
            size=64,
            seed=0,
            validation=256,
            cache=None,
            captions=8,
            questions=12,
            reading_share=0.3,
            questions_per_row=4,
            null_share=0.1,
            infilling_share=0.0,
            count_weights=[1.0, 1.0, 1.0],
        )
        self.weights = take(recipe.loss, "loss", caption=0.3, answer=1.0, infilling=0.5)
        if not self.data["tokenizer"]:
            raise ValueError(
                "`data.tokenizer` must name the directory of a trained tokenizer (`armm train` one first)."
            )
        if not 0 < self.data["reading_share"] < 1:
            raise ValueError(f"`data.reading_share` must lie between 0 and 1, got {self.data['reading_share']}.")
        if not 1 <= self.data["questions_per_row"] <= self.data["questions"]:
            raise ValueError("`data.questions_per_row` must lie between 1 and `data.questions`.")
        if (self.data["infilling_share"] > 0) != (self.settings["holes"] > 0):
            raise ValueError("`data.infilling_share` and `model.holes` belong together: set both or neither.")
        self.tokenizer = VQTokenizer.from_pretrained(self.data["tokenizer"]).requires_grad_(False)
        self.vocabulary = scene_vocabulary(self.settings["holes"])
        self.words = WordTokenizer(self.vocabulary)
        self.grid = (self.data["size"] // self.tokenizer.downsample,) * 2
        self.text_slots = int(self.settings["text_slots"])
        self.image_tokens = self.grid[0] * self.grid[1]
        self.decoding = build_strategy(self.settings["decoding"])
        window = (self.settings["shuffle"] or {}).get("window", 1)
        self.trunk_tokens = self.image_tokens // window**2
        positions = self.text_slots + 1 + self.trunk_tokens + int(self.settings["answer_slots"])
        self.model = AutoregressiveModel(
            vocab_size=len(self.words) + self.tokenizer.codebook_size,
            transformer={"learned_positions": positions, **self.settings["transformer"]},
            head=self.settings["head"],
            shuffle=self.settings["shuffle"],
            grid=list(self.grid),
            text_slots=self.text_slots,
            answer_slots=int(self.settings["answer_slots"]),
            bidirectional_prompt=bool(self.settings["bidirectional_prompt"]),
            bidirectional_image=bool(self.settings["bidirectional_image"]),
        )
        if self.settings["start"]:
            start_from(self.model, AutoregressiveModel.from_pretrained(self.settings["start"]))
        self.module = nn.ModuleDict({"model": self.model})

    # ------------------------------------------------------------------ data

    def prepare(self, device: torch.device) -> None:
        data = self.data
        self.device = device
        self.cache = Path(data["cache"] or Path(self.recipe.output).parent / "cache")
        self.tokenizer.to(device)
        self.train_data, _ = self._prepare_split(data["scenes"], data["seed"], "train")
        self.unseen, self.unseen_prompts = self._prepare_split(data["validation"], data["seed"] + 1, "heldout")
        length = max(data.questions.shape[-1] for data in (self.train_data, self.unseen))
        for split in (self.train_data, self.unseen):
            split.questions = F.pad(split.questions, (0, length - split.questions.shape[-1]), value=self.words.pad)
        self.caption_length = self.text_slots + (4 if self.words.holes else 1)
        slots = max(self.caption_length, length - 1)
        if slots > self.settings["answer_slots"]:
            raise ValueError(
                f"`model.answer_slots` {self.settings['answer_slots']} is too short for texts of {slots}: raise it."
            )
        self.question_length = length - 1
        segments = [self.caption_length] + [self.question_length] * data["questions_per_row"]
        prefix = self.text_slots + 1 + self.trunk_tokens
        self.reading_positions = reading_positions(prefix, segments).to(device)
        seen_whole = self.model.bidirectional_tokens(self.reading_positions, reading=True)
        self.reading_mask = reading_mask(prefix, segments, seen_whole).to(device)

    def _prepare_split(self, count: int, seed: int, split: str) -> tuple[UnifiedData, list[str]]:
        dataset = SceneDataset.prepare(count, self.data["size"], seed, split=split, cache_dir=self.cache)
        settings = {
            "text_slots": self.text_slots,
            "captions_per_scene": self.data["captions"],
            "questions_per_scene": self.data["questions"],
        }
        if split == "train":
            self.scene_weights = torch.tensor(self.data["count_weights"])[dataset.scenes.count.long() - 1]
        texts = prepare_texts(dataset.scenes, settings, self.vocabulary, self.cache)
        codes = prepare_codes(dataset.images, self.tokenizer, self.device, self.cache)
        prompts = [self.words.decode(row.tolist()) for row in texts["captions"][:16, 0]]
        return UnifiedData(codes=codes, **texts), prompts

    def batch(self, step: int, size: int, rank: int) -> Batch:
        generator = self.generator(step, rank)
        reading = min(size - 1, max(1, round(size * self.data["reading_share"]))) if size > 1 else 0
        rows = torch.multinomial(self.scene_weights, size, replacement=True, generator=generator)
        batch = self.drawing_rows(self.train_data, rows[reading:], generator, self.data["null_share"])
        if reading:
            batch |= self.reading_rows(self.train_data, rows[:reading], generator)
        if self.words.holes:
            count = max(1, round(self.data["infilling_share"] * (size - reading)))
            first, pad = len(self.words), self.words.pad
            batch |= holed_images(batch["drawing_codes"][:count], self.grid, self.words.holes, first, pad, generator)
        return self._to_device(batch)

    def drawing_rows(self, data: UnifiedData, rows: Tensor, generator: torch.Generator, null_share: float) -> Batch:
        """drawing [A, T + 1], the prompts up to begin-of-image, and drawing_codes [A, N]."""
        codes = data.codes[rows].long()
        pick = torch.randint(data.captions.shape[1], (len(rows),), generator=generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < null_share
        captions = torch.where(dropped, self._null(len(rows)), data.captions[rows, pick].long())
        image = torch.full((len(rows), 1), self.words.image)
        return {"drawing": torch.cat([captions, image], 1), "drawing_codes": codes}

    def reading_rows(
        self, data: UnifiedData, rows: Tensor, generator: torch.Generator, questions: Tensor | None = None
    ) -> Batch:
        """reading_codes [B, N]; reading [B, L], the texts after the image; reading_captions and reading_answers, their targets
        (-100 where there is none), [B, caption length] and [B, K * question length]."""
        count = len(rows)
        codes = data.codes[rows].long()
        pick = torch.randint(data.captions.shape[1], (count,), generator=generator)
        caption = data.captions[rows, pick].long()
        said, captions = self._said(caption, generator)
        tag = torch.full((count, 1), self.words.caption)
        if questions is None:
            draws = torch.rand(count, data.questions.shape[1], generator=generator)
            questions = draws.argsort(1)[:, : self.data["questions_per_row"]]
        asked = data.questions[rows[:, None], questions].long()
        starts = data.answer_starts[rows[:, None], questions].long()
        answers = asked[..., 1:].clone()
        before = torch.arange(answers.shape[-1]) < starts[..., None]
        answers[before | (answers == self.words.pad)] = _IGNORED
        return {
            "reading": torch.cat([tag, said[:, :-1], asked[..., :-1].flatten(1)], 1),
            "reading_codes": codes,
            "reading_captions": captions,
            "reading_answers": answers.flatten(1),
        }

    def _said(self, captions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Captions [B, T] with their end, and a share of them with a hole, as tokens and targets [B, caption length]."""
        words = self.words
        lengths = (captions != words.pad).sum(1)
        tokens = F.pad(captions, (0, self.caption_length - captions.shape[1]), value=words.pad)
        tokens.scatter_(1, lengths[:, None], words.end)
        targets = tokens.masked_fill(tokens == words.pad, _IGNORED)
        if words.holes:
            count = round(self.data["infilling_share"] * len(captions))
            holed = caption_with_hole(
                captions[:count], lengths[:count], words.holes[0], words.end, words.pad, generator
            )
            tokens[:count], targets[:count] = holed
        return tokens, targets

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _null(self, count: int) -> Tensor:
        prompt = torch.full((count, self.text_slots), self.words.pad)
        prompt[:, 0] = self.words.null
        return prompt

    # ------------------------------------------------------------------ loss

    def loss(self, batch: Batch, step: int, progress: float) -> tuple[Tensor, Batch]:
        image_loss = self._drawing_loss(batch)
        loss, logs = image_loss, {"image": image_loss.detach()}
        if "reading" in batch:
            caption_loss, answer_loss, _ = self._reading_losses(batch)
            loss = loss + self.weights["caption"] * caption_loss + self.weights["answer"] * answer_loss
            logs |= {"caption": caption_loss.detach(), "answer": answer_loss.detach()}
        if "holed" in batch:
            infilling_loss = self._infilling_loss(batch)
            loss, logs["infilling"] = loss + self.weights["infilling"] * infilling_loss, infilling_loss.detach()
        return loss, logs

    def _infilling_loss(self, batch: Batch) -> Tensor:
        prompts = batch["drawing"][: len(batch["holed"])]
        return holed_loss(self.model, prompts, batch, len(self.words), self.in_training(self.model.trunk))

    def _drawing_loss(self, batch: Batch) -> Tensor:
        words = len(self.words)
        codes, condition = batch["drawing_codes"], self.model.prefix_condition(batch["drawing"])
        logits = self.decoding.image_logits(
            self.model, codes + words, condition, low=words, trunk=self.in_training(self.model.trunk)
        )
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def _reading_losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of captions and answers, and the predicted ids of the answer tokens [B, K * question length]."""
        hidden = self.reading_states(batch["reading_codes"], batch["reading"])
        texts = hidden.split([self.caption_length, batch["reading_answers"].shape[1]], 1)
        losses = []
        predicted = torch.full_like(batch["reading_answers"], _IGNORED)
        for states, targets in zip(texts, (batch["reading_captions"], batch["reading_answers"]), strict=True):
            wanted = targets != _IGNORED
            logits = self.model.logits(states[wanted], low=0, high=len(self.words)).float()
            losses.append(F.cross_entropy(logits, targets[wanted]))
            if targets is batch["reading_answers"]:
                predicted[wanted] = logits.detach().argmax(-1)
        return losses[0], losses[1], predicted

    def reading_states(self, codes: Tensor, texts: Tensor) -> Tensor:
        """Final hidden states [B, L, D] of the texts [B, L] after an image of codes [B, N]."""
        model = self.model
        image = torch.full((len(codes), 1), self.words.image)
        prompt = torch.cat([self._null(len(codes)), image], 1).to(codes.device)
        embeds = [model.embed(prompt), model.embed_image(codes + len(self.words)), model.embed(texts)]
        table = model.positions_for(self.reading_positions)
        output = self.in_training(self.model.trunk)(torch.cat(embeds, 1), positions=table, mask=self.reading_mask[None, None])
        return (output[0] if isinstance(output, tuple) else output)[:, -texts.shape[1] :]

    # ------------------------------------------------------------------ figures, pictures, weights

    def validate(self) -> dict[str, float]:
        data, generator = self.unseen, torch.Generator().manual_seed(0)
        sums: dict[str, float] = {}
        right = {name: [0, 0] for name in data.kind_names}
        chunks = torch.arange(len(data)).split(64)
        for rows in chunks:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
                questions = torch.rand(len(rows), data.questions.shape[1], generator=generator).argsort(1)
                questions = questions[:, : self.data["questions_per_row"]]
                batch = self.drawing_rows(data, rows, generator, 0.0) | self.reading_rows(
                    data, rows, generator, questions
                )
                batch = self._to_device(batch)
                image = self._drawing_loss(batch)
                null = self._drawing_loss(self._to_device(self.drawing_rows(data, rows, generator, 1.0)))
                caption, answer, predicted = self._reading_losses(batch)
            for name, value in (("image", image), ("null", null), ("caption", caption), ("answer", answer)):
                sums[name] = sums.get(name, 0.0) + value.item() * len(rows)
            targets = batch["reading_answers"].unflatten(1, questions.shape[1:] + (-1,))
            hit = (predicted.view_as(targets) == targets).all(-1).cpu()
            for kind, value in zip(
                data.kinds[rows[:, None], questions].flatten().tolist(), hit.flatten().tolist(), strict=True
            ):
                right[data.kind_names[kind]][0] += value
                right[data.kind_names[kind]][1] += 1
        figures = {name: round(value / len(data), 4) for name, value in sums.items()}
        figures["prompt_gain"] = round(figures["null"] - figures["image"], 4)
        total = [sum(pair[i] for pair in right.values()) for i in (0, 1)]
        figures["answers_right"] = round(total[0] / total[1], 4)
        return figures | {f"right_{name}": round(hits / max(1, asked), 4) for name, (hits, asked) in right.items()}

    def pipeline(self) -> UnifiedTextToImagePipeline:
        """The model as it stands, as a pipeline."""
        pipe = UnifiedTextToImagePipeline(
            tokenizer=self.tokenizer,
            transformer=self.model,
            decoding=self.decoding,
            vocabulary=self.vocabulary,
            generation_config=dict(self.settings["generation"]),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe
