"""From a run's executed notebooks to the rendered book.

Executed notebooks are copied into `book/chapters/` in the state in which they are shown: without the cells
that only set parameters, without what progress bars left behind, and with live widgets replaced by the static
version they carry along.
"""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml
from PIL import Image

from nmlib import claims, config, links, measured, records, runtime
from nmlib.runtime import Run, RunError
from nmlib.steps import Step, read_step

_VIEW = "application/vnd.jupyter.widget-view+json"
_OWN = re.compile(r"(\{measured(?:-value)?\}`)([a-z0-9_.]+(?:`|:\.\df`))")  # of no run but the book's own
_BAR = re.compile(r"\d+%\|.*\||\d+(it|\S*) \[\d\d:\d\d")
_NOT_MEANINGFUL = """\
:::{{warning}}
This page was built with `params/{name}.yaml`, a size that only shows that everything runs. Its numbers and
pictures say nothing about the method.
:::
"""
_RESULT = """\
Asked to go back by one picture, the model that was trained on such requests gives the right one, in every detail, in
**{measured}`rollback.accuracy.depth1.rollback_trained`** of held-out conversations. The same model trained on plain
chains of edits does so in {measured}`rollback.accuracy.depth1.markov_trained`, and no method that sees only the last
picture can do better than {measured}`rollback.accuracy.depth1.ceiling`.
"""
_PICTURE = """
```{figure} generated/front.webp
:name: fig-front
:alt: Three rows of pictures of one conversation: right answers, model trained with rollback, model trained on chains.

One conversation, and what two models of the same size make of it. Look at the columns that say to go back: the first
row shows the picture that is meant, the second the model trained with rollback, the third the one trained on chains.
```
"""


def build_book(root: Path, run: Run, *, strict: bool = False) -> Path:
    """Render the book of a run.

    Args:
        root: the folder of the project.
        run: the run whose executed notebooks are shown.
        strict: whether a warning printed by a notebook is an error.

    Returns:
        The first page.

    Raises:
        RunError: a chapter was not executed, printed a warning under `strict`, the book does not build, or a link of
            it leads nowhere.
    """
    names = chapters(root)
    others = {name for name in names if not _step(root, name).applies(run.params)}
    missing = [name for name in names if name not in others and not run.path("chapters", f"{name}.ipynb").exists()]
    if missing:
        command = f"python -m nmlib run --params {run.name}"
        raise RunError(f"{run.folder / 'chapters'}: not executed yet: {', '.join(missing)}; run `{command}`")
    shown, generated = root / "book" / "chapters", root / "book" / "generated"
    for folder in (shown, generated):
        shutil.rmtree(folder, ignore_errors=True)
    warnings: list[str] = []
    front: dict[str, str] = {}
    lent: dict[str, claims.Records] = {}
    for name in names:
        step = _step(root, name)
        lender = lender_of(step, run) if name in others else None
        if name in others and lender is None:
            write_absent(step, run, shown / f"{name}.ipynb")
            continue
        shows = lender or run
        notebook = nbformat.read(shows.path("chapters", f"{name}.ipynb"), as_version=4)
        if lender is not None:
            lent[f"{measured.LENT}{lender.name}"] = records.read_records(lender)
            lend(notebook, lender.name, f"{_wanted(step, run)} What follows is the run of `params/{lender.name}.yaml`.")
        warnings += [f"{name}: {text}" for text in polish(notebook, None if shows.params.meaningful else shows.name)]
        front |= for_front_page(notebook)
        with runtime.atomic_path(shown / f"{name}.ipynb") as temporary:
            nbformat.write(notebook, temporary)
    if strict and warnings:
        raise RunError(f"{len(warnings)} warnings of notebooks; first: {' '.join(warnings[0].split())}")
    _write_generated(generated, run, root / "book" / "results", lent)
    _write_front(generated, front, _RESULT if run.params.seedx is None else _OWN.sub(r"\1cpu:\2", _RESULT))
    return _render(root, names)


def _render(root: Path, names: Sequence[str]) -> Path:
    """Make the pages of everything that lies in `book/`; returns the first one."""
    html = root / "_build" / "html"
    # pictures of earlier builds have other names; left here they would be published with this one
    shutil.rmtree(html, ignore_errors=True)
    _build(root)
    for name in names:  # what a reader downloads is the notebook itself, to be run, without the pictures of this run
        shutil.copyfile(root / "notebooks" / f"{name}.ipynb", html / "_sources" / "chapters" / f"{name}.ipynb")
    broken = links.broken_links(html)
    if broken:
        raise RunError(f"{html}: {len(broken)} links lead nowhere; first: {broken[0]}")
    return html / "index.html"


def _step(root: Path, name: str) -> Step:
    return read_step(root / "notebooks" / f"{name}.ipynb", [path.stem for path in (root / "notebooks").glob("*.ipynb")])


def write_absent(step: Step, run: Run, path: Path) -> None:
    """Write the page of a chapter that a run's params file has nothing for: its question, and why it ends there."""
    notebook = nbformat.read(step.path, as_version=4)
    why = f"{_wanted(step, run)} Build the book of other params, or run them and build this one again."
    note = f":::{{note}}\n{why}\n:::"
    notebook.cells = [notebook.cells[0], nbformat.v4.new_markdown_cell(note, id="absent")]
    with runtime.atomic_path(path) as temporary:
        nbformat.write(notebook, temporary)


def _wanted(step: Step, run: Run) -> str:
    wanted = f"is about `{step.about}`" if step.about else "is about the small model"
    found = "describes SEED-X" if run.params.seedx is not None else "has none"
    return f"This chapter {wanted}, and `params/{run.name}.yaml` {found}."


def lender_of(step: Step, run: Run) -> Run | None:
    """Another run beside this one that executed a chapter which this one has nothing for; the first by name, or None.

    Args:
        step: the chapter.
        run: the run whose book is built; what means something is lent by what means something.
    """
    for copy in sorted(run.folder.parent.glob("*/params.yaml")):
        try:
            other = Run(config.load(copy), copy.parent)
        except config.ParamsError:  # of an earlier version
            continue
        is_like = other.name != run.name and (other.params.meaningful or not run.params.meaningful)
        if is_like and step.applies(other.params) and (copy.parent / "chapters" / f"{step.name}.ipynb").exists():
            return other
    return None


def lend(notebook: nbformat.NotebookNode, lender: str, note: str) -> None:
    """Let an executed chapter of another run say so, and read its numbers in that run's records."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _OWN.sub(rf"\1{measured.LENT}{lender}:\2", cell.source)
    _add_note(notebook, f":::{{note}}\n{note}\n:::\n")


def chapters(root: Path) -> list[str]:
    """Names of the notebooks that the table of contents lists.

    Raises:
        RunError: the table of contents cannot be read or lists a notebook that does not exist.
    """
    file = root / "book" / "_toc.yml"
    try:
        listed = _files(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"{file}: cannot be read ({error})") from None
    names = [name.removeprefix("chapters/") for name in listed if name.startswith("chapters/")]
    missing = [name for name in names if not (root / "notebooks" / f"{name}.ipynb").exists()]
    if missing:
        raise RunError(f"{file}: lists {', '.join(missing)}, but notebooks/ has no such notebook")
    return names


def _files(node: Any) -> list[str]:
    """Every `file:` of a table of contents, in order."""
    if isinstance(node, list):
        return [name for part in node for name in _files(part)]
    if isinstance(node, dict):
        return [name for key, part in node.items() for name in ([part] if key == "file" else _files(part))]
    return []


# ---------------------------------------------------------------------------------------------------------
# one notebook


def polish(notebook: nbformat.NotebookNode, not_meaningful: str | None = None) -> list[str]:
    """Change an executed notebook into the form the book shows.

    Args:
        notebook: changed in place.
        not_meaningful: name of the params, if their results mean nothing and the page shall say so.

    Returns:
        What the notebook printed to stderr apart from progress bars.
    """
    notebook.metadata.pop("papermill", None)
    left: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("papermill", None)
        tags = cell.metadata.get("tags", [])
        if {"parameters", "injected-parameters"} & set(tags) and "remove-cell" not in tags:
            cell.metadata["tags"] = [*tags, "remove-cell"]
        cell.outputs = _without_progress(cell.outputs, left)
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/html" in data:
                data.pop(_VIEW, None)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if not any(_VIEW in output.get("data", {}) for output in outputs):
        notebook.metadata.pop("widgets", None)
    if not_meaningful is not None:
        _add_note(notebook, _NOT_MEANINGFUL.format(name=not_meaningful))
    return left


def _without_progress(outputs: list[nbformat.NotebookNode], left: list[str]) -> list[nbformat.NotebookNode]:
    """Outputs without progress bars; other text on stderr stays, as one output, and is appended to `left`."""
    kept, text = [], ""
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            text += output.text
        else:
            kept.append(output)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip() and not _BAR.search(line)]
    if lines:
        left.append("\n".join(lines))
        kept.append(nbformat.v4.new_output("stream", name="stderr", text="\n".join(lines) + "\n"))
    return kept


def _add_note(notebook: nbformat.NotebookNode, note: str) -> None:
    """Put a note below the title of a page."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.lstrip().startswith("# "):
            title, _, rest = cell.source.lstrip().partition("\n")
            cell.source = f"{title}\n\n{note}\n{rest.lstrip()}"
            return
    raise RunError("a notebook has no markdown cell that starts with its title (`# ...`)")


# ---------------------------------------------------------------------------------------------------------
# the whole book


_RESULTS = """\
Every number that this run measured, with its 95% interval where one was computed; those of published runs follow."""
_CLAIMS = """\
What the paper {cite:p}`zhang2026nonmarkov` claims, in our words, and the verdict of records: of this run, or of a
published one that is made for the claim. *Reproduced* means that intervals are apart, *trend only* that the means are
in the claimed order."""


def _write_generated(folder: Path, run: Run, results: Path, lent: Mapping[str, claims.Records]) -> None:
    """Write the pages that say what this book was built from, and what it and the published runs found."""
    found = records.read_records(run)
    published = {file.stem: records.read_records(file) for file in sorted(results.glob("*.json"))}
    made = f"Built with `params/{run.name}.yaml` on {runtime.machine()}."
    if "book.minutes" in found:
        made += " The notebooks took {measured-value}`book.minutes:.1f` minutes."
    note = "" if run.params.meaningful else "\n" + _NOT_MEANINGFUL.replace("page", "book").format(name=run.name)
    judged = _titled(claims.page(found, run.params, published), "claims")
    pages = {
        "run.md": f"{made}\n{note}",
        "results.md": f"# All results\n\n{_RESULTS} {made}\n{note}\n{_all_results(run.name, found, published)}\n",
        "claims.md": f"# Claims\n\n{_CLAIMS} {made}\n{'' if published else note}\n{judged}",
    }
    for name, text in pages.items():
        with runtime.atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    # where `{measured}` in the chapters finds the numbers of this run, and of those that lend chapters
    for name, of_run in {"records": found, **lent}.items():
        rows = {id_: record.model_dump(mode="json", exclude={"id"}) for id_, record in of_run.items()}
        runtime.write_json(folder / f"{name}.json", rows)


def _all_results(name: str, found: claims.Records, published: Mapping[str, claims.Records]) -> str:
    """Tables of the run of that name and of the published runs of others."""
    tables = [records.table(found.values()) if found else "This run recorded nothing."]
    for other, rows in published.items():
        if other != name:
            tables.append(f"## Published run of `params/{other}.yaml`\n\n{records.table(rows.values())}")
    return "\n\n".join(tables)


def _titled(table: str, name: str) -> str:
    """A markdown table with a class of its own, by which the style sheet finds it."""
    return f":::{{table}}\n:class: {name}\n\n{table}\n:::\n"


def for_front_page(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """What a notebook gives to the first page: outputs of cells tagged `front-page`, by their type.

    Args:
        notebook: executed and polished.

    Returns:
        By type, for example `image/png` with base64 text and `text/html` with an explorer.
    """
    found: dict[str, str] = {}
    for cell in notebook.cells:
        if "front-page" in cell.metadata.get("tags", []):
            for data in (output.get("data", {}) for output in cell.outputs):
                found |= {kind: data[kind] for kind in ("image/png", "text/html") if kind in data}
    return found


def _write_front(folder: Path, front: dict[str, str], text: str) -> None:
    """Write what the first page shows: the result in a paragraph and a picture, and a conversation to click."""
    explorer = "<p>This run has no conversation to click.</p>"
    if "image/png" in front:
        picture = Image.open(io.BytesIO(base64.b64decode(front["image/png"]))).convert("RGB")
        with runtime.atomic_path(folder / "front.webp") as temporary:
            picture.save(temporary, "WEBP", quality=90)  # lighter than the PNG file, on the page that must load fast
        text += _PICTURE
    for name, content in (("front.md", text), ("front.html", front.get("text/html", explorer))):
        with runtime.atomic_path(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


def _build(root: Path) -> None:
    """Run Jupyter Book; every warning is an error."""
    start = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    options = ["--config", "_config.yml", "--path-output", ".", "-W", "-n", "--keep-going", "--all", "-q"]
    command = [sys.executable, "-c", start, "build", "book", *options]
    # the pages on the library are made from the code that runs here, wherever another copy is installed
    path = [str(Path(runtime.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(  # warnings go to stderr
        command, cwd=root, check=False, stdout=subprocess.DEVNULL, env=environment
    )
    if done.returncode:
        raise RunError(f"the book did not build (exit code {done.returncode}); the messages above say why")
