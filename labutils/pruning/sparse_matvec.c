/* Matrix-vector products that skip zeros; rows are shared among threads. sparse.py describes the layouts. */
#include <stdint.h>
#if defined(__AVX2__) && defined(__FMA__) && !defined(SCALAR)
#define VECTORS
#include <immintrin.h>
#endif

#define ROWS 8      /* rows that are computed together */
#define COLUMNS 32  /* columns whose 16 kept weights share one 32-bit word of 2-bit places */
#define KEPT 16

/* 2:4, fp32. Each block of ROWS rows lies as: for every COLUMNS columns, ROWS words, then KEPT x ROWS weights. */
void matvec_2_4(const uint32_t *all_places, const float *all_weights, const float *x, float *y, int64_t blocks,
                int64_t spans, int64_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const uint32_t *places = all_places + block * spans * ROWS;
        const float *weights = all_weights + block * spans * KEPT * ROWS;
#ifdef VECTORS
        __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
        for (int64_t span = 0; span < spans; span++, places += ROWS, weights += KEPT * ROWS) {
            __m256i place = _mm256_loadu_si256((const __m256i *)places);
            for (int four = 0; four < COLUMNS / 4; four++) {
                __m256 inputs = _mm256_broadcast_ps((const __m128 *)(x + span * COLUMNS + four * 4));
                const float *pair = weights + four * 2 * ROWS;
                even = _mm256_fmadd_ps(_mm256_loadu_ps(pair), _mm256_permutevar_ps(inputs, place), even);
                place = _mm256_srli_epi32(place, 2);
                odd = _mm256_fmadd_ps(_mm256_loadu_ps(pair + ROWS), _mm256_permutevar_ps(inputs, place), odd);
                place = _mm256_srli_epi32(place, 2);
            }
        }
        _mm256_storeu_ps(y + block * ROWS, _mm256_add_ps(even, odd));
#else
        float sums[ROWS] = {0};
        for (int64_t span = 0; span < spans; span++, places += ROWS, weights += KEPT * ROWS)
            for (int kept = 0; kept < KEPT; kept++)
                for (int row = 0; row < ROWS; row++) {
                    const float *inputs = x + span * COLUMNS + kept / 2 * 4;
                    sums[row] += weights[kept * ROWS + row] * inputs[places[row] >> (2 * kept) & 3];
                }
        for (int row = 0; row < ROWS; row++) y[block * ROWS + row] = sums[row];
#endif
    }
}

/* Bitmap, fp32: bit j of word i of a row says whether column 32 i + j is kept; row r's weights begin at starts[r]. */
void matvec_bitmap(const int32_t *starts, const uint32_t *words, const float *weights, const float *x, float *y,
                   int64_t rows, int64_t spans, int64_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *next = weights + starts[row];
        float sum = 0;
        for (int64_t span = 0; span < spans; span++)
            for (uint32_t left = words[row * spans + span]; left; left &= left - 1)
                sum += *next++ * x[span * COLUMNS + __builtin_ctz(left)];
        y[row] = sum;
    }
}

/* CSR, fp32 weights and 32-bit columns; row r owns entries starts[r] ... starts[r + 1] - 1. */
void matvec_csr(const int32_t *starts, const int32_t *columns, const float *weights, const float *x, float *y, int64_t rows,
                int64_t threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        float sum = 0;
        for (int32_t i = starts[row]; i < starts[row + 1]; i++) sum += weights[i] * x[columns[i]];
        y[row] = sum;
    }
}
