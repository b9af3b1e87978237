"""The miniature's world: what there is to generate, how it is described, and the subjects that nobody has seen.

Every random choice comes from a `random.Random` seeded with text, so image `i` of a seed is the same everywhere.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from functools import lru_cache

from ether_diffusion.miniature.render import COLOURS, PATTERNS
from ether_diffusion.miniature.scene import Figure, Scene, Shape
from ether_diffusion.miniature.shapes import FIGURES, SHAPES

SIZES = {"small": (0.15, 0.18), "": (0.21, 0.26), "large": (0.31, 0.36)}  # radius, as a fraction of the side
POSITIONS = {
    "on the left": (0.3, 0.5),
    "on the right": (0.7, 0.5),
    "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
    "in the middle": (0.5, 0.5),
}
PREFIXES = ("", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ")
COUNTS = {2: "two", 3: "three"}
TOKENS = ("sks", "qwe")  # identifiers kept out of the training captions, for subjects
VIEWS = 6


@dataclass(frozen=True)
class Subject:
    """One figure that no training image shows, to be learned from a few views."""

    name: str
    figure: Figure

    @property
    def class_name(self) -> str:
        return self.figure.name

    def view(self, index: int) -> Scene:
        """View `index` (0 to VIEWS − 1): another background, place, size and tilt; the caption names its setting."""
        rng = random.Random(f"{self.name}/view/{index}")
        background = rng.choice([c for c in COLOURS if c not in dict(self.figure.colours).values()])
        pattern = PATTERNS[index % len(PATTERNS)]
        figure = replace(
            self.figure,
            x=rng.uniform(0.42, 0.58),
            y=rng.uniform(0.45, 0.55),
            radius=rng.uniform(0.34, 0.42),
            tilt=rng.uniform(-8, 8),
        )
        caption = f"a photo of {TOKENS[0]} {self.class_name} on {describe_background(background, pattern)}"
        return Scene((figure,), background, pattern, f"{self.name}/{index}", caption)


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def describe_background(colour: str, pattern: str) -> str:
    return article(f"{colour} background" if pattern == "plain" else f"{pattern} {colour} background")


def held_out(shape: str, colour: str) -> bool:
    """Whether this pair of shape and colour is kept out of all training images (about one in six)."""
    return (2 * list(SHAPES).index(shape) + list(COLOURS).index(colour)) % 6 == 0


def held_out_pairs() -> list[tuple[str, str]]:
    return [(shape, colour) for shape in SHAPES for colour in COLOURS if held_out(shape, colour)]


def _draw_figure(rng: random.Random, name: str, fewest_colours: int = 2) -> Figure:
    figure = FIGURES[name]
    palette = rng.sample(list(COLOURS), max(fewest_colours, rng.choice((2, 3, 3, 4, 5))))
    colours: dict[str, str] = {}
    for part, neighbour in figure.parts.items():
        colours[part] = rng.choice([c for c in palette if c != colours.get(neighbour)])
    styles = tuple((part, rng.randrange(n)) for part, n in figure.styles.items())
    return Figure(name, tuple(colours.items()), styles)


@lru_cache
def subjects() -> tuple[Subject, ...]:
    """Nine subjects, three of each class: figures whose colouring never occurs in the training images."""
    return tuple(
        Subject(f"{name}-{k + 1}", _draw_figure(random.Random(f"subject/{name}/{k}"), name, fewest_colours=4))
        for name, k in itertools.product(FIGURES, range(3))
    )


def _known_figure(rng: random.Random) -> Figure:
    while True:
        figure = _draw_figure(rng, rng.choice(list(FIGURES)))
        if (figure.name, figure.colours) not in {(s.class_name, s.figure.colours) for s in subjects()}:
            return figure


def _known_pair(rng: random.Random, not_colour: str) -> tuple[str, str]:
    while True:
        shape, colour = rng.choice(list(SHAPES)), rng.choice(list(COLOURS))
        if not held_out(shape, colour) and colour != not_colour:
            return shape, colour


def _invented_name(rng: random.Random) -> str:
    """A word without a meaning: what an identifier is before anything has been learned for it."""
    while True:
        word = "".join(rng.choice("bcdfghjklmnpqrstvwxz") for _ in range(3))
        if word not in TOKENS:
            return word


def _jittered(rng: random.Random, place: tuple[float, float], amount: float) -> tuple[float, float]:
    return place[0] + rng.uniform(-amount, amount), place[1] + rng.uniform(-amount, amount)


def _set_scene(rng: random.Random, phrase: str, background: str, pattern: str) -> str:
    """Put a noun phrase into one of several wordings, with or without its background."""
    phrase_first, ground = rng.choice(PREFIXES) + phrase, describe_background(background, pattern)
    plain = ground.split(" ", 1)[1]
    endings = (f" on {ground}", f" on {ground}", f", {plain}", f" in front of {ground}")
    return rng.choice((*(phrase_first + each for each in endings), f"{ground} with {phrase}", phrase_first))


def describe_figure(rng: random.Random, figure: Figure, name: str = "") -> str:
    """'a toy', or 'a toy with red ears, a blue head and a green body': up to all of its coloured parts."""
    noun = article(f"{name} {figure.name}" if name else figure.name)
    mentioned = rng.sample(figure.colours, rng.choice((0, 0, 1, 2, 3, len(figure.colours))))
    if not mentioned:
        return noun
    parts = [f"{c} {p}" if p.endswith("s") or p == "hair" else article(f"{c} {p}") for p, c in mentioned]
    return f"{noun} with {' and '.join((', '.join(parts[:-1]), parts[-1])) if len(parts) > 1 else parts[0]}"


def _single(rng: random.Random, background: str) -> tuple[tuple, str]:
    shape, colour = _known_pair(rng, background)
    size, where = rng.choice(list(SIZES)), rng.choice(list(POSITIONS))
    x, y = _jittered(rng, POSITIONS[where], 0.04)
    thing = Shape(shape, colour, size, x, y, rng.uniform(*SIZES[size]))
    words = " ".join(w for w in (size, colour if rng.random() < 0.93 else "", shape) if w)
    return (thing,), article(words) + (f" {where}" if rng.random() < 0.5 else "")


def _pair(rng: random.Random, background: str) -> tuple[tuple, str]:
    beside = rng.random() < 0.5
    places = ((0.27, 0.5), (0.73, 0.5)) if beside else ((0.5, 0.27), (0.5, 0.73))
    things = []
    for place in places:
        shape, colour = _known_pair(rng, background)
        things.append(Shape(shape, colour, "", *_jittered(rng, place, 0.03), rng.uniform(0.17, 0.22)))
    first, second = (article(f"{t.colour} {t.name}") for t in things)
    relation = rng.choice(("to the left of", "next to", "and") if beside else ("above", "above", "and"))
    return tuple(things), f"{first} {relation} {second}"


def _several(rng: random.Random, background: str) -> tuple[tuple, str]:
    shape, colour = _known_pair(rng, background)
    count = rng.choice(tuple(COUNTS))
    radius = 0.19 if count == 2 else 0.14
    things = [
        Shape(shape, colour, "small", *_jittered(rng, ((k + 0.5) / count, 0.5), 0.02), radius) for k in range(count)
    ]
    plural = f"{shape}es" if shape == "cross" else f"{shape}s"
    return tuple(things), f"{COUNTS[count]} {colour} {plural}"


def _portrait(rng: random.Random, figure: Figure) -> tuple[tuple, str]:
    small = rng.random() < 0.2
    where = rng.choice(list(POSITIONS)) if small else "in the middle"
    x, y = _jittered(rng, POSITIONS[where], 0.06)
    radius = rng.uniform(0.24, 0.28) if small else rng.uniform(0.33, 0.42)
    thing = replace(figure, x=x, y=y, radius=radius, tilt=rng.uniform(-9, 9))
    phrase = describe_figure(rng, figure, _invented_name(rng) if rng.random() < 0.2 else "")
    if small:
        phrase = phrase.replace("a ", "a small ", 1) + f" {where}"
    return (thing,), phrase


def _company(rng: random.Random, figure: Figure, background: str) -> tuple[tuple, str]:
    shape, colour = _known_pair(rng, background)
    left = rng.random() < 0.5
    x, y = _jittered(rng, (0.34 if left else 0.66, 0.52), 0.03)
    thing = replace(figure, x=x, y=y, radius=rng.uniform(0.28, 0.32), tilt=rng.uniform(-6, 6))
    place = _jittered(rng, (0.8 if left else 0.2, 0.5), 0.03)
    other = Shape(shape, colour, "small", *place, rng.uniform(0.13, 0.16))
    phrase = describe_figure(rng, figure, _invented_name(rng) if rng.random() < 0.2 else "")
    return (thing, other), f"{phrase} {rng.choice(('next to', 'and'))} {article(f'{colour} {shape}')}"


def draw_scene(seed: str | int, index: int) -> Scene:
    """Training scene `index`: shapes (35 %), several shapes (20 %), figures (35 %), a figure in company (10 %)."""
    rng = random.Random(f"{seed}/{index}")
    pattern = rng.choice(PATTERNS) if rng.random() < 0.4 else "plain"
    kind = rng.random()
    if kind < 0.55:
        background = rng.choice(list(COLOURS))
        compose = _single if kind < 0.35 else _pair if kind < 0.47 else _several
        things, phrase = compose(rng, background)
    else:
        figure = _known_figure(rng)
        background = rng.choice([c for c in COLOURS if c not in dict(figure.colours).values()])
        things, phrase = _portrait(rng, figure) if kind < 0.9 else _company(rng, figure, background)
    caption = _set_scene(rng, phrase, background, pattern)
    return Scene(things, background, pattern, f"{seed}/{index}/tones", caption)
