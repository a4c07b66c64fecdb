"""The portrait world: exact, legible, the same at every size, and with a split that shares nothing."""

import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d

from nmlib.sources import Source, attribute_index, attribute_sizes
from nmlib.world import FRAMING_RANGE, IDENTITY, LEVELS, NUISANCE, SPLIT_BY, SUBJECT, WorldSource, is_heldout

WORLD = WorldSource(48)
SIZES = attribute_sizes(WORLD)
NAMES = [attribute.name for attribute in WORLD.attributes]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pictures this small are drawn fastest by one thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def states(count: int, seed: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Random subjects (B, S) and values (B, A)."""
    draw = generator(seed)
    values = torch.stack([torch.randint(size, (count,), generator=draw) for size in SIZES], 1)
    return WORLD.sample_subjects(count, split, draw), values


def within_framing(subjects: Tensor) -> bool:
    framing = subjects[:, SUBJECT.index("framing")]
    return bool(((framing >= FRAMING_RANGE[0] - 1e-6) & (framing <= FRAMING_RANGE[1] + 1e-6)).all())


def test_is_a_source_with_the_documented_sizes() -> None:
    assert isinstance(WORLD, Source)
    assert dict(zip(NAMES, SIZES, strict=True)) == {
        "background": 8, "glasses": 3, "hat": 4, "shirt": 8, "expression": 3, "hair": 4,
    }  # fmt: skip
    assert SUBJECT == IDENTITY + NUISANCE and len(set(SUBJECT)) == 17


# ---------------------------------------------------------------------------------------------------------
# pictures


def test_render_is_deterministic_and_leaves_its_inputs_alone() -> None:
    subjects, values = states(11, 0)
    copies = subjects.clone(), values.clone()
    assert torch.equal(WORLD.render(subjects, values), WORLD.render(subjects, values))
    assert torch.equal(subjects, copies[0]) and torch.equal(values, copies[1])


def test_a_batch_across_chunks_equals_one_by_one() -> None:
    subjects, values = states(67, 1)  # more than one chunk, the last one partial
    together = WORLD.render(subjects, values)
    for i in (0, 3, 63, 64, 66):
        torch.testing.assert_close(together[i : i + 1], WORLD.render(subjects[i : i + 1], values[i : i + 1]))


def test_no_pictures() -> None:
    subjects, values = states(0, 2)
    assert WORLD.render(subjects, values).shape == (0, 3, 48, 48)


def test_a_large_picture_shrunk_is_the_small_picture() -> None:
    subjects, values = states(23, 3)
    error = (avg_pool2d(WorldSource(96).render(subjects, values), 2) - WORLD.render(subjects, values)).abs()
    assert error.mean() < 0.02  # measured 0.013: an edge is about two pixels wide at every size
    assert error.max() < 0.5  # measured 0.33, in the eyes


@settings(max_examples=25, deadline=None)
@given(data=st.data(), size=st.sampled_from((16, 31, 48)))
def test_every_state_has_a_picture(data: st.DataObject, size: int) -> None:
    numbers = st.lists(st.floats(-1, 1, width=32), min_size=len(SUBJECT), max_size=len(SUBJECT))
    subjects = torch.tensor([data.draw(numbers)])
    values = torch.tensor([[data.draw(st.integers(0, k - 1)) for k in SIZES]])
    picture = WorldSource(size).render(subjects, values)
    assert picture.shape == (1, 3, size, size) and picture.dtype == torch.float32
    assert picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1
    assert picture.std() > 0.02


@pytest.mark.parametrize("name", NAMES)
def test_every_pair_of_values_is_visible_on_everybody(name: str) -> None:
    subjects, values = states(59, 4)
    column = attribute_index(WORLD, name)
    pictures = []
    for value in range(SIZES[column]):
        values[:, column] = value
        pictures.append(WORLD.render(subjects, values))
    for one, other in itertools.combinations(pictures, 2):
        change = (one - other).abs()  # (B, 3, H, W)
        strong = (change.amax(1) > 0.15).float().sum((1, 2))  # clearly changed pixels, (B,)
        assert strong.min() >= 10, f"{name}: {strong.min()} pixels"
        assert change.mean((1, 2, 3)).min() > 0.002
        assert change.amax((1, 2, 3)).min() > 0.2


def test_an_edit_changes_only_its_place() -> None:
    subjects, values = states(29, 5)
    subjects[:, len(IDENTITY) :] = 0
    before = WORLD.render(subjects, values)

    def changed(name: str) -> Tensor:
        after, column = values.clone(), attribute_index(WORLD, name)
        after[:, column] = (after[:, column] + 1) % SIZES[column]
        return (WORLD.render(subjects, after) != before).any(1).any(0)  # (H, W), in any of the pictures

    assert changed("background")[:8, :8].all() and not changed("background")[22:32, 18:30].any()
    assert changed("shirt")[45:, 18:30].all() and not changed("shirt")[:30].any()
    assert not changed("hat")[28:].any() and not changed("expression")[42:].any()
    assert not changed("glasses")[36:].any() and not changed("glasses")[:12].any()


def test_every_subject_number_is_visible() -> None:
    subjects, values = states(37, 6)
    values[:, attribute_index(WORLD, "hat")] = values[:, attribute_index(WORLD, "hair")] = 0
    for i, name in enumerate(SUBJECT):
        low, high = subjects.clone(), subjects.clone()
        low[:, i], high[:, i] = -1, 1
        change = (WORLD.render(low, values) - WORLD.render(high, values)).abs()
        assert change.mean() > 0.0005, f"{name}: {change.mean()}"
        assert change.amax((1, 2, 3)).median() > 0.1, f"{name}: {change.amax((1, 2, 3)).median()}"


@pytest.mark.parametrize(
    ("subjects", "values", "message"),
    [
        ((5, 13), (5, 6), r"subjects \(5, 13\): expected \(B, 17\)"),
        ((5, 17), (5, 7), r"values \(5, 7\): expected \(5, 6\)"),
        ((5, 17), (3, 6), r"values \(3, 6\): expected \(5, 6\)"),
    ],
)
def test_wrong_shapes_are_named(subjects: tuple[int, int], values: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WORLD.render(torch.zeros(subjects), torch.zeros(values, dtype=torch.long))


@pytest.mark.parametrize("value", [-1, 3])
def test_a_value_out_of_range_is_named(value: int) -> None:
    subjects, values = states(5, 7)
    values[3, 1] = value
    with pytest.raises(ValueError, match=r"out of range for glasses \(0 to 2\)"):
        WORLD.render(subjects, values)


def test_too_small_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size 7: portraits need at least 16 pixels"):
        WorldSource(7)


# ---------------------------------------------------------------------------------------------------------
# subjects


def test_train_and_heldout_never_meet() -> None:
    train = WORLD.sample_subjects(4001, "train", generator(8))
    heldout = WORLD.sample_subjects(4001, "heldout", generator(8))
    assert not is_heldout(train).any() and is_heldout(heldout).all()


def test_heldout_is_an_eighth_of_the_space_over_the_whole_range() -> None:
    anywhere = torch.rand(20011, len(SUBJECT), generator=generator(9)) * 2 - 1
    assert is_heldout(anywhere).float().mean() == pytest.approx(1 / LEVELS, abs=0.01)
    for split in ("train", "heldout"):
        subjects = WORLD.sample_subjects(20011, split, generator(10))
        assert within_framing(subjects)
        for name in SPLIT_BY:
            shares = torch.histc(subjects[:, SUBJECT.index(name)], LEVELS, -1, 1) / len(subjects)
            torch.testing.assert_close(shares, torch.full((LEVELS,), 1 / LEVELS), atol=0.01, rtol=0)


def test_the_split_depends_on_identity_alone() -> None:
    subjects = WORLD.sample_subjects(101, "heldout", generator(11))
    subjects[:, len(IDENTITY) :] = torch.rand(101, len(NUISANCE), generator=generator(12)) * 2 - 1
    assert is_heldout(subjects).all()


def test_another_view_is_of_the_same_people() -> None:
    subjects, _ = states(19, 17, "heldout")
    copy = subjects.clone()
    viewed = WORLD.other_view(subjects, generator(18))
    assert torch.equal(subjects, copy) and within_framing(viewed)
    assert torch.equal(viewed[:, : len(IDENTITY)], subjects[:, : len(IDENTITY)])
    assert (viewed[:, len(IDENTITY) :] != subjects[:, len(IDENTITY) :]).all()


def test_sampling_repeats_with_its_seed() -> None:
    one, two, other = (WORLD.sample_subjects(13, "train", generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="split 'test': expected 'train' or 'heldout'"):
        WORLD.sample_subjects(3, "test", generator(0))


# ---------------------------------------------------------------------------------------------------------
# clips


def test_a_clip_is_smooth_and_keeps_who_and_what_it_shows() -> None:
    subjects, values = states(1, 13, "heldout")
    clip, clip_values = WORLD.clip(subjects[0], 47, generator(14), values[0])
    assert clip.shape == (47, len(SUBJECT)) and clip_values.shape == (47, len(SIZES))
    assert torch.equal(clip[:, : len(IDENTITY)], subjects[:, : len(IDENTITY)].expand(47, -1))
    assert clip.diff(dim=0).abs().max() < 0.1 and clip[:, len(IDENTITY) :].std(0).min() > 0.01
    assert clip.abs().max() <= 1 and within_framing(clip)
    expression = attribute_index(WORLD, "expression")
    assert (clip_values[:, expression].diff() != 0).sum() == 2 and len(clip_values[:, expression].unique()) == 3
    others = [i for i in range(len(SIZES)) if i != expression]
    assert torch.equal(clip_values[:, others], values[:, others].expand(47, -1))
    steps = WORLD.render(clip, values.expand(47, -1)).diff(dim=0).abs().mean((1, 2, 3))
    assert steps.max() < 0.03


def test_a_clip_of_one_frame_and_no_values() -> None:
    subjects, _ = states(1, 15)
    clip, values = WORLD.clip(subjects[0], 1, generator(16))
    assert WORLD.render(clip, values).shape == (1, 3, 48, 48)


# ---------------------------------------------------------------------------------------------------------
# phrases


def test_no_command_means_two_things() -> None:
    owners: dict[str, tuple[str, str]] = {}
    for attribute in WORLD.attributes:
        for value, commands in attribute.commands.items():
            assert len(commands) >= 5 and len(set(commands)) == len(commands)
            assert len(attribute.looks[value]) >= 2 and len(attribute.nouns) >= 2
            for command in commands:
                assert owners.setdefault(command, (attribute.name, value)) == (attribute.name, value)


def test_no_look_means_two_things() -> None:
    looks = [look for attribute in WORLD.attributes for group in attribute.looks.values() for look in group]
    assert len(set(looks)) == len(looks)


def test_phrases_are_plain_words_that_no_rollback_uses() -> None:
    reserved = set("first last undo picture image before back return revert original start everything step".split())
    for attribute in WORLD.attributes:
        tables = (*attribute.commands.values(), *attribute.looks.values(), attribute.nouns)
        for phrase in itertools.chain.from_iterable(tables):
            assert re.fullmatch(r"[a-z]+( [a-z]+)*", phrase), phrase
            assert not reserved & set(phrase.split()), phrase
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", phrase), phrase
