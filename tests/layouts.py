"""Real data sets in small: every layout as it is released, with pictures of one colour and the known oddities."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple")


def picture(colour: str, side: int = 64, kind: str = "PNG", spot: str | None = None) -> bytes:
    """The bytes of a picture of one colour, with a spot of another."""
    image = Image.new("RGB", (side, side), colour)
    if spot is not None:
        image.paste(spot, (side // 8, side // 8, side // 4, side // 4))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, name: str, data: bytes | str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def magicbrush_rows(sessions: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of sessions with so many turns; pictures are red, green, blue, ... in order."""
    return [
        {
            "img_id": id_,
            "turn_index": turn,
            "source_img": {"bytes": picture(COLOURS[turn - 1]), "path": f"{id_}-{turn - 1}.png"},
            "mask_img": {"bytes": picture("black"), "path": f"{id_}-mask{turn}.png"},
            "instruction": f"make it {COLOURS[turn]}",
            "target_img": {"bytes": picture(COLOURS[turn]), "path": f"{id_}-{turn}.png"},
        }
        for id_, turns in sessions.items()
        for turn in range(1, turns + 1)
    ]


def write_parquet(root: Path, name: str, rows: list[dict[str, Any]], schema: Any = None, group: int = 2) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


def magicbrush_schema() -> Any:
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.schema(
        [
            ("img_id", pyarrow.string()),
            ("turn_index", pyarrow.int32()),
            ("source_img", image),
            ("mask_img", image),
            ("instruction", pyarrow.string()),
            ("target_img", image),
        ]
    )


def write_magicbrush(root: Path) -> Path:
    """Two training files that cut a session in two, and a development file."""
    rows = magicbrush_rows({"10": 1, "242679": 3, "7": 2})
    write_parquet(root, "data/train-00000-of-00002-ab12.parquet", rows[:3], magicbrush_schema())
    write_parquet(root, "data/train-00001-of-00002-cd34.parquet", rows[3:], magicbrush_schema())
    write_parquet(root, "data/dev-00000-of-00001-ef56.parquet", magicbrush_rows({"99": 2}), magicbrush_schema())
    return root


def magicbrush_test_files() -> dict[str, bytes]:
    """Members of the test zip: a session of two turns, and one whose output is missing."""
    sessions = {
        "261": [
            {
                "input": "261-input.png",
                "mask": "261-mask1.png",
                "output": "261-output1.png",
                "instruction": "add a cat",
            },
            {
                "input": "261-output1.png",
                "mask": "261-mask2.png",
                "output": "261-output2.png",
                "instruction": "undo it",
            },
        ],
        "5": [{"input": "5-input.png", "mask": "5-mask1.png", "output": "5-output1.png", "instruction": "add a dog"}],
    }
    files = {"test/edit_sessions.json": json.dumps(sessions).encode(), "test/local_captions.json": b"{}"}
    for name, colour in (("input", "red"), ("output1", "green"), ("output2", "blue"), ("mask1", "black")):
        files[f"test/images/261/261-{name}.png"] = picture(colour)
    files["test/images/5/5-input.png"] = picture("red")
    return files


def write_seed(root: Path, lines: list[Any]) -> Path:
    """SEED-Data-Edit part 3: two files of annotations, pictures in both places that are seen."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    half = (len(texts) + 1) // 2
    write(root, "multi_turn_editing/annotations/split_0001.jsonl", "\n".join(texts[:half]) + "\n\n")
    write(root, "multi_turn_editing/annotations/split_0002.jsonl", "\n".join(texts[half:]))
    return root / "multi_turn_editing"


def seed_line(name: str, turns: int) -> dict[str, str]:
    folder = "20240407_586P_2211turns/Data/176"
    line = {"source_image": f"{folder}/{name}.jpg"}
    for turn in range(1, turns + 1):
        line[f"instruction_{turn}"] = f"make it {COLOURS[turn]}"
        line[f"inverse_instruction_{turn}"] = f"make it {COLOURS[turn - 1]}"
        line[f"edit_image_{turn}"] = f"{folder}/{name}_edit{turn}.jpg"
    return line


def write_seed_pictures(root: Path, line: dict[str, str], below: str = "images") -> None:
    names = [value for key, value in line.items() if "image" in key]
    for name, colour in zip(names, COLOURS, strict=False):
        write(root, f"{below}/{name}", picture(colour, kind="JPEG"))


def imgedit_entry(folder: str, turn: int, prompt: str) -> dict[str, Any]:
    return {
        "input_images": [f"{folder}/origin_{turn}.png"],
        "output_images": [f"{folder}/result_{turn}.png"],
        "prompt": prompt,
    }


def write_imgedit(root: Path) -> Path:
    """Version backtracking: an object is added, replaced, and then the first result is adjusted; one row is broken."""
    rows = []
    for name in ("00031_00020_000209651", "00031_00020_000209652"):
        folder = f"results_version_backtracking_part0/{name}"
        prompts = (
            "add a green vest in the middle-right area of the picture",
            "replace the green vest with a brown jacket",
            "withdraw the previous round of modifications, adjust the green vest in round1 to a brighter green",
        )
        rows.append({"data": [imgedit_entry(folder, turn, prompt) for turn, prompt in enumerate(prompts)]})
        spots = {"origin_0": None, "result_0": "green", "result_1": "brown", "result_2": "lime"}
        for picture_name, spot in spots.items():
            write(root, f"Multiturn/{folder}/{picture_name}.png", picture("white", spot=spot))
        for picture_name in ("origin_1", "origin_2"):  # the same picture at another size
            write(root, f"Multiturn/{folder}/{picture_name}.png", picture("white", 128, spot="green"))
    write(root, f"Multiturn/{folder}/origin_2.png", picture("purple"))  # of nothing that was shown before
    write_parquet(root, "Parquet/version_backtracking_part0.parquet", rows)
    return root


def write_instructpix2pix(root: Path) -> Path:
    """Two folders; of the second one picture is missing, and a third entry is malformed."""
    seeds: list[Any] = [["0000000", [1038967, 22]], ["0000001", [7]], ["0000002"]]
    write(root, "seeds.json", json.dumps(seeds))
    for folder in ("0000000", "0000001"):
        write(root, f"{folder}/prompt.json", json.dumps({"input": "a cat", "edit": "make it a dog", "output": "a dog"}))
        write(root, f"{folder}/metadata.jsonl", "{}\n")
    for seed in (1038967, 22):
        for place, colour in enumerate(("red", "blue")):
            write(root, f"0000000/{seed}_{place}.jpg", picture(colour, kind="JPEG"))
    write(root, "0000001/7_0.jpg", picture("red", kind="JPEG"))
    return root
