"""People: framing and pose that can be asked for, whole bodies, look-alikes, clips and names."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import raised

from nmlib import data, phrases
from nmlib.names import NAMES, names
from nmlib.people import FRAMINGS, MAX_DISTANCE, POSES, PeopleSource
from nmlib.sources import IdentityClips, Source, attribute_index
from nmlib.world import FRAMING_RANGE, WorldSource, is_heldout
from nmlib.world_portrait import IDENTITY, SUBJECT

PEOPLE, WORLD = PeopleSource(48), WorldSource(48)
FRAMING, POSE = attribute_index(PEOPLE, "framing"), attribute_index(PEOPLE, "pose")
VIEW = [SUBJECT.index(name) for name in ("shift_x", "shift_y", "lighting")]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(count: int, seed: int, framing: str = "own", pose: str = "own") -> tuple[Tensor, Tensor]:
    """Random subjects and values with one framing and pose."""
    subjects = PEOPLE.sample_subjects(count, "train", generator(seed))
    values = data.sample_values(PEOPLE, count, generator(seed + 1))
    values[:, FRAMING] = PEOPLE.attributes[FRAMING].values.index(framing)
    values[:, POSE] = PEOPLE.attributes[POSE].values.index(pose)
    return subjects, values


def test_people_are_a_source_and_a_source_of_clips() -> None:
    assert isinstance(PEOPLE, Source) and isinstance(PEOPLE, IdentityClips) and isinstance(WORLD, Source)
    assert WORLD.names == () and PEOPLE.names == NAMES


# ---------------------------------------------------------------------------------------------------------
# pictures


@pytest.mark.parametrize(
    ("size", "signature"),
    [
        (16, [0.226, 0.268, 0.988, 0.236]),
        (48, [-0.120, 0.310, 0.933, 0.754]),
        (128, [1.092, 0.584, -0.607, -0.579]),
    ],
)
def test_portraits_are_what_they_were_before_bodies_were_drawn(size: int, signature: list[float]) -> None:
    """A weighted sum of the pixels of each of the first pictures: processors differ in the last bit of a pixel."""
    _, _, pictures = data.sample_pictures(WorldSource(size), 37, "train", data.step_generator(1, size))
    weights = torch.cos(torch.arange(pictures[0].numel(), dtype=torch.float64)).reshape(pictures.shape[1:])  # (3, H, W)
    sums = (pictures[:4].double() * weights).sum((1, 2, 3))  # (4,)
    assert sums.tolist() == pytest.approx(signature, abs=0.02)


def test_own_views_are_the_pictures_of_the_world() -> None:
    subjects, values = states(13, 0)
    assert torch.equal(PEOPLE.render(subjects, values), WORLD.render(subjects, values[:, :6]))


@pytest.mark.parametrize("framing", ["own", *FRAMINGS])
@pytest.mark.parametrize("pose", ["own", *POSES])
def test_a_view_that_was_asked_for_is_exactly_known(framing: str, pose: str) -> None:
    subjects, values = states(7, 3, framing, pose)
    viewed, copy = PEOPLE.viewed(subjects, values), subjects.clone()
    copy[:, SUBJECT.index("framing")] = FRAMINGS.get(framing, copy[:, SUBJECT.index("framing")])
    if pose != "own":
        copy[:, SUBJECT.index("yaw")] = POSES[pose]
        copy[:, VIEW] = 0
    assert torch.equal(viewed, copy)
    world = WORLD.render(copy, values[:, :6])
    torch.testing.assert_close(PEOPLE.render(subjects, values), world)


def test_views_that_are_asked_for_differ_from_every_own_view() -> None:
    low, high = FRAMING_RANGE
    assert not any(low - 0.1 < number < high + 0.1 for number in FRAMINGS.values())


def test_near_and_far_pictures_are_the_same_side_by_side() -> None:
    subjects, values = states(12, 5)
    values[:, FRAMING] = torch.arange(12) % 4
    together = PEOPLE.render(subjects, values)
    for row in range(12):
        torch.testing.assert_close(together[row : row + 1], PEOPLE.render(subjects[[row]], values[[row]]))


@pytest.mark.parametrize("size", [48, 64, 128])
def test_the_whole_body_stands_in_the_frame(size: int) -> None:
    """The wall is all around: left, right, above and below; trousers and shoes change nothing in portraits."""
    source = PeopleSource(size)
    subjects, values = states(40, 7, "full body", "front")
    values[:, :6] = 0
    walls = torch.stack([source.render(subjects, values)])[0]
    values[:, 0] = 5
    changed = (walls != source.render(subjects, values)).any(1)  # (B, H, W) where the wall is seen
    edge = torch.ones(size, size, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert changed[:, edge].all()
    assert (~changed).float().mean((1, 2)).min() > 0.08, "somebody stands there"


# ---------------------------------------------------------------------------------------------------------
# faces


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), framing=st.sampled_from(["own", *FRAMINGS]), pose=st.sampled_from(["own", "left"]))
def test_eyes_lie_in_the_box_and_shoulders_do_not(seed: int, framing: str, pose: str) -> None:
    """Eye colour and eye size change pixels inside the box only; a shirt changes none above the chin's height."""
    subjects, values = states(5, seed, framing, pose)
    values[:, 1] = 0  # no glasses
    other = subjects.clone()
    other[:, SUBJECT.index("eyes")] = -subjects[:, SUBJECT.index("eyes")].sign()
    changed = (PEOPLE.render(subjects, values) - PEOPLE.render(other, values)).abs().amax(1) > 0.02  # (B, H, W)
    dressed = values.clone()
    dressed[:, 3] = (values[:, 3] + 1) % 8
    shirt = (PEOPLE.render(subjects, values) != PEOPLE.render(subjects, dressed)).any(1)  # (B, H, W)
    for row, (left, top, right, bottom) in enumerate(PEOPLE.face_boxes(subjects, values).tolist()):
        y, x = changed[row].nonzero().T
        if len(x):
            assert left <= x.min() and x.max() <= right and top <= y.min() and y.max() <= bottom
        assert shirt[row].nonzero()[:, 0].min() > (top + bottom) / 2


def test_a_face_box_by_hand() -> None:
    subjects, values = torch.zeros(1, len(SUBJECT)), torch.zeros(1, 8, dtype=torch.long)
    middle, size = 0.04, 48  # y = 0 lies 0.04 half frames below the middle; 1.1 half frames a unit
    edges = [-0.47 * 1.1, middle - 0.51 * 1.1, 0.47 * 1.1, middle + 0.47 * 1.1]
    expected = [(edge + 1) / 2 * size for edge in edges]
    assert PEOPLE.face_boxes(subjects, values)[0].tolist() == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------
# people


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), distance=st.floats(0.05, MAX_DISTANCE), split=st.sampled_from(["train", "heldout"]))
def test_look_alikes_are_exactly_so_far_and_of_the_same_split(seed: int, distance: float, split: str) -> None:
    subject = PEOPLE.sample_subjects(1, split, generator(seed))[0]
    alike = PEOPLE.look_alikes(subject, 5, distance, generator(seed + 1))
    assert alike.shape == (5, len(SUBJECT))
    assert torch.equal(alike[:, len(IDENTITY) :], subject[len(IDENTITY) :].expand(5, -1))
    apart = (alike - subject).norm(dim=1)
    torch.testing.assert_close(apart, torch.full((5,), distance), atol=1e-4, rtol=0)
    assert (is_heldout(alike) == (split == "heldout")).all() and alike[:, : len(IDENTITY)].abs().max() <= 1


@pytest.mark.parametrize("distance", [0.0, -1.0, 1.5])
def test_people_who_are_not_alike_are_refused(distance: float) -> None:
    text = raised(lambda: PEOPLE.look_alikes(torch.zeros(17), 1, distance, generator(0)), ValueError)
    assert text == f"distance {distance}: look-alikes are above 0 and at most 1.0 apart"


def test_clips_show_one_person_each_in_their_own_views() -> None:
    made = PEOPLE.clips(3, "heldout", generator(2), distance=0.5)
    firsts = torch.stack([clip.subjects[0] for clip in made if clip.subjects is not None])
    assert is_heldout(firsts).all()
    apart = (firsts - firsts[0])[1:, : len(IDENTITY)].norm(dim=1)
    torch.testing.assert_close(apart, torch.full((2,), 0.5), atol=1e-4, rtol=0)
    for clip in made:
        assert clip.subjects is not None and clip.values is not None
        assert (clip.subjects[:, : len(IDENTITY)] == clip.subjects[0, : len(IDENTITY)]).all()
        assert (clip.subjects[1:, len(IDENTITY) :] != clip.subjects[0, len(IDENTITY) :]).any()
        assert (clip.values[:, [FRAMING, POSE]] == 0).all() and PEOPLE.render(
            clip.subjects, clip.values
        ).isfinite().all()


# ---------------------------------------------------------------------------------------------------------
# names


def test_names_are_single_words_that_mean_nothing_else() -> None:
    assert len(NAMES) == len(set(NAMES)) > 380
    assert all(name == phrases.clean(name) and name.isalpha() for name in NAMES)
    words = set(phrases.vocabulary(PEOPLE.attributes, ["zzz"]))
    assert not words & set(NAMES)


def test_names_are_split_by_their_hash() -> None:
    train, held = names("train"), names("heldout")
    assert not set(train) & set(held) and {*train, *held} == set(NAMES) == set(names("any"))
    assert 0.08 < len(held) / len(NAMES) < 0.17
    assert raised(lambda: names("test"), ValueError) == "split 'test': expected 'train', 'heldout' or 'any'"
