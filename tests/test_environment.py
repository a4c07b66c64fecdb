"""`pyproject.toml` (ranges), `requirements.lock` (pins) and `environment.yml` (conda) say the same."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK_LINES = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LOCK_LINES)}


def test_lock_holds_plain_pins_only() -> None:
    for line in LOCK_LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), f"no plain pin: {line!r}"
    assert len(PINS) == len(LOCK_LINES), "a package is pinned twice"
    assert "nmlib" not in PINS


def test_torch_pin() -> None:
    assert PINS["torch"] == "2.13.0"


def test_every_dependency_is_locked_within_its_range() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for text in wanted:
        requirement = Requirement(text)
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in requirements.lock"
        assert requirement.specifier.contains(pin), f"{requirement.name}=={pin} is outside {requirement.specifier}"
        operators = {part.operator for part in requirement.specifier}
        assert operators == {">=", "<"}, f"{text}: expected a range with a lower and an upper end"


def test_conda_environment_uses_the_lock_and_an_allowed_python() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    packages = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    python = next(part for part in packages if isinstance(part, str) and part.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert "pip" in packages
    pip = next(part["pip"] for part in packages if isinstance(part, dict))
    assert pip == ["-r requirements.lock", "-e ."]


def test_makefile_installs_the_lock() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-r requirements.lock" in makefile
    assert "--no-deps -e ." in makefile
