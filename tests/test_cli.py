"""The command line: the overview, dispatch, and the two commands that a learner starts with."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from ports import free_port

from labutils import __version__
from labutils.course.cli import environment, lab, main
from labutils.course.cli import test as suite

ROOT = Path(__file__).resolve().parents[1]
PRESENT = [name for name in main.COMMANDS if main.exists(name)]


def arguments(module, *argv):
    parser = ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture
def command(monkeypatch):
    """Puts a command of the test's own in the place of `doctor`; its `calls` record what ran."""
    fake = SimpleNamespace(HELP="a fake", NEEDS_ENVIRONMENT=True, add_arguments=lambda parser: None, calls=[])
    fake.run = lambda args: fake.calls.append(args) or 5
    monkeypatch.setattr(main.importlib, "import_module", lambda name: fake)
    monkeypatch.setattr(main.environment, "enter", lambda root, argv, cuda: fake.calls.append((argv, cuda)))
    return fake


# --- overview and dispatch ---------------------------------------------------------------------------------------


def test_overview_names_every_command_in_ten_lines(capsys):
    assert main.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10 and max(map(len, lines)) <= 110
    named = {name.strip() for line in lines[1:] for name in line[:26].split(",")}
    assert named == set(PRESENT)


def test_overview_and_commands_name_the_same():
    assert sorted(name for names, _ in main.OVERVIEW for name in names) == sorted(main.COMMANDS)


def test_main_prints_its_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"labutils {__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"), [("tset", "did you mean 'test'?"), ("zzz", "lists them all"), ("main", "no command")]
)
def test_main_suggests_the_nearest_command(capsys, name, hint):
    assert main.main([name]) == 2
    assert hint in capsys.readouterr().err


def test_main_enters_the_environment_then_runs_and_returns_the_status(command):
    assert main.main(["doctor"]) == 5
    assert command.calls[0] == (["doctor"], False)
    assert command.calls[1].rest == []


def test_main_needs_no_environment_for_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["doctor", "--help"])
    assert caught.value.code == 0 and command.calls == []
    assert "a fake" in capsys.readouterr().out


def test_main_refuses_unknown_arguments_unless_the_command_passes_them_on(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["doctor", "--nonsense"])
    assert caught.value.code == 2 and command.calls == []
    command.PASSES_ON = True
    main.main(["doctor", "-k", "quantize", "--nonsense"])
    assert command.calls[1].rest == ["-k", "quantize", "--nonsense"]


def raises(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (environment.SetupError("connect, then go on"), 1, "labutils: connect, then go on\n"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_main_ends_in_one_sentence_without_a_traceback(command, capsys, error, status, words):
    command.run = raises(error)
    assert main.main(["doctor"]) == status
    shown = capsys.readouterr().err
    assert words in shown and "Traceback" not in shown


def test_main_repairs_an_environment_that_lost_a_package(command, capsys, monkeypatch):
    command.run = raises(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"))
    condemned = []
    monkeypatch.setattr(main.environment, "condemn", lambda root, package: condemned.append(package) or True)
    assert main.main(["doctor"]) == 1
    assert condemned == ["torch"]
    assert "run the same command again" in capsys.readouterr().err


def test_main_hides_no_error_of_an_optional_package(command, monkeypatch):
    monkeypatch.setattr(main.environment, "condemn", lambda root, package: False)
    command.run = raises(ModuleNotFoundError("No module named 'triton'", name="triton"))
    with pytest.raises(ModuleNotFoundError, match="triton"):
        main.main(["doctor"])


# --- before the environment stands -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESENT)
def test_command_keeps_the_protocol(name):
    module = main.importlib.import_module(f"labutils.course.cli.{name}")
    assert module.HELP and isinstance(module.NEEDS_ENVIRONMENT, bool)
    assert callable(module.add_arguments) and callable(module.run)


def test_every_help_works_with_the_standard_library_alone():
    code = (
        "import sys; from labutils.course.cli.main import COMMANDS, exists, main\n"
        "for name in filter(exists, COMMANDS):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0, name\n"
        "print(sorted(name for name in sys.modules if name in ('numpy', 'torch', 'yaml')))"
    )
    command = [sys.executable, "-S", "-c", code]  # -S: no site-packages
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("[]\n")
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("name", ["labutils/__init__.py", "labutils/__main__.py"])
def test_what_runs_first_can_be_read_by_an_old_python(name):
    ast.parse((ROOT / name).read_text(encoding="ascii"), feature_version=(3, 4))


def test_wrong_python_gets_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    code = compile((ROOT / "labutils/__main__.py").read_text(encoding="utf-8"), "__main__.py", "exec")
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer, and this one is 3\.10: install") as caught:
        exec(code, {"__name__": "__main__"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["python3.8", "python3.9", "python3.10"])
def test_wrong_python_for_real(name):
    python = shutil.which(name)
    command = [python or name, "-m", "labutils", "lab"]
    result = python and subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60)
    if not result or "labutils" not in result.stderr:
        pytest.skip(f"{name} is not here")
    assert result.returncode == 1
    assert result.stderr.startswith("labutils: this course needs Python 3.11") and result.stderr.count("\n") == 1


def test_output_in_a_pipe_has_no_colour_and_asks_nothing(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    monkeypatch.setattr(main.os, "environ", dict(os.environ))
    main.main([])
    assert main.os.environ["NO_COLOR"] == "1"


# --- test --------------------------------------------------------------------------------------------------------


def test_suite_runs_everything_with_doctests_and_coverage():
    command = suite.pytest_command([], fast=False)
    assert command[:3] == [sys.executable, "-m", "pytest"] and "-m" not in command[3:]
    assert {"--doctest-modules", "--cov=labutils", "tests", "labutils"} <= set(command)


def test_suite_leaves_out_what_is_slow_when_asked():
    command = suite.pytest_command([], fast=True)
    assert command[command.index("-m", 2) + 1] == "not slow and not browser"


def test_suite_runs_only_what_is_named():
    command = suite.pytest_command(["tests/test_cli.py::test_x", "-x"], fast=False)
    assert command == [sys.executable, "-m", "pytest", "tests/test_cli.py::test_x", "-x"]
    assert "tests" in suite.pytest_command(["-k", "quantize"], fast=False)


def test_suite_runs_on_one_thread_unless_told_otherwise():
    assert suite.one_thread_each({})["OMP_NUM_THREADS"] == "1"
    assert suite.one_thread_each({"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(("pytest_status", "ruff_status", "expected"), [(0, 0, 0), (0, 1, 1), (3, 0, 3), (3, 1, 3)])
def test_suite_returns_the_status_of_what_failed(monkeypatch, pytest_status, ruff_status, expected):
    monkeypatch.setattr(
        suite, "run_attached", lambda command, **_: pytest_status if "pytest" in command else ruff_status
    )
    monkeypatch.setattr(suite, "BESIDE", ())
    assert suite.run(SimpleNamespace(rest=[], fast=True)) == expected
    assert suite.run(SimpleNamespace(rest=["--durations=9"], fast=True)) == expected
    assert suite.run(SimpleNamespace(rest=["-m", "gpu"], fast=True)) == pytest_status


@pytest.mark.parametrize("failing", [None, "alpha", "beta", "gamma", "rest"])
def test_suite_runs_programs_side_by_side_and_no_test_twice(monkeypatch, capfdbinary, tmp_path, failing):
    """Each program waits until all have begun, so that one after the other would never end well."""
    program = "import pathlib, os, sys, time; folder, name, failing = sys.argv[1:4]; until = time.monotonic() + 60\n"
    program += "pathlib.Path(folder, name).touch(); print('said by', name, os.environ.get('SEEN'), *sys.argv[4:])\n"
    program += "while len(os.listdir(folder)) < 3 and time.monotonic() < until: time.sleep(0.01)\n"
    program += "sys.exit(3 if failing in sys.argv[4:] or len(os.listdir(folder)) < 3 else 0)"

    def command(rest, *, fast):
        name = "rest" if "--ignore=tests/test_alpha.py" in rest else rest[0]
        guilty = "--no-cov" if failing == name else f"tests/test_{failing}.py"
        return [sys.executable, "-c", program, str(tmp_path), Path(name).stem, guilty, *rest]

    monkeypatch.setattr(suite, "pytest_command", command)
    monkeypatch.setattr(suite, "BESIDE", (({"SEEN": "0"}, ["alpha", "beta"]), ({}, ["gamma"])))
    assert suite.run_whole(["--no-cov"], dict(os.environ), fast=False) == (3 if failing else 0)
    said = capfdbinary.readouterr().out.decode().splitlines()
    ignored = " ".join(f"--ignore=tests/test_{name}.py" for name in ("alpha", "beta", "gamma"))
    assert said == [
        f"said by rest None {ignored} --no-cov -o cache_dir=.pytest_cache/2",
        "said by test_alpha 0 tests/test_alpha.py tests/test_beta.py --no-cov -o cache_dir=.pytest_cache/0",
        "said by test_gamma None tests/test_gamma.py --no-cov -o cache_dir=.pytest_cache/1",
    ]


@pytest.mark.parametrize("wrong", ["assert seen.exists()", "assert False"], ids=["beside", "alone"])
def test_suite_runs_again_alone_what_has_failed(monkeypatch, capfdbinary, tmp_path, wrong):
    (tmp_path / "tests").mkdir()
    test = "def test_it():\n    try:\n        {}\n    finally:\n        seen.touch()\n\n\ndef test_right():\n    pass\n"
    seen = "import pathlib\n\nseen = pathlib.Path('SEEN')\n\n\n" + test
    (tmp_path / "tests" / "test_alpha.py").write_text(seen.format(wrong))
    (tmp_path / "tests" / "test_other.py").write_text("def test_right():\n    pass\n")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "BESIDE", (({}, ["alpha"]),))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cov", "--rootdir=.", "-c", "/dev/null"]
    monkeypatch.setattr(
        suite, "pytest_command", lambda rest, *, fast: [*command, *(rest if rest[0][:2] != "--" else ["tests", *rest])]
    )
    monkeypatch.setattr(suite, "ALONE", ("--last-failed",))
    assert suite.run_whole([], dict(os.environ), fast=False) == (1 if "False" in wrong else 0)
    said = capfdbinary.readouterr().out.decode()
    assert said.count("run again alone") == 1 and "1 failed, 1 passed" in said
    assert ("1 failed, 1 deselected" if "False" in wrong else "1 passed, 1 deselected") in said


def test_a_killed_program_is_a_failed_one(monkeypatch):
    monkeypatch.setattr(suite, "run_attached", lambda command, **_: -9)
    monkeypatch.setattr(suite, "BESIDE", ())
    assert suite.run_whole([], dict(os.environ), fast=False) == -9


def test_what_runs_beside_the_rest_is_there():
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for _, names in suite.BESIDE for name in names)


# --- lab ---------------------------------------------------------------------------------------------------------


def test_jupyter_command_opens_chapter_00_of_this_folder_and_stays_on_this_machine(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / lab.FIRST).touch()
    command = lab.jupyter_command(arguments(lab), tmp_path)
    assert f"--ServerApp.root_dir={tmp_path}" in command
    assert "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb" in command
    assert "--ServerApp.ip=127.0.0.1" in command
    assert "--no-browser" not in command


def test_jupyter_command_serves_a_remote_machine(tmp_path):
    command = lab.jupyter_command(arguments(lab, "--no-browser", "--port", "9000"), tmp_path)
    assert "--no-browser" in command and "--ServerApp.port=9000" in command
    assert "--LabApp.default_url=/lab" in command  # no chapter 00 in that folder


@pytest.mark.parametrize(("user", "expected"), [(0, True), (1000, False)])
def test_jupyter_command_allows_root_only_to_root(tmp_path, monkeypatch, user, expected):
    monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
    assert ("--allow-root" in lab.jupyter_command(arguments(lab), tmp_path)) is expected


@pytest.fixture
def served():
    """`python -m labutils lab` on a port of its own; yields the port and the process, and ends it."""
    port = free_port()
    environ = {**os.environ, environment.NO_VENV: "1", "JUPYTER_TOKEN": "a-test"}
    command = [sys.executable, "-m", "labutils", "lab", "--no-browser", "--port", str(port)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, **pipes)
    yield port, process
    process.kill()
    process.wait()


def interrupt_until_ended(process):
    """Ctrl-C again and again: two that are sent at once may arrive as one, which only asks for confirmation."""
    for _ in range(120):
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("the server goes on after two minutes of interrupts")


def fetch(port, path, process):
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.read().decode("utf-8")
        except OSError:
            assert time.monotonic() < deadline, "the server never answered"
            time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="ends the server with a POSIX signal")
def test_lab_serves_this_folder_and_asks_nothing_of_the_network(served):
    port, process = served
    page = fetch(port, "/lab?token=a-test", process)
    settings = json.loads(
        page.partition('<script id="jupyter-config-data" type="application/json">')[2].partition("</script>")[0]
    )
    assert lab.ANNOUNCEMENTS in settings["disabledExtensions"]
    assert settings["news"] == {"disabled": True}
    assert settings["extensionManager"]["can_install"] is False
    names = {item["name"] for item in json.loads(fetch(port, "/api/contents?token=a-test", process))["content"]}
    assert {"notebooks", "labutils", "pyproject.toml"} <= names
    interrupt_until_ended(process)
