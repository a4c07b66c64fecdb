"""The workflow that publishes the book calls what the project has, and publishes from `main` alone."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
FILE = ROOT / ".github" / "workflows" / "book.yml"
JOBS: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
COMMANDS = [step["run"] for step in STEPS if "run" in step]


def settings_of(action: str) -> dict[str, Any]:
    """What a step hands to an action."""
    [step] = [step for step in STEPS if step.get("uses", "").startswith(f"{action}@")]
    return dict(step.get("with", {}))


def test_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?m)^([a-z]+):", makefile)
    variables = re.findall(r"(?m)^([A-Z]+) \?=", makefile)
    *targeted, last = COMMANDS
    assert [command.split()[1] for command in targeted] == ["check", "test", "book"]
    assert last == ".venv/bin/python -m pytest tests/test_built_book.py", "the pages that are published are tested"
    assert last in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in targeted:
        program, target, *given = command.split()
        assert program == "make" and target in targets, command
        assert {word.partition("=")[0] for word in given} <= set(variables), command


def test_params_and_folder_exist() -> None:
    [name] = re.findall(r"PARAMS=(\w+)", " ".join(COMMANDS))
    assert (ROOT / "params" / f"{name}.yaml").exists()
    # `build_book` says where the pages are
    assert settings_of("actions/upload-pages-artifact")["path"] == "_build/html"
    assert 'root / "_build" / "html"' in (ROOT / "nmlib" / "book.py").read_text(encoding="utf-8")


def test_python_is_one_that_the_project_allows() -> None:
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert SpecifierSet(allowed).contains(settings_of("actions/setup-python")["python-version"])


def test_actions_are_pinned() -> None:
    for step in STEPS:
        assert "run" in step or re.fullmatch(r"[a-z-]+/[a-z-]+@v\d+", step["uses"]), step


def test_only_main_is_published_and_only_after_the_build() -> None:
    publish = JOBS["publish"]
    assert publish["needs"] == "build"
    assert "github.ref == 'refs/heads/main'" in publish["if"] and "!= 'pull_request'" in publish["if"]
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}
    assert "permissions" not in JOBS["build"], "the build may read the repository and nothing else"
