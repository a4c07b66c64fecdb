"""Photographs: known answers of every edit, visibility, split, words, errors."""

import random
import socket
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from torch import Tensor

from nmlib import phrases
from nmlib.experiments import probe_conversations
from nmlib.photo_edits import FRAMES, LIGHT_SHARE, SEPIA, STEPS, TINT_SHARE, TINTS, apply
from nmlib.photos import ORDERS, PHOTOS, SMALLEST_CROP, Photo, PhotoError, PhotoSource
from nmlib.sources import Source, attribute_index, attribute_sizes

SIZE = 48
# Words of rollbacks and of numbers: in an edit they would make a conversation ambiguous.
ROLLBACK_WORDS = set(
    "undo revert forget return go back again before since ago start over first last previous original very picture "
    "step steps change changes changed edit edits everything then but said".split()
)


@pytest.fixture(scope="module")
def source() -> PhotoSource:
    return PhotoSource(SIZE)


@pytest.fixture(scope="module")
def subjects(source: PhotoSource) -> Tensor:
    """Eleven crops of both splits, (11, 5)."""
    generator = torch.Generator().manual_seed(7)
    return torch.cat(
        [source.sample_subjects(count, split, generator) for count, split in ((7, "train"), (4, "heldout"))]
    )


def state(source: Source, **values: str) -> list[int]:
    """Value indices of a state; what is not named has its first value."""
    row = [0] * len(source.attributes)
    for name, value in values.items():
        place = attribute_index(source, name)
        row[place] = source.attributes[place].values.index(value)
    return row


def draw(source: Source, subjects: Tensor, **values: str) -> Tensor:
    """Pictures of all subjects in one state."""
    return source.render(subjects, torch.tensor([state(source, **values)]).expand(len(subjects), -1))


def random_values(source: Source, count: int, seed: int) -> Tensor:
    rng = random.Random(seed)
    return torch.tensor([[rng.randrange(size) for size in attribute_sizes(source)] for _ in range(count)])


def difference(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of each pair of pictures, (B,)."""
    return (one - other).abs().mean((1, 2, 3))


def test_is_a_source(source: PhotoSource) -> None:
    assert isinstance(source, Source)
    assert (source.name, source.image_size) == ("photos", SIZE)
    assert attribute_sizes(source) == (3, 2, 4, 2, 5, 3, 3)
    assert [attribute.name for attribute in source.attributes if attribute.relative] == ["mirror", "turn"]
    brought = {attribute.name: attribute.brought for attribute in source.attributes if attribute.brought is not None}
    assert brought == {"tone": "colour", "mirror": "no", "turn": "upright"}


def test_colours_that_are_asked_for_were_shown(source: PhotoSource) -> None:
    """Nobody knows the colours of a grey picture, and every request of a test conversation has an answer."""
    place, asked = attribute_index(source, "tone"), 0
    for conversation in probe_conversations(source, 60, 6, 1):
        for number, item in enumerate(conversation.rounds[1:], 1):
            if item.edit is not None and (item.edit.attribute, item.edit.value) == ("tone", "colour"):
                shown = {earlier.values[place] for earlier in conversation.rounds[:number] if earlier.values}
                assert source.attributes[place].values.index("colour") in shown
                asked += 1
    assert asked > 5


def test_pictures_have_the_promised_form(source: PhotoSource, subjects: Tensor) -> None:
    pictures = source.render(subjects, random_values(source, 11, seed=0))
    assert pictures.shape == (11, 3, SIZE, SIZE) and pictures.dtype == torch.float32
    assert 0 <= pictures.min() < 0.1 and 0.9 < pictures.max() <= 1
    assert source.render(subjects[:0], torch.empty(0, 7, dtype=torch.int64)).shape == (0, 3, SIZE, SIZE)


def test_same_seed_same_pictures(source: PhotoSource, subjects: Tensor) -> None:
    other, values = PhotoSource(SIZE), random_values(source, 11, seed=1)
    assert torch.equal(other.render(subjects, values), source.render(subjects, values))
    drawn = [PhotoSource(size).sample_subjects(5, "train", torch.Generator().manual_seed(3)) for size in (16, SIZE)]
    assert torch.equal(drawn[0], drawn[1])  # subjects do not depend on the size of the pictures


def test_batch_equals_one_by_one(source: PhotoSource, subjects: Tensor) -> None:
    values = random_values(source, 11, seed=2)
    single = [source.render(subjects[i : i + 1], values[i : i + 1]) for i in range(11)]
    assert torch.equal(source.render(subjects, values), torch.cat(single))


def test_subjects_survive_as_python_numbers(source: PhotoSource, subjects: Tensor) -> None:
    assert torch.equal(torch.tensor([tuple(subject.tolist()) for subject in subjects]), subjects)


def test_whole_photograph_is_the_file_pixel_by_pixel() -> None:
    """The astronaut is 512 pixels square, so the crop of size 1 at 512 pixels is the file itself."""
    file = Path(skimage.__file__).parent / "data" / "astronaut.png"
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)  # (3, H, W)
    picture = draw(PhotoSource(512), torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]]))[0]
    assert torch.equal((picture * 255).round().to(torch.uint8), expected)


def test_mirror_twice_is_the_plain_picture(source: PhotoSource, subjects: Tensor) -> None:
    assert torch.equal(draw(source, subjects, mirror="yes").flip(-1), draw(source, subjects))


@pytest.mark.parametrize(("turn", "quarters"), [("left", 1), ("upside down", 2), ("right", 3)])
def test_turn_is_rot90_of_the_upright_in_every_state(
    source: PhotoSource, subjects: Tensor, turn: str, quarters: int
) -> None:
    values, place = random_values(source, 11, seed=3), attribute_index(source, "turn")
    pictures = []
    for value in ("upright", turn):
        values[:, place] = source.attributes[place].values.index(value)
        pictures.append(source.render(subjects, values))
    assert torch.equal(pictures[1], torch.rot90(pictures[0], quarters, (2, 3)))


def test_black_and_white_has_equal_channels_and_keeps_the_luma(source: PhotoSource, subjects: Tensor) -> None:
    plain = draw(source, subjects)
    for light, blur in product(("normal", "bright", "dark"), ("sharp", "blurred")):
        grey = draw(source, subjects, tone="black and white", light=light, blur=blur)
        assert torch.equal(grey, grey[:, :1].expand_as(grey))
    luma = (plain * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    torch.testing.assert_close(draw(source, subjects, tone="black and white")[:, 0], luma, atol=1 / 255, rtol=0)


def test_sepia_lies_on_its_line(source: PhotoSource, subjects: Tensor) -> None:
    grey, (low, high) = draw(source, subjects, tone="black and white"), torch.tensor(SEPIA)[..., None, None] / 255
    torch.testing.assert_close(draw(source, subjects, tone="sepia"), low + (high - low) * grey, atol=0.6 / 255, rtol=0)


@pytest.mark.parametrize("tint", TINTS)
def test_tint_and_light_mix_in_a_colour(source: PhotoSource, subjects: Tensor, tint: str) -> None:
    colour, plain = torch.tensor(TINTS[tint])[:, None, None] / 255, draw(source, subjects)
    tinted = (1 - TINT_SHARE) * plain + TINT_SHARE * colour
    torch.testing.assert_close(draw(source, subjects, tint=tint), tinted, atol=1 / 255, rtol=0)
    for light, level in (("bright", 1), ("dark", 0)):
        expected = (1 - LIGHT_SHARE) * tinted + LIGHT_SHARE * level
        torch.testing.assert_close(draw(source, subjects, tint=tint, light=light), expected, atol=2 / 255, rtol=0)


@pytest.mark.parametrize("frame", FRAMES)
def test_frame_has_its_colour_and_leaves_the_inside(source: PhotoSource, subjects: Tensor, frame: str) -> None:
    others = {"tone": "sepia", "light": "dark", "tint": "blue", "blur": "blurred"}
    pictures, inner = draw(source, subjects, frame=frame, **others), slice(5, -5)  # round(0.1 * 48) = 5
    assert torch.equal(pictures[..., inner, inner], draw(source, subjects, **others)[..., inner, inner])
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[inner, inner] = False
    expected = torch.tensor(FRAMES[frame]) / 255
    assert torch.equal(pictures[..., border], expected[:, None].expand(11, 3, int(border.sum())))


def test_blur_lowers_detail_and_keeps_the_mean(source: PhotoSource, subjects: Tensor) -> None:
    sharp, blurred = draw(source, subjects), draw(source, subjects, blur="blurred")
    detail = [picture.diff(dim=-1).abs().mean((1, 2, 3)) for picture in (sharp, blurred)]
    assert (detail[1] < 0.5 * detail[0]).all()
    torch.testing.assert_close(blurred.mean((2, 3)), sharp.mean((2, 3)), atol=0.03, rtol=0)


@pytest.mark.parametrize("place", range(7))
def test_every_pair_of_values_differs_visibly_in_any_combination(
    source: PhotoSource, subjects: Tensor, place: int
) -> None:
    """Clearly from the plain picture, still visibly from random states."""
    plain = torch.zeros(11, 7, dtype=torch.int64)
    for values, least in ((plain, 0.03), *((random_values(source, 11, seed), 0.008) for seed in (4, 5))):
        pictures = []
        for value in range(attribute_sizes(source)[place]):
            values[:, place] = value
            pictures.append(source.render(subjects, values))
        for one, other in combinations(pictures, 2):
            assert difference(one, other).min() > least


def test_tone_tint_and_light_are_not_mistaken_for_each_other(source: PhotoSource, subjects: Tensor) -> None:
    places = [attribute_index(source, name) for name in ("tone", "tint", "light")]
    pictures = []
    for combination in product(range(3), repeat=3):
        values = torch.zeros(11, 7, dtype=torch.int64)
        values[:, places] = torch.tensor(combination)
        pictures.append(source.render(subjects, values))
    assert min(float(difference(one, other).min()) for one, other in combinations(pictures, 2)) > 0.015


def test_splits_share_no_photograph(source: PhotoSource) -> None:
    assert not set(PHOTOS["train"]) & set(PHOTOS["heldout"])
    drawn = {}
    for split, photos in PHOTOS.items():
        subjects = source.sample_subjects(60, split, torch.Generator().manual_seed(0))
        drawn[split] = set(subjects[:, 0].tolist())
        assert {source.photos[int(index)] for index in drawn[split]} == set(photos)  # and every one is used
    assert not drawn["train"] & drawn["heldout"]


def test_only_crops_to_train_on_are_close_and_recoloured(source: PhotoSource) -> None:
    for split, smallest in SMALLEST_CROP.items():
        subjects = source.sample_subjects(200, split, torch.Generator().manual_seed(5))
        assert smallest <= subjects[:, 3].min() < smallest + 0.1
        assert set(subjects[:, 4].tolist()) == set(range(len(ORDERS) if split == "train" else 1))


def test_an_order_swaps_the_channels_before_the_edits(source: PhotoSource, subjects: Tensor) -> None:
    own, swapped = subjects.clone(), subjects.clone()
    own[:, 4], swapped[:, 4] = 0, ORDERS.index((2, 0, 1))
    plain = draw(source, own)[:, [2, 0, 1]]
    assert torch.equal(draw(source, swapped), plain)
    luma = (plain * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    torch.testing.assert_close(draw(source, swapped, tone="black and white")[:, 0], luma, atol=1 / 255, rtol=0)


def test_another_view_is_the_same_photograph_in_the_same_colours(source: PhotoSource, subjects: Tensor) -> None:
    viewed = source.other_view(subjects, torch.Generator().manual_seed(4))
    assert torch.equal(viewed[:, [0, 3, 4]], subjects[:, [0, 3, 4]])
    sizes = torch.tensor([photo.load().size for photo in source.photos])[subjects[:, 0].long()]  # (B, 2)
    side = subjects[:, 3:4] * sizes.amin(1, keepdim=True)  # (B, 1)
    moved = (viewed - subjects)[:, 1:3].abs() * (sizes - side) / side  # (B, 2), shares of the side
    assert 0.01 < moved.max() <= 0.05 + 1e-6 and viewed[:, 1:3].min() >= 0 and viewed[:, 1:3].max() <= 1
    draw(source, viewed)  # which refuses subjects that are out of range


def test_pictures_made_before_change_nothing(source: PhotoSource) -> None:
    """States share their first steps; sharing gives what every state gives alone."""
    made: dict[tuple[str, ...], Image.Image] = {}
    image = source.photos[0].load().resize((SIZE, SIZE))
    for row in random_values(source, 40, seed=6).tolist():
        values = {item.name: item.values[value] for item, value in zip(source.attributes, row, strict=True)}
        assert apply(image, values, made).tobytes() == apply(image, values).tobytes()
    assert len(made) < 40 * len(STEPS), "nothing was shared"


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    fresh = PhotoSource(16)
    draw(fresh, fresh.sample_subjects(2, "train", torch.Generator().manual_seed(0)))


def test_commands_are_many_clean_and_unambiguous(source: PhotoSource) -> None:
    owner: dict[str, tuple[str, str]] = {}
    for attribute in source.attributes:
        for value, commands in attribute.commands.items():
            assert len(set(commands)) == len(commands) >= 5
            for command in commands:
                assert command not in owner, f"{command!r} is also said for {owner.get(command)}"
                owner[command] = (attribute.name, value)
                assert not set(command.split()) & (ROLLBACK_WORDS | set(phrases.NUMBERS) | set(phrases.ORDINALS))


def test_phrases_are_clean_and_unique(source: PhotoSource) -> None:
    looks = [look for attribute in source.attributes for group in attribute.looks.values() for look in group]
    nouns = [noun for attribute in source.attributes for noun in attribute.nouns]
    commands = [text for attribute in source.attributes for group in attribute.commands.values() for text in group]
    assert len(set(looks)) == len(looks) and len(set(nouns)) == len(nouns)
    for text in (*looks, *nouns, *commands):
        assert text == phrases.clean(text) and not any(letter.isdigit() for letter in text)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda source: source.sample_subjects(1, "test", torch.Generator()), "split 'test': expected one of 'train'"),
        (lambda source: source.sample_subjects(-1, "train", torch.Generator()), "count -1: expected 0 or more"),
        (lambda _: PhotoSource(8), "image_size 8: expected at least 16"),
        (lambda source: draw(source, torch.zeros(2, 3)), r"subjects \(2, 3\) and values \(2, 7\): expected \(B, 5\)"),
        (lambda source: draw(source, torch.tensor([[8.0, 0.0, 0.0, 1.0, 0.0]])), "subject 0 is .* a photo from 0 to 7"),
        (lambda source: draw(source, torch.tensor([[0.5, 0.0, 0.0, 1.0, 0.0]])), "subject 0 is .* a photo from 0 to 7"),
        (
            lambda source: draw(source, torch.tensor([[0.0, torch.nan, 0.0, 1.0, 0.0]])),
            "subject 0 is .* x and y from 0 to 1",
        ),
        (lambda source: draw(source, torch.tensor([[0.0, 0.0, 0.0, 0.2, 0.0]])), "a size from 0.25 to 1"),
        (lambda source: draw(source, torch.tensor([[0.0, 0.0, 0.0, 1.0, 6.0]])), "an order from 0 to 5"),
        (
            lambda source: source.render(
                torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]]), torch.tensor([[0, 0, 4, 0, 0, 0, 0]])
            ),
            r"values of picture 0: 'turn' is 4, expected 0 to 3 \(upright, left, right, upside down\)",
        ),
    ],
)
def test_errors_say_what_is_wrong(source: PhotoSource, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(source)


def test_missing_and_damaged_files_name_file_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "broken_photos"
    folder.mkdir()
    (folder / "__init__.py").touch()
    whole = (Path(skimage.__file__).parent / "data" / "coffee.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for file, problem in (("half.png", "is damaged"), ("empty.jpg", "is damaged"), ("none.png", "is missing")):
        with pytest.raises(
            PhotoError, match=rf"{file} of package 'broken-photos' {problem}; install it again with: pip"
        ):
            Photo("broken_photos", file, "broken-photos").load()
    with pytest.raises(PhotoError, match=r"'a\.png': package 'no-such' is not installed"):
        Photo("no_such_module", "a.png", "no-such").load()
