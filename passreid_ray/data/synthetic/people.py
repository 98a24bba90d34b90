"""Identities: what stays the same about a person from camera to camera."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np

from passreid_ray.data.synthetic.randomness import Stream, generator

Colour = tuple[int, int, int]
Texture = Literal["plain", "rows", "columns", "checks", "halves", "dots"]
HairStyle = Literal["bald", "short", "bob", "long", "bun", "ponytail"]
Hat = Literal["none", "cap", "beanie"]
Lower = Literal["trousers", "shorts", "skirt"]
Bag = Literal["none", "backpack", "shoulder", "handbag"]
NameT = TypeVar("NameT", bound=str)

# Clothing colours with how often they are worn: black, grey, white and blue make up more than half, which
# is what makes colour alone a weak cue.
_CLOTHES: list[tuple[Colour, float]] = [
    ((28, 28, 32), 0.13),  # black
    ((70, 72, 78), 0.07),  # dark grey
    ((135, 136, 140), 0.06),  # grey
    ((228, 228, 225), 0.1),  # white
    ((34, 42, 78), 0.08),  # navy
    ((62, 92, 148), 0.09),  # blue
    ((140, 180, 215), 0.05),  # light blue
    ((178, 38, 42), 0.08),  # red
    ((98, 30, 46), 0.04),  # burgundy
    ((58, 105, 66), 0.06),  # green
    ((96, 98, 60), 0.04),  # olive
    ((196, 176, 140), 0.05),  # beige
    ((104, 72, 48), 0.04),  # brown
    ((218, 186, 60), 0.035),  # yellow
    ((212, 120, 50), 0.02),  # orange
    ((220, 150, 172), 0.035),  # pink
    ((108, 74, 138), 0.03),  # purple
]
_HAIR: list[Colour] = [(24, 20, 20), (48, 34, 26), (84, 56, 36), (140, 100, 58), (188, 158, 104), (150, 148, 146)]
_SKIN: list[Colour] = [(238, 204, 180), (224, 182, 150), (198, 150, 116), (156, 108, 78), (112, 74, 54), (78, 52, 40)]
_SHOES: list[Colour] = [(26, 26, 28), (232, 232, 230), (92, 64, 44), (120, 122, 128), (170, 44, 44), (52, 74, 128)]
_UPPER_TEXTURES: dict[Texture, float] = {
    "plain": 0.52, "rows": 0.15, "columns": 0.06, "checks": 0.10, "halves": 0.12, "dots": 0.05,
}  # fmt: skip
_HAIR_STYLES: dict[HairStyle, float] = {
    "bald": 0.05, "short": 0.45, "bob": 0.14, "long": 0.17, "bun": 0.06, "ponytail": 0.13,
}  # fmt: skip
_SHORT_SLEEVES = [0.0, 0.35, 0.45, 0.7]
_HATS: dict[Hat, float] = {"none": 0.84, "cap": 0.10, "beanie": 0.06}
_LOWERS: dict[Lower, float] = {"trousers": 0.70, "shorts": 0.18, "skirt": 0.12}
_BAGS: dict[Bag, float] = {"none": 0.45, "backpack": 0.26, "shoulder": 0.17, "handbag": 0.12}
_LOWER_TEXTURES: dict[Texture, float] = {"plain": 0.84, "rows": 0.03, "columns": 0.06, "checks": 0.07}


@dataclass(frozen=True)
class Garment:
    """Cloth of one colour, or of two in a texture."""

    colour: Colour
    second: Colour
    texture: Texture
    period: float
    """Length of one repetition of the texture, in body heights."""
    top: float
    """Where the texture starts, in body heights below the top of the head."""


@dataclass(frozen=True)
class Person:
    """One identity. Lengths are in body heights."""

    stature: float
    """Height relative to an average adult."""
    build: float
    """Width relative to an average adult."""
    skin: Colour
    hair: Colour
    hair_style: HairStyle
    hat: Hat
    hat_colour: Colour
    upper: Garment
    upper_length: float
    """Where the upper garment ends, counted from the top of the head; 0.5 is the hip, a long coat reaches 0.7."""
    is_open: bool
    """An unbuttoned jacket that shows the second colour down the front."""
    sleeve: float
    """Covered share of the arm: 0.35 is a T-shirt."""
    logo: Colour | None
    """Print on the chest, seen from the front only."""
    lower: Garment
    lower_kind: Lower
    lower_width: float
    """Width of a trouser leg relative to an average one."""
    shoes: Colour
    bag: Bag
    bag_colour: Colour


@lru_cache(maxsize=4096)
def person_of(seed: int, person: int) -> Person:
    """Identity number ``person`` of a seed; it depends on nothing else. Negative numbers are passers-by."""
    rng = generator(seed, Stream.PERSON, abs(person), int(person < 0))
    coat = rng.random() < 0.25
    return Person(
        stature=float(np.clip(rng.normal(0.94, 0.05), 0.82, 1.05)),
        build=float(np.clip(rng.normal(1.0, 0.13), 0.74, 1.35)),
        skin=_vary(rng, _SKIN[rng.choice(len(_SKIN), p=[0.26, 0.28, 0.20, 0.12, 0.08, 0.06])], 8),
        hair=_vary(rng, _HAIR[rng.choice(len(_HAIR), p=[0.38, 0.24, 0.16, 0.10, 0.07, 0.05])], 8),
        hair_style=_choose(rng, _HAIR_STYLES),
        hat=_choose(rng, _HATS),
        hat_colour=_cloth_colour(rng),
        upper=_garment(rng, _UPPER_TEXTURES, top=0.16),
        upper_length=float(rng.uniform(0.58, 0.70) if coat else rng.uniform(0.49, 0.55)),
        is_open=bool(rng.random() < (0.5 if coat else 0.15)),
        sleeve=float(
            1.0 if coat or rng.random() < 0.45 else rng.choice([0.0, 0.35, 0.45, 0.7], p=[0.1, 0.4, 0.3, 0.2])
        ),
        logo=_cloth_colour(rng) if rng.random() < 0.3 else None,
        lower=_garment(rng, _LOWER_TEXTURES, top=0.48),
        lower_kind=_choose(rng, _LOWERS),
        lower_width=float(rng.uniform(0.8, 1.35)),
        shoes=_vary(rng, _SHOES[rng.choice(len(_SHOES), p=[0.36, 0.26, 0.12, 0.12, 0.07, 0.07])], 10),
        bag=_choose(rng, _BAGS),
        bag_colour=_cloth_colour(rng),
    )


def _garment(rng: np.random.Generator, textures: dict[Texture, float], top: float) -> Garment:
    return Garment(
        colour=_cloth_colour(rng),
        second=_cloth_colour(rng),
        texture=_choose(rng, textures),
        period=float(rng.uniform(0.035, 0.09)),
        top=top,
    )


def _cloth_colour(rng: np.random.Generator) -> Colour:
    weights = np.array([weight for _, weight in _CLOTHES])
    colour, _ = _CLOTHES[rng.choice(len(_CLOTHES), p=weights / weights.sum())]
    return _vary(rng, colour, 14)


def _vary(rng: np.random.Generator, colour: Colour, spread: float) -> Colour:
    red, green, blue = np.clip(np.array(colour) + rng.normal(0, spread / 2) + rng.normal(0, spread / 2, 3), 8, 247)
    return int(red), int(green), int(blue)


def _choose(rng: np.random.Generator, weights: dict[NameT, float]) -> NameT:
    names = list(weights)
    shares = np.array(list(weights.values()))
    return names[rng.choice(len(names), p=shares / shares.sum())]
