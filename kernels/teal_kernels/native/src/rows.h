/* Lists of kept inputs, and sums of the rows of weights that they name. */
#ifndef TEAL_ROWS_H
#define TEAL_ROWS_H

#include "internal.h"
#include "vector.h"

/* How far ahead rows are fetched, in bytes of what this thread reads, beyond the rows at hand: hardware fetches what lies
 * next, which may be skipped; this fetches what is next in the list. Nearer is faster: with 4, 8 and 32 KB a 4-bit token
 * took 1.05, 1.15 and 1.5 times as long.
 *
 * Into the second cache: pieces of 512 bytes, half of them skipped, came at 24 GB/s so, at 17 into the first one, and at
 * 15 without (two cores of Zen 4, dense 49 GB/s; benchmarks/NOTES.md). */
#define AHEAD_BYTES 2048
#define ROWS_AT_ONCE 8
/* Rows that are read side by side. Of those that stand 4,096 bytes apart, or a multiple, the first cache holds eight lines at
 * one place, and not one more: four are read at once. SmolLM2's output layer of int8 came at 13 GB/s by eight rows, and by
 * four at 20 (a core of Zen 3). */
INLINE int32_t rows_at_once(int64_t row_bytes) { return row_bytes % 4096 ? ROWS_AT_ONCE : ROWS_AT_ONCE / 2; }
INLINE void fetch(const uint8_t *line) { __builtin_prefetch(line, 0, 2); }

/* The first ones of some rows, which nobody has fetched yet: a line of each, then the next of each. */
static void fetch_first(const uint8_t *weights, int64_t row_bytes, const int32_t *index, int64_t rows, int64_t bytes) {
    int64_t first = bytes > 0 ? AHEAD_BYTES / bytes + 2 * ROWS_AT_ONCE : 0;
    if (first > rows) first = rows;
    for (int64_t at = 0; at < bytes; at += 64)
        for (int64_t r = 0; r < first; r++) fetch(weights + index[r] * row_bytes + at);
}

/* The thresholds of rows. `levels`: of each, or NULL; `row`: which rows they are, or NULL where they are the first ones. */
typedef struct {
    float of[TEAL_MAX_ROWS];
} limits;

static limits limits_of(const teal_weight *w, const int32_t *levels, const int32_t *row, int32_t rows) {
    limits found;
    for (int32_t r = 0; r < rows; r++)
        found.of[r] = w->thresholds ? w->thresholds[levels ? levels[row ? row[r] : r] : 0] : w->threshold;
    return found;
}

/* Lists the inputs of which a row keeps something.
 *
 * x: (rows, stride) of which inputs [0, n) are taken; their numbers begin at `first`. Values of rows lie side by side. */
static void make_list(const float *x, int64_t stride, int32_t rows, int32_t padded, int32_t n, int32_t first,
                      limits thresholds, kept_list *list, int64_t *kept) {
    int32_t count = 0;
    if (padded == 1) {
        const float threshold = thresholds.of[0];
        int32_t i = 0;
#if VECTOR_BYTES == 64
        const __m512 bound = _mm512_set1_ps(threshold);
        __m512i number = _mm512_add_epi32(_mm512_set1_epi32(first),
                                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        for (; i + 16 <= n; i += 16) {
            __m512 value = _mm512_loadu_ps(x + i);
            __mmask16 keep = _mm512_cmp_ps_mask(_mm512_abs_ps(value), bound, _CMP_NLE_UQ);
            _mm512_storeu_ps(list->value + count, _mm512_maskz_compress_ps(keep, value));
            _mm512_storeu_si512(list->index + count, _mm512_maskz_compress_epi32(keep, number));
            number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
            count += __builtin_popcount(keep);
        }
#endif
        for (; i < n; i++) {
            list->index[count] = first + i;
            list->value[count] = x[i];
            count += !(fabsf(x[i]) <= threshold);
        }
        if (kept) *kept += count;
    } else {
        int64_t all_kept = 0;
        for (int32_t i = 0; i < n; i++) {
            int32_t any = 0;
            float *value = list->value + (int64_t)count * padded;
            for (int32_t r = 0; r < rows; r++) {
                float one = x[r * stride + i];
                int32_t keep = !(fabsf(one) <= thresholds.of[r]);
                value[r] = keep ? one : 0.0f;
                any += keep;
            }
            for (int32_t r = rows; r < padded; r++) value[r] = 0.0f;
            list->index[count] = first + i;
            count += any > 0;
            all_kept += any;
        }
        if (kept) *kept += all_kept;
    }
    list->count = count;
}

/* y (R, stride) at [at, at + NV * LANES) += U rows of weights, each times its values x (U, R). */
INLINE void add_rows(const int dtype, const int R, const int U, const int NV, const uint8_t *const *row,
                     const uint8_t *const *ahead, const float *x, int64_t at, float *y, int64_t stride) {
    vf sums[REGISTERS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < NV; v++) sums[r * NV + v] = load(y + r * stride + at + v * LANES);
    UNROLL for (int u = 0; u < U; u++) {
        UNROLL for (int64_t byte = 0; byte < bytes_of(dtype, NV * LANES); byte += 64)
            fetch(ahead[u] + bytes_of(dtype, at) + byte);
        UNROLL for (int v = 0; v < NV; v++) {
            vf weights = load_weights(dtype, row[u], at + v * LANES);
            UNROLL for (int r = 0; r < R; r++) sums[r * NV + v] += weights * all(x[u * R + r]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < NV; v++) store(y + r * stride + at + v * LANES, sums[r * NV + v]);
}

/* The same for n outputs. `index` names the rows, `last` is the end of the list. */
INLINE void add_pieces(const int dtype, const int R, const int U, const uint8_t *weights, int64_t row_bytes,
                       const int32_t *index, const int32_t *last, int64_t distance, const float *x, int64_t n,
                       float *y, int64_t stride) {
    /* A line of each row, then the next one: with more of a row at once it came more slowly. */
    const int line = 64 / (int)bytes_of(dtype, LANES), wide = dtype == TEAL_F32 ? 2 : line < 4 ? line : 4;
    const int NV = wide * R <= REGISTERS ? wide : REGISTERS / R;
    const uint8_t *row[U], *ahead[U];
    UNROLL for (int u = 0; u < U; u++) {
        const int32_t *next = index + u + distance < last ? index + u + distance : last - 1;
        row[u] = weights + index[u] * row_bytes;
        ahead[u] = weights + *next * row_bytes;
    }
    int64_t at = 0;
    for (; at + NV * LANES <= n; at += NV * LANES) add_rows(dtype, R, U, NV, row, ahead, x, at, y, stride);
    for (; at + LANES <= n; at += LANES) add_rows(dtype, R, U, 1, row, ahead, x, at, y, stride);
    for (; at < n; at++)
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++) y[r * stride + at] += one_weight(dtype, row[u], at) * x[u * R + r];
}

/* As many of [at, end) as make whole groups of U rows. Returns the first that is left. */
INLINE int32_t add_groups(const int dtype, const int R, const int U, const uint8_t *weights, int64_t row_bytes,
                          const kept_list *list, int32_t at, int32_t end, int64_t n, float *y, int64_t stride) {
    const int64_t piece = bytes_of(dtype, n), distance = piece > 0 ? AHEAD_BYTES / piece + ROWS_AT_ONCE : ROWS_AT_ONCE;
    const int32_t *last = list->index + list->count;
    for (; at + U <= end; at += U)
        add_pieces(dtype, R, U, weights, row_bytes, list->index + at, last, distance, list->value + (int64_t)at * R, n,
                   y, stride);
    return at;
}

/* y (R, stride) += the rows of weights of a part of a list. */
INLINE void add_list(const int dtype, const int R, const uint8_t *weights, int64_t row_bytes, const kept_list *list,
                     int32_t begin, int32_t end, int64_t n, float *y, int64_t stride) {
    int32_t at = begin;
    if (rows_at_once(row_bytes) == ROWS_AT_ONCE)
        at = add_groups(dtype, R, ROWS_AT_ONCE, weights, row_bytes, list, at, end, n, y, stride);
    else at = add_groups(dtype, R, ROWS_AT_ONCE / 2, weights, row_bytes, list, at, end, n, y, stride);
    add_groups(dtype, R, 1, weights, row_bytes, list, at, end, n, y, stride);
}

#endif
