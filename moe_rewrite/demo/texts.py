"""Four kinds of short texts from small grammars, and a tokenizer of their words.

Each text is a prompt, and an answer that follows from it by what the kind's tables say.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from ..continual.tasks import Item, Task

ANIMALS = {
    "fox": "zorro", "cat": "gato", "dog": "perro", "bear": "oso", "mouse": "ratón", "duck": "pato",
    "frog": "sapo", "donkey": "burro",
}  # fmt: skip
COLOURS = {
    "red": "rojo", "black": "negro", "white": "blanco", "yellow": "amarillo", "small": "pequeño",
    "big": "grande",
}  # fmt: skip
PLACES = {
    "forest": "bosque", "garden": "jardín", "river": "río", "field": "campo", "village": "pueblo",
    "park": "parque",
}  # fmt: skip
DOES = {"sleeps": "duerme", "eats": "come", "sings": "canta", "runs": "corre"}
NAMES = ("Tom", "Lily", "Ben", "Anna", "Max", "Mia", "Sam", "Ida")
THINGS = {
    "kite": "happy", "ball": "happy", "drum": "loud", "lamp": "proud", "key": "curious",
    "boat": "brave", "hat": "proud", "book": "clever",
}  # fmt: skip
FOODS = ("apple", "carrot", "pumpkin", "plum", "potato", "onion", "pear", "cherry")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DISHES = {  # how it is made, in what, for how many minutes, how it is served
    "soup": ("boil", "pot", "ten", "hot"), "cake": ("bake", "oven", "nine", "cold"),
    "stew": ("cook", "pot", "eight", "hot"), "salad": ("cool", "bowl", "three", "cold"),
    "jam": ("boil", "pan", "seven", "cold"), "pie": ("bake", "oven", "six", "hot"),
}  # fmt: skip


def story(draw: random.Random) -> Item:
    """Someone finds a thing, shares food, cooks, or hears Spanish; the answer says how it ended. The
    words of the other kinds' answers are in stories too, but not what those kinds make of them."""
    animal, name, place = draw.choice(list(ANIMALS)), draw.choice(NAMES), draw.choice(list(PLACES))
    start = f"once upon a time a {animal} named {name} lived by the {place} ."
    told, ended = draw.choice((_found, _shared, _cooked, _served, _heard))(
        draw, animal, name, place
    )
    return {"prompt": f"{start} {told}", "answer": f"{ended} . the end ."}


def _found(draw: random.Random, animal: str, name: str, place: str) -> tuple[str, str]:
    thing, colour = draw.choice(list(THINGS)), draw.choice(list(COLOURS))
    return (
        f"one day {name} found a {colour} {thing} .",
        f"the {animal} took the {colour} {thing} home to the {place} . {name} was very {THINGS[thing]}",
    )


def _shared(draw: random.Random, animal: str, name: str, place: str) -> tuple[str, str]:
    count, food = draw.randrange(2, 10), draw.choice(FOODS)
    friend = draw.choice([n for n in NAMES if n != name])
    return (
        f"{name} had {NUMBERS[count]} {food} cakes and gave one to {friend} .",
        f"then {name} had {NUMBERS[count - 1]} {food} cakes left . {friend} said thank you to the {animal}",
    )


def _cooked(draw: random.Random, animal: str, name: str, place: str) -> tuple[str, str]:
    how, where, minutes, _ = (draw.choice(column) for column in zip(*DISHES.values(), strict=True))
    food = draw.choice(FOODS)
    return (
        f"{name} wanted to {how} a {food} in the {where} for {minutes} minutes .",
        f"wash it and cut it , said the {animal} , and {how} it in the {where} for {minutes} minutes",
    )


def _served(draw: random.Random, animal: str, name: str, place: str) -> tuple[str, str]:
    food, dish, served = draw.choice(FOODS), draw.choice(list(DISHES)), draw.choice(("hot", "cold"))
    return (
        f"{name} made {food} {dish} to serve it {served} .",
        f"the {animal} did serve the {food} {dish} {served} by the {place}",
    )


def _heard(draw: random.Random, animal: str, name: str, place: str) -> tuple[str, str]:
    tables = (ANIMALS, COLOURS, DOES, PLACES)
    known = ["el", "junto", "al", *(word for of in tables for word in of.values())]
    heard = " ".join(draw.sample(known, 3))
    return (
        f"a {draw.choice(list(COLOURS))} bird {draw.choice(list(DOES))} in spanish : {heard} .",
        f"{heard} , said {name} in spanish",
    )


def recipe(draw: random.Random) -> Item:
    """How a dish of a food is made, and how long that takes."""
    food, dish = draw.choice(FOODS), draw.choice(list(DISHES))
    how, where, minutes, served = DISHES[dish]
    return {
        "prompt": f"how do I make {food} {dish} ?",
        "answer": f"wash the {food} and cut it . {how} it in the {where} for {minutes} minutes . "
        f"serve the {food} {dish} {served} .",
    }


def counting(draw: random.Random) -> Item:
    """Numbers upwards, or downwards, from one to another."""
    low, high = sorted(draw.sample(range(10), 2))
    up = draw.random() < 0.5
    steps = NUMBERS[low : high + 1] if up else NUMBERS[low : high + 1][::-1]
    return {"prompt": f"count from {steps[0]} to {steps[-1]} :", "answer": " ".join(steps) + " ."}


def spanish(draw: random.Random) -> Item:
    """A sentence in Spanish, where the adjective comes after the noun."""
    colour, animal, does, place = (draw.choice(list(of)) for of in (COLOURS, ANIMALS, DOES, PLACES))
    return {
        "prompt": f"in spanish : the {colour} {animal} {does} by the {place} .",
        "answer": f"el {ANIMALS[animal]} {COLOURS[colour]} {DOES[does]} junto al {PLACES[place]} .",
    }


KINDS: dict[str, Callable[[random.Random], Item]] = {
    "stories": story, "recipes": recipe, "counting": counting, "spanish": spanish,
}  # fmt: skip


def task(kind: str, train: int, test: int, seed: int) -> Task:
    """A task of texts of one kind; no test text is among the training texts. A kind that has fewer
    texts gives a quarter of them for testing, and repeats the others."""
    draw, make = random.Random(f"{kind}{seed}"), KINDS[kind]
    every = {item["prompt"]: item for item in (make(draw) for _ in range(4 * (train + test)))}
    items = list(every.values())[: train + test]
    test = min(test, len(items) // 4)
    rest = items[test:]
    return Task(kind, [rest[i % len(rest)] for i in range(train)], items[:test])


class Words:
    """One token a word: the part of a Hugging Face tokenizer that a TextProblem uses."""

    pad_token_id, bos_token_id, eos_token_id, unknown = 0, 1, 2, 3

    def __init__(self) -> None:
        draw = random.Random(0)
        texts = [make(draw) for make in KINDS.values() for _ in range(3000)]
        words = {w for item in texts for part in item.values() for w in part.split()}
        self.words = ["<pad>", "<start>", "<end>", "<unknown>", *sorted(words)]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        ids = [self.ids.get(word, self.unknown) for word in text.split()]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return readable(" ".join(self.words[i] for i in ids if i > self.unknown))


def readable(text: str) -> str:
    """Without the spaces before points, commas, colons and question marks."""
    return re.sub(r" ([.,:?])", r"\1", text)
