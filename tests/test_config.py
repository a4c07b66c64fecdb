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


def test_missing_file_lists_its_neighbours(tmp_path: Path, tiny: dict[str, Any]) -> None:
    write(tmp_path / "tiny.yaml", tiny)
    text = refusal(tmp_path / "tini.yaml")
    assert text == f"{tmp_path}/tini.yaml: cannot be read (No such file or directory); known params there: ['tiny']"


def test_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: [tiny", encoding="utf-8")
    assert refusal(path).startswith(f"{path}: not valid YAML: ")
    assert "\n" not in refusal(path)


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
