"""The scenes' language: captions that say what they claim, questions with one answer each, and a closed vocabulary.

Everything is drawn from a ``random.Random``, so a scene, an index and a seed give the same words on every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import NamedTuple

import torch

from .geometry import centre_heights, unproject
from .graph import COLORS, LIGHTS, MATERIALS, SHAPES, SIZES, Scenes, relation

ATTRIBUTES = ("size", "material", "color", "shape")  # the order in which a phrase names them
QUESTION_TYPES = ("count", "color", "shape", "size", "material", "relation", "existence", "light")
NUMBERS = ("zero", "one", "two", "three")
_VALUES = {"size": SIZES, "material": MATERIALS, "color": COLORS, "shape": SHAPES}
_SYNONYMS = {
    "sphere": ("ball",),
    "cube": ("box", "block"),
    "small": ("little", "tiny"),
    "large": ("big",),
    "shiny": ("glossy",),
    "matte": ("dull",),
}
_SYNONYM_SHARE = 0.15
_PHRASES = {
    "left": ("to the left of", "to the left of", "left of", "on the left of"),
    "right": ("to the right of", "to the right of", "right of", "on the right of"),
    "front": ("in front of",),
    "behind": ("behind",),
}
_ANSWERS = {"left": "to the left", "right": "to the right", "front": "in front", "behind": "behind"}
_OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
_LIGHT_PHRASES = {
    "day": ("by day", "in daylight", "during the day"),
    "dusk": ("at dusk", "in the evening"),
    "night": ("at night", "in the night"),
}


class Fact(NamedTuple):
    """One claim: of ``kind`` "shape", "color", "size", "material", "relation", "count" or "light".

    ``subject`` numbers the named objects in the order in which the caption names them (-1: the whole scene). A relation
    says where ``subject`` stands as seen from ``other``.
    """

    kind: str
    subject: int
    value: str | int
    other: int = -1


@dataclass(frozen=True)
class Caption:
    """A caption and everything it claims. It names all objects of its scene, so it always claims their number."""

    text: str
    facts: list[Fact]

    def __str__(self) -> str:
        return self.text


class QA(NamedTuple):
    """A question with its only answer; `object` is the number (of those present) of the one thing it asks about, if there is one."""

    question: str
    answer: str
    type: str
    object: int | None = None


# --- phrases ---------------------------------------------------------------------------------------------------------


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _word(value: str, rng: random.Random, plain: bool = False) -> str:
    options = _SYNONYMS.get(value)
    return rng.choice(options) if options and not plain and rng.random() < _SYNONYM_SHARE else value


def _noun(values: dict[str, str], rng: random.Random, plain: bool = False) -> str:
    """Attribute values (any subset) -> "small shiny red sphere"; "object" stands for an unnamed shape."""
    words = [_word(values[name], rng, plain) for name in ATTRIBUTES if name in values]
    return " ".join(words if "shape" in values else [*words, "object"])


def _objects(scenes: Scenes, index: int) -> tuple[list[dict], str]:
    if not isinstance(scenes, Scenes):
        raise TypeError(f"scenes must be a Scenes batch, got {type(scenes).__name__}")
    if not isinstance(index, int) or not 0 <= index < len(scenes):
        raise ValueError(f"index must be an integer from 0 to {len(scenes) - 1}, got {index!r}")
    return scenes.objects(index), LIGHTS[int(scenes.light[index])]


def _between(a: dict, b: dict) -> str:
    return relation(a["x"] - b["x"], a["z"] - b["z"])


# --- captions --------------------------------------------------------------------------------------------------------


def caption(scenes: Scenes, index: int, rng: random.Random) -> Caption:
    """A random caption of one scene: sizes, materials, relations and the light are mentioned or not."""
    objects, light = _objects(scenes, index)
    size = rng.choices(("all", "none", "some"), (0.75, 0.15, 0.1))[0]
    material = rng.choices(("all", "none", "some"), (0.35, 0.55, 0.1))[0]
    named = []
    for entry in objects:
        names = {"shape", "color"}
        names |= {"size"} if size == "all" or (size == "some" and rng.random() < 0.5) else set()
        names |= {"material"} if material == "all" or (material == "some" and rng.random() < 0.5) else set()
        if rng.random() < 0.06:
            names.discard(rng.choice(("shape", "color")))
        named.append((entry, names))
    related = rng.random() < 0.8
    return _compose(named, light if rng.random() < 0.4 else None, related, rng, plain=False)


def describe_prompt(scenes: Scenes, index: int, rng: random.Random) -> Caption:
    """A prompt to generate one scene from: every object with its size, color and shape, every pair's relation.

    Materials and the light are named half of the time; the words are the plain ones.
    """
    objects, light = _objects(scenes, index)
    names = {"size", "color", "shape"} | ({"material"} if rng.random() < 0.5 else set())
    return _compose([(entry, names) for entry in objects], light if rng.random() < 0.5 else None, True, rng, plain=True)


def _compose(
    named: list[tuple[dict, set[str]]], light: str | None, related: bool, rng: random.Random, plain: bool
) -> Caption:
    named = list(named)
    rng.shuffle(named)
    facts = [Fact("count", -1, len(named))]
    nouns: list[str] = []
    phrases: list[str] = []
    for subject, (entry, names) in enumerate(named):
        values = {name: entry[name] for name in names}
        facts += [Fact(name, subject, values[name]) for name in ATTRIBUTES if name in values]
        noun = _noun(values, rng, plain)
        phrases.append(f"another {noun}" if noun in nouns else _article(noun))
        nouns.append(noun)
    if len(named) > 1 and related:
        body, relations = _related(named, nouns, phrases, rng, plain)
        facts += relations
    else:
        body = _listed(phrases, rng, plain)
    if light is not None:
        facts.append(Fact("light", -1, light))
        when = _LIGHT_PHRASES[light][0] if plain else rng.choice(_LIGHT_PHRASES[light])
        body = f"{when}, {body}" if plain or rng.random() < 0.6 else f"{body} {when}"
    return Caption(body, facts)


def _listed(phrases: list[str], rng: random.Random, plain: bool) -> str:
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    if plain:
        return listed
    opening = rng.random()
    if opening < 0.5:
        return listed
    if opening < 0.7:
        return f"there {'is' if len(phrases) == 1 else 'are'} {listed}"
    if opening < 0.85:
        return f"{NUMBERS[len(phrases)]} object{'s' if len(phrases) > 1 else ''}: {listed}"
    return f"a picture of {listed}"


def _related(
    named: list[tuple[dict, set[str]]], nouns: list[str], phrases: list[str], rng: random.Random, plain: bool
) -> tuple[str, list[Fact]]:
    """The sentence that chains the objects by their relations, and those relations."""
    where = [_between(named[k][0], named[k + 1][0]) for k in range(len(named) - 1)]
    how = [_PHRASES[name][0] if plain else rng.choice(_PHRASES[name]) for name in where]
    facts = [Fact("relation", k, name, k + 1) for k, name in enumerate(where)]
    first = f"{phrases[0]} {how[0]} {phrases[1]}"
    if len(named) == 3:
        middle, names = named[1]
        short = {name: middle[name] for name in ("color", "shape")}
        alone = len(_matches(short, [entry for entry, _ in named])) == 1 and names >= {"color", "shape"}
        if plain or not alone or rng.random() < 0.5:
            return f"{first}, which is {how[1]} {phrases[2]}", facts
        return f"{first}, and the {middle['color']} {nouns[1].split()[-1]} is {how[1]} {phrases[2]}", facts
    form = 0.0 if plain else rng.random()
    if form < 0.55:
        return first, facts
    if form < 0.7:
        return f"{phrases[0]} is {how[0]} {phrases[1]}", facts
    if form < 0.85:
        turned = _OPPOSITE[where[0]]
        return f"{phrases[0]} with {phrases[1]} {rng.choice(_PHRASES[turned])} it", [Fact("relation", 1, turned, 0)]
    return f"{'there is' if form < 0.95 else 'a picture of'} {first}", facts


# --- judging ---------------------------------------------------------------------------------------------------------


def check_facts(facts: list[Fact], predicted: list[dict], light: str | None = None) -> dict[str, list[bool]]:
    """Which facts of a caption hold for what was seen, by kind.

    Args:
        facts: What the caption claims.
        predicted: The objects seen: dictionaries with shape, color, size, material and the place: plane coordinates x, z,
            or the object's middle in the image, x, y (normalised).
        light: The light seen.

    The named objects are matched with the seen ones in the way that makes most facts true; a named object without a
    partner fails all its facts. The number of objects seen must be the number named.
    """
    places = [_place(entry) for entry in predicted]
    count = next((int(fact.value) for fact in facts if fact.kind == "count"), 0)
    named = max([count, *(max(fact.subject, fact.other) + 1 for fact in facts)])
    seen: list[int | None] = list(range(len(predicted)))
    seen += [None] * max(0, named - len(predicted))

    def holds(fact: Fact, partner: tuple[int | None, ...]) -> bool:
        if fact.kind == "count":
            return fact.value == len(predicted)
        if fact.kind == "light":
            return fact.value == light
        subject = partner[fact.subject]
        if subject is None:
            return False
        if fact.kind == "relation":
            other = partner[fact.other]
            if other is None:
                return False
            (ax, az), (bx, bz) = places[subject], places[other]
            return fact.value == relation(ax - bx, az - bz)
        return fact.value == predicted[subject].get(fact.kind)

    best: list[bool] = []
    for partner in permutations(seen, named):
        verdict = [holds(fact, partner) for fact in facts]
        if not best or sum(verdict) > sum(best):
            best = verdict
    result: dict[str, list[bool]] = {}
    for fact, good in zip(facts, best, strict=True):
        result.setdefault(fact.kind, []).append(good)
    return result


def _place(entry: dict) -> tuple[float, float]:
    """Plane coordinates of a seen object."""
    if "x" in entry and "z" in entry:
        return float(entry["x"]), float(entry["z"])
    missing = [name for name in ("x", "y", "shape", "size") if name not in entry]
    if missing:
        raise ValueError(f"a predicted object needs x and z, or x, y, shape and size; {', '.join(missing)} missing")
    shape, size = (torch.tensor(_VALUES[name].index(entry[name])) for name in ("shape", "size"))
    x, z = unproject(torch.tensor([float(entry["x"]), float(entry["y"])]), centre_heights(shape, size)).tolist()
    return x, z


# --- questions -------------------------------------------------------------------------------------------------------


def questions(scenes: Scenes, index: int, rng: random.Random) -> list[QA]:
    """Questions about one scene, several of each type that the scene allows, each with exactly one right answer."""
    objects, light = _objects(scenes, index)
    asked = _count_questions(objects, rng)
    for kind in ("color", "shape", "size", "material"):
        asked += _attribute_questions(objects, kind, rng)
    asked += _relation_questions(objects, rng)
    asked += [_existence_question(objects, rng) for _ in range(2)]
    asked += _light_questions(light, rng)
    return asked


def _matches(values: dict[str, str], objects: list[dict]) -> list[int]:
    return [k for k, entry in enumerate(objects) if all(entry[name] == value for name, value in values.items())]


def _reference(objects: list[dict], k: int, rng: random.Random, without: str | None = None) -> str | None:
    """A phrase ("red cube") that fits object ``k`` alone and does not name the attribute ``without``."""
    usable = [name for name in ATTRIBUTES if name != without]
    fitting: list[dict[str, str]] = []
    for number in range(len(usable) + 1):
        for names in combinations(usable, number):
            values = {name: objects[k][name] for name in names}
            if _matches(values, objects) == [k]:
                fitting.append(values)
        if fitting and number >= 2:
            break
    if not fitting:
        return None
    # Phrases that name the shape sound natural; short ones are as likely as longer ones.
    weights = [(3.0 if "shape" in values else 1.0) / (1 + abs(len(values) - 2)) for values in fitting]
    return _noun(rng.choices(fitting, weights)[0], rng)


def _count_questions(objects: list[dict], rng: random.Random) -> list[QA]:
    asked = [
        QA(rng.choice(("how many objects are there?", "how many objects do you see?")), NUMBERS[len(objects)], "count")
    ]
    kind = rng.choice(("shape", "color", "size", "material"))
    value = rng.choice(_VALUES[kind]) if rng.random() < 0.35 else rng.choice(objects)[kind]
    things = f"{value}s" if kind == "shape" else f"{value} objects"
    ending = rng.choice(("are there?", "do you see?"))
    asked.append(QA(f"how many {things} {ending}", NUMBERS[len(_matches({kind: value}, objects))], "count"))
    return asked


def _attribute_questions(objects: list[dict], kind: str, rng: random.Random) -> list[QA]:
    forms = {
        "color": ("what color is the {}?", "what color is the {}?", "what is the color of the {}?"),
        "shape": ("what shape is the {}?", "what shape is the {}?", "what is the {}?"),
        "size": ("what size is the {}?", "how big is the {}?", "is the {} small or large?"),
        "material": ("is the {} shiny or matte?", "is the {} matte or shiny?", "what material is the {}?"),
    }
    asked = []
    for k, entry in enumerate(objects):
        phrase = _reference(objects, k, rng, without=kind)
        if phrase is not None:
            asked.append(QA(rng.choice(forms[kind]).format(phrase), entry[kind], kind, k))
    return asked


def _relation_questions(objects: list[dict], rng: random.Random) -> list[QA]:
    asked: list[QA] = []
    for i, j in permutations(range(len(objects)), 2):
        first, second = (_reference(objects, k, rng) for k in (i, j))
        if first is None or second is None:
            continue
        true = _between(objects[i], objects[j])
        form = rng.random()
        if form < 0.45:
            asked.append(QA(f"where is the {first} relative to the {second}?", _ANSWERS[true], "relation"))
        elif form < 0.7:
            said = true if rng.random() < 0.5 else rng.choice([name for name in _OPPOSITE if name != true])
            answer = "yes" if said == true else "no"
            asked.append(QA(f"is the {first} {_PHRASES[said][0]} the {second}?", answer, "relation"))
        elif sum(_between(other, objects[j]) == true for k, other in enumerate(objects) if k != j) == 1:
            answer = f"{objects[i]['color']} {objects[i]['shape']}"
            asked.append(QA(f"what is {_PHRASES[true][0]} the {second}?", answer, "relation"))
    return asked


def _existence_question(objects: list[dict], rng: random.Random) -> QA:
    """Half of the answers are "no": then one attribute of a real object was changed."""
    entry = rng.choice(objects)
    names = {"shape", *rng.sample(("size", "material", "color"), rng.choice((1, 1, 2)))}
    if rng.random() < 0.1:
        names = {"shape"}
    values = {name: entry[name] for name in names}
    if rng.random() < 0.5:
        options = [
            {**values, name: value}
            for name in sorted(names)
            for value in _VALUES[name]
            if not _matches({**values, name: value}, objects)
        ]
        if options:
            values = rng.choice(options)
    phrase = _article(_noun(values, rng))
    form = rng.choice(("is there {}?", "is there {}?", "do you see {}?"))
    return QA(form.format(phrase), "yes" if _matches(values, objects) else "no", "existence")


def _light_questions(light: str, rng: random.Random) -> list[QA]:
    said = light if rng.random() < 0.5 else rng.choice([name for name in LIGHTS if name != light])
    return [
        QA(rng.choice(("what time of day is it?", "is it day, dusk or night?")), light, "light"),
        QA(f"is it {said}?", "yes" if said == light else "no", "light"),
    ]
