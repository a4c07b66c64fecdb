"""The command line: help that explains, exit codes, one line for each error."""

import errno
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import write_notebook

from nmlib import __main__ as cli
from nmlib import experiments
from nmlib.records import END, START, write_record
from nmlib.runtime import Run


@pytest.fixture
def call(project_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Call the command line inside the tiny project; gives exit code, stdout and stderr."""
    monkeypatch.chdir(project_root)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def test_an_archive_is_unpacked_or_refused(call: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("part/one.txt", "1")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("../one.txt", "1")
    code, out, _ = call("data", "unpack", str(tmp_path / "a.zip"), "--to", str(tmp_path / "a"))
    assert (code, out) == (0, f"{tmp_path / 'a'}: 1 files\n") and (tmp_path / "a/part/one.txt").read_text() == "1"
    code, _, err = call("data", "unpack", str(tmp_path / "a.zip"), "--to", str(tmp_path))
    assert code == 1 and err == f"{tmp_path}: is there already and would be replaced as a whole; give a new folder\n"
    assert (tmp_path / "a.zip").exists()
    code, _, err = call("data", "unpack", str(tmp_path / "b.zip"), "--to", str(tmp_path / "b"))
    assert code == 1 and "../one.txt" in err and not (tmp_path / "b").exists()


def test_help_names_every_verb(call: Any) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for verb in (
        "run",
        "train",
        "evaluate",
        "book",
        "params",
        "results",
        "chat",
        "bench",
        "plan",
        "checkpoint",
        "data",
    ):
        assert f"  {verb} " in out


@pytest.mark.parametrize(
    "verb", ["run", "train", "evaluate", "book", "params", "results", "chat", "bench", "plan", "checkpoint", "data"]
)
def test_help_of_every_verb(call: Any, verb: str) -> None:
    code, out, _ = call(verb, "--help")
    assert code == 0
    assert "--help" in out


@pytest.mark.parametrize("words", [["fly"], ["run", "--fast"], ["run", "--cell-minutes", "0"]])
def test_wrong_usage_is_2(call: Any, words: list[str]) -> None:
    assert call(*words)[0] == 2


def test_unknown_params_is_2_and_lists_the_known(call: Any) -> None:
    code, out, err = call("run", "--params", "tini")
    assert code == 2
    assert out == ""
    assert err.strip().endswith("tini.yaml: cannot be read (No such file or directory); known params there: ['tiny']")


def test_params_that_do_not_fit_is_2(call: Any, project_root: Path, tiny: dict[str, Any]) -> None:
    (project_root / "params" / "bad.yaml").write_text(yaml.safe_dump(tiny | {"sead": 1}))
    code, _, err = call("run", "--params", "bad")
    assert code == 2
    assert "unknown key 'sead'" in err
    assert err.count("\n") == 1


def test_failing_notebook_is_1_and_one_line(call: Any, project_root: Path) -> None:
    write_notebook(project_root / "notebooks" / "01_one.ipynb", "One", "1 / 0")
    code, out, err = call("run", "--params", "tiny")
    assert code == 1
    assert out == ""
    assert err.splitlines()[-1].startswith("notebooks/01_one.ipynb, cell 3: ZeroDivisionError: division by zero")
    assert "Traceback" not in err


def test_outside_a_project_is_1(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["run"])
    assert caught.value.code == 1
    assert "go to the folder of the project" in capsys.readouterr().err


def test_params_lists_and_shows(call: Any, project_root: Path) -> None:
    path = project_root / "params" / "tiny.yaml"
    path.write_text("# The smallest size.\n" + path.read_text())
    assert call("params") == (0, "tiny       The smallest size.\n", "")
    code, out, _ = call("params", "tiny")
    assert code == 0
    shown = yaml.safe_load(out)
    assert shown["name"] == "tiny"
    assert shown["precision"] == "auto"  # a default that the file does not set
    assert "# hash " in out


def test_results(call: Any, project_root: Path) -> None:
    code, _, err = call("results", "--params", "tiny")
    assert code == 1
    assert "no records" in err
    run = Run.open(project_root / "params" / "tiny.yaml", root=project_root / "runs")
    write_record(run, "tiny.one", 1.0, n=1, modules=["runtime"])
    write_record(run, "edit.accuracy.tiny_trained", 0.5, n=2, modules=["runtime"])
    (project_root / "README.md").write_text(f"{START}\n{END}\n")
    code, out, err = call("results", "--params", "tiny", "--publish", "--write-readme")
    assert code == 0, err
    assert "| `tiny.one` | 1.000 |" in out
    readme = (project_root / "README.md").read_text()
    assert "| `edit.accuracy.tiny_trained` | 0.500 |" in readme
    assert "tiny.one" not in readme, "the README shows headline results only"
    write_record(run, "people.identity.tiny", 0.25, n=3, modules=["runtime"])
    assert call("results", "--params", "tiny", "--publish", "--write-readme")[0] == 0
    readme = (project_root / "README.md").read_text()
    assert "| `people.identity.tiny` | 0.250 |" in readme
    assert "edit.accuracy" not in readme, "of a run on people the README shows those alone"
    (run.folder / "records" / "people.identity.tiny.json").unlink()
    path = project_root / "params" / "tiny.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    code, _, err = call("results", "--params", "tiny")
    assert code == 1
    assert "2 of 2 records are not current; edit.accuracy.tiny_trained: the settings changed since" in err


def test_book_of_nothing_is_1(call: Any, project_root: Path) -> None:
    (project_root / "book").mkdir()
    (project_root / "book" / "_toc.yml").write_text("root: index\nchapters: [{file: chapters/01_one}]\n")
    code, _, err = call("book", "--params", "tiny")
    assert code == 1
    line = err.splitlines()[-1]
    assert line.endswith("chapters: not executed yet: 01_one; run `python -m nmlib run --params tiny`")


def test_a_full_disk_is_1_and_one_line(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/tiny/events")

    monkeypatch.setattr(cli.Project, "open", full)
    code, _, err = call("results", "--params", "tiny")
    assert (code, err) == (1, "runs/tiny/events: the disk is full; make room, and give the command again\n")


def test_chat_with_seedx_asks_for_a_picture_grids_and_weights(call: Any, tmp_path: Path) -> None:
    paper = ["chat", "--params", str(Path(__file__).parent.parent / "params" / "paper.yaml")]
    code, _, err = call(*paper)
    assert (code, err) == (1, "paper: SEED-X has no pictures of its own; give one with --picture FILE\n")
    paper += ["--picture", str(tmp_path / "photo.png")]
    code, _, err = call(*paper, "--tiles", "1x1,2by1")
    assert code == 1 and err.startswith("--tiles: '2by1'; expected columns x rows such as 2x1, or any of ('1x1', ")
    code, _, err = call(*paper, "--stage", "weights")
    assert code == 1 and "SEED-X begins with released weights, give theirs with --weights" in err
    code, _, err = call(*paper, "--stage", "last")
    assert code == 1 and "has no stage 'last'" in err


def test_chat_names_the_stages(call: Any) -> None:
    code, _, err = call("chat", "--params", "tiny", "--stage", "last")
    assert code == 1
    assert "params 'tiny' has no stage 'last'; it has ['language', 'base'" in err


def test_chat_before_training_is_1_and_one_line(call: Any) -> None:
    code, out, err = call("chat", "--params", "tiny")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "rollback.safetensors: no such checkpoint; run the notebook that writes it" in err


def test_chat_about_what_is_no_picture_is_1_and_one_line(
    call: Any, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = SimpleNamespace(image_size=16, encode=None)
    monkeypatch.setattr(experiments, "load_system", lambda run, stage: system)
    for name, content in (("bad.png", b"no picture"), ("none.png", None)):
        path = project_root / name
        if content is not None:
            path.write_bytes(content)
        code, out, err = call("chat", "--params", "tiny", "--picture", str(path))
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"{path}: cannot be read as a picture (")


@pytest.mark.parametrize("words", [("import", "--params", "tiny", "--name", "rollback"), ("inspect",)])
def test_a_broken_zip_is_1_and_one_line(call: Any, project_root: Path, words: tuple[str, ...]) -> None:
    path = project_root / "broken.zip"
    path.write_text("<html>not found</html>")
    code, out, err = call("data", words[0], str(path), *words[1:])
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"{path}: cannot be read as a zip file (")
