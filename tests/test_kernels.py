"""Building the C kernels: found again by what made them, in a folder that only its owner may enter."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import types

import pytest

from labutils.lab.layers import compile
from labutils.lab.layers.compile import KernelError, cache_dir, compile_c, torch_compile_lack
from labutils.quantization import kernels
from labutils.quantization.kernels import find_kernels

SEVEN = "int seven(void) { return 7; }"
pytestmark = pytest.mark.skipif(os.name != "posix" or compile.compiler() is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_compile_c_makes_a_library_that_runs_and_finds_it_again(home):
    path = compile_c(SEVEN)
    assert ctypes.CDLL(str(path)).seven() == 7
    made = path.stat().st_mtime_ns
    assert compile_c(SEVEN) == path and path.stat().st_mtime_ns == made
    assert list((home / "kernels").iterdir()) == [path]


def test_compile_c_names_a_library_by_source_flags_and_compiler(monkeypatch, tmp_path):
    first = compile_c(SEVEN)
    assert compile_c(SEVEN + " ") != first
    assert compile_c(SEVEN, flags=("-DEIGHT",)) != first
    other = tmp_path / "other-cc"
    other.write_text(f'#!/bin/sh\nexec {compile.compiler()} -DNEWER_VERSION "$@"\n', encoding="utf-8")
    other.chmod(0o755)
    monkeypatch.setenv("CC", str(other))
    assert compile_c(SEVEN) != first


def test_cache_dir_is_for_its_owner_alone(home):
    old = os.umask(0)
    try:
        folder = cache_dir()
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(KernelError, match="mode 700; got owner .*, mode 770"):
        compile_c(SEVEN)
    folder.rmdir()
    (home / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(home / "elsewhere")
    with pytest.raises(KernelError, match="must be a folder of yours"):
        cache_dir()


def test_cache_dir_refuses_the_folder_of_someone_else(monkeypatch):
    cache_dir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(KernelError, match="must be a folder of yours"):
        cache_dir()


def test_compile_c_reports_what_the_compiler_refuses(home):
    with pytest.raises(KernelError, match="must accept the source; got .*error"):
        compile_c("int seven( {")
    assert list((home / "kernels").iterdir()) == []


def test_two_processes_may_build_at_once(home):
    program = f"from labutils.lab.layers.compile import compile_c; print(compile_c({SEVEN!r}))"
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, encoding="utf-8") for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1 and [str(p) for p in (home / "kernels").iterdir()] == list(paths)


def test_a_library_appears_whole_or_not_at_all(monkeypatch, home):
    def killed(command):
        if "-dM" not in command:
            out = command[command.index("-o") + 1]
            with open(out, "wb") as file:
                file.write(b"half a libr")
            raise KernelError("killed")
        return ""

    monkeypatch.setattr(compile, "_run", killed)
    with pytest.raises(KernelError, match="killed"):
        compile_c(SEVEN)
    assert list((home / "kernels").iterdir()) == []


def test_a_finished_library_is_renamed_not_copied(monkeypatch):
    """A reader never meets half a file: the name moves to the finished one."""
    run, inodes = compile._run, []

    def noting(command):
        output = run(command)
        if "-o" in command:
            inodes.append(os.stat(command[command.index("-o") + 1]).st_ino)
        return output

    monkeypatch.setattr(compile, "_run", noting)
    assert [compile_c(SEVEN).stat().st_ino] == inodes


def test_find_kernels_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert find_kernels.__wrapped__() == (None, "no C compiler: install gcc or clang")


@pytest.mark.parametrize("full_at", ["make the folder", "write in it"])
def test_find_kernels_in_a_folder_that_cannot_be_written_says_what_to_do(monkeypatch, tmp_path, full_at):
    home = tmp_path / "home"
    if full_at == "make the folder":
        home.touch()
    else:
        error = OSError(errno.EROFS, os.strerror(errno.EROFS))
        monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **_: (_ for _ in ()).throw(error))
    monkeypatch.setenv("LABUTILS_HOME", str(home))
    library, reason = find_kernels.__wrapped__()
    advice = f"compiled kernels are kept in {home / 'kernels'}, which must be writable: set LABUTILS_HOME to a folder"
    assert library is None and reason.startswith(advice) and "Errno" not in reason


def test_find_kernels_builds_for_this_machine():
    library, reason = find_kernels.__wrapped__()
    assert reason == ""
    with_vnni = {"AVX2 with VNNI", "AVX-512 with VNNI"}
    assert kernels.instruction_set(library) in {"AVX2", *with_vnni, "NEON with dot products", "plain C"}


def test_find_kernels_does_without_openmp(monkeypatch, tmp_path):
    picky = tmp_path / "cc"
    picky.write_text(
        '#!/bin/sh\ncase "$*" in *openmp*) echo "error: no OpenMP" >&2; exit 1;; esac\n'
        f'exec {compile.compiler()} "$@"\n',
        encoding="utf-8",
    )
    picky.chmod(0o755)
    monkeypatch.setenv("CC", str(picky))
    library, reason = find_kernels.__wrapped__()
    assert library is not None and reason == ""


@pytest.mark.parametrize(
    ("folder", "platform", "words"),
    [
        ("/home/ada/course", "linux", ""),
        ("/home/ada/my course", "linux", "needs a path without a space; got /home/ada/my course/.venv/torch: move"),
        ("/Users/ada/my course", "darwin", "needs a path without a space"),
        ("/home/ada/my course", "win32", ""),
    ],
)
def test_torch_compile_lack_names_a_path_that_the_compiler_would_cut_in_two(monkeypatch, folder, platform, words):
    monkeypatch.setattr(compile, "compiler", lambda: "/usr/bin/cc")
    monkeypatch.setattr(sys, "platform", platform)
    found = types.SimpleNamespace(origin=f"{folder}/.venv/torch/__init__.py")
    monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: found)
    lack = torch_compile_lack()
    assert words in lack and bool(lack) == bool(words)


def test_torch_compile_lack_names_a_missing_compiler(monkeypatch):
    monkeypatch.setattr(compile, "compiler", lambda: None)
    assert torch_compile_lack() == "no C compiler: install g++ or clang"
