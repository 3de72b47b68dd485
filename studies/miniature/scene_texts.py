"""The things of a scene, and how they are described: texts of several lengths and wordings, right and wrong ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

# Two large drawings fit into a corner, and a small one is still three patches of a ViT-S/14 wide.
SIZES = {"large": 66, "small": 40}
GAP = 4
PLACES = [
    *("top left", "top centre", "top right"),
    *("middle left", "centre", "middle right"),
    *("bottom left", "bottom centre", "bottom right"),
]
IN_A = {place: f"{'in' if place == 'centre' else 'at'} the {place}" for place in PLACES}
IN_B = dict(
    zip(
        PLACES,
        [
            *("in the upper left corner", "halfway along the upper edge", "in the upper right corner"),
            *("halfway down the left side", "in the very middle", "halfway down the right side"),
            *("in the lower left corner", "halfway along the lower edge", "in the lower right corner"),
        ],
        strict=True,
    )
)
# "A fox" is true of two foxes as well, so that a changed count would not be wrong.
ONE = ("a single", "just one")
NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]
PLURALS = {
    **{"cactus": "cacti", "elf": "elves", "foot": "feet", "goose": "geese", "knife": "knives", "leaf": "leaves"},
    **{"mango": "mangoes", "mosquito": "mosquitoes", "mouse": "mice", "ox": "oxen", "potato": "potatoes"},
    **{"scarf": "scarves", "superhero": "superheroes", "tomato": "tomatoes", "tooth": "teeth"},
    **{"tornado": "tornadoes", "volcano": "volcanoes", "wolf": "wolves"},
}
# No word of these is part of a name in nouns.txt: they can be neither true nor false of a picture.
IRRELEVANT = [
    "It rained all morning on the day this was made.",
    "The afternoon had been warm and rather windy.",
    "This was done on a Tuesday, shortly before lunch.",
    "It took less than an hour from start to finish.",
    "Someone in the next room was practising a song.",
    "The colours had been bought the week before.",
    "Nobody remembers who first suggested the idea.",
    "A cousin asked for a copy and never got one.",
    "It was meant as a present but was never sent.",
    "The last days of the holidays had just begun.",
    "There was tea afterwards, and everyone went home early.",
    "The original has been kept for many years.",
    "Spring came late that year, and the evenings were mild.",
    "An earlier attempt had been thrown away.",
    "The weather forecast had promised snow, which never came.",
    "It won no prize, though the jury was kind about it.",
    "Most of the work was done by candlelight during a power cut.",
    "The neighbours were celebrating until late that night.",
    "It was finished in March, a month later than planned.",
    "Several visitors have asked whether it is for sale.",
]


@dataclass(frozen=True)
class Thing:
    """Drawings of one name in a scene: what a question can ask, then where the copies lie.

    `corners` are the left upper corners in pixels, and `drawing` is a key of `concepts`.
    """

    caption: str
    count: int
    size: str
    place: str
    drawing: str = ""
    corners: tuple[tuple[int, int], ...] = ()

    def extent(self, axis: int) -> tuple[int, int]:
        """Return where the copies begin and end, left to right (0) or top to bottom (1)."""
        starts = [corner[axis] for corner in self.corners]
        return min(starts), max(starts) + SIZES[self.size]

    def precedes(self, other: Thing, axis: int) -> bool:
        """Return whether all of this is left of (0) or above (1) all of the other, in words and in pixels."""
        here, there = (PLACES.index(thing.place) for thing in (self, other))
        regions = here // 3 < there // 3 if axis else here % 3 < there % 3
        return regions and self.extent(axis)[1] + GAP <= other.extent(axis)[0]


def related(things: Sequence[Thing]) -> list[tuple[int, int, list[bool]]]:
    """List the pairs of which the first is left of the second or above it: two numbers, and which of the two holds."""
    pairs: list[tuple[int, int, list[bool]]] = []
    for one, other in combinations(range(len(things)), 2):
        for first, second in ((one, other), (other, one)):
            holds = [things[first].precedes(things[second], axis) for axis in (0, 1)]
            # Either of two things can be the first where one is left of the other and below it.
            if any(holds) and (not pairs or pairs[-1][:2] != (second, first)):
                pairs.append((first, second, holds))
    return pairs


def plural(name: str) -> str:
    """Return the plural of a name in `nouns.txt`."""
    first, of, rest = name.partition(" of ")
    *others, head = first.split(" ")
    if head in PLURALS:
        head = PLURALS[head]
    elif head.endswith("man"):
        head = head[:-3] + "men"
    elif re.search("[^aeiou]y$", head):
        head = head[:-1] + "ies"
    else:
        head += "es" if re.search("(s|x|z|ch|sh)$", head) else "s"
    return " ".join([*others, head]) + of + rest


def article(phrase: str) -> str:
    """Return "a" or "an", by sound for the names in `nouns.txt`."""
    return "an" if re.match("(?!(uni|ewe))[aeiou]|hour", phrase) else "a"


def noun(thing: Thing) -> str:
    return thing.caption if thing.count == 1 else plural(thing.caption)


def join(phrases: Sequence[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]])


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def named(thing: Thing, sizes: bool = True) -> str:
    """Name a thing with its number: "a small fox", "two foxes"."""
    phrase = f"{thing.size} {noun(thing)}" if sizes else noun(thing)
    return f"{article(phrase) if thing.count == 1 else NUMBERS[thing.count]} {phrase}"


def named_a(thing: Thing, single: str) -> str:
    return f"{single if thing.count == 1 else NUMBERS[thing.count]} {thing.size} {noun(thing)}"


def named_b(thing: Thing) -> str:
    number = ("one", "a pair of", "a trio of")[thing.count - 1]
    return f"{number} {'big' if thing.size == 'large' else 'little'} {noun(thing)}"


def be(thing: Thing) -> str:
    return "is" if thing.count == 1 else "are"


def relation_a(one: Thing, other: Thing, holds: Sequence[bool]) -> str:
    parts = f"to the left of the {noun(other)}" if holds[0] else f"above the {noun(other)}"
    if all(holds):
        parts += f" and above {'it' if other.count == 1 else 'them'}"
    return f"the {noun(one)} {be(one)} {parts}"


def relation_b(one: Thing, other: Thing, holds: Sequence[bool]) -> str:
    parts = [part for part, true in zip(("further to the right", "lower down"), holds, strict=True) if true]
    return f"the {noun(other)} {be(other)} {' and '.join(parts)} than the {noun(one)}"


def sentence_a(thing: Thing, single: str, random: Random) -> str:
    name, at, verb = named_a(thing, single), IN_A[thing.place], be(thing)
    return random.choice((f"there {verb} {name} {at}", f"{at} there {verb} {name}", f"{name} {verb} {at}"))


def short(things: Sequence[Thing], random: Random) -> str:
    """Name the things; four take all of ten words without their sizes."""
    return join([named(thing, sizes=len(things) < 4) for thing in random.sample(things, len(things))])


def long_a(things: Sequence[Thing], random: Random, told: Sequence[Thing] = ()) -> str:
    """Describe a scene in a sentence per thing; `told` are the same things after one change, for a negative."""
    told = told or things
    kinds = len(things)
    single = random.choice(ONE)
    said = [sentence_a(told[number], single, random) for number in random.sample(range(kinds), kinds)]
    opening = random.choice(
        (
            f"the picture shows {NUMBERS[kinds]} kinds of things on white paper",
            f"{NUMBERS[kinds]} kinds of things are drawn on a white page",
            f"this is a white page with {NUMBERS[kinds]} kinds of things",
        )
    )
    closing = random.choice(
        ("the rest of the page is empty", "nothing else is on the page", "apart from these the page is blank")
    )
    first, second, holds = random.choice(related(things))
    said.append(relation_a(told[first], told[second], holds))
    # Four things fill the sixty words alone, and two leave some of the thirty.
    said = ([opening] if kinds < 4 else []) + said + ([closing] if kinds == 2 else [])
    return " ".join(map(sentence, said))


def long_b(things: Sequence[Thing], random: Random) -> str:
    """Describe a scene in one list, with other words for sizes, places, numbers and relations."""
    start = random.choice(
        ("somebody has drawn", "you can see", "look closely and you will find", "here we have", "the artist has put")
    )
    items = [f"{named_b(thing)} {IN_B[thing.place]}" for thing in random.sample(things, len(things))]
    first, second, holds = random.choice(related(things))
    said = [f"{start} {join(items)}", relation_b(things[first], things[second], holds)]
    if len(things) < 4:
        said.append(total(things))
    return " ".join(map(sentence, said))


def total(things: Sequence[Thing]) -> str:
    return f"in all there are {NUMBERS[sum(thing.count for thing in things)]} items"


def full(things: Sequence[Thing], random: Random) -> str:
    """Say all that `long_a` and `long_b` can say, in sentences of both kinds, with irrelevant ones between."""
    said = []
    for thing in random.sample(things, len(things)):
        other = f"{named_b(thing)} can be seen {IN_B[thing.place]}"
        said.append(random.choice((sentence_a(thing, random.choice(ONE), random), other)))
    pairs = related(things)
    # Two things have one relation, and its two wordings would say the same thing in a row.
    tellers = random.sample((relation_a, relation_b), min(2, len(pairs)))
    for tell, (first, second, holds) in zip(tellers, random.sample(pairs, len(tellers)), strict=True):
        said.append(tell(things[first], things[second], holds))
    said = [f"this page holds {NUMBERS[len(things)]} kinds of things and nothing more", *said, total(things)]
    said = list(map(sentence, said))
    length = random.randint(82, 100)
    for number, irrelevant in enumerate(random.sample(IRRELEVANT, len(IRRELEVANT))):
        if number > 1 and sum(len(text.split()) for text in said) >= length:
            break
        said.insert(random.randint(1, len(said) - 1), irrelevant)
    return " ".join(said)


def exchanged(things: Sequence[Thing], pair: tuple[int, int], fields: Sequence[str]) -> list[Thing]:
    """Return the things after two have exchanged some fields."""
    changed = list(things)
    for one, other in (pair, pair[::-1]):
        changed[one] = replace(things[one], **{field: getattr(things[other], field) for field in fields})
    return changed


def negatives(things: Sequence[Thing], random: Random) -> dict[str, list[Thing] | None]:
    """Make the changes that `long_a` is wrong after.

    Each turns what is likely in a scene into what is as likely, but for the room that three large drawings need:
    who reads the texts without the picture cannot tell which is right. Scenes with one, two and three of a thing
    change into each other evenly.
    """
    pairs = list(combinations(range(len(things)), 2))
    unequal = [pair for pair in pairs if things[pair[0]].size != things[pair[1]].size]
    several = [number for number, thing in enumerate(things) if thing.count > 1]
    number = several[0] if several else random.randrange(len(things))
    count = random.choice([count for count in (1, 2, 3) if count != things[number].count])
    recounted = [replace(thing, count=count) if thing is things[number] else thing for thing in things]
    return {
        # The number and the size go along with the name: only the places change.
        "swapped_places": exchanged(things, random.choice(pairs), ("caption", "count", "size")),
        "changed_count": recounted,
        "swapped_sizes": exchanged(things, random.choice(unequal), ("size",)) if unequal else None,
    }
