// All decoder layers for some tokens of one or several sequences: between the matrices of kernels.c a dozen small steps
// a layer. Called from Python one by one, they cost as much as a third of an int4 model's matrices. Compiled together
// with kernels.c.

// ---- a register full of numbers, each on its own: how many there are changes no bits -----------------------------------

typedef Inputs floats;
typedef int32_t ints __attribute__((vector_size(sizeof(floats)), aligned(4)));
enum { LANES = sizeof(floats) / sizeof(float) };

static inline floats load(const float *x, int64_t n, float rest) {  // n numbers, then `rest`
    if (n >= LANES) return *(const floats *)x;
    floats v = (floats){0} + rest;
    memcpy(&v, x, n * sizeof(float));
    return v;
}

static inline void store(float *x, floats v, int64_t n) {
    if (n >= LANES) *(floats *)x = v;
    else memcpy(x, &v, n * sizeof(float));
}

#ifdef WIDE
static inline f32x8 fused8(f32x8 a, f32x8 b, f32x8 sum) {  // a b + sum, rounded once
    return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}
static inline floats fused_all(floats a, floats b, floats sum) {
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}
#else
#define fused8 fused
#define fused_all fused
#endif

static inline floats larger(floats a, floats b) {  // NaN in a does not count
#if defined(WIDE)
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && !defined(SCALAR)
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    ints is = a > b;
    return (floats)(((ints)a & is) | ((ints)b & ~is));
#endif
}

// e^x for x <= 0, as 2^k 2^r: k the whole part of x / ln 2 and |r| <= 1/2, whose power is a series to r^6.
// Relative error: up to 2.4e-7 for x > -1, 1.4e-6 near -87, where 1 / ln 2 has too few digits.
static inline floats exponential(floats x) {
    const floats zero = {0}, per_octave = zero + 1.44269504f;
    floats whole = fused_all(x, per_octave, zero + 12582912.0f);  // rounds, as in quantize_token
    ints power = ((ints)whole << 23) + (127 << 23);
    floats r = fused_all(x, per_octave, 12582912.0f - whole), e = fused_all(zero + 1.5403530e-4f, r, zero + 1.3333558e-3f);
    e = fused_all(fused_all(e, r, zero + 9.6181291e-3f), r, zero + 5.5504109e-2f);
    e = fused_all(fused_all(fused_all(e, r, zero + 2.4022651e-1f), r, zero + 6.9314718e-1f), r, zero + 1);
    return (floats)((ints)(e * (floats)power) & ~(x <= -87.0f));  // so: NaN stays NaN
}

// x = e^(scale * (x - the largest)) for `length` numbers, 0 for those behind them up to `room`, a multiple of 16.
// Returns the sum: number i is added to sum i % 16, so that 8 lanes and 16 add in the same order.
static float exponentials(float *x, int64_t length, int64_t room, float scale) {
    for (int64_t i = length; i < room; i++) x[i] = -INFINITY;
    floats largest = (floats){0} - INFINITY, sums[16 / LANES] = {0};
    for (int64_t i = 0; i < room; i += LANES) largest = larger(load(x + i, LANES, 0), largest);
    for (int i = 1; i < LANES; i++) largest[0] = largest[i] > largest[0] ? largest[i] : largest[0];
    for (int64_t i = 0; i < room; i += 16)
        for (int part = 0; part < 16 / LANES; part++) {
            float *near = x + i + part * LANES;
            floats e = exponential((load(near, LANES, 0) - largest[0]) * scale);
            sums[part] += e;
            store(near, e, LANES);
        }
    return sum8(*(f32x8 *)sums) + sum8(*((f32x8 *)sums + 1));
}

// y = x / sqrt(mean(x^2) + eps) * gain
static void rms_norm(const float *x, const float *gain, float *y, int64_t n, float eps) {
    f32x8 squares = {0};
    for (int64_t i = 0; i < n; i += 8) squares += load8(x + i, n - i, 0) * load8(x + i, n - i, 0);
    float scale = 1 / sqrtf(sum8(squares) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * (gain[i] * scale);
}

// y = gate / (1 + e^-gate) * up; gate and up lie one behind the other, n numbers each
static void swiglu(const float *gate_up, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        floats gate = load(gate_up + i, n - i, 0), up = load(gate_up + n + i, n - i, 0);
        ints positive = gate > 0;
        floats e = exponential((floats)((ints)gate | INT32_MIN));  // e^-|gate|: never overflows
        floats share = (floats)(((ints)((floats){0} + 1) & positive) | ((ints)e & ~positive));
        store(y + i, gate * share / (1 + e) * up, n - i);
    }
}

static void rotate(float *x, const float *cosine, const float *sine, int64_t dim) {  // pairs (i, i + dim / 2)
    for (int64_t i = 0, half = dim / 2; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

typedef struct {
    const int64_t *blocks;  // the token's block table: blocks[j] holds positions j * block and up
    int64_t position;
} Row;

enum { SHARE = TOKENS / 2 };  // heads that read the same rounded keys and values in one pass, each with two codes

typedef struct {
    const float *attention_gain, *mlp_gain;
    void *keys, *values;               // this layer's cache: float (kv_heads, max_length, dim), or codes as in cache.c
    float *key_scales, *value_scales;  // of the codes; NULL: floats
    Weight qkv, output, gate_up, down;
} Layer;

typedef struct {
    int64_t layers, heads, kv_heads, dim, max_length, block;  // one stream: a block of max_length positions
    float *narrow, *wide, *inner, *scores;  // a row each: hidden; qkv or gate_up; heads * dim or the MLP; SHARE * max_length
    float eps;
} Shape;

// Scores have room for whole blocks of 64 positions.
static int64_t room_of(const Shape *s) { return (s->max_length + 63) / 64 * 64; }

// The same over a cache of int8: see cache.c.
static void store_rounded(const float *key, const float *value, const Layer *layer, const Shape *s, int64_t kv, int64_t p);
static void attend_rounded(const float *q, float *out, float *scores, const Layer *layer, const Shape *s, int64_t kv,
                           int64_t length, int64_t heads);

// Rotates queries and keys of one token (in place) and stores key and value at its position.
// qkv (heads + 2 kv_heads, dim); dim a multiple of 8.
static void store_token(float *qkv, const float *cosine, const float *sine, const Layer *layer, const Shape *s,
                        const Row *row) {
    int64_t dim = s->dim, rotated = s->heads + s->kv_heads;
    int64_t slot = row->blocks[row->position / s->block] * s->block + row->position % s->block;
    for (int64_t head = 0; head < rotated; head++) rotate(qkv + head * dim, cosine, sine, dim);
    for (int64_t kv = 0; kv < s->kv_heads; kv++) {
        const float *key = qkv + (s->heads + kv) * dim, *value = qkv + (rotated + kv) * dim;
        int64_t at = (kv * s->max_length + slot) * dim;
        if (layer->key_scales) {
            store_rounded(key, value, layer, s, kv, slot);
            continue;
        }
        memcpy((float *)layer->keys + at, key, dim * sizeof(float));
        memcpy((float *)layer->values + at, value, dim * sizeof(float));
    }
}

// score[h][j] = q[h] . key[j] for `count` keys, one behind the other. Eight at a time, for a sum waits for the one before.
static inline __attribute__((always_inline)) void score_keys(
    const float *q, const float *keys, float *scores, int64_t room, int64_t count, int64_t dim, const int heads) {
    const int at_once = LANES == 16 && heads > 2 ? 4 : 8 / heads;  // 32 registers, or 16
    for (int64_t j = 0; j < count; j += at_once) {
        int64_t left = count - j < at_once ? count - j : at_once;
        const float *key[8];
        for (int n = 0; n < at_once; n++) key[n] = keys + (j + (n < left ? n : 0)) * dim;
        f32x8 dots[16] = {0};
        for (int64_t i = 0; i < dim; i += 8)
#pragma GCC unroll 8
            for (int h = 0; h < heads; h++)
#pragma GCC unroll 8
                for (int n = 0; n < at_once; n++) {
                    f32x8 *dot = dots + h * at_once + n, its = load8(q + h * dim + i, 8, 0);
                    *dot = fused8(its, load8(key[n] + i, 8, 0), *dot);
                }
        f32x8 made[2] = {sum8_of_8(dots), sum8_of_8(dots + 8)};
        for (int h = 0; h < heads; h++) memcpy(scores + h * room + j, (float *)made + h * at_once, left * sizeof(float));
    }
}

// `width` numbers of each head's mixed values, in `registers`, from `values` on
static inline __attribute__((always_inline)) void mix_values(
    const float *weights, int64_t room, const float *values, float *out, const Row *row, int64_t block, int64_t dim,
    const float *total, int64_t width, const int heads, const int registers) {
    floats mixed[SHARE][4] = {0};
    for (int64_t start = 0, length = row->position + 1; start < length; start += block) {
        const float *near = values + row->blocks[start / block] * block * dim;
        for (int64_t j = start; j < length && j < start + block; j++, near += dim)
#pragma GCC unroll 8
            for (int n = 0; n < registers; n++) {
                floats v = load(near + n * LANES, width, 0);
#pragma GCC unroll 8
                for (int h = 0; h < heads; h++)
                    mixed[h][n] = fused_all((floats){0} + weights[h * room + j], v, mixed[h][n]);
            }
    }
    for (int h = 0; h < heads; h++)
        for (int n = 0; n < registers; n++) store(out + h * dim + n * LANES, mixed[h][n] / total[h], width);
}

// The same for `rows` tokens that read the same keys: a product of matrices, that one of `float_product`, with its bits.
// scores (rows, SHARE, room), also of what lies behind a token. q: each token's `width` behind the one before.
static void score_rows(const float *q, int64_t width, const float *keys, float *scores, const Shape *s, const Row *row,
                       int64_t rows, int64_t heads) {
    Inputs laid[s->dim / 8 * ((rows + SIDE - 1) / SIDE)];
    int64_t dim = s->dim, length = 0, room = room_of(s);
    for (int64_t r = 0; r < rows; r++) length = row[r].position >= length ? row[r].position + 1 : length;
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t v = 0, all = (rows + SIDE - 1) / SIDE; v < all; v += VECTORS)
            lay_inputs(q + h * dim, width, dim, rows, v, all - v < VECTORS ? all - v : VECTORS, laid + v * (dim / 8));
        for (int64_t j = 0; j < length; j += ROWS) {
            int64_t at = j + ROWS <= s->max_length ? j : s->max_length - ROWS;
            Weight near = {.codes = (const uint8_t *)(keys + at * dim), .in = dim, .out = SHARE * room};
            float_tile_times_all(&near, laid, scores + h * room + at, 0, rows);
        }
    }
}

// Heads that read the same keys and values, so that each is loaded once. q, out (heads, dim); scores (heads, room).
static inline __attribute__((always_inline)) void attend_heads(
    const float *q, const float *keys, const float *values, float *out, float *scores, const Row *row, const Shape *s,
    int scored, const int heads) {
    const int registers = LANES == 16 || heads <= 2 ? 4 : 2;
    int64_t dim = s->dim, block = s->block, room = room_of(s), length = row->position + 1, i = 0;
    for (int64_t start = 0; start < length && !scored; start += block)
        score_keys(q, keys + row->blocks[start / block] * block * dim, scores + start, room,
                   block < length - start ? block : length - start, dim, heads);
    float total[SHARE];
    for (int h = 0; h < heads; h++)
        total[h] = exponentials(scores + h * room, length, (length + 15) / 16 * 16, 1 / sqrtf((float)dim));
    for (; i + registers * LANES <= dim; i += registers * LANES)
        mix_values(scores, room, values + i, out + i, row, block, dim, total, LANES, heads, registers);
    for (; i < dim; i += LANES) mix_values(scores, room, values + i, out + i, row, block, dim, total, dim - i, heads, 1);
}

enum { PROMPT = 12 };  // tokens whose scores are made at once where all lie in one block: twice VECTORS registers

// One head's keys and values after the other's, for all rows, so that they stay in the cache. A row stays with one thread.
static void attend_rows(const float *qkv, const Layer *layer, const Shape *s, const Row *row, int64_t rows, int64_t threads) {
    int64_t dim = s->dim, group = s->heads / s->kv_heads, passes = (group + SHARE - 1) / SHARE;
    int64_t width = (s->heads + 2 * s->kv_heads) * dim, one_block = s->block == s->max_length && s->block >= ROWS;
    int64_t together = one_block && !layer->key_scales ? PROMPT : 1;
    for (int64_t pass = 0; pass < s->kv_heads * passes; pass++)
#pragma omp for schedule(static) nowait
        for (int64_t begin = 0; begin < rows; begin += together) {
            int64_t end = begin + together < rows ? begin + together : rows, scored = end - begin > 1;
            int64_t kv = pass / passes, first = pass % passes * SHARE, head = kv * group + first;
            int64_t count = group - first < SHARE ? group - first : SHARE, at = kv * s->max_length * dim;
            const float *q = qkv + begin * width + head * dim;
            const float *keys = (float *)layer->keys + at, *values = (float *)layer->values + at;
            float *scores = s->scores + (threads > 1 ? begin : 0) * SHARE * room_of(s);  // one thread uses the same again
            if (scored) score_rows(q, width, keys, scores, s, row + begin, end - begin, count);
            for (int64_t r = begin; r < end; r++, q += width, scores += SHARE * room_of(s)) {
                float *out = s->inner + (r * s->heads + head) * dim;
                if (layer->key_scales) attend_rounded(q, out, scores, layer, s, kv, row[r].position + 1, count);
                else if (count == 1) attend_heads(q, keys, values, out, scores, row + r, s, scored, 1);
                else if (count == 2) attend_heads(q, keys, values, out, scores, row + r, s, scored, 2);
                else if (count == 3) attend_heads(q, keys, values, out, scores, row + r, s, scored, 3);
                else attend_heads(q, keys, values, out, scores, row + r, s, scored, 4);
            }
        }
}

// Tokens of one or several sequences, each attending to all of its own up to itself. qkv (rows, heads + 2 kv_heads, dim).
static void attend(float *qkv, const float *cosine, const float *sine, const Layer *layer, const Shape *s,
                   const Row *row, int64_t rows, int64_t threads) {
    int64_t dim = s->dim, width = (s->heads + 2 * s->kv_heads) * dim;
    for (int64_t r = 0; r < rows; r++)
        store_token(qkv + r * width, cosine + r * dim, sine + r * dim, layer, s, row + r);
    if (threads > 1 && rows > 1) {
#pragma omp parallel num_threads(threads)
        attend_rows(qkv, layer, s, row, rows, threads);
    } else attend_rows(qkv, layer, s, row, rows, threads);
}

static void add(float *x, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

// hidden += attention(norm(hidden)); hidden += mlp(norm(hidden)); layer by layer, for `rows` tokens, each in its sequence.
// hidden (rows, width); cosine, sine (rows, dim). A row's bits do not depend on the others. 0, or -1 without memory.
int64_t decode_layers(const Layer *layer, const Shape *s, float *hidden, const float *cosine, const float *sine,
                  const Row *row, int64_t rows, int64_t threads) {
    int64_t failed = 0;
    for (const Layer *end = layer + s->layers; layer < end; layer++) {
        int64_t width = layer->qkv.in, inner = layer->down.in;
        for (int64_t r = 0; r < rows; r++)
            rms_norm(hidden + r * width, layer->attention_gain, s->narrow + r * width, width, s->eps);
        failed |= packed_linear(&layer->qkv, s->narrow, s->wide, rows, threads);
        attend(s->wide, cosine, sine, layer, s, row, rows, threads);
        failed |= packed_linear(&layer->output, s->inner, s->narrow, rows, threads);
        add(hidden, s->narrow, rows * width);
        for (int64_t r = 0; r < rows; r++)
            rms_norm(hidden + r * width, layer->mlp_gain, s->narrow + r * width, width, s->eps);
        failed |= packed_linear(&layer->gate_up, s->narrow, s->wide, rows, threads);
        for (int64_t r = 0; r < rows; r++) swiglu(s->wide + 2 * r * inner, s->inner + r * inner, inner);
        failed |= packed_linear(&layer->down, s->inner, s->narrow, rows, threads);
        add(hidden, s->narrow, rows * width);
    }
    return failed;
}
