"""Exercises in finding what was said: what a small model must learn that a pretrained language model brings along.

An exercise is a dialogue without pictures. Somebody says a few words in each round; now and then one of the words is
asked for, or a round by its number or by how long ago it was, and the reply gives the number of the round in question.
`before tree` asks for the number that stood behind `tree` in an earlier reply. A question may bring new words
along, the last of which the reply repeats. Where people have names, some rounds mix a name into other words, and the
reply repeats the name and the round that first said it. Nothing in it goes back to a picture and no instruction of the
data sets occurs, so a model that was trained on it has seen no rollback and no introduction; but it can look up a word
and count, it knows that `third` and `three` mean `#3`, and which words are names.

Held-out names are words too, as every name is known to a language model that has read the internet: here they are
said, in the data sets nobody is called by them.
"""

import random
from collections.abc import Mapping, Sequence

from nmlib import phrases
from nmlib.sources import Source

Dialogue = list[tuple[str, str]]  # what is said in each round, and the reply

ASK_SHARE, NUMBER_SHARE = 0.6, 0.5  # of rounds that ask, and of these that ask by number or distance
NEW_SHARE = 0.5  # of the questions that can bring new words along
BEFORE_SHARE = 0.4  # of the questions for a word, where one has a number behind it
NAME_SHARE, OLD_NAME_SHARE = 0.5, 0.75  # of rounds with a name where there are names, and of these with one said before
AGO = "ago"
MOST_WORDS = 5
RESERVED = (
    phrases.SAID,
    phrases.BEFORE,
    AGO,
    "then",
    "to",
    *phrases.NUMBERS,
    *phrases.ORDINALS,
)  # words of the replies


def spoken_words(source: Source) -> tuple[str, ...]:
    """Words for exercises but for names: all else that the source's grammar can say."""
    silent = {*source.names, *RESERVED}
    return tuple(word for word in phrases.vocabulary(source.attributes, source.names) if word not in silent)


def exercise(words: Sequence[str], names: Sequence[str], rounds: int, rng: random.Random) -> Dialogue:
    """One dialogue.

    Args:
        words: to draw from; no word is new twice, so that what is asked for has one answer.
        names: of people, none of them among the words; may be empty.
        rounds: length.
        rng: source of chance.
    """
    dialogue: Dialogue = []
    said: dict[str, int] = {}
    starts: dict[str, int] = {}  # the number behind a word in a reply
    for index in range(rounds):
        if names and rng.random() < NAME_SHARE:
            dialogue.append(_with_a_name(words, names, said, index, rng))
        elif said and rng.random() < ASK_SHARE:
            fresh = _fresh(words, said, rng) if rng.random() < NEW_SHARE else []
            dialogue.append(_question(said, starts, fresh, index, rng))
            said |= dict.fromkeys(fresh, index)
        else:
            fresh = _fresh(words, said, rng)
            said |= dict.fromkeys(fresh, index)
            start = ""
            if index:
                start, starts[fresh[-1]] = f"{phrases.marker(index - 1)} to ", index - 1
            dialogue.append((" ".join(fresh), f"{fresh[-1]} {start}{phrases.marker(index)}"))
    return dialogue


def _fresh(words: Sequence[str], said: Mapping[str, int], rng: random.Random) -> list[str]:
    return rng.sample([word for word in words if word not in said], rng.randint(2, MOST_WORDS))


def _question(
    said: Mapping[str, int], starts: dict[str, int], fresh: Sequence[str], index: int, rng: random.Random
) -> tuple[str, str]:
    """A round that asks for an earlier one: by its number or distance, by a word said there, or right after it."""
    here, new = phrases.marker(index), fresh[-1:]
    if rng.random() < NUMBER_SHARE:
        text, place = _by_number(index, rng)
        starts |= dict.fromkeys(new, place)
        return " ".join([text, *fresh]), " ".join([*new, phrases.marker(place), "to", here])
    if starts and rng.random() < BEFORE_SHARE:
        word = rng.choice(sorted(starts))
        then = ["then", *new] if new else []
        reply = [phrases.BEFORE, word, phrases.marker(starts[word]), *then, "to", here]
        return " ".join([phrases.BEFORE, word, *fresh]), " ".join(reply)
    word = rng.choice(sorted(said))
    reply = [phrases.SAID, word, phrases.marker(said[word]), "to", here]
    return " ".join([phrases.SAID, word, *fresh]), " ".join(reply)


def _by_number(index: int, rng: random.Random) -> tuple[str, int]:
    """Words for a round before round `index`, and its place: `third`, `three`, `#3`, or `two ago` from the last one."""
    place = rng.randrange(index)
    texts = [phrases.ORDINALS[place], phrases.NUMBERS[place], phrases.marker(place)]
    if place < index - 1:
        texts += [f"{phrases.NUMBERS[index - 2 - place]} {AGO}"] * len(texts)
    return rng.choice(texts), place


def _with_a_name(
    words: Sequence[str], names: Sequence[str], said: dict[str, int], index: int, rng: random.Random
) -> tuple[str, str]:
    """A round that mixes a name into other words, mostly one that was said before; adds what is new to `said`."""
    old = [name for name in names if name in said]
    fresh = [name for name in names if name not in said]
    name = rng.choice(old if old and rng.random() < OLD_NAME_SHARE else fresh)
    text = rng.sample(words, rng.randint(1, MOST_WORDS - 1))
    text.insert(rng.randint(0, len(text)), name)
    for word in text:
        said.setdefault(word, index)
    return " ".join(text), f"{phrases.SAID} {name} {phrases.marker(said[name])} to {phrases.marker(index)}"


def exercises(
    words: Sequence[str], names: Sequence[str], count: int, rounds: int, rng: random.Random
) -> list[Dialogue]:
    """`count` dialogues of `rounds` rounds each."""
    return [exercise(words, names, rounds, rng) for _ in range(count)]
