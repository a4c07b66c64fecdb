"""The command line: `python -m nmlib`.

Exit codes: 0 done, 1 failed (one line on stderr says what, where and what to do), 2 wrong usage or settings
that cannot be used, 130 interrupted.
"""

import errno
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from nmlib import config, records
from nmlib.data_commands import ParamsOption, data_app
from nmlib.pipeline import Project, run_notebooks
from nmlib.runtime import Run, RunError

HEADLINES = (
    r"rollback\.(accuracy|accuracy_clean|retrieval)\.depth\d\.\w+|edit\..*|encoder\..*|detokenizer\.(psnr|seam)"
    r"|metric\..*|book\.(minutes.*|peak\w+)|drift\.(identity|psnr|accuracy)\.round10\.(tokens|reencode|oracle)"
    r"|drift\.\w+_gain\.round10|drift\.slope\.\w+|breaks\.(rounds\.retrieval|size\.named)\..*benefit|breaks\.caching\.accuracy\..*"
    r"|people\.(identity|compliance|clip|copy_paste|named)\.\w+|names\.accuracy\.people\d\.delay\d.*"
    r"|bench\.\w+\.ratio\w*|bench\.(world\.render|undo\.(share|depth)|memory\.of_copy)|bench\.throughput\.(compiled\.)?(tokens|mfu)"
    r"|detokenizer\.(psnr|identity)_faces\..*"
)
SIDE_BY_SIDE = (
    r"rollback\.accuracy\.depth[1-4]\.(ceiling|markov_trained|rollback_trained|deep_trained)|edit\.accuracy\.rollback_trained"
    r"|drift\.identity\.round10\.(tokens|reencode)|detokenizer\.psnr|names\.accuracy\.people2\.delay[18]"
    r"|people\.(identity|compliance)\.(floor|base|portrait|stage1|stage12|stage123|joint|ceiling)|book\.minutes"
)
NOT_ABOUT_PEOPLE = r"(rollback|drift|edit|bench)\..*"
app = typer.Typer(
    help="Multi-round conversational image generation that remembers the whole conversation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
checkpoints = typer.Typer(help="Look into weights.", no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoint")
app.add_typer(data_app, name="data")
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="Folder of SEED-X's weights, for params like `paper`; by default `weights` in the run's folder."),
]


@app.command()
def run(
    params: ParamsOption = "cpu",
    only: Annotated[str | None, typer.Option(help="Number of one notebook, for example 03.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run what is up to date as well, from nothing.")] = False,
    cell_minutes: Annotated[float, typer.Option(min=0.01, help="Longest time for a cell of a notebook.")] = 120.0,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every stage, for intervals over seeds.")] = 1,
) -> None:
    """Run the notebooks in order; what is up to date is skipped."""
    project = Project.find()
    opened = project.open(params)
    try:
        ran = run_notebooks(project, opened, only=only, force=force, cell_minutes=cell_minutes, seeds=seeds)
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo(_summary(opened) if ran else "everything is up to date")


def _summary(opened: Run) -> str:
    """Minutes and memory of a run, from its records."""
    found = records.read_records(opened)
    prefix = "book.minutes."
    lines = [f"{r.id.removeprefix(prefix):28} {r.value:7.2f} min" for r in found.values() if r.id.startswith(prefix)]
    if "book.minutes" in found:
        memory = found["book.peak_memory_gb"].value
        lines.append(f"{'all':28} {found['book.minutes'].value:7.2f} min, peak memory {memory:.2f} GB")
    return "\n".join(lines)


@app.command()
def train(
    stage: Annotated[
        str,
        typer.Option(help="Stage of the params file, `encoder`, `detokenizer`; `-faces` and `-predicted` for `paper`."),
    ],
    params: ParamsOption = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Added to the run's seed, for intervals over seeds.")] = 0,
    weights: WeightsOption = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the VAE that `detokenizer` draws with, for params like `paper`; by default `vae` "
            "in the run's folder."
        ),
    ] = None,
) -> None:
    """Train one stage with all it starts from; under `accelerate launch` in several processes."""
    from nmlib import jobs  # loads the model libraries, which takes seconds
    from nmlib.checkpoint import CheckpointError
    from nmlib.train import processes

    opened = Project.find().open(params)
    try:
        history = jobs.train_one(opened, stage, seed, weights, vae)
    except (CheckpointError, ValueError, FloatingPointError) as error:
        raise RunError(str(error)) from None
    if processes().is_main_process:
        typer.echo(f"{stage}: {json.dumps(history[-1])}")


@app.command()
def evaluate(
    stage: Annotated[str, typer.Option(help="Stage of the params file that was trained.")],
    name: Annotated[str, typer.Option(help="Imported data set, of which the held-out part is asked.")],
    weights: WeightsOption = None,
    params: ParamsOption = "paper",
) -> None:
    """Measure whether a SEED-X that was trained here finds the picture that it is sent back to."""
    from nmlib import seedx_evaluation, seedx_training  # these load the model libraries, which takes seconds
    from nmlib.checkpoint import CheckpointError
    from nmlib.conversation import ConversationError

    try:
        opened = Project.find().open(params)
        table = seedx_evaluation.evaluate(opened, stage, name, seedx_training.weights_folder(opened, weights))
    except (CheckpointError, ConversationError, ValueError) as error:
        raise RunError(str(error)) from None
    typer.echo(seedx_evaluation.summary(table).to_string(index=False, float_format="{:.3f}".format))


@app.command()
def book(
    params: ParamsOption = "cpu",
    strict: Annotated[bool, typer.Option("--strict", help="A warning of a notebook is an error.")] = False,
) -> None:
    """Render the book of a run, and print where to open it."""
    from nmlib.book import build_book

    project = Project.find()
    typer.echo("rendering the book", err=True)
    page = build_book(project.root, project.open(params), strict=strict)
    typer.echo(f"open {page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page}")


@app.command("params")
def show_params(
    name: Annotated[str | None, typer.Argument(help="Name of a file in params/, or the path of one.")] = None,
) -> None:
    """List the sizes, or print the checked settings of one with all defaults."""
    project = Project.find()
    if name is not None:
        settings = config.load(project.params_file(name))
        typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip())
        typer.echo(f"# hash {config.digest(settings)}")
        return
    for file in sorted((project.root / "params").glob("*.yaml")):
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{file.stem:10} {first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip())


@app.command()
def results(
    params: ParamsOption = "cpu",
    publish: Annotated[bool, typer.Option("--publish", help="Copy the run's records to book/results/.")] = False,
    write_readme: Annotated[
        bool, typer.Option("--write-readme", help="Write the tables of all published runs into README.md.")
    ] = False,
) -> None:
    """Print the records of a run, or the published ones, and check that code and settings are still the same."""
    project = Project.find()
    opened = project.open(params)
    published = project.root / "book" / "results" / f"{opened.name}.json"
    if publish:
        typer.echo(f"published {records.publish(opened, published.parent)}", err=True)
    source = opened.folder if records.read_records(opened) or not published.exists() else published
    found = records.read_records(source)
    if not found:
        raise RunError(f"{source}: no records; run `python -m nmlib run --params {opened.name}` first")
    typer.echo(records.table(found.values()))
    if write_readme:
        tables = {file.stem: _headlines(records.read_records(file)) for file in sorted(published.parent.glob("*.json"))}
        records.write_tables(project.root / "README.md", tables, SIDE_BY_SIDE)
    stale = records.mismatches(opened, found.values())
    if stale:
        raise RunError(f"{source}: {len(stale)} of {len(found)} records are not current; {stale[0]}")


def _headlines(found: Mapping[str, records.Record]) -> list[records.Record]:
    """Results for the README; of a run on people only those on people, since its stages on rollback are short."""
    shown = {id: record for id, record in found.items() if re.fullmatch(HEADLINES, id)}
    if any(id.startswith("people.") for id in shown):
        shown = {id: record for id, record in shown.items() if not re.fullmatch(NOT_ABOUT_PEOPLE, id)}
    return list(shown.values())


@app.command()
def chat(
    params: ParamsOption = "cpu",
    stage: Annotated[str, typer.Option(help="Training stage to talk to.")] = "rollback",
    picture: Annotated[Path | None, typer.Option(help="First picture; by default one that was held out.")] = None,
    weights: Annotated[Path | None, typer.Option(help="SEED-X's weights; by default `weights` in the run.")] = None,
    tiles: Annotated[
        str, typer.Option(help="Of SEED-X: columns x rows that pictures are cut into; empty for the whole alone.")
    ] = "",
) -> None:
    """Talk to a trained model: say what to change, undo, go back, branch. With --stage weights to SEED-X itself."""
    opened = Project.find().open(params)
    is_seedx = opened.params.seedx is not None
    try:
        if not (is_seedx and stage == "weights"):
            opened.params.stage(stage)
    except KeyError as error:
        raise RunError(str(error.args[0])) from None
    from nmlib import chat, data, experiments, seedx_chat  # these load the model libraries, which takes seconds
    from nmlib.checkpoint import CheckpointError
    from nmlib.conversation import ConversationError

    try:
        if is_seedx:
            seedx_chat.talk_to(opened, stage, picture, weights, tiles)
            return
        session = chat.ChatSession(experiments.load_system(opened, stage))
        if picture is None:
            source = data.open_source(opened.params.source)
            chance = data.step_generator(opened.params.seed, 0)
            session.upload(data.sample_pictures(source, 1, "heldout", chance)[2][0])
        else:
            session.upload(picture)
    except (CheckpointError, ConversationError) as error:
        raise RunError(str(error)) from None
    chat.repl(session, opened.path("chat", stage))


@checkpoints.command()
def inspect(path: Annotated[Path, typer.Argument(help="Folder with llm/ and agent/, or of a tuned model.")]) -> None:
    """Say what a folder of SEED-X weights is, what is missing and what does not fit."""
    from nmlib import seedx_inspect  # loads the model libraries, which takes seconds
    from nmlib.checkpoint import CheckpointError

    try:
        report = seedx_inspect.inspect(path)
    except CheckpointError as error:
        raise RunError(str(error)) from None
    typer.echo(report)
    if not report.fits:
        raise RunError(f"{path}: does not fit; see the lines with a dash above")


@app.command()
def plan(
    params: Annotated[Path, typer.Argument(help="A params file, such as params/paper.yaml or params/gpu.yaml.")],
    gpus: Annotated[int, typer.Option(min=1, help="Graphics cards to share the work.")] = 8,
    memory: Annotated[float, typer.Option(min=1, help="Memory of each card in GB.")] = 80.0,
) -> None:
    """Say what a training needs before a machine is rented: numbers, memory, tokens and operations."""
    from nmlib import plan as planner
    from nmlib import plan_latents, plan_stages

    settings = config.load(params)
    if settings.seedx is None:
        typer.echo(plan_stages.report(settings))
    else:
        typer.echo(planner.report(settings, settings.seedx, gpus, memory))
        typer.echo("\n" + plan_latents.report(settings, settings.seedx, gpus))


@app.command()
def bench(
    params: ParamsOption = "cpu",
    only: Annotated[str | None, typer.Option(help="One workload, for example training.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; by default bench.json in the run's folder.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each thing is timed.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny workloads that only show that everything runs.")] = False,
) -> None:
    """Measure what memory saves: ratios beside what arithmetic allows, on fresh weights."""
    from nmlib import bench as benchmark  # loads the model libraries, which takes seconds
    from nmlib.bench_setup import QUICK

    opened = Project.find().open(params)
    sizes = QUICK if quick else None
    report = benchmark.run_bench(opened.params, None if only is None else [only], repeats, sizes=sizes)
    benchmark.save(report, out or opened.path("bench.json"))
    if not quick:
        benchmark.record(opened, report)
    typer.echo(benchmark.table(report))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always ends by SystemExit with one of the codes above.

    Args:
        arguments: words after the program's name; by default those of this process.
    """
    try:
        app(args=arguments, prog_name="nmlib")
    except config.ParamsError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except RunError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"{error.filename or 'a file'}: the disk is full; make room, and give the command again", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
