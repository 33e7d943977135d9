"""An optional extra is installed once, by pip, with the course's pins where the environment is the course's own."""

import subprocess
import sys

import pytest

from labutils.course import extras
from labutils.course.extras import install_extra, install_packages, missing_packages


@pytest.fixture
def root(tmp_path):
    text = '[project.optional-dependencies]\nhere = ["numpy>=1"]\naway = ["a-package-that-nobody-has>=1"]\n'
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    (tmp_path / "constraints.txt").write_text("", encoding="utf-8")
    return tmp_path


@pytest.fixture
def pip(monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command[2:])
        return subprocess.CompletedProcess(command, pip.status, "", "a line\nERROR: no such package\n")

    pip = run
    pip.status, pip.calls = 0, calls
    monkeypatch.setattr(subprocess, "run", run)
    return pip


def test_missing_packages_are_those_not_met(root):
    assert missing_packages("here", root) == []
    assert missing_packages("away", root) == ["a-package-that-nobody-has>=1"]


def test_install_extra_asks_for_nothing_that_is_there(root, pip):
    assert install_extra("here", root)
    assert pip.calls == []


def test_install_extra_installs_what_is_missing(root, pip, capsys):
    assert install_extra("away", root)
    assert pip.calls[0][:2] == ["pip", "install"] and "a-package-that-nobody-has>=1" in pip.calls[0]
    assert "-c" not in pip.calls[0]
    assert "a-package-that-nobody-has" in capsys.readouterr().out


def test_install_extra_keeps_the_pins_in_the_courses_own_environment(root, pip, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    install_extra("away", root)
    assert pip.calls[0][-2:] == ["-c", str(root / "constraints.txt")]


def test_an_extra_of_files_alone_brings_nothing_else(root, pip, monkeypatch):
    monkeypatch.setattr(extras, "ALONE", {"away"})
    install_extra("away", root)
    assert "--no-deps" in pip.calls[0]
    monkeypatch.setattr(extras, "ALONE", set())
    install_extra("away", root)
    assert "--no-deps" not in pip.calls[1]


def test_a_package_that_torch_pins_is_never_replaced(root, monkeypatch):
    """A CUDA build of torch brings its own Triton: any version that is there counts, and none is fetched beside it."""
    text = '[project.optional-dependencies]\ngpu = ["pytest>=99"]\nnone = ["no-such-thing>=9"]\n'
    (root / "pyproject.toml").write_text(text, encoding="utf-8")
    assert missing_packages("gpu", root) == ["pytest>=99"]
    monkeypatch.setattr(extras, "KEPT", {"pytest", "no-such-thing"})
    assert missing_packages("gpu", root) == [] and missing_packages("none", root) == ["no-such-thing>=9"]


def test_install_extra_says_in_a_sentence_what_failed(root, pip, capsys):
    pip.status = 1
    assert not install_extra("away", root)
    assert "'away' could not be installed, and what needs it is left out: ERROR: no such" in capsys.readouterr().out


def test_an_unknown_extra_is_refused(root):
    with pytest.raises(ValueError, match=r"must be an extra .*\(here, away\); got 'gpu'"):
        missing_packages("gpu", root)


@pytest.fixture
def apt(monkeypatch):
    """A Debian whose apt-get installs what `apt.offers` names."""
    installed, calls = {"here"}, []

    def run(command, **_):
        calls.append(command)
        if command[0] == "dpkg-query":
            return subprocess.CompletedProcess(command, 0, "installed" if command[-1] in installed else "", "")
        if "install" in command:
            installed.update(set(command) & apt.offers)
        return subprocess.CompletedProcess(command, 0, "", "")

    apt = run
    apt.offers, apt.calls, apt.programs, apt.user = {"away"}, calls, {"apt-get", "dpkg-query"}, 0
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("shutil.which", lambda name: name if name in apt.programs else None)
    monkeypatch.setattr("os.geteuid", lambda: apt.user, raising=False)
    return apt


def test_debian_packages_that_are_there_are_left_alone(apt):
    assert install_packages("here")
    assert {call[0] for call in apt.calls} == {"dpkg-query"}


def test_missing_debian_packages_are_installed_together(apt, capsys):
    assert install_packages("here", "away")
    assert ["apt-get", "install", "-y", "-qq", "away"] in apt.calls
    assert "installing away" in capsys.readouterr().out


def test_a_debian_package_that_nobody_offers_is_one_sentence(apt, capsys):
    assert not install_packages("away", "nowhere")
    assert "apt-get could not install nowhere, and what needs it is left out" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"user": 1000}, {"programs": set()}])
def test_without_the_right_or_apt_nothing_is_tried(apt, capsys, change):
    vars(apt).update(change)
    assert not install_packages("away")
    assert all(call[0] == "dpkg-query" for call in apt.calls)
    assert capsys.readouterr().out == "what needs away is left out; on Debian: sudo apt-get install away\n"


@pytest.mark.parametrize(
    ("installed", "missing"),
    [({"jax"}, ["jax>=99"]), ({"jax", "libtpu"}, []), ({"jax", "jax-cuda12-plugin"}, []), ({"libtpu"}, ["jax>=99"])],
)
def test_a_jax_built_for_an_accelerator_is_never_replaced(tmp_path, monkeypatch, installed, missing):
    text = '[project.optional-dependencies]\ntpu = ["numpy>=1", "jax>=99"]\n'
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(extras, "_is_installed", installed.__contains__)
    assert missing_packages("tpu", tmp_path) == missing
