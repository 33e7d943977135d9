# %% WRONG processing_element | keep it while load is 0
# EXERCISE processing_element
def processing_element(p):
    m = Module()
    m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    m.d.sync += p.sum_out.eq(p.sum_in + p.w_out * p.x_in)
    return m


# %% WRONG processing_element | x_out follows at once
# EXERCISE processing_element
def processing_element(p):
    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.comb += p.x_out.eq(p.x_in)
    m.d.sync += p.sum_out.eq(p.sum_in + p.w_out * p.x_in)
    return m


# %% WRONG processing_element | sum_out is no register
# EXERCISE processing_element
def processing_element(p):
    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    m.d.comb += p.sum_out.eq(p.sum_in + p.w_out * p.x_in)
    return m


# %% WRONG processing_element | the element's own last sum
# EXERCISE processing_element
def processing_element(p):
    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    m.d.sync += p.sum_out.eq(p.sum_out + p.w_out * p.x_in)
    return m


# %% WRONG processing_element | the weight passing by
# EXERCISE processing_element
def processing_element(p):
    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += [p.x_out.eq(p.x_in), p.sum_out.eq(p.sum_in + p.w_in * p.x_in)]
    return m


# %% WRONG processing_element | the input of the cycle before
# EXERCISE processing_element
def processing_element(p):
    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += [p.x_out.eq(p.x_in), p.sum_out.eq(p.sum_in + p.w_out * p.x_out)]
    return m


# %% WRONG processing_element | the sum from above is lost
# EXERCISE processing_element
def processing_element(p):
    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += [p.x_out.eq(p.x_in), p.sum_out.eq(p.w_out * p.x_in)]
    return m


# %% WRONG processing_element | a loop of wires
# EXERCISE processing_element
def processing_element(p):
    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    m.d.comb += p.sum_out.eq(p.sum_out + p.w_out * p.x_in)
    return m


# %% WRONG systolic_array | every column gets the input at once
# EXERCISE systolic_array
def systolic_array(a, add_element):
    m, n = Module(), len(a.x_in)
    pe = [[add_element(m, k, j) for j in range(n)] for k in range(n)]
    for k in range(n):
        for j in range(n):
            m.d.comb += pe[k][j].load.eq(a.load)
            m.d.comb += pe[k][j].x_in.eq(a.x_in[k])
            m.d.comb += pe[k][j].w_in.eq(pe[k - 1][j].w_out if k else a.w_in[j])
            m.d.comb += pe[k][j].sum_in.eq(pe[k - 1][j].sum_out if k else a.sum_in[j])
    m.d.comb += [a.sum_out[j].eq(pe[n - 1][j].sum_out) for j in range(n)]
    return m


# %% WRONG systolic_array | every row loads the same weight
# EXERCISE systolic_array
def systolic_array(a, add_element):
    m, n = Module(), len(a.x_in)
    pe = [[add_element(m, k, j) for j in range(n)] for k in range(n)]
    for k in range(n):
        for j in range(n):
            m.d.comb += pe[k][j].load.eq(a.load)
            m.d.comb += pe[k][j].x_in.eq(pe[k][j - 1].x_out if j else a.x_in[k])
            m.d.comb += pe[k][j].w_in.eq(a.w_in[j])
            m.d.comb += pe[k][j].sum_in.eq(pe[k - 1][j].sum_out if k else a.sum_in[j])
    m.d.comb += [a.sum_out[j].eq(pe[n - 1][j].sum_out) for j in range(n)]
    return m


# %% WRONG systolic_array | the sums move to the right
# EXERCISE systolic_array
def systolic_array(a, add_element):
    m, n = Module(), len(a.x_in)
    pe = [[add_element(m, k, j) for j in range(n)] for k in range(n)]
    for k in range(n):
        for j in range(n):
            m.d.comb += pe[k][j].load.eq(a.load)
            m.d.comb += pe[k][j].x_in.eq(pe[k][j - 1].x_out if j else a.x_in[k])
            m.d.comb += pe[k][j].w_in.eq(pe[k - 1][j].w_out if k else a.w_in[j])
            m.d.comb += pe[k][j].sum_in.eq(pe[k][j - 1].sum_out if j else a.sum_in[k])
    m.d.comb += [a.sum_out[j].eq(pe[n - 1][j].sum_out) for j in range(n)]
    return m


# %% WRONG systolic_array | that is the top row
# EXERCISE systolic_array
def systolic_array(a, add_element):
    m, n = Module(), len(a.x_in)
    pe = [[add_element(m, k, j) for j in range(n)] for k in range(n)]
    for k in range(n):
        for j in range(n):
            m.d.comb += pe[k][j].load.eq(a.load)
            m.d.comb += pe[k][j].x_in.eq(pe[k][j - 1].x_out if j else a.x_in[k])
            m.d.comb += pe[k][j].w_in.eq(pe[k - 1][j].w_out if k else a.w_in[j])
            m.d.comb += pe[k][j].sum_in.eq(pe[k - 1][j].sum_out if k else a.sum_in[j])
    m.d.comb += [a.sum_out[j].eq(pe[0][j].sum_out) for j in range(n)]
    return m


# %% WRONG systolic_array | load goes to every element
# EXERCISE systolic_array
def systolic_array(a, add_element):
    m, n = Module(), len(a.x_in)
    pe = [[add_element(m, k, j) for j in range(n)] for k in range(n)]
    for k in range(n):
        for j in range(n):
            if k == 0:
                m.d.comb += pe[k][j].load.eq(a.load)
            m.d.comb += pe[k][j].x_in.eq(pe[k][j - 1].x_out if j else a.x_in[k])
            m.d.comb += pe[k][j].w_in.eq(pe[k - 1][j].w_out if k else a.w_in[j])
            m.d.comb += pe[k][j].sum_in.eq(pe[k - 1][j].sum_out if k else a.sum_in[j])
    m.d.comb += [a.sum_out[j].eq(pe[n - 1][j].sum_out) for j in range(n)]
    return m


# %% WRONG skew | no column is late
# EXERCISE skew
def skew(x):
    rows, n = x.shape
    return np.concatenate([x, np.zeros((n - 1, n), dtype=np.int64)])


# %% WRONG skew | the first column is the latest
# EXERCISE skew
def skew(x):
    rows, n = x.shape
    fed = np.zeros((rows + n - 1, n), dtype=np.int64)
    for k in range(n):
        fed[n - 1 - k : n - 1 - k + rows, k] = x[:, k]
    return fed


# %% WRONG skew | comes back at the start
# EXERCISE skew
def skew(x):
    return np.stack([np.roll(x[:, k], k) for k in range(x.shape[1])], axis=1)


# %% WRONG skew | the last numbers are cut off
# EXERCISE skew
def skew(x):
    fed = np.zeros_like(x)
    for k in range(x.shape[1]):
        fed[k:, k] = x[: max(len(x) - k, 0), k]
    return fed


# %% WRONG skew | turned: a row is a cycle
# EXERCISE skew
def skew(x):
    rows, n = x.shape
    fed = np.zeros((n, rows + n - 1), dtype=np.int64)
    for k in range(n):
        fed[k, k : k + rows] = x[:, k]
    return fed


# %% WRONG layer_cycles | one tile only
# EXERCISE layer_cycles
def layer_cycles(rows, features, outputs, n):
    return n + rows + 2 * n - 2


# %% WRONG layer_cycles | loaded for every tile
# EXERCISE layer_cycles
def layer_cycles(rows, features, outputs, n):
    return (features // n) * (outputs // n) * (rows + 2 * n - 2)


# %% WRONG layer_cycles | the skew counts twice
# EXERCISE layer_cycles
def layer_cycles(rows, features, outputs, n):
    return (features // n) * (outputs // n) * (n + rows + n - 1)


# %% WRONG layer_cycles | leave it idle
# EXERCISE layer_cycles
def layer_cycles(rows, features, outputs, n):
    return rows * features * outputs // n**2


# %% WRONG accumulator_bits | the sign's
# EXERCISE accumulator_bits
def accumulator_bits(bits, terms):
    return (terms * 2 ** (2 * bits - 2)).bit_length()


# %% WRONG accumulator_bits | itself must fit
# EXERCISE accumulator_bits
def accumulator_bits(bits, terms):
    import math

    return math.ceil(math.log2(terms * 2 ** (2 * bits - 2))) + 1


# %% WRONG accumulator_bits | that holds one product
# EXERCISE accumulator_bits
def accumulator_bits(bits, terms):
    return 2 * bits


# %% WRONG accumulator_bits | twice the terms cost one bit
# EXERCISE accumulator_bits
def accumulator_bits(bits, terms):
    return 2 * bits * terms


# %% WRONG accumulator_bits | an FPGA pays for each bit
# EXERCISE accumulator_bits
def accumulator_bits(bits, terms):
    return 32


# %% WRONG telling_inputs | zeros hide every mistake
# EXERCISE telling_inputs
def telling_inputs():
    return np.zeros((4, 3), dtype=np.int64), np.zeros((3, 3), dtype=np.int64)


# %% WRONG telling_inputs | put a negative weight in
# EXERCISE telling_inputs
def telling_inputs():
    return np.array([[127, 127, 127], [0, 0, 0], [1, 2, 3]]), np.full((3, 3), 127)


# %% WRONG telling_inputs | a sum must pass 32767
# EXERCISE telling_inputs
def telling_inputs():
    return np.array([[1, 2, 3], [0, 0, 0], [4, 5, 6]]), np.full((3, 3), -1)


# %% WRONG telling_inputs | a 0 must follow another number
# EXERCISE telling_inputs
def telling_inputs():
    return np.full((3, 3), -128), np.full((3, 3), -128)


# %% WRONG telling_inputs | whole numbers from -128 to 127
# EXERCISE telling_inputs
def telling_inputs():
    return np.full((3, 3), 1000), np.full((3, 3), -1000)


# %% WRONG telling_inputs | a sum must pass 32767 | same
# EXERCISE telling_inputs
def telling_inputs():  # int8 products wrap in numpy, which must not count as a difference
    return np.full((4, 3), 100, dtype=np.int8), np.full((3, 3), -100, dtype=np.int8)


# %% WRONG requantizer | the shift alone rounds down
# EXERCISE requantizer
def requantizer(p, multiplier, shift):
    from amaranth.hdl import Mux

    m = Module()
    code = ((p.sum * multiplier) >> shift) + p.zero_point
    m.d.comb += p.code.eq(Mux(code > 127, 127, Mux(code < -128, -128, code)))
    return m


# %% WRONG requantizer | large codes wrap around
# EXERCISE requantizer
def requantizer(p, multiplier, shift):
    m = Module()
    m.d.comb += p.code.eq(((p.sum * multiplier + (1 << (shift - 1))) >> shift) + p.zero_point)
    return m


# %% WRONG requantizer | cut to 32 bits
# EXERCISE requantizer
def requantizer(p, multiplier, shift):
    from amaranth.hdl import Mux

    m, product = Module(), Signal(signed(32))
    m.d.comb += product.eq(p.sum * multiplier)
    code = ((product + (1 << (shift - 1))) >> shift) + p.zero_point
    m.d.comb += p.code.eq(Mux(code > 127, 127, Mux(code < -128, -128, code)))
    return m


# %% WRONG requantizer | add it after the shift
# EXERCISE requantizer
def requantizer(p, multiplier, shift):
    from amaranth.hdl import Mux

    m = Module()
    code = ((p.sum + p.zero_point) * multiplier + (1 << (shift - 1))) >> shift
    m.d.comb += p.code.eq(Mux(code > 127, 127, Mux(code < -128, -128, code)))
    return m


# %% WRONG lut4 | the order is turned
# EXERCISE lut4
def lut4(table, a, b, c, d):
    return (table >> (8 * a + 4 * b + 2 * c + 1 * d) & 1) == 1


# %% WRONG lut4 | read from the left
# EXERCISE lut4
def lut4(table, a, b, c, d):
    return (table >> (15 - (1 * a + 2 * b + 4 * c + 8 * d)) & 1) == 1


# %% WRONG lut4 | keep one with & 1
# EXERCISE lut4
def lut4(table, a, b, c, d):
    return (table >> (1 * a + 2 * b + 4 * c + 8 * d)) > 0


# %% WRONG lut4 | a wire is True or False
# EXERCISE lut4
def lut4(table, a, b, c, d):
    return table >> (1 * a + 2 * b + 4 * c + 8 * d) & 1


# %% WRONG pipelined_element | no register more than before
# EXERCISE pipelined_element
def pipelined_element(p):
    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    m.d.sync += p.sum_out.eq(p.sum_in + p.w_out * p.x_in)
    return m


# %% WRONG pipelined_element | put it before
# EXERCISE pipelined_element
def pipelined_element(p):
    m, total = Module(), Signal.like(p.sum_out)
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    m.d.sync += total.eq(p.sum_in + p.w_out * p.x_in)
    m.d.sync += p.sum_out.eq(total)
    return m


# %% WRONG pipelined_element | has lost its register
# EXERCISE pipelined_element
def pipelined_element(p):
    m, product = Module(), Signal.like(p.w_out * p.x_in)
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    m.d.sync += product.eq(p.w_out * p.x_in)
    m.d.comb += p.sum_out.eq(p.sum_in + product)
    return m


# %% WRONG pipelined_element | too narrow
# EXERCISE pipelined_element
def pipelined_element(p):
    m, product = Module(), Signal.like(p.x_in)
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += [p.x_out.eq(p.x_in), product.eq(p.w_out * p.x_in), p.sum_out.eq(p.sum_in + product)]
    return m


# %% WRONG my_design | the quality floor comes first
# EXERCISE my_design
my_design = {"x_bits": 4, "w_bits": 4, "n": 5}


# %% WRONG my_design | synthesis says that it does not fit
# EXERCISE my_design
my_design = {"x_bits": 8, "w_bits": 8, "n": 4}


# %% WRONG my_design | room for a larger array
# EXERCISE my_design
my_design = {"x_bits": 5, "w_bits": 5, "n": 3}


# %% WRONG my_design | another precision meets the floor
# EXERCISE my_design
my_design = {"x_bits": 8, "w_bits": 4, "n": 3}


# %% WRONG multipliers_needed | round up with math.ceil
# EXERCISE multipliers_needed
def multipliers_needed(weight_bytes, clock_mhz, memory_gb_per_s):
    return memory_gb_per_s * 1e9 / weight_bytes / (clock_mhz * 1e6)


# %% WRONG multipliers_needed | the engine falls behind
# EXERCISE multipliers_needed
def multipliers_needed(weight_bytes, clock_mhz, memory_gb_per_s):
    return int(memory_gb_per_s * 1e9 / weight_bytes / (clock_mhz * 1e6))


# %% WRONG multipliers_needed | divide by the bytes of one
# EXERCISE multipliers_needed
def multipliers_needed(weight_bytes, clock_mhz, memory_gb_per_s):
    return math.ceil(memory_gb_per_s * 1e9 * weight_bytes / (clock_mhz * 1e6))


# %% WRONG multipliers_needed | than bytes
# EXERCISE multipliers_needed
def multipliers_needed(weight_bytes, clock_mhz, memory_gb_per_s):
    return math.ceil(memory_gb_per_s * 1e9 / (clock_mhz * 1e6))


# %% WRONG product_tables | negative codes
# EXERCISE product_tables
def product_tables(weight):
    return [sum((x * weight >> bit & 1) << x for x in range(16)) for bit in range(8)]


# %% WRONG product_tables | begin with bit 0
# EXERCISE product_tables
def product_tables(weight):
    codes = [*range(8), *range(-8, 0)]
    return [sum((x * weight >> bit & 1) << p for p, x in enumerate(codes)) for bit in reversed(range(8))]


# %% WRONG product_tables | not four
# EXERCISE product_tables
def product_tables(weight):
    codes = [*range(8), *range(-8, 0)]
    return [sum((x * weight >> bit & 1) << p for p, x in enumerate(codes)) for bit in range(4)]


# %% WRONG product_tables | two's complement
# EXERCISE product_tables
def product_tables(weight):
    return [sum((x * weight >> bit & 1) << p for p, x in enumerate(range(-8, 8))) for bit in range(8)]
