"""Exercises in finding what was said: what a small model must learn that a pretrained language model brings along.

An exercise is a dialogue without pictures. Somebody says a few words in each round; now and then one of the words is
asked for, or the n-th round, and the reply gives the number of the round in question. Nothing in it goes back to a
picture and no instruction of the data sets occurs, so a model that was trained on it has seen no rollback and no
introduction; but it can look up a word, and it knows what `third` means.
"""

import random
from collections.abc import Sequence

from nmlib import phrases
from nmlib.names import names
from nmlib.sources import Source

Dialogue = list[tuple[str, str]]  # what is said in each round, and the reply

ASK_SHARE, NUMBER_SHARE = 0.6, 0.25  # of rounds that ask, and of these that ask for the n-th round
MOST_WORDS = 5
RESERVED = ("said", "to")  # words of the replies


def spoken_words(source: Source) -> tuple[str, ...]:
    """Words for exercises: all that the source's grammar can say but for held-out names, which stay unheard."""
    silent = {*names("heldout"), *RESERVED}
    return tuple(word for word in phrases.vocabulary(source.attributes, source.names) if word not in silent)


def exercise(words: Sequence[str], rounds: int, rng: random.Random) -> Dialogue:
    """One dialogue.

    Args:
        words: to draw from; no word is new twice, so that what is asked for has one answer.
        rounds: length.
        rng: source of chance.
    """
    dialogue: Dialogue = []
    said: dict[str, int] = {}
    for index in range(rounds):
        here = phrases.marker(index)
        if said and rng.random() < ASK_SHARE:
            if rng.random() < NUMBER_SHARE:
                place = rng.randrange(min(index, len(phrases.ORDINALS)))
                dialogue.append((phrases.ORDINALS[place], f"{phrases.marker(place)} to {here}"))
            else:
                word = rng.choice(sorted(said))
                dialogue.append((f"said {word}", f"said {word} {phrases.marker(said[word])} to {here}"))
            continue
        fresh = rng.sample([word for word in words if word not in said], rng.randint(2, MOST_WORDS))
        said |= dict.fromkeys(fresh, index)
        before = f"{phrases.marker(index - 1)} to " if index else ""
        dialogue.append((" ".join(fresh), f"{fresh[-1]} {before}{here}"))
    return dialogue


def exercises(words: Sequence[str], count: int, rounds: int, rng: random.Random) -> list[Dialogue]:
    """`count` dialogues of `rounds` rounds each."""
    return [exercise(words, rounds, rng) for _ in range(count)]
