"""A params file that cannot be used is refused in one clear line for each fault."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nmlib import config

ROOT = Path(__file__).parent.parent


def write(path: Path, raw: Any) -> Path:
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(config.ParamsError) as caught:
        config.load(path)
    return str(caught.value)


def test_valid_file_loads_and_is_frozen(tmp_path: Path, tiny: dict[str, Any]) -> None:
    params = config.load(write(tmp_path / "tiny.yaml", tiny))
    assert params.name == "tiny"
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 1  # type: ignore[misc]


def test_unknown_key(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["vision"]["widht"] = 8
    text = refusal(write(tmp_path / "a.yaml", tiny))
    assert text == f"{tmp_path}/a.yaml: unknown key 'vision.widht' (value 8); remove it or correct its spelling"


def test_out_of_range(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["detokenizer"]["condition_dropout"] = 1.5
    text = refusal(write(tmp_path / "a.yaml", tiny))
    assert text == (
        f"{tmp_path}/a.yaml: detokenizer.condition_dropout: Input should be less than or equal to 1, found 1.5"
    )


def test_missing_key(tmp_path: Path, tiny: dict[str, Any]) -> None:
    del tiny["source"]
    assert refusal(write(tmp_path / "a.yaml", tiny)) == f"{tmp_path}/a.yaml: key 'source' is missing; add it"


def test_every_fault_gets_its_line(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["seed"] = "one"
    tiny["sead"] = 1
    lines = refusal(write(tmp_path / "a.yaml", tiny)).splitlines()
    assert len(lines) == 2
    assert "seed: Input should be a valid integer, found 'one'" in lines[0]
    assert "unknown key 'sead'" in lines[1]


def test_number_that_yaml_reads_as_text(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["vision"]["optim"]["learning_rate"] = "LR"
    path = write(tmp_path / "a.yaml", tiny)
    path.write_text(path.read_text().replace("LR", "1e-3"), encoding="utf-8")
    assert "vision.optim.learning_rate: Input should be a valid number, found '1e-3'" in refusal(path)


def test_sizes_that_do_not_fit(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["detokenizer"]["patch_size"] = 7
    text = refusal(write(tmp_path / "a.yaml", tiny))
    assert "detokenizer.patch_size 7 does not divide source.image_size 32" in text


def test_stage_that_starts_from_nothing(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["stages"][0]["start"] = "bse"
    text = refusal(write(tmp_path / "a.yaml", tiny))
    assert "'language' starts from 'bse', which is no earlier stage" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "data: {} has no pictures, so the stage reads exercises; expected words: lookup, got data"),
        ({"words": "lookup", "word_rounds": 12}, "word_rounds: 12 has no use in a stage without pictures"),
        ({"words": "lookup", "history_noise": 0.1}, "history_noise: 0.1 has no use in a stage without pictures"),
    ],
)
def test_stage_without_pictures(tmp_path: Path, tiny: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    tiny["stages"][0] |= {"data": {}, "words": "data", "history_noise": 0.0, "word_rounds": 0} | changes
    assert said in refusal(write(tmp_path / "a.yaml", tiny))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"response": "polite"}, "markers: true needs response: grounded, whose text names the picture to start from"),
        ({"markers": False, "copy_gate": True}, "copy_gate: true needs markers: true, with which queries know"),
    ],
)
def test_what_names_a_picture_goes_together(
    tmp_path: Path, tiny: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    tiny["model"] |= changes
    assert said in refusal(write(tmp_path / "a.yaml", tiny))


@pytest.mark.parametrize("changes", [{"markers": False}, {"markers": False, "response": "polite"}])
def test_stage_without_markers_has_no_copy_gate(tmp_path: Path, tiny: dict[str, Any], changes: dict[str, Any]) -> None:
    tiny["stages"][0] |= changes
    text = refusal(write(tmp_path / "a.yaml", tiny))
    assert "(whole file): stages: 'language', with `model:` overridden by {" in text and "'markers': False}" in text
    assert "}: copy_gate: true needs markers: true, with which queries know the picture they start from" in text
    tiny["model"]["copy_gate"] = False
    assert config.load(write(tmp_path / "a.yaml", tiny)).stages[0].markers is False


def test_stage_that_replies_politely_has_no_markers(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["stages"][0]["response"] = "polite"
    text = refusal(write(tmp_path / "a.yaml", tiny))
    assert "stages: 'language', with `model:` overridden by {'response': 'polite'}: markers: true needs" in text


# Where a value is changed, what it becomes, and what is said after the file's name.
REFUSED: list[tuple[str, Any, str]] = [
    ("seed", -1, "seed: Input should be greater than or equal to 0, found -1"),
    ("seed", 2**32, "seed: Input should be less than 4294967296, found 4294967296"),
    ("data.base.rounds", [], "data.base.rounds: expected 1 or more values, found []"),
    ("experiments.depths", [], "experiments.depths: expected 1 or more values, found []"),
    (
        "vision.optim.learning_rate",
        float("inf"),
        "vision.optim.learning_rate: Input should be a finite number, found inf",
    ),
    (
        "vision.optim.learning_rate",
        float("nan"),
        "vision.optim.learning_rate: Input should be a finite number, found nan",
    ),
    ("stages.0.data", {"base": float("inf")}, "stages.0.data.base: Input should be a finite number, found inf"),
    (
        "model.feature_loss_weight",
        float("inf"),
        "model.feature_loss_weight: Input should be a finite number, found inf",
    ),
    ("vision.optim.betas", [0.9, 1.0], "vision.optim.betas.1: Input should be less than 1, found 1.0"),
    ("vision.optim.betas", [-0.1, 0.9], "vision.optim.betas.0: Input should be greater than or equal to 0, found -0.1"),
    ("vision.optim.ema_decay", 1.0, "vision.optim.ema_decay: Input should be less than 1, found 1.0"),
]


def change(settings: Any, place: str, value: Any) -> None:
    """Set the value at a dotted place."""
    *path, last = place.split(".")
    for part in path:
        settings = settings[int(part) if part.isdigit() else part]
    settings[last] = value


@pytest.mark.parametrize(("place", "value", "said"), REFUSED)
def test_what_fails_in_training_is_refused_before(
    tmp_path: Path, tiny: dict[str, Any], place: str, value: Any, said: str
) -> None:
    change(tiny, place, value)
    assert refusal(write(tmp_path / "a.yaml", tiny)) == f"{tmp_path}/a.yaml: {said}"


@pytest.mark.parametrize("key", ["rounds", "people"])
def test_people_data_set_of_no_lengths(tmp_path: Path, tiny: dict[str, Any], key: str) -> None:
    tiny["people"] = {"more": {"conversations": 3, "rounds": [4], "pairing": "same", key: []}}
    text = refusal(write(tmp_path / "a.yaml", tiny))
    assert text == f"{tmp_path}/a.yaml: people.more.{key}: expected 1 or more values, found []"


def test_heads_of_the_resamplers_divide_both_widths(tmp_path: Path, tiny: dict[str, Any]) -> None:
    width = tiny["model"]["hidden_size"]
    tiny["model"]["resampler_heads"] = 7
    assert f"a.yaml: model: hidden_size {width} must be a multiple of resampler_heads 7 and of 4: the input" in refusal(
        write(tmp_path / "a.yaml", tiny)
    )
    tiny["model"] |= {"hidden_size": 56, "heads": 4}
    width = tiny["vision"]["feature_dim"]
    assert f"vision.feature_dim {width} must be a multiple of model.resampler_heads 7 and of 4: the output" in refusal(
        write(tmp_path / "a.yaml", tiny)
    )


def test_width_of_the_resamplers_is_a_multiple_of_four(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["model"] |= {"hidden_size": 18, "heads": 3, "resampler_heads": 2}
    text = refusal(write(tmp_path / "a.yaml", tiny))
    assert "hidden_size 18 must be a multiple of resampler_heads 2 and of 4" in text


def test_heads_of_seedx_divide_its_features(tmp_path: Path) -> None:
    paper = yaml.safe_load((ROOT / "params" / "paper.yaml").read_text(encoding="utf-8"))
    paper["seedx"]["vision"] = {"feature_dim": 4100}
    text = refusal(write(tmp_path / "a.yaml", paper))
    assert "seedx.vision.feature_dim 4100 must be a multiple of model.resampler_heads 32 and of 4" in text


def test_every_size_of_the_break_conditions_is_a_model(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "params" / "cpu.yaml").read_text(encoding="utf-8"))
    settings["breaks"]["sizes"][1] |= {"hidden_size": 54, "heads": 3}
    text = refusal(write(tmp_path / "a.yaml", settings))
    assert "breaks.sizes.1, with `model:` overridden by {'hidden_size': 54" in text
    assert "}: hidden_size 54 must be a multiple of resampler_heads 4 and of 4" in text


NOT_PLAIN = ["../x", "a/b", "a\\b", "", ".hidden", "..", "-x", "a\n", "a" * 101]
PLAIN = "expected a plain file name: at most 100 letters, digits, '_', '-' and '.', not beginning with '-' or '.'"


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_names_are_plain_file_names(tmp_path: Path, tiny: dict[str, Any], name: str) -> None:
    path, said = tmp_path / "a.yaml", f"{PLAIN}, found {name!r}"
    assert refusal(write(path, tiny | {"name": name})) == f"{path}: name: {said}"
    assert refusal(write(path, tiny | {"data": tiny["data"] | {name: tiny["data"]["base"]}})) == f"{path}: data: {said}"
    named = {"conversations": 3, "rounds": [4], "pairing": "same"}
    assert refusal(write(path, tiny | {"people": {name: named}})) == f"{path}: people: {said}"
    tiny["stages"][1]["name"] = name
    assert refusal(write(path, tiny)) == f"{path}: stages.1.name: {said}"


@pytest.mark.parametrize("name", ["cpu", "run-2.1", "_x", "läufe", "2024"])
def test_names_that_are_plain(tmp_path: Path, tiny: dict[str, Any], name: str) -> None:
    assert config.load(write(tmp_path / "a.yaml", tiny | {"name": name})).name == name


def test_two_stages_of_one_name(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["stages"].append(tiny["stages"][-1])
    name = tiny["stages"][-1]["name"]
    text = refusal(write(tmp_path / "a.yaml", tiny))
    assert f"stages: two stages are named {name!r}; every stage has a name of its own" in text


def test_missing_file_lists_its_neighbours(tmp_path: Path, tiny: dict[str, Any]) -> None:
    write(tmp_path / "tiny.yaml", tiny)
    text = refusal(tmp_path / "tini.yaml")
    assert text == f"{tmp_path}/tini.yaml: cannot be read (No such file or directory); known params there: ['tiny']"


def test_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: [tiny", encoding="utf-8")
    assert refusal(path).startswith(f"{path}: not valid YAML: ")
    assert "\n" not in refusal(path)


def test_a_key_given_twice(tmp_path: Path, tiny: dict[str, Any]) -> None:
    path = write(tmp_path / "a.yaml", tiny)
    path.write_text(path.read_text(encoding="utf-8") + "\nseed: 2\nseed: 3\n", encoding="utf-8")
    assert "not valid YAML: key 'seed' is given twice; keep one of them in " in refusal(path)


def test_an_anchor_may_be_merged_and_overridden(tmp_path: Path, tiny: dict[str, Any]) -> None:
    optim = tiny["vision"].pop("optim")
    path = write(tmp_path / "a.yaml", tiny)
    merged = f"  optim: {{<<: {optim}, steps: 7}}\n"
    path.write_text(path.read_text(encoding="utf-8").replace("vision:\n", "vision:\n" + merged, 1), encoding="utf-8")
    assert config.load(path).vision.optim.steps == 7


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "name: 2024-01-01",
            "name: expected text, a number, a list or a mapping, found 2024-01-01, which YAML reads as a date; "
            "put text in quotes",
        ),
        (
            "vision: {width: [!!binary YQ==]}",
            "vision.width.0: expected text, a number, a list or a mapping, found b'a', which YAML reads as a bytes; "
            "put text in quotes",
        ),
        (
            "data: {2024-01-01: {conversations: 1}}",
            "data.2024-01-01: expected a name as key, found 2024-01-01, which YAML reads as a date; put text in quotes",
        ),
        ("name: 2024-13-01", "not valid YAML: month must be in 1..12; put text in quotes"),
        ("a: &x {b: *x}", "a.b: the anchor's value contains itself; write out what is meant instead of the alias"),
        ("a: &x [1, *x]", "a.1: the anchor's value contains itself; write out what is meant instead of the alias"),
    ],
)
def test_yaml_that_settings_cannot_hold(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(line, encoding="utf-8")
    assert refusal(path) == f"{path}: {said}"


def test_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("# settings\nname: é\n".encode("latin-1"))
    assert refusal(path) == f"{path}: expected UTF-8 text, found byte 0xe9 in line 2; save as UTF-8"


def test_an_anchor_may_be_used_twice(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["detokenizer"]["optim"] = tiny["vision"]["optim"]
    path = write(tmp_path / "a.yaml", tiny)
    assert "&id001" in path.read_text(encoding="utf-8"), "the file has an alias"
    assert config.load(path).detokenizer.optim == config.load(path).vision.optim


def test_not_a_mapping(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", [1, 2])
    assert refusal(path) == f"{path}: expected a mapping of settings, found list"


def test_digest_follows_values_only(tmp_path: Path, tiny: dict[str, Any]) -> None:
    first = config.load(write(tmp_path / "a.yaml", tiny))
    same = config.load(write(tmp_path / "b.yaml", dict(reversed(tiny.items()))))
    other = config.load(write(tmp_path / "c.yaml", tiny | {"seed": 1}))
    assert config.digest(first) == config.digest(same)
    assert config.digest(first) != config.digest(other)


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_params_are_valid(path: Path) -> None:
    params = config.load(path)
    assert params.name == path.stem


def test_seedx_sizes_agree_with_the_model(tmp_path: Path, tiny: dict[str, Any]) -> None:
    paper = yaml.safe_load((ROOT / "params" / "paper.yaml").read_text(encoding="utf-8"))
    paper["seedx"]["model"] = paper["model"] | {"layers": 39}
    assert "seedx.model differs from model; write it once" in refusal(write(tmp_path / "a.yaml", paper))
    del paper["seedx"]["model"]["layers"]
    paper["seedx"] |= {"model": paper["model"], "queries": 60}
    assert "queries 60 is not a square number" in refusal(write(tmp_path / "b.yaml", paper))
    paper["seedx"] |= {"queries": 144}
    assert "vision.tokens 256 must be a multiple of queries 144" in refusal(write(tmp_path / "c.yaml", paper))
    paper["seedx"] |= {"queries": 256}
    assert "image_words 100 must be at least queries 256" in refusal(write(tmp_path / "d.yaml", paper))


def test_an_absent_seedx_block_leaves_the_digest_alone(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Published records name the digest of their settings, which must not change with what they do not use."""
    assert "seedx" not in config.load(write(tmp_path / "a.yaml", tiny)).model_dump(mode="json")
