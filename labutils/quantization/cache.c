// Attention over a cache of int8. Keys and values are rounded as activations are, with a scale for every 64 numbers of a
// position (32 where the head's size is no multiple of 64), and both products are sums of whole numbers:
//
//   score[p] = q . k[p]             the positions lie side by side as the rows of a weight do: tiles of 16
//   out[c]   = sum_p w[p] v[p][c]   the channels do: tiles of 16 for every span of 64 positions
//
// w is e^(score - largest) times the scale of v[p], rounded to 14 bits: of 8, a small w would vanish beside a large one.
// An instruction takes 8, so w = 128 high + low is two products. Compiled together with kernels.c and steps.c.

enum { SPAN = 64, TILE = 16 };

static int64_t part_of(int64_t dim) { return dim % MAX_BLOCK ? CHUNK : MAX_BLOCK; }

// sum[r] += code[r][k] * x[k] for 4 inputs k of LANES rows: of a tile, or of its half.
static inline ints dot4(ints sum, const uint8_t *codes, const int8_t *x) {
#ifdef WIDE
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(codes), repeat16(x));
#elif defined(DPBUSD)
    return (ints)DPBUSD((__m256i)sum, _mm256_loadu_si256((const __m256i *)codes), repeat(x));
#elif defined(__AVX2__) && !defined(SCALAR)
    __m256i code = _mm256_loadu_si256((const __m256i *)codes) ^ _mm256_set1_epi8(-128);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(repeat(x), code));
    return sum + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(SCALAR)
    int32x4_t halves[2];
    memcpy(halves, &sum, sizeof sum);
    for (int i = 0; i < 2; i++) {
        int8x16_t code = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + 16 * i), vdupq_n_u8(128)));
        halves[i] = vdotq_s32(halves[i], code, repeat(x));
    }
    memcpy(&sum, halves, sizeof sum);
    return sum;
#else
    for (int r = 0; r < LANES; r++)
        for (int k = 0; k < 4; k++) sum[r] += codes[4 * r + k] * x[k];
    return sum;
#endif
}

// Where code k of row r lies: 4 inputs of each of 16 rows, then the next 4.
static int64_t place(int64_t r, int64_t k, int64_t inputs) {
    return r / TILE * TILE * inputs + k / 4 * 4 * TILE + r % TILE * 4 + k % 4;
}

// One head's row into a cache of keys or values. scales: keys (tiles, parts, 16), values (parts, max_length).
static void store_codes(const float *x, uint8_t *codes, float *scales, int64_t p, const Shape *s, int values) {
    int64_t dim = s->dim, part = part_of(dim), parts = dim / part;
    int8_t rounded[dim];
    float its[parts], sums[parts];
    quantize_token(x, dim, part, 1, 1, rounded, its, sums);
    for (int64_t b = 0; b < parts; b++)
        scales[values ? b * s->max_length + p : (p / TILE * parts + b) * TILE + p % TILE] = its[b];
    for (int64_t c = 0; c < dim; c++)
        codes[values ? p / SPAN * SPAN * dim + place(c, p % SPAN, SPAN) : place(p, c, dim)] = rounded[c] + 128;
}

static void store_rounded(const float *key, const float *value, const Layer *layer, const Shape *s, int64_t kv, int64_t p) {
    int64_t at = kv * s->max_length * s->dim, scales = at / part_of(s->dim);
    store_codes(key, (uint8_t *)layer->keys + at, layer->key_scales + scales, p, s, 0);
    store_codes(value, (uint8_t *)layer->values + at, layer->value_scales + scales, p, s, 1);
}

// score[h][p] = q[h] . k[p] for `count` positions, whole spans.
static inline __attribute__((always_inline)) void score_codes(
    const Activations *q, const uint8_t *keys, const float *key_scales, float *scores, int64_t room, int64_t count,
    int64_t dim, const int heads) {
    const int64_t part = part_of(dim), parts = dim / part;
    for (int64_t p = 0; p < count; p += LANES) {
        floats sum[SHARE] = {0};
        for (int64_t b = 0; b < parts; b++) {
            ints dot[SHARE] = {0};
            for (int64_t k = b * part; k < (b + 1) * part; k += 4)
                for (int h = 0; h < heads; h++) dot[h] = dot4(dot[h], keys + place(p, k, dim), q->codes + h * dim + k);
            floats scale = load(key_scales + (p / TILE * parts + b) * TILE + p % TILE, LANES, 0);
            for (int h = 0; h < heads; h++)
                sum[h] += (scale * q->scales[h * parts + b])
                        * (__builtin_convertvector(dot[h], floats) - q->sums[h * parts + b]);
        }
        for (int h = 0; h < heads; h++) store(scores + h * room + p, sum[h], LANES);
    }
}

// w = e * scale for a span to whole numbers, largest 127 * 128, as 128 high + low; codes: (high, low), each SPAN.
// Returns their scale, and their sum.
static inline float round_weights(const float *e, const float *scales, int8_t *codes, int32_t *sum) {
    union { float f[SPAN]; int32_t i[SPAN]; } w;
    union { float f; int32_t i; } largest = {0};  // as integers, infinity and NaN sort on top
    for (int p = 0; p < SPAN; p++) w.f[p] = e[p] * scales[p];
    for (int p = 0; p < SPAN; p++) largest.i = w.i[p] > largest.i ? w.i[p] : largest.i;
    float inverse = largest.f > 1e-30f ? 16256 / largest.f : 0;
    *sum = 0;
    for (int p = 0; p < SPAN; p++) {
        w.f[p] = w.f[p] * inverse + 12582912.0f;  // rounds, as in quantize_token
        w.i[p] -= 0x4B400000;
        *sum += w.i[p];
    }
    for (int p = 0; p < SPAN; p++) codes[p] = (int8_t)(w.i[p] >> 7), codes[SPAN + p] = (int8_t)(w.i[p] & 127);
    return largest.i >= 0x7f800000 ? NAN : largest.f > 1e-30f ? largest.f / 16256 : 0;
}

// out[h][c] += sum over a span of e[h][p] * v[p][c], for the channels of one part.
static inline __attribute__((always_inline)) void mix_span(
    const float *e, int64_t room, const uint8_t *values, const float *value_scales, float *out, int64_t dim, int64_t part,
    const int heads) {
    int8_t codes[2 * SHARE * SPAN];
    float scale[SHARE];
    int32_t sum[SHARE];
    for (int h = 0; h < heads; h++) scale[h] = round_weights(e + h * room, value_scales, codes + 2 * h * SPAN, sum + h);
    for (int64_t c = 0; c < part; c += LANES) {
        ints dot[2 * SHARE] = {0};
        for (int64_t p = 0; p < SPAN; p += 4)
            for (int t = 0; t < 2 * heads; t++) dot[t] = dot4(dot[t], values + place(c, p, SPAN), codes + t * SPAN + p);
        for (int h = 0; h < heads; h++) {
            ints whole = (dot[2 * h] << 7) + dot[2 * h + 1] - (128 - CENTRED) * sum[h];
            float *to = out + h * dim + c;
            store(to, load(to, LANES, 0) + scale[h] * __builtin_convertvector(whole, floats), LANES);
        }
    }
}

// Heads that read the same keys and values. q, out (heads, dim); scores (heads, max_length).
static inline __attribute__((always_inline)) void attend_codes(
    const float *q, const uint8_t *keys, const float *key_scales, const uint8_t *values, const float *value_scales,
    float *out, float *scores, int64_t length, const Shape *s, const int heads) {
    int64_t dim = s->dim, part = part_of(dim), parts = dim / part, room = s->max_length;
    int64_t count = (length + SPAN - 1) / SPAN * SPAN;
    int8_t codes[heads * dim];
    float xscales[heads * parts], sums[heads * parts], total[SHARE];
    Activations x = {codes, xscales, sums};
    for (int h = 0; h < heads; h++)
        quantize_token(q + h * dim, dim, part, 1, 128 - CENTRED, codes + h * dim, xscales + h * parts, sums + h * parts);
    score_codes(&x, keys, key_scales, scores, room, count, dim, heads);
    for (int h = 0; h < heads; h++) total[h] = exponentials(scores + h * room, length, count, 1 / sqrtf((float)dim));
    memset(out, 0, heads * dim * sizeof(float));
    for (int64_t start = 0; start < count; start += SPAN)
        for (int64_t b = 0; b < parts; b++) {
            float its[SPAN] = {0};  // behind the last position: what was forgotten must not count
            memcpy(its, value_scales + b * room + start, (length - start < SPAN ? length - start : SPAN) * sizeof(float));
            mix_span(scores + start, room, values + start * dim + b * part * SPAN, its, out + b * part, dim, part, heads);
        }
    for (int h = 0; h < heads; h++)
        for (int64_t c = 0; c < dim; c++) out[h * dim + c] /= total[h];
}

static void attend_rounded(const float *q, float *out, float *scores, const Layer *layer, const Shape *s, int64_t kv,
                           int64_t length, int64_t heads) {
    int64_t at = kv * s->max_length * s->dim, scales = at / part_of(s->dim);
    const uint8_t *keys = (uint8_t *)layer->keys + at, *values = (uint8_t *)layer->values + at;
    const float *of_keys = layer->key_scales + scales, *of_values = layer->value_scales + scales;
    if (heads == 1) attend_codes(q, keys, of_keys, values, of_values, out, scores, length, s, 1);
    if (heads == 2) attend_codes(q, keys, of_keys, values, of_values, out, scores, length, s, 2);
    if (heads == 3) attend_codes(q, keys, of_keys, values, of_values, out, scores, length, s, 3);
    if (heads == 4) attend_codes(q, keys, of_keys, values, of_values, out, scores, length, s, 4);
}
