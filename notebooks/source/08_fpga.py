# %% [markdown]
# # 08 · FPGA: quantization as silicon area
#
# **Goal:** build the heart of an inference chip, a systolic array, in a hardware language; run a real layer of LabLM on it, bit
# for bit; then ask real synthesis what a bit costs in area, and what the area buys in speed.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 (decoding) and 02; chapter 03's C kernels are met once; binary numbers |
# | Time | 4 hours for you; all cells run in two to four minutes (measured: 111 and 212 s, the core shared); the first run ever, one to two more |
# | Memory, download | 0.9 GB at the peak (measured); 60 MB of tools, 240 MB of disk |
# | Hardware | any computer; no FPGA: all is simulated or estimated |
# | Exercises | 12, each checked in the cell below it; those marked *core* fit into one session of two hours |

# %%
from labutils.course.extras import install_extra

install_extra("fpga")

# %% [markdown]
# Three open tools do the work: **Amaranth** (hardware as Python objects, and a simulator), **Yosys** (synthesis) and
# **nextpnr** (place and route), the last two as WebAssembly from PyPI. The first start translates them for this machine and
# keeps the result; a second notebook waits for the first. Without them the next cell says in one sentence what to install.

# %%
import json
import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch

from labutils.course.predictions import calibration, predict
from labutils.fpga.tools import warm_up
from labutils.lab.paths import DATA
from labutils.lab.plots import fpga as plots
from labutils.lab.plots.style import series_style

warnings.filterwarnings("ignore", message=".*created but never used")  # Amaranth's, of hardware that a check refused
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # PyTorch's, that it will go one day
warm_up()
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1 · Wires and registers
#
# An FPGA is a field of small tables and registers that a file wires up. A hardware language does not list steps; it lists
# things that all exist *at once*:
#
# - `m.d.comb += y.eq(3 * x)`: a wire. y follows x in the same cycle.
# - `m.d.sync += y.eq(3 * x)`: a register. y takes the value at the clock's edge and shows it one cycle later.
#
# A `Signal(signed(8))` is eight wires read as a number from −128 to 127. **Predict:** x is 1, 2, −3, 0 in four cycles. What
# do the wire and the register show?

# %%
from amaranth.hdl import Module, Signal, signed

from labutils.fpga.simulate import simulate

x, wire, register = (Signal(signed(8), name=name) for name in ("x", "wire", "register"))
m = Module()
m.d.comb += wire.eq(3 * x)
m.d.sync += register.eq(3 * x)
for cycle, (now, later) in enumerate(simulate(m, [(x, [1, 2, -3, 0])], [wire, register])):
    print(f"cycle {cycle}: wire {now:>3}, register {later:>3}")

# %% [markdown]
# A matrix product needs one thing many times: a **processing element** that keeps a weight, multiplies what comes by, adds
# it to the sum from above, and hands both on, one cycle later:
#
# $$\text{sum\_out} \leftarrow \text{sum\_in} + w \cdot x\_{\text{in}}, \qquad x\_{\text{out}} \leftarrow x\_{\text{in}}$$
#
# (Kung 1982, "Why systolic architectures?"; Google's first TPU is 256 × 256 of them: Jouppi et al. 2017, arXiv:1704.04760.)
# The weight stays while all inputs pass: *weight-stationary*. To bring it in, weights move down a column while `load` is 1.
#
# **Tiny numbers:** w = 7, x = 2, sum_in = 10: one cycle later sum_out = 24.

# %% [markdown]
# ## Exercise 8.1: processing_element (core)
#
# Write `processing_element(p)`: `p` has the signals `load`, `w_in`, `x_in`, `sum_in`, `w_out`, `x_out`, `sum_out`. `w_out` *is*
# the kept weight: it takes `w_in` at the edge while `load` is 1. `x_out` and `sum_out` are registers. Return the Module. The
# check compares arrays whose rows are cycles and whose columns are w_out, x_out, sum_out. 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Every output is a register: <code>m.d.sync</code>. <code>with m.If(p.load):</code> makes an assignment conditional.</details>
# <details><summary>Hint 2</summary><code>m.d.sync += p.sum_out.eq(p.sum_in + p.w_out * p.x_in)</code></details>


# %%
# EXERCISE processing_element
def processing_element(p):
    """A weight-stationary element."""
    m = Module()
    ### BEGIN SOLUTION
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    m.d.sync += p.sum_out.eq(p.sum_in + p.w_out * p.x_in)
    ### END SOLUTION
    return m


# %%
# CHECK processing_element
from labutils.course.checks import ch08, ch08_area

ch08.processing_element(processing_element)

# %% [markdown]
# ## 2 · The array
#
# N × N elements. Element (k, j) keeps W[k, j]. Input k enters row k at the left and moves right; sums enter at the top and
# move down; below column j stands
#
# $$y\_{mj} = \sum_k x\_{mk} W\_{kj}$$
#
# No *data* wire is longer than one element, whatever N is: that is what lets such a thing be clocked fast. (The one control wire,
# `load`, does reach every element here.)

# %% [markdown]
# ## Exercise 8.2: systolic_array (core)
#
# Write `systolic_array(a, add_element)`. `a` has `load` and, as lists of N signals, `w_in[j]` and `sum_in[j]` (top of column j),
# `x_in[k]` (left of row k) and `sum_out[j]` (bottom of column j). `add_element(m, k, j)` puts element (k, j) into m and returns
# its ports, those of 8.1: make all of them first. Wire them with `m.d.comb`; return m. 9 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary><code>pe = [[add_element(m, k, j) for j in range(n)] for k in range(n)]</code>. For each element ask for x_in, w_in and sum_in: who stands to the left, who above? At the border the array's own signal takes that place.</details>
# <details><summary>Hint 2</summary><code>m.d.comb += pe[k][j].x_in.eq(pe[k][j - 1].x_out if j else a.x_in[k])</code>, and the same downwards.</details>


# %%
# EXERCISE systolic_array
def systolic_array(a, add_element):
    """Wires N × N elements."""
    m = Module()
    ### BEGIN SOLUTION
    n = len(a.x_in)
    pe = [[add_element(m, k, j) for j in range(n)] for k in range(n)]
    for k in range(n):
        for j in range(n):
            m.d.comb += pe[k][j].load.eq(a.load)
            m.d.comb += pe[k][j].x_in.eq(pe[k][j - 1].x_out if j else a.x_in[k])
            m.d.comb += pe[k][j].w_in.eq(pe[k - 1][j].w_out if k else a.w_in[j])
            m.d.comb += pe[k][j].sum_in.eq(pe[k - 1][j].sum_out if k else a.sum_in[j])
    for j in range(n):
        m.d.comb += a.sum_out[j].eq(pe[n - 1][j].sum_out)
    ### END SOLUTION
    return m


# %%
# CHECK systolic_array
ch08.systolic_array(systolic_array)

# %% [markdown]
# A sum needs one cycle from row to row. So input k must come k cycles after input 0, or the sums would meet inputs of another
# row of x. This delay is the **skew**.
#
# **Tiny numbers:** x = [[1, 2], [3, 4]] enters as [1, 0], [3, 2], [0, 4]: the second column one cycle late.
#
# ## Exercise 8.3: skew
#
# Write `skew(x)`: x (rows, n), whole numbers; return (rows + n − 1, n), row t what enters in cycle t: column k delayed by k,
# zeros elsewhere. 4 lines, 6 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Begin with zeros of the final shape, then place one column after the other.</details>
# <details><summary>Hint 2</summary><code>fed[k : k + rows, k] = x[:, k]</code></details>


# %%
# EXERCISE skew
def skew(x):
    """Column k delayed by k cycles."""
    ### BEGIN SOLUTION
    rows, n = x.shape
    fed = np.zeros((rows + n - 1, n), dtype=np.int64)
    for k in range(n):
        fed[k : k + rows, k] = x[:, k]
    return fed
    ### END SOLUTION


# %%
# CHECK skew
ch08.skew(skew)

# %% [markdown]
# Now watch it. A 3 × 3 array, four rows of x, every register of every element, cycle by cycle.

# %%
from labutils.fpga.hardware import ArraySpec
from labutils.fpga.simulate import build_array, march

x, w = rng.integers(-9, 10, (4, 3)), rng.integers(-9, 10, (3, 3))
frames = march(build_array(ArraySpec(3)), x, w)
figure, panels = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
for panel, cycle in zip(panels, (2, 4, 6, 9), strict=True):
    plots.draw_cycle(panel, frames, cycle)
plt.show()

# %% [markdown]
# *Four cycles of a 3 × 3 array. w: the kept weight; x0 to x3: which row of x stands at the element's left, one colour each; Σ: the sum
# below it. A row of x is a diagonal that moves to the lower right.*
#
# Move the slider through all cycles (or read them as text with `print_march(frames)`). Do all nine elements ever work at once?
# How many rows would it take?
#
# <details><summary>Answer</summary>Never with these four rows: at most eight do. An N × N array needs 2N − 1 rows, here five, before the
# first row has reached the last element while the last row still occupies the first.</details>

# %%
from labutils.lab.widgets.fpga import march_widget, print_march

print_march(frames, range(6, 7))
march_widget(frames)

# %% [markdown]
# Seeing is not proving. The array must equal numpy's integer product for every shape and at the extremes. Codes of b bits
# reach from −2^(b−1), whose square is the largest product.

# %%
from labutils.fpga.hardware import accumulator_bits
from labutils.fpga.simulate import run_array

for n, x_bits, w_bits in [(1, 8, 8), (3, 8, 8), (4, 8, 4), (4, 4, 4), (5, 3, 3)]:
    array = build_array(ArraySpec(n, x_bits, w_bits, accumulator_bits(x_bits, w_bits, n)))
    low_x, low_w = -(2 ** (x_bits - 1)), -(2 ** (w_bits - 1))
    pairs = [(rng.integers(low_x, -low_x, (rows, n)), rng.integers(low_w, -low_w, (n, n))) for rows in (1, 2, 7)]
    pairs.append((np.full((2, n), low_x), np.full((n, n), low_w)))
    equal = all((run_array(array, x, w) == x @ w).all() for x, w in pairs)
    print(f"{array.spec!s:<26} equal to numpy on {len(pairs)} inputs, extremes included: {equal}")
signs = build_array(ArraySpec(4, 1, 1, 7, lanes=8))
x, w = rng.choice([-1, 1], (5, 32)), rng.choice([-1, 1], (32, 4))
print(f"{signs.spec!s:<26} equal to numpy: {(run_array(signs, x, w) == x @ w).all()} (32 signs a row, XNOR and count)")

# %% [markdown]
# How long does it take? N cycles to load; the last row of x enters `rows` cycles later; then it still has N − 1 elements to go
# down and N − 1 to the right:
#
# $$\text{cycles} = N + \text{rows} + 2N - 2$$
#
# A layer larger than the array is cut into N × N tiles. **Tiny numbers:** 4 rows on 3 × 3: 3 + 4 + 4 = 11.
#
# ## Exercise 8.4: layer_cycles (core)
#
# Write `layer_cycles(rows, features, outputs, n)`: cycles of a layer with `features` inputs and `outputs` outputs, tile after
# tile; n divides both. 1 line, 4 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>How many tiles? Each is loaded, fed and drained.</details>
# <details><summary>Hint 2</summary><code>(features // n) * (outputs // n)</code> tiles.</details>


# %%
# EXERCISE layer_cycles
def layer_cycles(rows, features, outputs, n):
    """Cycles of a tiled layer."""
    ### BEGIN SOLUTION
    return (features // n) * (outputs // n) * (n + rows + 2 * n - 2)
    ### END SOLUTION


# %%
# CHECK layer_cycles
ch08.layer_cycles(layer_cycles)

# %% [markdown]
# **Predict:** an element could multiply in every cycle. In which share of the cycles does it, when LabLM decodes one token (rows
# = 1)? When it reads a prompt of 1024?

# %%
my_share = predict("cycles in which an element of an 8 x 8 array multiplies, one row", None, unit="%")

# %%
from labutils.fpga.simulate import total_cycles

appeared = np.diff(frames.sums[:, -1, -1]).nonzero()[0][-1] + 1
print(f"section 2's last sum appeared in cycle {appeared}; the formula: {total_cycles(3, frames.rows)}")
for n in (8, 256):
    shares = {rows: rows / total_cycles(n, rows) for rows in (1, 16, 128, 1024)}
    print(f"N = {n:>3}, rows " + ", ".join(f"{rows}: {share:.1%}" for rows, share in shares.items()))
my_share.compare(100 / total_cycles(8, 1))

# %% [markdown]
# **Explain.** A single row makes poor use of the array, which loads N² weights and uses each only once. This is chapter 01's decode again,
# with registers in the place of memory: a systolic array suits prefill and batches. (Real arrays load the next weights behind
# the current ones, which hides the load, not the reading of the weights.)

# %% [markdown]
# ## 3 · How wide is a sum, and how good is a test?
#
# A CPU adds in 32 bits because that is what it has. On an FPGA each bit is a table and a register, in every element. Two's
# complement of n bits reaches from $-2^{n-1}$ to $2^{n-1}-1$. The largest product of two b-bit codes is
# $(-2^{b-1})^2 = 2^{2b-2}$.
#
# **Tiny numbers:** one product of 2-bit codes: (−2)² = 4 needs 4 bits (−8 … 7); 3 bits end at 3.
#
# ## Exercise 8.5: accumulator_bits (core)
#
# Write `accumulator_bits(bits, terms)`: the smallest n that holds every sum of `terms` products of two `bits`-bit codes. LabLM's
# longest sum has 768 terms. 2 lines, 6 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Write the largest sum; then the smallest n with sum ≤ 2^(n−1) − 1.</details>
# <details><summary>Hint 2</summary><code>int.bit_length()</code> counts the binary digits of a positive number. And the sign?</details>


# %%
# EXERCISE accumulator_bits
def accumulator_bits(bits, terms):
    """The narrowest safe sum."""
    ### BEGIN SOLUTION
    largest = terms * 2 ** (2 * bits - 2)
    return largest.bit_length() + 1
    ### END SOLUTION


# %%
# CHECK accumulator_bits
ch08.accumulator_bits(accumulator_bits)

# %% [markdown]
# Four 3 × 3 arrays with one mistake each come with the course: *sign* (weights read as positive numbers), *width* (sums of 16
# bits), *gate* (an element saves power by not passing zeros on), *skew* (inputs run ahead). Random small numbers, how many
# of them do they find?

# %%
from labutils.fpga.hardware import accumulator_bits
from labutils.fpga.planted import planted_arrays

broken = planted_arrays()
for name, (low, high) in {"1 to 9": (1, 10), "-9 to 9": (-9, 10), "-128 to 127": (-128, 128)}.items():
    x, w = rng.integers(low, high, (4, 3)), rng.integers(low, high, (3, 3))
    found = [bug for bug, array in broken.items() if not (run_array(array, x, w) == x @ w).all()]
    print(f"random codes {name:<12} find {found}")

# %% [markdown]
# ## Exercise 8.6: telling_inputs (core)
#
# Write `telling_inputs()`: return x (1 to 16 rows, 3 columns) and w (3 × 3), int8 codes, on which *every* broken array differs
# from `x @ w`. One pair for all four. 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>One condition a mistake: a negative weight; a sum past 32767; a zero in x after another number; columns that count.</details>
# <details><summary>Hint 2</summary>−128 times −128 is 16384: how many of them in one sum?</details>


# %%
# EXERCISE telling_inputs
def telling_inputs():
    """Inputs that catch all four."""
    ### BEGIN SOLUTION
    x = np.array([[-128, -128, -128], [0, 0, 0], [1, 2, 3]])
    w = np.full((3, 3), -128)
    return x, w
    ### END SOLUTION


# %%
# CHECK telling_inputs
ch08_area.telling_inputs(telling_inputs)

# %% [markdown]
# ## 4 · A layer of LabLM on the array
#
# Chapter 02 put `k_proj` of layer 5 into integers from end to end: int8 codes of weights and inputs, a bias in int32 (it holds
# the zero point's share too), sums in int32, and one multiplier and shift for each output. The same layer, the same 17
# tokens; but now the multiplying and adding is done by an 8 × 8 array in simulation, 512 tiles. The bias enters at its top.

# %%
from labutils.lab.models.load import load_model
from labutils.quantization.affine import Scheme, choose_qparams, dequantize, quantize
from labutils.quantization.integer import IntegerLinear
from labutils.quantization.theory import sqnr_db

model, tokenizer = load_model("lablm")
layer, inputs = model.model.layers[5].self_attn.k_proj, []
hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
with torch.inference_mode():
    model(**tokenizer("def read_lines(path):\n    with open(path) as file:\n        return ", return_tensors="pt"))
hook.remove()
x, weight = inputs[0], layer.weight.detach()
asymmetric = Scheme(symmetric=False, granularity="tensor")
x_q, y_q = choose_qparams(x, asymmetric), choose_qparams(x @ weight.T, asymmetric)
integer_layer = IntegerLinear.prepare(weight, torch.zeros(len(weight)), x=x_q, y=y_q)
x_codes = quantize(x, x_q)

# %%
import time

from labutils.fpga.simulate import layer_product

start = time.perf_counter()
w_codes, bias = integer_layer.weight.T.numpy().astype(np.int64), integer_layer.bias.numpy()
sums, cycles = layer_product(build_array(ArraySpec(8)), x_codes.numpy().astype(np.int64), w_codes, bias)
seconds = time.perf_counter() - start
reference = x_codes.int() @ integer_layer.weight.int().T + integer_layer.bias
print(f"{x_codes.shape[0]} x {w_codes.shape[0]} times {w_codes.shape[0]} x {w_codes.shape[1]}: {cycles} cycles")
print(f"as the formula says: {cycles == 512 * total_cycles(8, len(x_codes))}")
print(f"every sum equal to torch's integer product: {(torch.from_numpy(sums) == reference).all().item()}")
print(f"simulated in {seconds:.0f} s; a chip would take {cycles / 100e6 * 1e3:.2f} ms, if it ran at 100 MHz")

# %% [markdown]
# The sums are int32; the next layer wants int8. Chapter 02's requantization needs no float, so it can stand below the array:
#
# $$q_y = \operatorname{clamp}\left(Z_y + \left\lfloor \frac{\text{sum} \cdot m + 2^{n-1}}{2^n} \right\rfloor,\; -128,\; 127\right)$$
#
# (Jacob et al. 2017, arXiv:1712.05877, equation 6.) In Amaranth, `a * b` is as wide as the product needs, `>>` on a signed value rounds
# down, and `Mux(condition, yes, no)` chooses. Assigning to a narrower signal silently drops the upper bits.
#
# **Tiny numbers:** sum = 3, M = 0.75 = m/2ⁿ, Z = 5: ⌊2.25 + 0.5⌋ + 5 = 7.

# %% [markdown]
# ## Exercise 8.7: requantizer
#
# Write `requantizer(p, multiplier, shift)`: `multiplier` and `shift` are Python ints, `p.sum` (32 bits), `p.zero_point` (8 bits) and
# `p.code` (8 bits) signals, all signed. Wires only, no register; return the Module. 3 lines, 10 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Half of what the shift drops is <code>1 &lt;&lt; (shift - 1)</code>. Add it before shifting.</details>
# <details><summary>Hint 2</summary><code>Mux(code &gt; 127, 127, Mux(code &lt; -128, -128, code))</code></details>


# %%
# EXERCISE requantizer
def requantizer(p, multiplier, shift):
    """An int32 sum to an int8 code."""
    from amaranth.hdl import Mux

    m = Module()
    ### BEGIN SOLUTION
    code = ((p.sum * multiplier + (1 << (shift - 1))) >> shift) + p.zero_point
    m.d.comb += p.code.eq(Mux(code > 127, 127, Mux(code < -128, -128, code)))
    ### END SOLUTION
    return m


# %%
# CHECK requantizer
ch08_area.requantizer(requantizer)

# %%
from labutils.fpga.hardware import requantizer, requantizer_ports

p, flat = requantizer_ports(), sums.flatten()
driven = [
    (p.sum, flat),
    (p.multiplier, integer_layer.multiplier.numpy().tolist() * len(sums)),
    (p.shift, integer_layer.shift.numpy().tolist() * len(sums)),
    (p.zero_point, [y_q.zero_point.item()] * len(flat)),
]
codes = torch.from_numpy(simulate(requantizer(p), driven, [p.code])).view(sums.shape)
expected = integer_layer(x_codes)
print(f"{codes.numel()} codes equal chapter 02's IntegerLinear: {torch.equal(codes, expected.long())}")
y = dequantize(codes.to(torch.int8), y_q)
print(f"against the unquantized layer: SQNR {sqnr_db(x @ weight.T, y):.1f} dB (chapter 02 printed the same)")

# %% [markdown]
# **Explain.** Quantization is the only place where anything was lost. From codes to codes, hardware, torch and numpy agree in every
# bit: integers leave no room for "almost equal".

# %% [markdown]
# ## 5 · Bits as area
#
# The array is text so far. **Synthesis** turns it into what the chip has. On a Lattice ECP5 that is the *LUT4*, a table of
# sixteen bits addressed by four wires, a carry chain for adders, a register, and a few ready-made 18 × 18-bit multipliers (DSPs).
#
# A LUT4 with table T and inputs a, b, c, d puts out bit a + 2b + 4c + 8d of T. **Tiny numbers:** T = 0x8888 is 1 at places 3, 7,
# 11, 15: a and b, whatever c and d are.
#
# ## Exercise 8.8: lut4
#
# Write `lut4(table, a, b, c, d)`: `table` an int, the inputs boolean arrays of one shape; return a boolean array. 1 line, 4 minutes,
# difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Four booleans are the four bits of a place in the table: which number is it? (numpy's <code>+</code> of two booleans is a boolean again; <code>2 * b</code> is a number.)</details>
# <details><summary>Hint 2</summary><code>(table &gt;&gt; place &amp; 1) == 1</code></details>


# %%
# EXERCISE lut4
def lut4(table, a, b, c, d):
    """One table of the chip, for many cases at once."""
    ### BEGIN SOLUTION
    place = 1 * a + 2 * b + 4 * c + 8 * d
    return (table >> place & 1) == 1
    ### END SOLUTION


# %%
# CHECK lut4
ch08_area.lut4(lut4)

# %% [markdown]
# With that one function a whole netlist can be run in numpy, for *all* inputs: the strongest test there is. We synthesise a bare
# b × b multiplier into LUT4s, read Yosys' netlist, and compare all 4^b products. **Predict:** how does the number of tables
# grow with b?

# %%
from labutils.fpga.netlist import all_products

tables = {}
for bits in (2, 3, 4, 5, 6, 8):
    area, found, expected = all_products(bits)
    plain, *_ = all_products(bits, booth=False)
    tables[bits] = (area.lut4, plain.lut4)
    print(
        f"{bits} bits: {area.lut4:>3} LUT4, all {len(found):>5} products right: {(found == expected).all()}; ", end=""
    )
    print(f"without Booth's recoding {plain.lut4}")

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for index, name in enumerate(("Booth's recoding", "plain")):
    axes.plot(list(tables), [pair[index] for pair in tables.values()], label=name, **series_style(index))
scale = tables[8][0] / 64
axes.plot(list(tables), [scale * b * b for b in tables], color="0.4", linestyle=":", label="in proportion to b²")
axes.set(xlabel="bits of each factor (b)", ylabel="LUT4s of the multiplier")
axes.set_title(f"From 8 bits to 4 a multiplier shrinks to 1/{tables[8][0] / tables[4][0]:.1f}")
axes.grid(alpha=0.25)
axes.legend()
plt.show()

# %% [markdown]
# *Four-input tables of a signed b × b multiplier, synthesised two ways; dotted: the square law, drawn through the point at 8 bits.*
#
# **Explain.** A multiplier is b rows of b bits, so area goes roughly with b² (with Booth's recoding it stays below the dotted line at every smaller
# width): quantization pays *twice* here, where a memory only pays once. The script matters as well, so an area without its script says little: of
# the next cell's scripts that use no DSP, the dearest takes more than twice the LUTs of the cheapest.
# **Booth's recoding** reads one factor two bits at a time, which halves the rows. The netlist above may hold nothing but LUT4s, so that numpy can
# run it: `-noccu2` forbids the chip's **carry chains** (cell CCU2C, two bits of an adder each). All other areas of this chapter allow them. The
# next cell prints the same 8-bit multiplier under six scripts.

# %%
from labutils.fpga.netlist import multiplier
from labutils.fpga.synthesis import synthesize, to_rtlil, yosys_script

plain = {"booth": False}
for choices in ({"carry": False}, plain | {"carry": False}, {}, plain, plain | {"wide": True}, {"dsp": True}):
    area, _ = synthesize(to_rtlil(*multiplier(8)), **choices)
    print(f"{area.luts:>3} LUTs, {area.dsps} DSP: {yosys_script(**choices)}")

# %% [markdown]
# An element is more than its multiplier: the adder stays. Its width follows from 8.5, for LabLM's longest sum, 768 terms. One
# element of each precision, with a register after the product (section 6 tells why). *int8 x int4* means int8 inputs, int4 weights.
# *binary x 8* adds eight products of signs in one element, as many wires as int8 has.

# %%
from labutils.course.bench.fpga import Design, spec_for
from labutils.fpga.synthesis import array_area

PAIRS = {"int8": (8, 8), "int8 x int4": (8, 4), "int6": (6, 6), "int5": (5, 5), "int4": (4, 4), "int3": (3, 3)}
element_areas = {name: array_area(build_array(spec_for(1, *bits))) for name, bits in PAIRS.items()}
element_areas["binary"] = array_area(build_array(spec_for(1, 1, 1)))
eight = array_area(build_array(spec_for(1, 1, 1, lanes=8)))
shares = {}
for name, bits in {**PAIRS, "binary": (1, 1)}.items():
    adder = 2 * math.ceil(spec_for(1, *bits).acc_bits / 2)  # a carry cell adds two bits and counts as two LUTs
    shares[name] = (element_areas[name].luts - adder, adder)
shares["binary x 8"] = ((eight.luts - adder) / 8, adder / 8)
figure, axes = plt.subplots(figsize=(8.5, 4), layout="constrained")
plots.draw_area(axes, shares)
plt.show()
for name in ("int8", "int4"):
    dsp = array_area(build_array(spec_for(1, *PAIRS[name])), dsp=True)
    print(f"{name} on a DSP: {dsp.luts} LUTs and {dsp.dsps} of the chip's 28 DSPs")

# %% [markdown]
# *LUTs for one product of each precision: the adder for the sum, as wide as 8.5 asks, and the rest, the multiplier (of signs: XNORs, and for
# binary x 8 their count).*
#
# **Explain.** The multiplier shrinks roughly with b², the adder only with the width of the sum (the LUTs printed beside a DSP are the adder
# alone): for a single sign it is nearly everything, until eight signs share one. DSPs are free area while they last: a 25k chip has 28, an
# 8 × 8 array needs 64. And unlike a CPU, LUTs have no favourite widths: five bits are as good as four or eight.

# %% [markdown]
# An int4 product leaves most of an 18 × 18 multiplier idle. **Packing** puts two weights into one factor, 8 bits apart:
#
# $$x\,(w\_0 + 2^8 w\_1) = x w\_0 + 2^8\, x w\_1$$
#
# The lower eight bits are the first product, the upper ones the second, less one where the first is negative (its sign borrows from
# them). **Tiny numbers:** x = 3, w₀ = −1, w₁ = 2: 3 · (−1 + 512) = 1533 = 5 · 256 + 253; 253 is −3 in eight bits, and 5 + 1 = 6.

# %%
from labutils.fpga.netlist import packed_products

m, (x, w0, w1, y0, y1) = packed_products()
area, _ = synthesize(to_rtlil(m, [x, w0, w1, y0, y1]), dsp=True)
codes = np.array(np.meshgrid(*[np.arange(-8, 8)] * 3)).reshape(3, -1)
found = simulate(m, list(zip((x, w0, w1), codes, strict=True)), [y0, y1])
right = (found == (codes[0] * codes[1:]).T).all()
print(f"two int4 products: {area.dsps} DSP and {area.luts} LUTs; all {len(found)} cases right: {right}")

# %% [markdown]
# The repair of the upper product costs a few LUTs. Two int8 products do not fit: their results need 16 bits each, so that the packed factor
# would have 24, and this chip's multipliers take 18. (Xilinx' take 27, where the same trick works for int8.)

# %% [markdown]
# ## 6 · A register, and what it does to the clock
#
# The clock can tick as fast as the slowest path from register to register. In our element that is multiplier *and* adder. A register
# between them cuts the path; the sum comes one cycle later, the array still takes one input a cycle.
#
# ## Exercise 8.9: pipelined_element
#
# Write `pipelined_element(p)`: as 8.1, with the product in a register of its own: sum_out is what it was, but with the product of the
# cycle *before*. 6 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Make a signal for the product: how wide is the product of two 8-bit numbers? <code>Signal.like(p.w_out * p.x_in)</code> asks Amaranth.</details>
# <details><summary>Hint 2</summary>Two lines on <code>m.d.sync</code>: the product, and sum_in plus the product. Neither waits for the other.</details>


# %%
# EXERCISE pipelined_element
def pipelined_element(p):
    """A register between multiplier and adder."""
    m = Module()
    ### BEGIN SOLUTION
    product = Signal.like(p.w_out * p.x_in)
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    m.d.sync += product.eq(p.w_out * p.x_in)
    m.d.sync += p.sum_out.eq(p.sum_in + product)
    ### END SOLUTION
    return m


# %%
# CHECK pipelined_element
ch08_area.pipelined_element(pipelined_element)

# %% [markdown]
# Now the whole way at N = 4, live: synthesis, placing every cell on the chip, routing every wire, a timing estimate, and the file
# that would be loaded into the chip. The array sits in a small test shell (shift registers) because a chip has too few pins for
# all its wires. LUTs count the array alone. **Predict:** what does the register do to Fmax, what do four bits?

# %%
from labutils.course.bench.fpga import HEAD, bench_fpga, conditions

slow, fast = (Design(spec_for(4, 8, 8, pipelined=pipelined), dsp=True) for pipelined in (False, True))
print(HEAD)
(before,) = bench_fpga(4, seeds=(1,), of=[slow])

# %%
(after,) = bench_fpga(4, seeds=(1,), of=[fast])
print(f"the register: Fmax times {after.fmax_mhz[0] / before.fmax_mhz[0]:.2f}")

# %%
print(HEAD)
int4, signs = bench_fpga(4, seeds=(1,), of=[Design(spec_for(4, 4, 4)), Design(spec_for(4, 1, 1, lanes=8))])
print(*conditions((1,)), sep="\n")

# %%
from labutils.fpga.synthesis import place_and_route

spec = int4.design.spec
placed = place_and_route(build_array(spec), seed=1)
figure, (chip, zoom) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
plots.draw_floorplan(chip, zoom, placed, spec)
plt.show()
print(f"{len(placed.cells)} cells placed; the file for the chip: {placed.bitstream_bytes / 1e3:.0f} kB")

# %% [markdown]
# *Where nextpnr put the 4 × 4 int4 array: left on the whole ECP5-25k, right enlarged. One label "k,j" for each element, near the middle of
# its cells, the array's neighbours in different colours (on the chip equal colours may meet); grey: the shell. Each element gathers in patches,
# in no tidy grid.*
#
# **Explain.** In this pair of runs, one seed each, a register lifts the clock by the ratio printed above, for registers that lie idle
# beside every table anyway. Fmax is nextpnr's estimate from the chip's timing model and moves from seed to seed (section 7 prints the range of
# three), so the ratio's second digit is not safe. And the int4 row changes two things at once, the bits and where products are made, in LUTs:
# section 7's rows without a DSP change the bits alone.

# %% [markdown]
# ## 7 · The honest comparison
#
# N = 8 takes minutes, so it was run beforehand, by the command that the next cell prints; three seeds each. *GMAC/s bound* is Fmax · N²
# (and lanes): an array that is never loaded, never drained and fed without a pause.

# %%
saved = json.loads((DATA / "results" / "fpga_n8.json").read_text(encoding="utf-8"))
print(saved["command"])
for row in saved["rows"]:
    if row["note"]:
        print(f"{row['design']:<40} {row['note']}")
        continue
    fmax, luts = sorted(row["fmax_mhz"]), row["area"]["luts"]
    print(
        f"{row['design']:<40}{luts:>6} LUTs {row['area']['dsps']:>3} DSPs {fmax[1]:>5.0f} MHz [{fmax[0]:.0f}, {fmax[-1]:.0f}]",
        end="",
    )
    print(f"{row['gmac_per_s']:>6.1f} GMAC/s, {1e3 * row['gmac_per_s'] / luts:.1f} per 1000 LUTs")

# %% [markdown]
# And this computer? To be fair, it uses its best int8: PyTorch's quantized linear layer (fbgemm or its like) and the C kernels of
# chapter 03. (`torch._int_mm` falls back to slow code on some CPUs, so comparing with it could mislead.) Decoding one sequence has one row,
# a batch has many, so there is a column for each. **Predict:** how many 8 × 8 int8 arrays does one core equal in each?

# %%
my_arrays = predict("8 x 8 int8 arrays, never loaded, that one core equals at 64 rows", None, unit="arrays")

# %%
from labutils.measurement.ledger import host_line
from labutils.measurement.threads import thread_count
from labutils.measurement.timing import measure_interleaved
from labutils.quantization.packed import PackedLinear

SIZE, inputs = 1024, {count: torch.randn(count, 1024) for count in (1, 64)}
with thread_count(1), torch.inference_mode():
    dense = torch.nn.Linear(SIZE, SIZE, bias=False)
    ours, library = PackedLinear.from_layer(dense, Scheme()), torch.ops.quantized
    int8 = torch.quantize_per_tensor(dense.weight, dense.weight.abs().max().item() / 127, 0, torch.qint8)
    theirs = library.linear_prepack(int8, None)
    functions = {f"C kernels, {n} row{'s' * (n > 1)}": lambda x=x: ours(x) for n, x in inputs.items()}
    functions |= {
        f"PyTorch, {n} row{'s' * (n > 1)}": lambda x=x: library.linear_dynamic(x, theirs) for n, x in inputs.items()
    }
    timings = measure_interleaved(functions, repeats=9, warmup=2)

# %%
cpu = {}
for name, timing in timings.items():
    gmac = [int(name.split()[-2]) * SIZE**2 / s / 1e9 for s in sorted(timing.samples_s)]
    cpu[name] = gmac[len(gmac) // 2]
    print(f"{name:<20} {cpu[name]:>6.1f} GMAC/s, from {gmac[-1]:.1f} to {gmac[0]:.1f}")
engine = torch.backends.quantized.engine
print(host_line())
print(
    f"int8, one CPU thread, {SIZE} x {SIZE}, PyTorch's engine {engine}; inputs quantized on the way; median of 9, interleaved"
)
from labutils.fpga.simulate import with_loading

best = {rows: max(value for name, value in cpu.items() if f", {rows} row" in name) for rows in (1, 64)}
print(f"\n{'how many arrays one core equals':<40}{'64 rows, bound':>15}{'64 rows':>10}{'1 row':>8}")
arrays = {r["design"]: (ArraySpec(**r["spec"]), r["gmac_per_s"]) for r in saved["rows"] if r["gmac_per_s"]}
for name, (spec, bound) in arrays.items():
    loaded = {rows: best[rows] / with_loading(spec, bound, rows) for rows in best}
    print(f"{name:<40}{best[64] / bound:>15.0f}{loaded[64]:>10.0f}{loaded[1]:>8.0f}")
my_arrays.compare(best[64] / arrays["8x8 int8, acc25, pipelined, LUT"][1])

# %% [markdown]
# **Explain.** The first column compares the CPU with an array that is never loaded and never drained. The other two let the array load,
# stream and drain by section 2's formula, as it was built: with one row nearly all cycles go into loading and draining. An 8 × 8 int8 array
# on a small FPGA is far slower than one core of a computer; signs come nearest, and signs ruin the model (section 8). A CPU core can multiply
# dozens of int8 pairs a cycle, at many times the clock. FPGAs of another size do compete: LUT-LLM (arXiv:2511.06174) reports a 1.7B language model on an AMD V80,
# with tables in place of multipliers; FlightLLM (arXiv:2401.03868) runs 7B models on a U280 with HBM.
#
# And we have not fed it yet. The OrangeCrab board carries this chip and a 16-bit DDR3L memory; Lattice's note on fast I/O (FPGA-TN-02035,
# table 6.1) allows 400 MHz, two transfers a cycle: 1.6 GB/s *at best, by the datasheets, not measured*. **Predict:** does one sequence wait for
# the memory or for the array?

# %%
BOARD_GB_PER_S = 16 / 8 * 2 * 0.4
BYTES = {"8x8 int8, acc25, pipelined, LUT": 1.0, "8x8 int4, acc17, pipelined, LUT": 0.5}
BYTES["8x8 binary x 8, acc11, pipelined, LUT"] = 1 / 8
figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
plots.draw_board(axes, {name: (*arrays[name], size) for name, size in BYTES.items()}, BOARD_GB_PER_S)
plt.show()
per_token, tokens_per_s = sum(w.numel() for w in model.parameters()) / 1e9, {}
for name, size in BYTES.items():
    spec, bound = arrays[name]
    found = tokens_per_s[name] = {"the memory": BOARD_GB_PER_S / size / per_token}
    found |= {"the array": with_loading(spec, bound, 1) / per_token, "loading hidden": bound / spec.n / per_token}
    print(f"{name:<38} one sequence, tokens/s: " + ", ".join(f"{what} {rate:.0f}" for what, rate in found.items()))

# %% [markdown]
# *GMAC/s over the rows of x that share one reading of the weights. Dotted: what the board's memory (1.6 GB/s, datasheet) can feed. Solid: what
# the array reaches when it loads, streams and drains each tile. The lower of the two counts. Activations, attention and control are left out,
# so all of it is optimistic.*
#
# **Explain.** The smaller of memory and array decides. "Loading hidden" is an array that loads the next tile while it works: even then
# weights enter N a cycle, one for each column, and each is used once. An array is built for weights that stay; decoding brings new ones in every cycle.
#
# **Why there is no power figure here.** Efficiency is what FPGAs are praised for. But no step of this flow measures power: it needs the chip's
# activity and its supply, hence a board and a meter. A figure from a datasheet's maximum would be invention.

# %% [markdown]
# ## Exercise 8.10: multipliers_needed
#
# What would you build instead? A **matrix-vector engine**: multipliers side by side, each with a new weight in *every* cycle, and a tree of adders
# below. Write `multipliers_needed(weight_bytes, clock_mhz, memory_gb_per_s)`: the smallest number of multipliers that takes the weights as fast as the
# memory brings them. **Tiny numbers:** 1 byte, 100 MHz, 0.95 GB/s: 9.5 weights a cycle, 10 multipliers. 1 line, 6 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>How many weights does the memory bring in a second, and how many in a cycle?</details>
# <details><summary>Hint 2</summary>memory · 10⁹ / bytes / (clock · 10⁶), rounded up with <code>math.ceil</code>.</details>


# %%
# EXERCISE multipliers_needed
def multipliers_needed(weight_bytes, clock_mhz, memory_gb_per_s):
    """Multipliers that keep up with a memory."""
    ### BEGIN SOLUTION
    return math.ceil(memory_gb_per_s * 1e9 / weight_bytes / (clock_mhz * 1e6))
    ### END SOLUTION


# %%
# CHECK multipliers_needed
ch08_area.multipliers_needed(multipliers_needed)

# %%
luts = {"8x8 int8, acc25, pipelined, LUT": element_areas["int8"].luts}
luts |= {"8x8 int4, acc17, pipelined, LUT": element_areas["int4"].luts, list(BYTES)[-1]: eight.luts / 8}
for row in (r for r in saved["rows"] if r["design"] in BYTES):
    name, clock = row["design"], sorted(row["fmax_mhz"])[1]
    count = multipliers_needed(BYTES[name], clock, BOARD_GB_PER_S)
    print(f"{name}: {row['area']['luts']} LUTs, {tokens_per_s[name]['the array']:.0f} tokens/s by the formula")
    print(
        f"    {count} multipliers, about {count * luts[name]:.0f} LUTs: {tokens_per_s[name]['the memory']:.0f} tokens/s"
    )

# %% [markdown]
# (The engine's area is the number of multipliers times section 5's area of an element, its clock is the array's, and its speed the memory's
# bound: computed, not synthesised.) A fraction of the area, several times the tokens: an engine that fits its memory beats one with more multipliers.

# %% [markdown]
# ## 8 · You are the architect
#
# A chip with 1300 LUTs and no multiplier. The assistant may lose 0.05 bits per byte against float32, no more. An array of x_bits × w_bits
# rounds *both* inputs (a scale per token) and weights (a scale per output), in every linear layer. What does each pair lose? Measured as
# in the ledger: bits per byte, paired with float32 on the same documents.

# %%
import copy

from labutils.lab.layers.linears import linear_layers, set_weight_, weight_of
from labutils.lab.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.quantization.affine import fake_quantize
from labutils.quantization.binary import binarize


def rounded(x, bits, granularity):
    if bits > 1:
        return fake_quantize(x, Scheme(bits=bits, granularity=granularity))
    signs, scale = binarize(x)
    return signs * scale


def as_on_the_array(x_bits, w_bits):
    variant = copy.deepcopy(model)
    for _, linear in linear_layers(variant):
        set_weight_(linear, rounded(weight_of(linear), w_bits, "channel"))
        linear.register_forward_pre_hook(lambda module, args: (rounded(args[0], x_bits, "token"),))
    return variant


# %%
documents = held_out_documents(limit_bytes=600)
baseline = bits_by_document(model, tokenizer, documents)
losses = {}
for name, bits in {**PAIRS, "binary": (1, 1)}.items():
    quality = paired_quality(bits_by_document(as_on_the_array(*bits), tokenizer, documents), baseline)
    losses[bits] = quality.difference
    low, high = quality.interval
    print(
        f"{name:<12} loses {quality.difference:.3f} [{low:.3f}, {high:.3f}], {element_areas[name].luts:>3} LUTs an element"
    )

# %% [markdown]
# ## Exercise 8.11: my_design
#
# Choose: `my_design = {"x_bits": …, "w_bits": …, "n": …}`, a pair from the table above and N from 1 to 8. It must keep the quality
# floor (0.05), fit 1300 LUTs with sums for 768 terms and the register of 8.9, and make as many products a cycle as any such design can. Yosys
# builds your array and judges: up to 20 seconds. 1 line, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Cross out what loses too much. N² elements must fit: the square root of 1300 over the area of one.</details>
# <details><summary>Hint 2</summary>The course's favourite widths are not the chip's.</details>

# %%
# EXERCISE my_design
### BEGIN SOLUTION
my_design = {"x_bits": 5, "w_bits": 5, "n": 4}
### END SOLUTION

# %%
# CHECK my_design
ch08_area.my_design(my_design, losses)

# %% [markdown]
# ## 9 · The table is the multiplier
#
# A LUT4 holds *any* function of four bits. Multiplying a 4-bit code x by a weight that never changes is eight such functions, one for each bit of the
# product, so the weight disappears into the tables: no memory brings it, and no register keeps it. Networks have been built this way (LogicNets,
# Umuroglu et al. 2020, arXiv:2004.03021); LUT-LLM keeps tables of products in memory instead, and T-MAC (arXiv:2407.00088) looks them up on a CPU.
#
# **Tiny numbers:** weight 3, bit 0 of 3x is 1 for each odd x: the table has ones at the odd places, 0xAAAA.

# %% [markdown]
# ## Exercise 8.12: product_tables
#
# Write `product_tables(weight)`: eight ints, the tables of bits 0 to 7 of x · weight, lowest bit first. Place p of a table belongs to the code x whose four
# bits are p in two's complement: places 0 to 7 are x = 0 … 7, places 8 to 15 are x = −8 … −1. 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>x * weight &gt;&gt; bit &amp; 1</code> is one bit of the product, for negative numbers too.</details>
# <details><summary>Hint 2</summary>Add <code>that &lt;&lt; place</code> over the sixteen places; the code of a place is <code>place - 16 * (place &gt;= 8)</code>.</details>


# %%
# EXERCISE product_tables
def product_tables(weight):
    """Tables of the product's bits."""
    ### BEGIN SOLUTION
    tables = [0] * 8
    for place in range(16):
        x = place - 16 * (place >= 8)
        for bit in range(8):
            tables[bit] |= (x * weight >> bit & 1) << place
    return tables
    ### END SOLUTION


# %%
# CHECK product_tables
ch08_area.product_tables(product_tables)

# %% [markdown]
# Your tables, run for all codes; then Yosys, asked for the sixteen products at once. **Predict:** how many LUT4s does a product by a fixed weight take,
# where the general 4-bit multiplier took the number of section 5?

# %%
my_tables = predict("LUT4s of a product by a fixed 4-bit weight", None, unit="LUT4")

# %%
from labutils.fpga.netlist import constant_products

weights, places = range(-8, 8), np.arange(16)
bits = [places >> i & 1 == 1 for i in range(4)]
words = np.array([sum(lut4(t, *bits) << i for i, t in enumerate(product_tables(w))) for w in weights])
by_hand = np.where(words >= 128, words - 256, words)  # eight bits, read as a signed number
codes = np.where(places >= 8, places - 16, places)
print(f"all {words.size} products right: {(by_hand == np.outer(weights, codes)).all()}")
area, _ = synthesize(to_rtlil(*constant_products(weights)), carry=False)
each = area.lut4 / len(weights)
print(f"Yosys: {area.lut4} LUT4 for {len(weights)} weights, {each:.1f} each; any 4-bit weight: {tables[4][0]}")
my_tables.compare(each)
print(
    f"all {per_token * 1e3:.1f} million weights of LabLM: {per_token * 1e9 * each / 24_288:.0f} chips like ours, adders left out"
)

# %% [markdown]
# **Explain.** A fixed weight costs a fraction of a multiplier: each bit of its product is one table at most, zeros and equal bits need none,
# and it needs no memory bandwidth at all.
# The price is that *every* weight now takes area, used or not, where the array reused its multipliers for all of them. So whole networks in tables
# are small networks, or tables of *groups* of values in a large memory.

# %% [markdown]
# ## What you have
#
# - a processing element and a systolic array of your own, equal to numpy in every bit, and inputs that tell four broken ones apart;
# - LabLM's `k_proj` computed by hardware in simulation, with chapter 02's requantization below it;
# - area as a function of bits, from real synthesis, and a multiplier checked for every possible input;
# - a routed chip with its floorplan and bitstream, and an honest place beside a CPU: behind it;
# - the engine that a board's memory deserves, and multipliers that are nothing but tables;
# - `python -m labutils bench fpga`: the table for N = 4, three seeds (`--array 8` for the other).
#
# **Open question:** you are to serve LabLM from an FPGA board, one user at a time, 200 tokens per second. Which number decides first:
# LUTs, clock, DSPs or memory? What would you change about the model, and what about the board?
#
# Next: **09 · Multi-GPU and distributed inference**.

# %%
from labutils.course.progress import progress

progress()
calibration()
