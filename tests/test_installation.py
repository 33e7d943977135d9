"""What the set-up installs, how it fails, and how far it says it is; pip itself is replaced."""

import os
import shutil
import sys

import pytest

from labutils.course.cli import installation, progress
from labutils.course.cli.installation import Plan, SetupError
from labutils.course.cli.progress import Outcome, Stage


@pytest.fixture
def root(tmp_path):
    (tmp_path / "constraints.txt").write_text("# tested\nfoo==1.0\ntorch==2.13.0\n", encoding="utf-8")
    return tmp_path


class Runs(list):
    """The commands that an installation would run; `ends` says how the next of them end (well, when empty)."""

    def __init__(self):
        super().__init__()
        self.ends = []

    def follow(self, command, *, stage, **_):
        self.append(f"{stage}: {' '.join(map(str, command[1:]))}")
        return self.ends.pop(0) if self.ends else Outcome(0, "")


@pytest.fixture
def runs(monkeypatch):
    recorded = Runs()
    monkeypatch.setattr(installation, "follow", recorded.follow)
    monkeypatch.setattr(installation, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in installation.STEERING:
        monkeypatch.delenv(name, raising=False)
    return recorded


def plan_for(root, **changes):
    values = {"extras": "lab", "cuda": False, "fresh": True, **changes}
    return Plan(root, root / ".venv" / "bin" / "python", **values)


EVERYTHING = "-m pip install --no-compile -e .[lab] -c constraints.txt"


def test_install_takes_the_cpu_build_on_linux_without_a_gpu(root, runs):
    installation.install(plan_for(root))
    assert runs == [
        f"[1/3] making .venv: -m venv {root / '.venv'}",
        "[2/3] installing torch: -m pip install --no-compile --no-deps "
        f"--index-url {installation.CPU_INDEX} --retries 1 --timeout 15 torch==2.13.0",
        f"[3/3] installing the other packages: {EVERYTHING}",
    ]


def test_install_goes_on_with_the_default_index_and_names_the_download(root, runs, capsys):
    runs.ends = [Outcome(0, ""), Outcome(1, "Failed to establish a new connection")]
    installation.install(plan_for(root))
    assert runs[-1].endswith(EVERYTHING)
    assert "several GB" in capsys.readouterr().err


def test_install_stops_when_the_larger_download_has_no_room(root, runs, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 1e9, 8e9))
    runs.ends = [Outcome(0, ""), Outcome(1, "")]
    with pytest.raises(SetupError, match="about 12 GB of free disk"):
        installation.install(plan_for(root))


def test_install_replaces_the_cpu_build_when_cuda_is_asked_for(root, runs):
    plan = plan_for(root, cuda=True, fresh=False)
    (plan.folder / "lib/python3.11/site-packages/torch-2.13.0+cpu.dist-info").mkdir(parents=True)
    installation.install(plan)
    assert runs == [
        "[1/2] installing torch: -m pip install --no-compile --force-reinstall --no-deps torch==2.13.0",
        f"[2/2] installing the other packages: {EVERYTHING}",
    ]


@pytest.mark.parametrize(
    ("platform", "cuda", "gpu", "environ", "expected"),
    [
        ("linux", False, False, {}, True),
        ("linux", True, False, {}, False),
        ("linux", False, True, {}, False),
        ("linux", False, False, {"PIP_FIND_LINKS": "/wheels"}, False),
        ("linux", False, False, {"PIP_INDEX_URL": "https://mirror"}, False),
        ("linux", False, False, {"PIP_EXTRA_INDEX_URL": "https://mirror"}, False),
        ("linux", False, False, {"PIP_FIND_LINKS": ""}, True),
        ("darwin", False, False, {}, False),
        ("win32", False, False, {}, False),
    ],
)
def test_wants_cpu_torch(monkeypatch, platform, cuda, gpu, environ, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(installation, "has_nvidia_gpu", lambda: gpu)
    assert installation.wants_cpu_torch(cuda, environ) is expected


def test_install_names_the_missing_disk_before_any_download(root, runs, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 8e9, 1e9))
    with pytest.raises(SetupError, match=r"needs about 4 GB of free disk and .* has 1\.0 GB: free some space"):
        installation.install(plan_for(root))
    assert runs == []


def test_install_names_the_debian_package_where_venv_is_missing(root, runs, monkeypatch):
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    with pytest.raises(SetupError, match=r"sudo apt install python3\.\d+-venv"):
        installation.install(plan_for(root))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "PIP_CERT"),
        (
            "NameResolutionError: Failed to resolve 'pypi.org' ([Errno -3] Temporary failure in name resolution)",
            "network",
        ),
        ("Failed to establish a new connection\nERROR: No matching distribution found for torch", "network"),
        ("WARNING: Retrying ... ConnectTimeoutError", "network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: 'x'", "permissions"),
        ("ERROR: No matching distribution found for torch==2.13.0", "Intel Macs"),
        ("ERROR: ResolutionImpossible: for help visit", "contradict"),
        ("ERROR: something that nobody foresaw", "shown above"),
    ],
)
def test_install_explains_a_failure_in_one_sentence(root, runs, capsys, output, words):
    runs.ends = [Outcome(0, ""), Outcome(0, ""), Outcome(1, output)]
    with pytest.raises(SetupError, match=words) as caught:
        installation.install(plan_for(root))
    assert "run the same command again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert output.splitlines()[-1] in capsys.readouterr().err


def test_pip_environment_asks_and_colours_nothing():
    environ = installation.pip_environment({"PIP_USER": "1", "PIP_INDEX_URL": "https://mirror"})
    assert environ["PIP_NO_INPUT"] == environ["NO_COLOR"] == environ["PYTHONUTF8"] == "1"
    assert environ["PIP_INDEX_URL"] == "https://mirror"
    assert "PIP_USER" not in environ


# --- progress ----------------------------------------------------------------------------------------------------

STAGE = Stage(2, 3, "installing")


def follow(tmp_path, code, **options):
    command = [sys.executable, "-u", "-c", code]
    return progress.follow(command, stage=STAGE, log=tmp_path / "log", environ=os.environ, cwd=tmp_path, **options)


def test_follow_logs_everything_and_returns_the_end(tmp_path, capsys):
    code = "import sys; print('Collecting größe'); print('gone wrong', file=sys.stderr); sys.exit(3)"
    outcome = follow(tmp_path, f"import os; os.environ['PYTHONUTF8'] = '1'; {code}")
    assert outcome.status == 3
    assert "gone wrong" in outcome.tail
    assert "gone wrong" in (tmp_path / "log").read_text(encoding="utf-8")
    shown = capsys.readouterr().err
    assert "[2/3] installing" in shown and "failed after" in shown
    assert "\r" not in shown and "\x1b" not in shown


def test_follow_shows_sparse_lines_in_a_pipe(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SPARSE_S", 0.2)
    code = "import time; print('Collecting numpy'); time.sleep(0.8); print('Collecting torch'); time.sleep(0.8)"
    follow(tmp_path, code, detail=lambda activity: f"<{activity}>")
    shown = capsys.readouterr().err
    assert "s: <numpy>" in shown and "s: <torch>" in shown
    assert len(shown.splitlines()) <= 10


def test_display_renews_one_line_on_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    display = progress.Display(STAGE, sys.stderr)
    display.update("numpy")
    display.update("torch")
    display.close(0)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert [part.split(":")[-1].strip() for part in shown.split("\r")[1:]] == ["numpy", "torch", "done in 0 s"]


def test_follow_leaves_no_process_behind_when_interrupted(tmp_path, monkeypatch):
    started = []

    def interrupted(process):
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "lines_or_ticks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path, "import time; time.sleep(60)")
    assert started[0].poll() is not None
