"""Records: written once, read strictly, checked against code and settings, published, tabulated."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nmlib import records, runtime
from nmlib.records import Record, write_record
from nmlib.runtime import Run, RunError

MODULES = ("runtime",)


@pytest.fixture
def run(tmp_path: Path, tiny: dict[str, Any]) -> Run:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny), encoding="utf-8")
    return Run.open(path, root=tmp_path / "runs")


def write(run: Run, id: str = "rollback.accuracy.depth1", value: float = 0.5, **more: Any) -> Record:
    return write_record(run, id, value, n=10, modules=MODULES, **more)


def test_round_trip(run: Run) -> None:
    record = write(run, value=0.912, low=0.9, high=0.92, unit="share", minutes=1.25)
    assert records.read_records(run) == {record.id: record}
    assert record.params_hash == run.digest
    assert record.library_hash == runtime.library_digest(*MODULES)
    assert record.command == "python -m nmlib run --params tiny"
    assert write(run, seeds=3).command == "python -m nmlib run --params tiny --seeds 3"


def test_scalars_of_other_libraries_become_plain_numbers(run: Run) -> None:
    import numpy as np
    import torch

    assert write(run, value=torch.tensor(0.25)).value == 0.25
    assert type(write(run, value=np.float32(0.25)).value) is float


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"id": "Accuracy"}, "record 'Accuracy': id: String should match pattern"),
        ({"value": float("nan")}, "value: Input should be a finite number, found nan"),
        ({"seeds": 0}, "seeds: Input should be greater than or equal to 1, found 0"),
    ],
)
def test_what_cannot_be_stored(run: Run, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(RunError) as caught:
        write(run, **arguments)
    assert text in str(caught.value)
    assert records.read_records(run) == {}


def test_truncated_and_foreign_files_are_named(run: Run) -> None:
    write(run)
    path = run.path("records", "rollback.accuracy.depth1.json")
    path.write_text(path.read_text()[:20])
    with pytest.raises(RunError, match=r"depth1\.json: not complete JSON"):
        records.read_records(run)
    path.write_text('{"id": "a.b"}')
    with pytest.raises(RunError, match=r"depth1\.json: no valid record: value: Field required; delete it"):
        records.read_records(run)


def test_a_published_file_that_holds_no_records_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    path.write_text('{"a.b": 1}')
    with pytest.raises(RunError, match=r"tiny\.json: no valid record: "):
        records.read_records(path)


def test_mismatches_name_record_and_command(run: Run) -> None:
    current = write(run)
    assert records.mismatches(run, [current]) == []
    other = current.model_copy(update={"params_hash": "0", "library_hash": "1"})
    assert records.mismatches(run, [other]) == [
        "rollback.accuracy.depth1: the settings and the code changed since; "
        "measure again: python -m nmlib run --params tiny"
    ]


def test_publish(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no records; run `python -m nmlib run --params tiny` first"):
        records.publish(run, tmp_path / "results")
    record = write(run)
    path = records.publish(run, tmp_path / "results")
    assert path == tmp_path / "results" / "tiny.json"
    assert records.read_records(path) == {record.id: record}


def test_publish_refuses_what_is_stale_or_means_nothing(run: Run, tmp_path: Path) -> None:
    record = write(run)
    path = run.path("records", f"{record.id}.json")
    runtime.write_json(path, record.model_copy(update={"library_hash": "0"}).model_dump(mode="json"))
    with pytest.raises(RunError, match="1 of 1 records are not current; first: rollback"):
        records.publish(run, tmp_path)
    run.params = run.params.model_copy(update={"meaningful": False})
    with pytest.raises(RunError, match="'tiny' are not meaningful: their numbers are never published"):
        records.publish(run, tmp_path)


def test_table_goes_between_the_markers(run: Run, tmp_path: Path) -> None:
    rows = [write(run, low=0.4, high=0.6, limit=0.75, unit="share"), write(run, "detokenizer.psnr", 25.123, unit="dB")]
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n{records.START}\nold\n{records.END}\nrest\n", encoding="utf-8")
    for _ in range(2):
        records.write_tables(readme, {"tiny": rows, "big": rows[:1]}, r"rollback\..*")
    text = readme.read_text(encoding="utf-8")
    assert "| `rollback.accuracy.depth1` | 0.500 | 0.400 to 0.600 | 0.750 | 10 | 1 | share |  |" in text
    assert "| `detokenizer.psnr` | 25.1 |  |  | 10 | 1 | dB |  |" in text
    both = "0.500 (0.400 to 0.600)"
    side = f"| result | `tiny` | `big` |\n|---|---|---|\n| `rollback.accuracy.depth1` | {both} | {both} |\n\n"
    assert side in text and "<summary><code>params/big.yaml</code>: 1 results</summary>" in text
    assert "old" not in text
    assert text.index("params/tiny.yaml") < text.index("params/big.yaml")
    assert text.startswith("# A\n")
    assert text.endswith("rest\n")


def test_readme_without_markers(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A\n")
    with pytest.raises(RunError, match=r"README\.md: markers .* not found"):
        records.write_tables(tmp_path / "README.md", {}, "")


def test_the_readme_has_the_markers() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert text.index(records.START) < text.index(records.END)
