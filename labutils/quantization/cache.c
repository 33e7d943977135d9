// Attention over a cache of int8. Keys and values are rounded as activations are, with a scale for every 64 numbers of a
// position (32 where the head's size is no multiple of 64), and lie like weights, so that both products are kernels.c's:
//
//   score[p] = q . k[p]             the positions are the rows of a weight: tiles of 8 positions
//   out[c]   = sum_p w[p] v[p][c]   the channels are its rows, the positions its inputs: spans of 64 positions
//
// w is e^(score - largest) times the scale of v[p], rounded to 14 bits in two codes: in one of 8 bits, a small w would
// vanish beside a large one. Compiled together with kernels.c and steps.c.

enum { SPAN = 64 };

static int64_t part_of(int64_t dim) { return dim % MAX_BLOCK ? CHUNK : MAX_BLOCK; }

// Code k of position p among the keys, and of channel c among the values: the layout of kernels.c for 8 bits.
static int64_t place(int64_t row, int64_t k, int64_t inputs) {
    return row / ROWS * ROWS * inputs + k / 4 * 32 + row % ROWS * 4 + k % 4;
}

// One head's row into a cache of keys or values. scales: keys (tiles, parts, 8), values (parts, max_length).
static void store_codes(const float *x, uint8_t *codes, float *scales, int64_t p, const Shape *s, int values) {
    int64_t dim = s->dim, part = part_of(dim), parts = dim / part;
    int8_t rounded[dim];
    float its[parts], sums[parts];
    quantize_token(x, dim, part, rounded, its, sums);
    for (int64_t b = 0; b < parts; b++)
        scales[values ? b * s->max_length + p : (p / ROWS * parts + b) * ROWS + p % ROWS] = its[b];
    for (int64_t c = 0; c < dim; c++)
        codes[values ? p / SPAN * SPAN * dim + place(c, p % SPAN, SPAN) : place(p, c, dim)] = rounded[c] + 128;
}

static void store_rounded(const float *key, const float *value, const Layer *layer, const Shape *s, int64_t kv, int64_t p) {
    int64_t at = kv * s->max_length * s->dim, scales = at / part_of(s->dim);
    store_codes(key, (uint8_t *)layer->keys + at, layer->key_scales + scales, p, s, 0);
    store_codes(value, (uint8_t *)layer->values + at, layer->value_scales + scales, p, s, 1);
}

// w = scale (128 high + low), scale = largest / (127 * 128); codes: (high, low), each SPAN.
static void split_weights(const float *w, int8_t *codes, float *scales, float *sums) {
    union { float f; int32_t i; } largest = {0}, v;  // as integers, infinity and NaN sort on top
    for (int p = 0; p < SPAN; p++) {
        v.f = w[p];
        largest.i = v.i > largest.i ? v.i : largest.i;
    }
    float inverse = largest.f > 1e-30f ? 16256 / largest.f : 0;
    int32_t high_sum = 0, low_sum = 0;
    for (int p = 0; p < SPAN; p++) {
        v.f = w[p] * inverse + 12582912.0f;  // rounds, as in quantize_token
        int32_t whole = v.i - 0x4B400000, high = (whole + 64) >> 7, low = whole - 128 * high;
        codes[p] = (int8_t)high, codes[SPAN + p] = (int8_t)low;
        high_sum += (int8_t)high, low_sum += (int8_t)low;
    }
    scales[1] = largest.i >= 0x7f800000 ? NAN : largest.f > 1e-30f ? largest.f / 16256 : 0;
    scales[0] = 128 * scales[1], sums[0] = (float)high_sum, sums[1] = (float)low_sum;
}

// Up to SHARE heads that read the same keys and values. q, out (heads, dim); scores (heads, length).
static void attend_codes(const float *q, const uint8_t *keys, const float *key_scales, const uint8_t *values,
                         const float *value_scales, float *out, float *scores, int64_t length, int64_t heads,
                         const Shape *s) {
    int64_t dim = s->dim, part = part_of(dim), parts = dim / part;
    int8_t codes[TOKENS * (dim > SPAN ? dim : SPAN)];
    float xscales[TOKENS * parts], sums[TOKENS * parts], total[SHARE], scale = 1 / sqrtf((float)dim);
    Activations x = {codes, xscales, sums};
    for (int64_t h = 0; h < heads; h++)
        quantize_token(q + h * dim, dim, part, codes + h * dim, xscales + h * parts, sums + h * parts);
    Weight k = {keys, key_scales, NULL, NULL, dim, length, dim, part, part, 8};
    for (int64_t tile = 0; tile * ROWS < length; tile++) tile_times_all(&k, &x, scores, tile, heads, 8, 0);
    for (int64_t h = 0; h < heads; h++) {
        float *its = scores + h * length, largest = largest_of(its, length);
        f32x8 eight = {0};
        for (int64_t p = 0; p < length; p += 8) {
            f32x8 e = exp8((load8(its + p, length - p, -INFINITY) - largest) * scale);
            eight += e;
            store8(its + p, e, length - p);
        }
        total[h] = sum8(eight);
    }
    static const float ones[MAX_BLOCK] = {[0 ... MAX_BLOCK - 1] = 1};
    memset(out, 0, heads * dim * sizeof(float));
    for (int64_t start = 0; start < length; start += SPAN)
        for (int64_t b = 0; b < parts; b++) {
            float y[TOKENS * MAX_BLOCK];
            for (int64_t h = 0; h < heads; h++) {
                float w[SPAN] = {0};
                for (int64_t p = 0; p < SPAN && start + p < length; p++)
                    w[p] = scores[h * length + start + p] * value_scales[b * s->max_length + start + p];
                split_weights(w, codes + 2 * h * SPAN, xscales + 2 * h, sums + 2 * h);
            }
            Weight v = {values + start * dim + b * part * SPAN, ones, NULL, NULL, SPAN, part, SPAN, SPAN, SPAN, 8};
            for (int64_t tile = 0; tile * ROWS < part; tile++) tile_times_all(&v, &x, y, tile, 2 * heads, 8, 0);
            for (int64_t h = 0; h < heads; h++)
                for (int64_t c = 0; c < part; c++)
                    out[h * dim + b * part + c] += y[2 * h * part + c] + y[(2 * h + 1) * part + c];
        }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t c = 0; c < dim; c++) out[h * dim + c] /= total[h];
}

// All heads of one token. q, out (heads, dim); scores: room for (SHARE, length).
static void attend_rounded(const float *q, float *out, float *scores, const Layer *layer, const Shape *s, int64_t length) {
    int64_t group = s->heads / s->kv_heads, dim = s->dim;
    for (int64_t head = 0, count; head < s->heads; head += count) {
        int64_t at = head / group * s->max_length * dim, scales = at / part_of(dim), left = group - head % group;
        count = left < SHARE ? left : SHARE;
        attend_codes(q + head * dim, (uint8_t *)layer->keys + at, layer->key_scales + scales,
                     (uint8_t *)layer->values + at, layer->value_scales + scales, out + head * dim, scores, length, count, s);
    }
}
