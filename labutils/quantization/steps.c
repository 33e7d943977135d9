// All decoder layers for some tokens of one or several sequences: between the matrices of kernels.c a dozen small steps
// a layer. Called from Python one by one, they cost as much as a third of an int4 model's matrices. Compiled together
// with kernels.c.

static inline void store8(float *x, f32x8 v, int64_t n) {
    if (n >= 8) memcpy(x, &v, sizeof v);
    else memcpy(x, &v, n * sizeof(float));
}

static float largest_of(const float *x, int64_t n) {  // NaN does not count
    f32x8 eight = (f32x8){0} - INFINITY;
    for (int64_t i = 0; i < n; i += 8) {
        f32x8 v = load8(x + i, n - i, -INFINITY);
        i32x8 larger = v > eight;
        eight = (f32x8)(((i32x8)v & larger) | ((i32x8)eight & ~larger));
    }
    for (int i = 1; i < 8; i++) eight[0] = eight[i] > eight[0] ? eight[i] : eight[0];
    return eight[0];
}

// e^x for x <= 0: x = k ln 2 + r, |r| <= ln 2 / 2, e^x = 2^k e^r, and e^r by its series up to r^6 (error below 2e-7).
static inline f32x8 exp8(f32x8 x) {
    f32x8 k = x * 1.44269504f + 12582912.0f;  // rounds, as in quantize_token
    i32x8 power = ((i32x8)k - 0x4B400000 + 127) << 23;
    k -= 12582912.0f;
    f32x8 r = x - k * 0.693359375f + k * 2.12194440e-4f;  // ln 2 in two parts: the first times k is exact
    f32x8 e = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    return (f32x8)((i32x8)(e * (f32x8)power) & ~(x <= -87.0f));  // so: NaN stays NaN
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
    for (int64_t i = 0; i < n; i += 8) {
        f32x8 gate = load8(gate_up + i, n - i, 0), up = load8(gate_up + n + i, n - i, 0);
        i32x8 positive = gate > 0;
        f32x8 e = exp8((f32x8)((i32x8)gate | INT32_MIN));  // e^-|gate|: never overflows
        f32x8 share = (f32x8)(((i32x8)((f32x8){0} + 1) & positive) | ((i32x8)e & ~positive));
        store8(y + i, gate * share / (1 + e) * up, n - i);
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

// score[j] = q . key[j] for `count` keys, one behind the other; eight at a time, for an addition waits for the one before.
static void score_keys(const float *q, const float *keys, float *scores, int64_t count, int64_t dim) {
    int64_t j = 0;
    for (; j + 8 <= count; j += 8, keys += 8 * dim) {
        f32x8 dots[8] = {0};
        for (int64_t i = 0; i < dim; i += 8)
            for (int n = 0; n < 8; n++) dots[n] += load8(q + i, 8, 0) * load8(keys + n * dim + i, 8, 0);
        store8(scores + j, sum8_of_8(dots), 8);
    }
    for (; j < count; j++, keys += dim) {
        f32x8 dot = {0};
        for (int64_t i = 0; i < dim; i += 8) dot += load8(q + i, 8, 0) * load8(keys + i, 8, 0);
        scores[j] = sum8(dot);
    }
}

// 8 * eights numbers of the mixed values, from `values` on
static inline __attribute__((always_inline)) void mix_values(
    const float *weights, const float *values, float *out, const Row *row, int64_t block, int64_t dim, float total,
    const int eights) {
    f32x8 mixed[8] = {0};
    for (int64_t start = 0, length = row->position + 1; start < length; start += block) {
        const float *near = values + row->blocks[start / block] * block * dim;
        for (int64_t j = start; j < length && j < start + block; j++, near += dim)
            for (int n = 0; n < eights; n++) mixed[n] += weights[j] * load8(near + 8 * n, 8, 0);
    }
    for (int n = 0; n < eights; n++) store8(out + 8 * n, mixed[n] / total, 8);
}

static void attend_head(const float *q, const float *keys, const float *values, float *out, float *scores, const Row *row,
                        int64_t block, int64_t dim) {
    int64_t length = row->position + 1, i = 0;
    for (int64_t start = 0; start < length; start += block)
        score_keys(q, keys + row->blocks[start / block] * block * dim, scores + start,
                   block < length - start ? block : length - start, dim);
    float largest = largest_of(scores, length), scale = 1 / sqrtf((float)dim);
    f32x8 sums = {0};
    for (int64_t j = 0; j < length; j += 8) {
        f32x8 e = exp8((load8(scores + j, length - j, -INFINITY) - largest) * scale);
        sums += e;
        store8(scores + j, e, length - j);
    }
    float total = sum8(sums);
    for (; i + 64 <= dim; i += 64) mix_values(scores, values + i, out + i, row, block, dim, total, 8);
    for (; i < dim; i += 8) mix_values(scores, values + i, out + i, row, block, dim, total, 1);
}

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

// The same over a cache of int8: see cache.c.
static void store_rounded(const float *key, const float *value, const Layer *layer, const Shape *s, int64_t kv, int64_t p);
static void attend_rounded(const float *q, float *out, float *scores, const Layer *layer, const Shape *s, int64_t length);

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

// Tokens of one or several sequences, each attending to all of its own up to itself. qkv (rows, heads + 2 kv_heads, dim).
static void attend(float *qkv, const float *cosine, const float *sine, const Layer *layer, const Shape *s,
                   const Row *row, int64_t rows, int64_t threads) {
    int64_t dim = s->dim, width = (s->heads + 2 * s->kv_heads) * dim;
    for (int64_t r = 0; r < rows; r++)
        store_token(qkv + r * width, cosine + r * dim, sine + r * dim, layer, s, row + r);
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t r = 0; r < rows; r++) {
        float *out = s->inner + r * s->heads * dim, *scores = s->scores + r * SHARE * s->max_length;
        if (layer->key_scales) attend_rounded(qkv + r * width, out, scores, layer, s, row[r].position + 1);
        else for (int64_t head = 0; head < s->heads; head++) {
            int64_t at = head * s->kv_heads / s->heads * s->max_length * dim;
            attend_head(qkv + r * width + head * dim, (float *)layer->keys + at, (float *)layer->values + at,
                        out + head * dim, scores, row + r, s->block, dim);
        }
    }
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
