"""Results have one home: a record for every measured number, and nothing that was not measured.

A record is a small JSON file in the run's folder. The records of a full run are published to
`book/results/<params>.json`, from which the README's table is generated.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import SupportsFloat

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nmlib import runtime
from nmlib.runtime import Run, RunError

START, END = "<!-- results:start -->", "<!-- results:end -->"
_ID = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")


class Record(BaseModel):
    """One measured number.

    Args:
        id: dotted name, for example `rollback.accuracy.depth1.rollback_trained`.
        value: the number.
        low: lower end of the 95% interval, if one was computed.
        high: upper end of it.
        limit: what the numbers of operations alone would give, where that is known.
        n: how many things were measured.
        seeds: over how many training seeds.
        unit: for example `share`, `dB`, `minutes`; empty where the number has none.
        command: what a reader types to measure it again.
        modules: library modules that made it; `library_hash` covers them and all they import.
        params_hash: hash of the settings.
        library_hash: hash of the code.
        machine: one line.
        minutes: what the measurement took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: str = Field(pattern=f"^{_ID.pattern}$")
    value: float
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    n: int = Field(ge=1)
    seeds: int = Field(default=1, ge=1)
    unit: str = ""
    command: str
    modules: tuple[str, ...]
    params_hash: str
    library_hash: str
    machine: str
    minutes: float | None = None


def write_record(
    run: Run,
    id: str,
    value: SupportsFloat,
    *,
    n: int,
    modules: Sequence[str],
    low: SupportsFloat | None = None,
    high: SupportsFloat | None = None,
    limit: SupportsFloat | None = None,
    seeds: int = 1,
    unit: str = "",
    minutes: float | None = None,
    command: str | None = None,
) -> Record:
    """Write one measured number to `records/<id>.json` of a run.

    Args:
        run: the run that measured it.
        id: dotted lower-case name.
        value: the number; plain Python, numpy and torch scalars will do.
        n: how many things were measured.
        modules: library modules that made the number, what they import is implied; () is the whole library.
        low, high: the 95% interval, if there is one.
        limit: what the numbers of operations alone would give, where that is known.
        seeds: over how many training seeds.
        unit: for example `share` or `dB`.
        minutes: what the measurement took.
        command: what measures it again; by default the run of these params with as many seeds.

    Returns:
        The record.

    Raises:
        RunError: the id or a number cannot be stored.
    """
    try:
        record = Record(
            id=id,
            value=float(value),
            low=None if low is None else float(low),
            high=None if high is None else float(high),
            limit=None if limit is None else float(limit),
            n=int(n),
            seeds=seeds,
            unit=unit,
            command=command or f"python -m nmlib run --params {run.name}" + (f" --seeds {seeds}" if seeds > 1 else ""),
            modules=tuple(modules),
            params_hash=run.digest,
            library_hash=runtime.library_digest(*modules),
            machine=runtime.machine(),
            minutes=None if minutes is None else round(float(minutes), 3),
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise RunError(f"record {id!r}: {fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}") from None
    runtime.write_json(run.path("records", f"{id}.json"), record.model_dump(mode="json"))
    return record


def read_records(run: Run | str | Path) -> dict[str, Record]:
    """All records of a run by id, sorted.

    Args:
        run: a run, its folder, or a published file such as `book/results/cpu.json`.

    Returns:
        Empty if nothing was recorded.

    Raises:
        RunError: a file is missing, truncated, or does not hold records.
    """
    path = run.folder if isinstance(run, Run) else Path(run)
    if path.suffix == ".json":
        rows = runtime.read_json(path)
        if not isinstance(rows, dict):
            raise RunError(f"{path}: expected a mapping of records; publish it again from a run")
        named = {id: {"id": id, **row} if isinstance(row, dict) else row for id, row in sorted(rows.items())}
        return {id: _parse(row, path) for id, row in named.items()}
    files = [p for p in sorted((path / "records").glob("*.json")) if not runtime.is_temporary(p)]
    found = [_parse(runtime.read_json(file), file) for file in files]
    return {record.id: record for record in sorted(found, key=lambda record: record.id)}


def _parse(row: object, where: Path) -> Record:
    try:
        return Record.model_validate(row)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise RunError(f"{where}: no valid record: {key}: {fault['msg']}; delete it and measure again") from None


def mismatches(run: Run, records: Iterable[Record]) -> list[str]:
    """One line for each record that other settings or other code made; empty when all are current.

    Args:
        run: the run with the current settings.
        records: what to check.
    """
    current: dict[tuple[str, ...], str] = {}
    lines = []
    for record in records:
        code = current.setdefault(record.modules, runtime.library_digest(*record.modules))
        stale = [
            *(["settings"] if record.params_hash != run.digest else []),
            *(["code"] if record.library_hash != code else []),
        ]
        if stale:
            lines.append(f"{record.id}: the {' and the '.join(stale)} changed since; measure again: {record.command}")
    return lines


def publish(run: Run, results: str | Path = "book/results") -> Path:
    """Gather a run's records into `<results>/<params>.json`.

    Args:
        run: a finished run.
        results: folder of the published records.

    Returns:
        The file written.

    Raises:
        RunError: the run's numbers are not meaningful, there are none, or some are not current.
    """
    if not run.params.meaningful:
        raise RunError(f"params {run.name!r} are not meaningful: their numbers are never published")
    records = read_records(run)
    if not records:
        raise RunError(f"{run.folder}: no records; run `python -m nmlib run --params {run.name}` first")
    stale = mismatches(run, records.values())
    if stale:
        raise RunError(f"{len(stale)} of {len(records)} records are not current; first: {stale[0]}")
    path = Path(results) / f"{run.name}.json"
    runtime.write_json(path, {id: record.model_dump(mode="json", exclude={"id"}) for id, record in records.items()})
    return path


def table(records: Iterable[Record]) -> str:
    """Records as a markdown table; the machines are listed below it.

    Args:
        records: what to show, in this order.
    """
    rows = list(records)
    head = ["| result | value | 95% interval | limit | n | seeds | unit | minutes |", "|---" * 8 + "|"]
    body = [
        f"| `{r.id}` | {_show(r.value)} | {_interval(r)} | {'' if r.limit is None else _show(r.limit)} | {r.n} "
        f"| {r.seeds} | {r.unit} | {_minutes(r)} |"
        for r in rows
    ]
    machines = sorted({(r.command, r.machine) for r in rows})
    return "\n".join([*head, *body, "", *(f"`{command}` on {machine}  " for command, machine in machines)])


def _show(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _interval(record: Record) -> str:
    if record.low is None or record.high is None:
        return ""
    return f"{_show(record.low)} to {_show(record.high)}"


def _minutes(record: Record) -> str:
    return "" if record.minutes is None else f"{record.minutes:.1f}"


def side_by_side(records: Mapping[str, Iterable[Record]], pattern: str) -> str:
    """The same results of several runs in one table, a column for each.

    Args:
        records: by the name of their params file.
        pattern: regular expression of the ids to show; a run that has none of them is left out.
    """
    runs = {name: {r.id: r for r in rows if re.fullmatch(pattern, r.id)} for name, rows in records.items()}
    runs = {name: found for name, found in runs.items() if found}
    head = ["| result | " + " | ".join(f"`{name}`" for name in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    body = []
    for id_ in dict.fromkeys(id_ for found in runs.values() for id_ in found):
        shown = [_with_interval(found[id_]) if id_ in found else "" for found in runs.values()]
        body.append(f"| `{id_}` | {' | '.join(shown)} |")
    return "\n".join([*head, *body])


def _with_interval(record: Record) -> str:
    span = _interval(record)
    return _show(record.value) + (f" ({span})" if span else "")


def write_tables(readme: str | Path, records: Mapping[str, Iterable[Record]], first: str) -> None:
    """Put tables of records between the results markers of a README: some results side by side, all of each run folded.

    Args:
        readme: the file.
        records: of published runs, by the name of their params file.
        first: regular expression of the ids that are shown side by side.

    Raises:
        RunError: the file lacks a marker.
    """
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise RunError(f"{path}: markers {START} and {END} not found; add both, the table goes between them")
    runs = {name: list(rows) for name, rows in records.items()}
    folded = [
        f"<details><summary><code>params/{name}.yaml</code>: {len(rows)} results</summary>"
        f"\n\n{table(rows)}\n\n</details>"
        for name, rows in runs.items()
    ]
    tables = "\n\n".join([side_by_side(runs, first), *folded])
    with runtime.atomic_path(path) as temporary:
        temporary.write_text(f"{before}{START}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
