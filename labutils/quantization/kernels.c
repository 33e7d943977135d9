// Matrix products with 8- or 4-bit weights on a CPU: y = x W^T + b, W never unpacked into floats.
//
//   W[r][k] = scale[r][g] * (code[r][k] - zero[r][g])      g = k / group: each group of inputs has its own scale
//   x[t][k] ~ xscale[t][b] * xcode[t][k]                   b = k / block: activations are rounded to int8 as they come
//   y[t][r] = sum over b of (scale * xscale) * (sum over k in b of code * xcode  -  zero * sum over k in b of xcode)
//
// The inner sum is one of integers, so its order does not matter: vector units may take it as they like. The outer sum
// is one of floats, taken block by block, and every ISA, thread count and batch size gets the same bits.
//
// Layout. Eight rows travel together (a tile): a 32-byte vector holds 4 inputs of each of 8 rows,
//   [r0: k0 k1 k2 k3][r1: k0 k1 k2 k3] ... [r7: k0 k1 k2 k3]
// so 4 inputs of x, repeated 8 times, meet 8 rows at once, and lane r of the result belongs to row r: nothing is ever
// summed across lanes, and the weights are read in the order in which they lie. A chunk is 32 inputs of 8 rows:
//   8 bits: 8 such vectors;   4 bits: 4, vector i holding inputs 4i.. in its low halves and 4i+16.. in its high ones.
// Codes are unsigned (0..255 or 0..15). Rows are padded to 8, inputs to whole blocks, both with zeros.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float f32x8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i32x8 __attribute__((vector_size(32), aligned(4)));

// Up to TOKENS share each weight that is loaded; AHEAD: bytes fetched before they are needed. Found by measuring, as was
// how many tiles a single token meets at once.
enum { ROWS = 8, CHUNK = 32, MAX_BLOCK = 64, TOKENS = 8, MAX_STREAMS = 4, AHEAD = 2048 };
static inline int streams_of(int64_t bits) { return bits == 8 ? 2 : MAX_STREAMS; }

typedef struct {
    const uint8_t *codes;
    const float *scales, *zeros;              // (tiles, groups, 8); zeros NULL: 128 or 8, the middle
    const float *bias;                        // (out), or NULL
    int64_t in, out, padded, group, block, bits;  // padded: inputs in whole blocks; group: a multiple of block
} Weight;

typedef struct {
    // (tokens, padded), as a tile reads them: of TOKENS tokens 4 codes each, then 4 codes each of what is behind these;
    // and so their scales and sums, (tokens, blocks). For weights in floats the inputs, as `lay_inputs` lays them.
    int8_t *codes;
    float *scales, *sums;  // sums: of a block's codes, times the middle where that is every zero point
} Activations;

// ---- chunk: dot[t][row] += sum over 32 inputs of code[row][k] * x[t][k], for each instruction set -------------------
// Where signed codes multiply faster, an 8-bit code counts from its middle, CENTRED, here and in the zero point below.

#if defined(__AVX2__) && !defined(SCALAR)
#include <immintrin.h>
const char *const instruction_set =
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define DPBUSD _mm256_dpbusd_epi32
    "AVX-512 with VNNI";
#define WIDE  // several tokens meet two tiles at once
#elif defined(__AVXVNNI__)
#define DPBUSD _mm256_dpbusd_avx_epi32
    "AVX2 with VNNI";
#else
    "AVX2";
#endif

static inline __m256i repeat(const int8_t *x) {  // 4 inputs, 8 times
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

#ifdef DPBUSD
// One instruction multiplies 32 unsigned bytes with 32 signed ones and adds groups of 4 into 8 int32.
static inline __attribute__((always_inline)) void chunk(
    i32x8 *dot, const uint8_t *w, const int8_t *x, const int tokens, const int bits) {
    const __m256i half = _mm256_set1_epi8(15);
    __m256i sums[2][TOKENS] = {0};  // each chunk's own, and two: an addition waits five cycles for the one before it
    for (int i = 0; i < bits; i++) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(w + 32 * i));
        __m256i low = v & half, high = _mm256_srli_epi16(v, 4) & half;
        for (int t = 0; t < tokens; t++) {
            const int8_t *xt = x + 4 * (i * tokens + t);
            __m256i *even = &sums[0][t], *odd = &sums[tokens > 1 ? 0 : 1][t];
            if (bits == 8 && i % 2) *odd = DPBUSD(*odd, v, repeat(xt));
            if (bits == 8 && i % 2 == 0) *even = DPBUSD(*even, v, repeat(xt));
            if (bits == 4) *even = DPBUSD(*even, low, repeat(xt));
            if (bits == 4) *odd = DPBUSD(*odd, high, repeat(xt + 16 * tokens));
        }
    }
    for (int t = 0; t < tokens; t++) dot[t] += (i32x8)_mm256_add_epi32(sums[0][t], sums[1][t]);
}
#else
// maddubs multiplies 32 unsigned bytes with 32 signed ones and adds pairs into 16 int16, which SATURATE.
// 4 bits: a code up to 15 times 127, 16 products in a lane: 30480 fits, so int16 holds a whole chunk.
// 8 bits: of a centred code the size, up to 128, times x with the code's sign, two products: 32512 just fits.
#define CENTRED 128
static inline __attribute__((always_inline)) void chunk(
    i32x8 *dot, const uint8_t *w, const int8_t *x, const int tokens, const int bits) {
    const __m256i half = _mm256_set1_epi8(15), centre = _mm256_set1_epi8(-128), one = _mm256_set1_epi16(1);
    __m256i sums[TOKENS] = {0};
    for (int i = 0; i < bits; i++) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(w + 32 * i));
        __m256i low = v & half, high = _mm256_srli_epi16(v, 4) & half;
        __m256i code = v ^ centre, size = _mm256_abs_epi8(code);
        for (int t = 0; t < tokens; t++) {
            const int8_t *xt = x + 4 * (i * tokens + t);
            if (bits == 8) {  // madd: 16 int16 times 1, pairs added into 8 int32
                __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(repeat(xt), code));
                dot[t] += (i32x8)_mm256_madd_epi16(pairs, one);
            } else {
                sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(low, repeat(xt)));
                sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(high, repeat(xt + 16 * tokens)));
            }
        }
    }
    for (int t = 0; t < tokens && bits == 4; t++) dot[t] += (i32x8)_mm256_madd_epi16(sums[t], one);
}
#endif

#elif defined(__ARM_FEATURE_DOTPROD) && !defined(SCALAR)
#include <arm_neon.h>
const char *const instruction_set = "NEON with dot products";

// vdotq_s32 multiplies 16 signed bytes with 16 signed ones and adds groups of 4 into 4 int32: half a tile.
#define CENTRED 128
static inline int8x16_t repeat(const int8_t *x) {  // 4 inputs, 4 times
    int32_t four;
    memcpy(&four, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

static inline __attribute__((always_inline)) void chunk(
    i32x8 *dot, const uint8_t *w, const int8_t *x, const int tokens, const int bits) {
    for (int t = 0; t < tokens; t++) {
        int32x4_t sums[2];
        memcpy(sums, dot + t, sizeof sums);
        for (int i = 0; i < bits; i++) {
            const int8_t *xt = x + 4 * (i * tokens + t);
            for (int rows = 0; rows < 2; rows++) {
                uint8x16_t v = vld1q_u8(w + 32 * i + 16 * rows);
                if (bits == 8) {
                    int8x16_t code = vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(128)));
                    sums[rows] = vdotq_s32(sums[rows], code, repeat(xt));
                } else {
                    int8x16_t low = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
                    int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
                    sums[rows] = vdotq_s32(sums[rows], low, repeat(xt));
                    sums[rows] = vdotq_s32(sums[rows], high, repeat(xt + 16 * tokens));
                }
            }
        }
        memcpy(dot + t, sums, sizeof sums);
    }
}

#else
const char *const instruction_set = "plain C";

static inline __attribute__((always_inline)) void chunk(
    i32x8 *dot, const uint8_t *w, const int8_t *x, const int tokens, const int bits) {
    for (int t = 0; t < tokens; t++)
        for (int k = 0; k < CHUNK; k++)
            for (int r = 0; r < ROWS; r++) {
                uint8_t byte = w[k / 4 % bits * 32 + 4 * r + k % 4];
                int code = bits == 8 ? byte : k < 16 ? byte & 15 : byte >> 4;
                dot[t][r] += code * x[(k / 4 * tokens + t) * 4 + k % 4];
            }
}
#endif

#ifndef CENTRED
#define CENTRED 0
#endif
#ifdef WIDE
enum { TWO_TILES = 1 };
#else
enum { TWO_TILES = 0 };
#endif

// ---- a tile: 8 rows times 1 to 8 tokens -------------------------------------------------------------------------

// Every `step`-th of `sum` is a token's.
static inline __attribute__((always_inline)) void store_rows(
    const Weight *w, const f32x8 *sum, int step, float *y, int64_t tile, int64_t token, const int tokens) {
    const int64_t first = tile * ROWS, rows = w->out - first;
    f32x8 bias = {0};
    for (int64_t r = 0; w->bias && r < ROWS && r < rows; r++) bias[r] = w->bias[first + r];
    for (int t = 0; t < tokens; t++) {
        f32x8 made;
        memcpy(&made, sum + t * step, sizeof made);  // of 16 numbers or 8: a compiler may tell their types apart
        made += bias;
        if (rows >= ROWS) memcpy(y + (token + t) * w->out + first, &made, sizeof made);
        else memcpy(y + (token + t) * w->out + first, &made, rows * sizeof(float));
    }
}

static inline __attribute__((always_inline)) void tile_times_tokens(
    const Weight *w, const Activations *x, float *y, int64_t tile, int64_t token, const int tokens, const int bits) {
    const int64_t blocks = w->padded / w->block, groups = (w->padded + w->group - 1) / w->group;
    const uint8_t *codes = w->codes + tile * w->padded * bits;
    const int8_t *xcodes = x->codes + token * w->padded;
    const float *xscales = x->scales + token * blocks, *xsums = x->sums + token * blocks;
    f32x8 sum[TOKENS] = {0};
    for (int64_t g = 0, b = 0; g < groups; g++) {
        f32x8 scale = *(const f32x8 *)(w->scales + (tile * groups + g) * ROWS);
        f32x8 none = {0}, zero = none;
        if (w->zeros) zero = *(const f32x8 *)(w->zeros + (tile * groups + g) * ROWS) - (bits == 8 ? (float)CENTRED : 0.0f);
        for (; b < blocks && b * w->block < (g + 1) * w->group; b++) {
            i32x8 dot[TOKENS] = {0};
            for (int64_t k = 0; k < w->block; k += CHUNK, codes += CHUNK * bits) {
                for (int line = 0; line < CHUNK * bits; line += 64) __builtin_prefetch(codes + AHEAD + line);
                chunk(dot, codes, xcodes + (b * w->block + k) * tokens, tokens, bits);
            }
            for (int64_t t = 0, at = b * tokens; t < tokens; t++, at++) {
                f32x8 whole = __builtin_convertvector(dot[t], f32x8) - (w->zeros ? zero * xsums[at] : none + xsums[at]);
                sum[t] += (scale * xscales[at]) * whole;
            }
        }
    }
    store_rows(w, sum, 1, y, tile, token, tokens);
}

// ---- two tiles: 16 rows times 1 to 8 tokens, where a register holds 64 bytes ------------------------------------------

#ifdef WIDE
typedef float f32x16 __attribute__((vector_size(64), aligned(4)));

static inline __m512i pair(const void *one, const void *other) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(one)), _mm256_loadu_si256(other), 1);
}

static inline __m512i repeat16(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

// Half the instructions of two tiles, each after the other. Tile i goes with tile i + half: both are read front to back.
// Of a prompt, TOKENS tokens take a turn at these two tiles, and each turn fetches its share of the next two.
static inline __attribute__((always_inline)) void pair_times_tokens(
    const Weight *w, const Activations *x, float *y, int64_t tile, int64_t token, int64_t turns,
    const int tokens, const int bits) {
    const int64_t blocks = w->padded / w->block, groups = (w->padded + w->group - 1) / w->group;
    const int64_t tiles = (w->out + ROWS - 1) / ROWS, half = (tiles + 1) / 2, apart = tile + half < tiles ? half : 0;
    const uint8_t *codes = w->codes + tile * w->padded * bits, *others = codes + apart * w->padded * bits;
    const int8_t *xcodes = x->codes + token * w->padded;
    const float *xscales = x->scales + token * blocks, *xsums = x->sums + token * blocks;
    const __m512i low_half = _mm512_set1_epi8(15);
    f32x16 sum[TOKENS] = {0};
    const int64_t ahead = turns > 1 ? w->padded * bits : AHEAD;
    const uint8_t *next = codes + ahead + token / TOKENS * 64;
    for (int t = 0; t < 2 * tokens; t++)  // what will be written lies far apart: a row of y
        __builtin_prefetch(y + (token + t / 2) * w->out + (tile + t % 2 * apart) * ROWS, 1);
    for (int64_t g = 0, b = 0; g < groups; g++) {
        const int64_t at = (tile * groups + g) * ROWS, there = at + apart * groups * ROWS;
        f32x16 scale = (f32x16)pair(w->scales + at, w->scales + there);
        const f32x16 none = {0}, zero = w->zeros ? (f32x16)pair(w->zeros + at, w->zeros + there) : none;
        for (; b < blocks && b * w->block < (g + 1) * w->group; b++) {
            __m512i dot[TOKENS] = {0};
            for (const uint8_t *end = codes + ahead + w->block * bits; next < end; next += turns * 64) {
                __builtin_prefetch(next, 0, 2);
                __builtin_prefetch(next + (others - codes), 0, 2);
            }
            for (int64_t k = 0; k < w->block; k += CHUNK, codes += CHUNK * bits, others += CHUNK * bits) {
                const int8_t *near = xcodes + (b * w->block + k) * tokens;
                for (int i = 0; i < bits; i++) {
                    __m512i v = pair(codes + 32 * i, others + 32 * i), low = bits == 8 ? v : _mm512_and_si512(v, low_half);
                    __m512i high = _mm512_and_si512(_mm512_srli_epi16(v, 4), low_half);
                    for (int t = 0; t < tokens; t++)
                        dot[t] = _mm512_dpbusd_epi32(dot[t], low, repeat16(near + 4 * (i * tokens + t)));
                    for (int t = 0; t < tokens && bits == 4; t++)
                        dot[t] = _mm512_dpbusd_epi32(dot[t], high, repeat16(near + 4 * ((i + 4) * tokens + t)));
                }
            }
            for (int64_t t = 0, i = b * tokens; t < tokens; t++, i++) {
                f32x16 whole = (f32x16)_mm512_cvtepi32_ps(dot[t]) - (w->zeros ? zero * xsums[i] : none + xsums[i]);
                sum[t] += (scale * xscales[i]) * whole;
            }
        }
    }
    store_rows(w, (const f32x8 *)sum, 2, y, tile, token, tokens);
    if (apart) store_rows(w, (const f32x8 *)sum + 1, 2, y, tile + apart, token, tokens);
}

// One token meets some tiles, each read front to back: its inputs are spread over registers once for all. A vector
// holds 8 inputs of 8 rows, so a row has two sums, one in each half of a register. 4 bits: the high halves stay where they
// are in their bytes, so their sum is 16 times too large, exactly. A tile beyond the last is the first again, and not stored.
// Read so, the CPU fetches ahead by itself; asking it to made this loop slower.
static inline __attribute__((always_inline)) void tiles_times_token(
    const Weight *w, const Activations *x, float *y, int64_t tile, int64_t apart, const int bits) {
    const int streams = streams_of(bits);
    const int64_t blocks = w->padded / w->block, groups = (w->padded + w->group - 1) / w->group;
    const int64_t tiles = (w->out + ROWS - 1) / ROWS;
    const __m512i low_half = _mm512_set1_epi8(15), ones = _mm512_set1_epi32(1);
    __m512i places[4] = {_mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1)};  // 8 times 0, 8 times 1
    for (int i = 1; i < 4; i++) places[i] = _mm512_add_epi32(places[i - 1], _mm512_add_epi32(ones, ones));
    int64_t at[MAX_STREAMS];
    f32x8 sum[MAX_STREAMS] = {0};
    for (int j = 0; j < streams; j++) at[j] = tile + j * apart < tiles ? tile + j * apart : tile;
    for (int64_t g = 0, b = 0; g < groups; g++) {
        f32x8 scale[MAX_STREAMS], zero[MAX_STREAMS] = {0};
        for (int j = 0; j < streams; j++) {
            scale[j] = *(const f32x8 *)(w->scales + (at[j] * groups + g) * ROWS);
            if (w->zeros) zero[j] = *(const f32x8 *)(w->zeros + (at[j] * groups + g) * ROWS);
        }
        for (; b < blocks && b * w->block < (g + 1) * w->group; b++) {
            __m512i dot[MAX_STREAMS] = {0}, high[MAX_STREAMS] = {0};
            for (int64_t k = b * w->block; k < (b + 1) * w->block; k += CHUNK) {
                __m512i inputs = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(x->codes + k))), spread[4];
                for (int i = 0; i < 4; i++) spread[i] = _mm512_permutexvar_epi32(places[i], inputs);
                for (int j = 0; j < streams; j++)
                    for (int i = 0; i < bits / 2; i++) {
                        __m512i v = _mm512_loadu_si512(w->codes + (at[j] * w->padded + k) * bits + 64 * i);
                        dot[j] = _mm512_dpbusd_epi32(dot[j], bits == 8 ? v : _mm512_and_si512(v, low_half), spread[i]);
                        if (bits == 4)
                            high[j] = _mm512_dpbusd_epi32(high[j], _mm512_andnot_si512(low_half, v), spread[i + 2]);
                    }
            }
            for (int j = 0; j < streams; j++) {
                if (bits == 4) dot[j] = _mm512_add_epi32(dot[j], _mm512_srai_epi32(high[j], 4));
                __m256i both = _mm256_add_epi32(_mm512_castsi512_si256(dot[j]), _mm512_extracti64x4_epi64(dot[j], 1));
                f32x8 offset = w->zeros ? zero[j] * x->sums[b] : (f32x8){0} + x->sums[b];
                sum[j] += (scale[j] * x->scales[b]) * ((f32x8)_mm256_cvtepi32_ps(both) - offset);
            }
        }
    }
    for (int j = 0; j < streams; j++)
        if (tile + j * apart < tiles) store_rows(w, sum + j, 1, y, at[j], 0, 1);
}
#endif

static inline __attribute__((always_inline)) void rows_times_tokens(
    const Weight *w, const Activations *x, float *y, int64_t tile, int64_t token, int64_t turns, const int tokens,
    const int bits, const int wide) {
#ifdef WIDE
    if (wide) pair_times_tokens(w, x, y, tile, token, turns, tokens, bits);
    else
#endif
        tile_times_tokens(w, x, y, tile, token, tokens, bits);
}

static inline __attribute__((always_inline)) void tile_times_all(
    const Weight *w, const Activations *x, float *y, int64_t tile, int64_t tokens, const int bits, const int wide) {
    int64_t t = 0, turns = (tokens + TOKENS - 1) / TOKENS;
    for (; t + TOKENS <= tokens; t += TOKENS) rows_times_tokens(w, x, y, tile, t, turns, TOKENS, bits, wide);
    switch (tokens - t) {  // each count compiled apart, so that the rest shares one pass over the weights as well
        case 1: rows_times_tokens(w, x, y, tile, t, turns, 1, bits, wide); break;
        case 2: rows_times_tokens(w, x, y, tile, t, turns, 2, bits, wide); break;
        case 3: rows_times_tokens(w, x, y, tile, t, turns, 3, bits, wide); break;
        case 4: rows_times_tokens(w, x, y, tile, t, turns, 4, bits, wide); break;
        case 5: rows_times_tokens(w, x, y, tile, t, turns, 5, bits, wide); break;
        case 6: rows_times_tokens(w, x, y, tile, t, turns, 6, bits, wide); break;
        case 7: rows_times_tokens(w, x, y, tile, t, turns, 7, bits, wide); break;
    }
}

// ---- activations ---------------------------------------------------------------------------------------------------

// One token to int8, block by block: scale = max|x| / 127, code = round(x / scale), ties to even.
// A block with infinity or NaN gets the scale NaN, and so do all results; one below 1e-30 counts as zeros.
// Every `apart`-th 4 codes, scale and sum are the token's.
static void quantize_token(
    const float *x, int64_t in, int64_t block, int64_t apart, float middle, int8_t *codes, float *scales, float *sums) {
    for (; in > 0; in -= block, x += block, codes += block * apart, scales += apart, sums += apart) {
        union { float f[MAX_BLOCK]; int32_t i[MAX_BLOCK]; } v;
        if (in >= MAX_BLOCK && block == MAX_BLOCK) memcpy(v.f, x, sizeof v);
        else for (int64_t k = 0; k < MAX_BLOCK; k++) v.f[k] = k < block && k < in ? x[k] : 0;
        union { int32_t i; float f; } largest = {0};  // as integers, |x| sorts with infinity and NaN on top
        for (int k = 0; k < MAX_BLOCK; k++) {
            int32_t size = v.i[k] & 0x7fffffff;
            largest.i = size > largest.i ? size : largest.i;
        }
        float inverse = largest.f > 1e-30f ? 127.0f / largest.f : 0.0f;
        uint32_t sum = 0;  // wraps around where numbers are not finite
        for (int k = 0; k < MAX_BLOCK; k++) {  // 1.5 * 2^23 has no bits left for a fraction: adding it rounds
            v.f[k] = v.f[k] * inverse + 12582912.0f;
            v.i[k] -= 0x4B400000;
            sum += (uint32_t)v.i[k];
        }
        int8_t rounded[MAX_BLOCK];
        for (int k = 0; k < MAX_BLOCK; k++) rounded[k] = (int8_t)v.i[k];
        for (int k = 0; k < block; k += 4) memcpy(codes + k * apart, rounded + k, 4);
        *scales = largest.i >= 0x7f800000 ? NAN : largest.f > 1e-30f ? largest.f / 127.0f : 0.0f;
        *sums = middle * (float)(int32_t)sum;
    }
}

// ---- float32 -------------------------------------------------------------------------------------------------------

// Weights that stay floats: bits = 32, and codes points to (out, in) floats. The bits of a float sum depend on its order,
// so every ISA, thread count and batch size takes this one:
//
//   lane[i] = sum over k = i, i + 8, i + 16 ... of W[r][k] * x[t][k], each product added without being rounded first
//   y[t][r] = sum8(lane) + b[r]
//
// Eight rows travel together here too, with up to VECTORS registers of inputs: 8 of a token, or of SIDE tokens each.
// The sums of AT_ONCE rows stay in registers, so each load serves several products.

static inline f32x8 load8(const float *x, int64_t n, float rest) {  // n numbers, then `rest`
    if (n >= 8) return *(const f32x8 *)x;
    f32x8 v = (f32x8){0} + rest;
    memcpy(&v, x, n * sizeof(float));
    return v;
}

static inline float sum8(f32x8 v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

static inline f32x8 sum8_of_8(const f32x8 *v) {  // number i: sum8(v[i]), the same bits
#if defined(__AVX2__) && !defined(SCALAR)
    __m256 four[2];
    for (int i = 0; i < 2; i++, v += 4)
        four[i] = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]), _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
    return (f32x8)(_mm256_permute2f128_ps(four[0], four[1], 0x20) + _mm256_permute2f128_ps(four[0], four[1], 0x31));
#else
    return (f32x8){sum8(v[0]), sum8(v[1]), sum8(v[2]), sum8(v[3]), sum8(v[4]), sum8(v[5]), sum8(v[6]), sum8(v[7])};
#endif
}

static inline f32x8 fma8(f32x8 a, f32x8 b, f32x8 sum) {
#if defined(__FMA__) && !defined(SCALAR)
    return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    for (int i = 0; i < 8; i++) sum[i] = __builtin_fmaf(a[i], b[i], sum[i]);
    return sum;
#endif
}

#ifdef WIDE
typedef f32x16 Inputs;
enum { SIDE = 2, VECTORS = 3, AT_ONCE = 8 };
static inline Inputs fused(f32x8 w, Inputs x, Inputs sum) {
    return (Inputs)_mm512_fmadd_ps(_mm512_broadcast_f32x8((__m256)w), (__m512)x, (__m512)sum);
}
#else
typedef f32x8 Inputs;
enum { SIDE = 1, VECTORS = 3, AT_ONCE = 4 };
static inline Inputs fused(f32x8 w, Inputs x, Inputs sum) { return fma8(w, x, sum); }
#endif

// Loops over registers must be unrolled: an array that is indexed at run time lies in memory.
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif
#define EACH(i, count) UNROLLED for (int i = 0; i < (count); i++)

// AT_ONCE rows times `vectors` registers of inputs, which lie as `lay_inputs` lays them, 8 of a row at a time.
static inline __attribute__((always_inline)) void dot_rows(
    const float *const *row, const Inputs *x, int64_t in, Inputs (*sums)[VECTORS], const int vectors) {
    Inputs near[AT_ONCE][VECTORS] = {0};
    for (int64_t k = 0; k < in - 7; k += 8, x += vectors)
        EACH(r, AT_ONCE) {
            if (k % 16 == 0) __builtin_prefetch(row[r] + k + ROWS * in, 0, 2);  // the next tile's, to the second cache
            EACH(v, VECTORS) if (v < vectors) near[r][v] = fused(load8(row[r] + k, 8, 0), x[v], near[r][v]);
        }
    EACH(r, AT_ONCE) EACH(v, VECTORS) {
        if (in % 8 && v < vectors) near[r][v] = fused(load8(row[r] + in / 8 * 8, in % 8, 0), x[v], near[r][v]);
        sums[r][v] = near[r][v];
    }
}

// A row that is not there is computed as another, and not stored.
static inline __attribute__((always_inline)) void float_tile(
    const Weight *w, const Inputs *x, float *y, int64_t tile, int64_t token, int64_t tokens, const int vectors) {
    const int64_t rows = w->out - tile * ROWS, here = tokens - token < vectors * SIDE ? tokens - token : vectors * SIDE;
    const float *row[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = (const float *)w->codes + (tile * ROWS + (r < rows ? r : 0)) * w->in;
    Inputs sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r += AT_ONCE) dot_rows(row + r, x, w->in, sums + r, vectors);
    f32x8 made[VECTORS * SIDE];
    for (int t = 0; t < here; t++) {
        f32x8 lanes[ROWS];
        for (int r = 0; r < ROWS; r++) memcpy(lanes + r, (float *)sums[r] + 8 * t, sizeof(f32x8));
        made[t] = sum8_of_8(lanes);
    }
    store_rows(w, made, 1, y, tile, token, here);
}

// The registers from `first` on, VECTORS of all or fewer: their inputs 0..7, then 8..15 ...; zeros where there is no token.
static void lay_inputs(
    const float *x, int64_t stride, int64_t in, int64_t tokens, int64_t first, int64_t vectors, Inputs *laid) {
    for (int64_t k = 0; k < in; k += 8, laid += vectors)
        for (int64_t t = 0; t < vectors * SIDE; t++) {
            int64_t token = first * SIDE + t;
            f32x8 its = load8(x + token * stride + k, token < tokens ? in - k : 0, 0);
            memcpy((float *)laid + 8 * t, &its, sizeof its);
        }
}

static void float_tile_times_all(const Weight *w, const Inputs *laid, float *y, int64_t tile, int64_t tokens) {
    const int64_t eights = (w->in + 7) / 8, all = (tokens + SIDE - 1) / SIDE;
    for (int64_t v = 0; v < all; v += VECTORS)
        if (all - v == 1) float_tile(w, laid + v * eights, y, tile, v * SIDE, tokens, 1);
        else if (all - v == 2) float_tile(w, laid + v * eights, y, tile, v * SIDE, tokens, 2);
        else float_tile(w, laid + v * eights, y, tile, v * SIDE, tokens, VECTORS);
}

enum { PARTS = 4 };

// One token: a row of each of PARTS parts of the matrix, so that the CPU sees as many streams and fetches ahead in all.
static void rows_times_token(const Weight *w, const float *x, float *y, int64_t first, int64_t apart) {
    const float *row[PARTS];
    f32x8 sums[PARTS] = {0};
    for (int j = 0; j < PARTS; j++)
        row[j] = (const float *)w->codes + (first + j * apart < w->out ? first + j * apart : first) * w->in;
    for (int64_t k = 0; k < w->in - 7; k += 8)
        EACH(j, PARTS) sums[j] = fma8(load8(row[j] + k, 8, 0), load8(x + k, 8, 0), sums[j]);
    for (int64_t j = 0, k = w->in / 8 * 8; j < PARTS && first + j * apart < w->out; j++) {
        if (k < w->in) sums[j] = fma8(load8(row[j] + k, w->in - k, 0), load8(x + k, w->in - k, 0), sums[j]);
        y[first + j * apart] = sum8(sums[j]) + (w->bias ? w->bias[first + j * apart] : 0);
    }
}

// As `product`.
static void float_product(const Weight *w, const float *x, Inputs *laid, float *y, int64_t tokens) {
    const int64_t eights = (w->in + 7) / 8, all = (tokens + SIDE - 1) / SIDE, apart = (w->out + PARTS - 1) / PARTS;
    if (tokens == 1) {
#pragma omp for
        for (int64_t row = 0; row < apart; row++) rows_times_token(w, x, y, row, apart);
        return;
    }
#pragma omp for
    for (int64_t v = 0; v < all; v += VECTORS)
        lay_inputs(x, w->in, w->in, tokens, v, all - v < VECTORS ? all - v : VECTORS, laid + v * eights);
#pragma omp for
    for (int64_t tile = 0; tile < (w->out + ROWS - 1) / ROWS; tile++)
        float_tile_times_all(w, laid, y, tile, tokens);
}

// ---- the product ---------------------------------------------------------------------------------------------------

// Every thread of a team takes its part; outside of one, all of it. A team of one would cost as much as a small matrix.
static void product(const Weight *w, const float *x, Activations *q, float *y, int64_t tokens) {
    if (w->bits == 32) {
        float_product(w, x, (Inputs *)q->codes, y, tokens);
        return;
    }
    const int64_t blocks = w->padded / w->block, tiles = (w->out + ROWS - 1) / ROWS;
    const float middle = w->zeros ? 1 : w->bits == 8 ? 128 - CENTRED : 8;
    const int64_t together = !TWO_TILES ? 1 : tokens == 1 ? streams_of(w->bits) : 2, steps = (tiles + together - 1) / together;
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) {
        int64_t of = t % TOKENS, first = t - of, apart = tokens - first < TOKENS ? tokens - first : TOKENS;
        quantize_token(x + t * w->in, w->in, w->block, apart, middle, q->codes + first * w->padded + 4 * of,
                       q->scales + first * blocks + of, q->sums + first * blocks + of);
    }
#pragma omp for
    for (int64_t tile = 0; tile < steps; tile++) {
#ifdef WIDE
        if (tokens == 1 && w->bits == 8) tiles_times_token(w, q, y, tile, steps, 8);
        else if (tokens == 1) tiles_times_token(w, q, y, tile, steps, 4);
        else
#endif
        if (w->bits == 8) tile_times_all(w, q, y, tile, tokens, 8, together > 1);
        else tile_times_all(w, q, y, tile, tokens, 4, together > 1);
    }
}

// y (tokens, out) = x (tokens, in) W^T + b. Returns 0, or -1 when there was no memory for the activations as they are read.
int64_t packed_linear(const Weight *w, const float *x, float *y, int64_t tokens, int64_t threads) {
    int64_t blocks = w->padded / w->block, size = tokens * w->padded;
    if (w->bits == 32) size = (w->in + 7) / 8 * ((tokens + SIDE - 1) / SIDE) * sizeof(Inputs);
    size += -size & 63;  // a register of 64 bytes is read faster where no line of the cache ends within
    int8_t *memory = aligned_alloc(64, size + (2 * tokens * blocks * sizeof(float) + 64) / 64 * 64);
    if (!memory) return -1;
    float *scales = (float *)(memory + size);
    Activations q = {memory, scales, scales + tokens * blocks};
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        product(w, x, &q, y, tokens);
    } else product(w, x, &q, y, tokens);
    free(memory);
    return 0;
}
