"""The doctor's report: what is there, what is missing, what that costs."""

import os
import shutil
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest

from labutils.course.cli import doctor
from labutils.lab.layers import compile

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A machine that lacks nothing; each test takes one thing away."""
    monkeypatch.setattr(doctor, "free_memory_bytes", lambda: 8e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e11, 0, 5e10))
    monkeypatch.setattr(doctor, "compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(doctor, "kernels", lambda: ("AVX2", ""))
    monkeypatch.setattr(doctor, "gpu", lambda: "A GPU")
    monkeypatch.setattr(compile, "torch_compile_lack", lambda: "")
    (tmp_path / "data" / "lablm").mkdir(parents=True)
    (tmp_path / "data" / "lablm" / "config.json").touch()
    return tmp_path


def test_lacks_is_silent_on_a_healthy_machine(healthy):
    assert list(doctor.lacks(healthy)) == []


@pytest.mark.parametrize(
    ("place", "name", "value", "words"),
    [
        (doctor, "free_memory_bytes", lambda: 1e9, "memory, 1.0 GB free: a notebook whose"),
        (shutil, "disk_usage", lambda _: Usage(1e11, 0, 1e9), "disk, 1.0 GB free: exported"),
        (doctor, "compiler", lambda: None, "no C++ compiler: torch.compile"),
        (compile, "torch_compile_lack", lambda: "a space", "a space: what it would compile is left out"),
        (doctor, "kernels", lambda: ("", "no tools"), "no int8 and int4 kernels (no tools): quantized layers run"),
        (doctor, "gpu", lambda: None, "no NVIDIA GPU: GPU cells run on the CPU"),
    ],
)
def test_lacks_names_each_absence_and_its_cost(healthy, monkeypatch, place, name, value, words):
    monkeypatch.setattr(place, name, value)
    (lack,) = doctor.lacks(healthy)
    assert str(lack).startswith(words)


def test_lacks_names_the_missing_model(healthy):
    (healthy / "data" / "lablm" / "config.json").unlink()
    assert [lack.what for lack in doctor.lacks(healthy)] == ["no model in data/lablm"]


def test_lacks_does_not_guess_where_the_system_is_silent(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "free_memory_bytes", lambda: None)
    assert list(doctor.lacks(healthy)) == []


def test_free_memory_bytes_is_plausible():
    free_bytes = doctor.free_memory_bytes()
    assert free_bytes is None or 2**20 < free_bytes < 2**46


def test_free_memory_bytes_reads_linux_by_hand(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    text = "MemTotal:       24000000 kB\nMemFree:         1000 kB\nMemAvailable:    2000 kB\n"
    monkeypatch.setattr(doctor.Path, "read_text", lambda self, encoding: text)
    assert doctor.free_memory_bytes() == 2000 * 1024


def test_free_memory_bytes_reads_macos_by_hand(monkeypatch):
    output = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10.\nPages active: 999.\nPages inactive: 5.\n"
        "Pages speculative: 1.\n"
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=output))
    assert doctor.free_memory_bytes() == 16 * 16384
    assert doctor.free_memory_bytes_from_vm_stat("something else") is None


def fake_program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="the fake programs are shell scripts")
@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 'NVIDIA T4'; echo second", "NVIDIA T4"), ("echo broken driver; exit 9", None), ("", None)],
)
def test_gpu_asks_the_driver(tmp_path, monkeypatch, script, expected):
    fake_program(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert doctor.gpu() == expected


@pytest.mark.skipif(os.name == "nt", reason="the fake programs are shell scripts")
def test_compiler_prefers_the_one_that_the_user_names(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.compiler() is None
    fake_program(tmp_path, "g++", "")
    assert doctor.compiler() == str(tmp_path / "g++")
    fake_program(tmp_path, "mine", "")
    monkeypatch.setenv("CXX", "mine")
    assert doctor.compiler() == str(tmp_path / "mine")


def test_kernels_are_named_or_missed_with_a_reason(monkeypatch):
    from labutils.quantization import kernels

    monkeypatch.setattr(kernels, "find_kernels", lambda: (None, "no C compiler"))
    assert doctor.kernels() == ("", "no C compiler")
    monkeypatch.setattr(kernels, "find_kernels", lambda: (object(), ""))
    monkeypatch.setattr(kernels, "instruction_set", lambda library: "AVX2")
    assert doctor.kernels() == ("AVX2", "")


@pytest.mark.parametrize(("name", "expected"), [(None, "CPU"), ("A GPU", "CPU (torch cannot use the GPU: ")])
def test_resources_names_the_device_that_torch_uses(monkeypatch, name, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "gpu", lambda: name)
    device = dict(doctor.resources(doctor.ROOT))["device"]
    assert device == expected if name is None else device.startswith(expected)


def test_run_reports_versions_measurements_and_costs(monkeypatch, capsys):
    from labutils.measurement import roofline

    asked = []
    rates = {"bytes:sum": (12.3e9, 8.1e9, 8.1e9)}
    measured = roofline.Roofline(12.3e9, 45.6e9, 2, "cpu", "float32", 2**28, rates)
    monkeypatch.setattr(roofline, "measure_roofline", lambda seconds: asked.append(seconds) or measured)
    monkeypatch.setattr(doctor, "lacks", lambda: [doctor.Lack("no tea", "you stay thirsty")])
    assert doctor.run(SimpleNamespace(seconds=0.5)) == 0
    shown = capsys.readouterr().out
    for words in (
        "12.3 GB/s at best, median 8.1 (cpu, 2 threads)",
        "differ by more than a fifth",
        "46 GFLOP/s",
        "no tea: you stay thirsty",
        "jupyterlab",
        "threads",
    ):
        assert words in shown
    assert asked == [0.5]
