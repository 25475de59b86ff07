/* Matrix-vector products: of kept inputs (rows of weights are added up), and of rows of weights with all inputs. */
#ifndef TEAL_PRODUCTS_H
#define TEAL_PRODUCTS_H

#include "internal.h"
#include "vector.h"

/* How far ahead rows are fetched, in bytes of what this thread reads: hardware fetches what lies next, which may be
 * skipped; this fetches what is next in the list. Twice and four times as far was the same within 5 %.
 *
 * Into the second cache: pieces of 512 bytes, half of them skipped, came at 24 GB/s so, at 17 into the first one, and at
 * 15 without (two cores of Zen 4, dense 49 GB/s; benchmarks/NOTES.md). */
#define AHEAD_BYTES 4096
#define AHEAD_BYTES_OF_GROUPS 8192
INLINE void fetch(const uint8_t *line) { __builtin_prefetch(line, 0, 2); }

/* Lists the inputs of which a row keeps something.
 *
 * x: (rows, stride) of which inputs [0, n) are taken; their numbers begin at `first`. Values of rows lie side by side. */
static void make_list(const float *x, int64_t stride, int32_t rows, int32_t padded, int32_t n, int32_t first,
                      float threshold, kept_list *list, int64_t *kept) {
    int32_t count = 0;
    if (padded == 1) {
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
                int32_t keep = !(fabsf(one) <= threshold);
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
    const int NV = REGISTERS / R < 4 ? REGISTERS / R : 4;
    const uint8_t *row[8], *ahead[8];
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

/* y (R, stride) += the rows of weights of a part of a list. */
INLINE void add_list(const int dtype, const int R, const uint8_t *weights, int64_t row_bytes, const kept_list *list,
                     int32_t begin, int32_t end, int64_t n, float *y, int64_t stride) {
    const int U = dtype == TEAL_F32 ? 4 : 8;
    int64_t piece = bytes_of(dtype, n), distance = piece > 0 ? AHEAD_BYTES / piece + U : U;
    const int32_t *last = list->index + list->count;
    int32_t at = begin;
    for (; at + U <= end; at += U)
        add_pieces(dtype, R, U, weights, row_bytes, list->index + at, last, distance, list->value + (int64_t)at * R, n,
                   y, stride);
    for (; at < end; at++)
        add_pieces(dtype, R, 1, weights, row_bytes, list->index + at, last, distance, list->value + (int64_t)at * R, n,
                   y, stride);
}

/* Of one group of codes and one row: the sum stays in registers over the whole group. NV vectors of outputs from `at`. */
INLINE void group_of_one(const int dtype, const int NV, const uint8_t *weights, int64_t row_bytes,
                         const kept_list *list, int32_t begin, int32_t end, int64_t distance, int64_t at, vf *sums) {
    UNROLL for (int v = 0; v < NV; v++) sums[v] = all(0.0f);
    const int32_t *index = list->index, last = list->count - 1;
    for (int32_t p = begin; p < end; p++) {
        int64_t next = p + distance < last ? p + distance : last;
        const uint8_t *row = weights + index[p] * row_bytes;
        fetch(weights + index[next] * row_bytes + bytes_of(dtype, at));
        vf x = all(list->value[p]);
        UNROLL for (int v = 0; v < NV; v++) sums[v] += load_weights(dtype, row, at + v * LANES) * x;
    }
}

INLINE vf load_scale(const int32_t dtype, const void *scales, int64_t at) {
    return dtype == TEAL_F16 ? load_half((const uint16_t *)scales + at) : load((const float *)scales + at);
}
INLINE float one_scale(const int32_t dtype, const void *scales, int64_t at) {
    return dtype == TEAL_F16 ? from_half(((const uint16_t *)scales)[at]) : ((const float *)scales)[at];
}

/* What turns sums of codes into sums of weights: (sum of code * x - zero * sum of x) * scale. */
typedef struct {
    const void *scales;
    const uint16_t *zeros;
    int32_t scale_dtype;
    float middle;
} group_scales;

INLINE group_scales scales_of(const teal_weight *w, int64_t group, int64_t first) {
    int64_t scale_bytes = w->scale_dtype == TEAL_F16 ? 2 : 4;
    return (group_scales){
        (const uint8_t *)w->scales + (group * w->scale_stride + first) * scale_bytes,
        w->zeros ? (const uint16_t *)w->zeros + group * w->zero_stride + first : NULL,
        w->scale_dtype,
        w->dtype == TEAL_INT4 ? 8.0f : 128.0f,
    };
}
INLINE vf scaled(const int dtype, const group_scales *g, vf codes, int64_t at, float sum_of_x) {
    const float offset = dtype == TEAL_INT4 ? NIBBLE_OFFSET : 0.0f;
    vf zero = g->zeros ? load_half(g->zeros + at) : all(g->middle);
    if (dtype == TEAL_INT4) codes = natural_order(codes);
    return load_scale(g->scale_dtype, g->scales, at) * (codes - (zero + all(offset)) * all(sum_of_x));
}
INLINE float one_scaled(const group_scales *g, float codes, int64_t at, float sum_of_x) {
    float zero = g->zeros ? from_half(g->zeros[at]) : g->middle;
    return one_scale(g->scale_dtype, g->scales, at) * (codes - zero * sum_of_x);
}

/* y += one group of one row. */
INLINE void add_group_of_one(const int dtype, const teal_weight *w, const uint8_t *weights, const group_scales *g,
                             const kept_list *list, int32_t begin, int32_t end, int64_t n, float sum_of_x, float *y) {
    int64_t piece = bytes_of(dtype, n), distance = piece > 0 ? AHEAD_BYTES_OF_GROUPS / piece : 8, at = 0;
    if (distance < end - begin) distance = end - begin; /* a nearer row is needed before it could come */
    vf sums[8];
    for (; at + 8 * LANES <= n; at += 8 * LANES) {
        group_of_one(dtype, 8, weights, w->row_bytes, list, begin, end, distance, at, sums);
        UNROLL for (int v = 0; v < 8; v++) {
            float *place = y + at + v * LANES;
            store(place, load(place) + scaled(dtype, g, sums[v], at + v * LANES, sum_of_x));
        }
    }
    for (; at + 2 * LANES <= n; at += 2 * LANES) {
        group_of_one(dtype, 2, weights, w->row_bytes, list, begin, end, distance, at, sums);
        UNROLL for (int v = 0; v < 2; v++) {
            float *place = y + at + v * LANES;
            store(place, load(place) + scaled(dtype, g, sums[v], at + v * LANES, sum_of_x));
        }
    }
    for (; at + LANES <= n; at += LANES) {
        group_of_one(dtype, 1, weights, w->row_bytes, list, begin, end, distance, at, sums);
        store(y + at, load(y + at) + scaled(dtype, g, sums[0], at, sum_of_x));
    }
    for (; at < n; at++) {
        float codes = 0;
        for (int32_t p = begin; p < end; p++)
            codes += one_weight(dtype, weights + list->index[p] * w->row_bytes, at) * list->value[p];
        y[at] += one_scaled(g, codes, at, sum_of_x);
    }
}

/* y (R, stride) = kept inputs [from, to) of the list times outputs [first, first + n). `group` has room for as many
 * floats as y. */
INLINE void multiply(const int dtype, const int R, const teal_weight *w, const kept_list *list, int32_t from,
                     int32_t to, int64_t first, int64_t n, float *y, int64_t stride, float *group) {
    const uint8_t *weights = (const uint8_t *)w->data + bytes_of(dtype, first);
    for (int r = 0; r < R; r++) memset(y + r * stride, 0, (size_t)n * sizeof *y);
    if (dtype < TEAL_INT8) {
        add_list(dtype, R, weights, w->row_bytes, list, from, to, n, y, stride);
        return;
    }
    for (int32_t begin = from, end; begin < to; begin = end) {
        int64_t number = list->index[begin] / w->group, next = (number + 1) * w->group;
        float sum_of_x[R];
        memset(sum_of_x, 0, sizeof sum_of_x);
        for (end = begin; end < to && list->index[end] < next; end++)
            for (int r = 0; r < R; r++) sum_of_x[r] += list->value[(int64_t)end * R + r];
        group_scales g = scales_of(w, number, first);
        if (R == 1 && w->group <= 128) {
            add_group_of_one(dtype, w, weights, &g, list, begin, end, n, sum_of_x[0], y);
            continue;
        }
        for (int r = 0; r < R; r++) memset(group + r * stride, 0, (size_t)n * sizeof *group);
        add_list(dtype, R, weights, w->row_bytes, list, begin, end, n, group, stride);
        for (int r = 0; r < R; r++) {
            float *whole = y + r * stride, *codes = group + r * stride;
            int64_t at = 0;
            for (; at + LANES <= n; at += LANES)
                store(whole + at, load(whole + at) + scaled(dtype, &g, load(codes + at), at, sum_of_x[r]));
            for (; at < n; at++) whole[at] += one_scaled(&g, codes[at], at, sum_of_x[r]);
        }
    }
}

typedef void multiplication(const teal_weight *, const kept_list *, int32_t, int32_t, int64_t, int64_t, float *,
                            int64_t, float *);

#define MULTIPLICATION(dtype, R)                                                                                   \
    static void multiply_##dtype##_##R(const teal_weight *w, const kept_list *list, int32_t from, int32_t to,       \
                                       int64_t first, int64_t n, float *y, int64_t stride, float *group) {          \
        multiply(dtype, R, w, list, from, to, first, n, y, stride, group);                                          \
    }
#define MULTIPLICATIONS(dtype) \
    MULTIPLICATION(dtype, 1) MULTIPLICATION(dtype, 2) MULTIPLICATION(dtype, 4) MULTIPLICATION(dtype, 8)
MULTIPLICATIONS(TEAL_F32)
MULTIPLICATIONS(TEAL_BF16)
MULTIPLICATIONS(TEAL_F16)
MULTIPLICATIONS(TEAL_INT8)
MULTIPLICATIONS(TEAL_INT4)

#define BY_ROWS(dtype) \
    { multiply_##dtype##_1, multiply_##dtype##_2, multiply_##dtype##_4, multiply_##dtype##_8 }
static multiplication *const multiplications[5][4] = {BY_ROWS(TEAL_F32), BY_ROWS(TEAL_BF16), BY_ROWS(TEAL_F16),
                                                      BY_ROWS(TEAL_INT8), BY_ROWS(TEAL_INT4)};

/* (R, outputs) dot products of NO rows of weights with x (R, stride), n inputs. */
INLINE void dot_rows(const int dtype, const int R, const int NO, const uint8_t *const *row, const float *x,
                     int64_t stride, int64_t n, float *const *y) {
    vf sums[REGISTERS];
    UNROLL for (int i = 0; i < NO * R; i++) sums[i] = all(0.0f);
    int64_t at = 0;
    for (; at + LANES <= n; at += LANES) {
        UNROLL for (int o = 0; o < NO; o++) {
            vf weights = load_weights(dtype, row[o], at);
            UNROLL for (int r = 0; r < R; r++) sums[r * NO + o] += weights * load(x + r * stride + at);
        }
    }
    UNROLL for (int o = 0; o < NO; o++)
        UNROLL for (int r = 0; r < R; r++) {
            float total = sum(sums[r * NO + o]);
            for (int64_t i = at; i < n; i++) total += one_weight(dtype, row[o], i) * x[r * stride + i];
            y[r][o] = total;
        }
}

/* y (R, y_stride): rows of weights times x (R, stride), inputs [input, input + n) of them.
 *
 * The rows are those of `index`, `count` of them, or where that is NULL the ones from `first` on. */
INLINE void dots(const int dtype, const int R, const teal_weight *w, const int32_t *index, int32_t first,
                 int32_t count, const float *x, int64_t stride, int64_t input, int64_t n, float *y, int64_t y_stride) {
    const int NO = REGISTERS / R < 4 ? REGISTERS / R : 4;
    const uint8_t *weights = (const uint8_t *)w->data + bytes_of(dtype, input), *row[4];
    float *to[R];
    int32_t at = 0;
    for (; at + NO <= count; at += NO) {
        UNROLL for (int o = 0; o < NO; o++) row[o] = weights + (index ? index[at + o] : first + at + o) * w->row_bytes;
        UNROLL for (int r = 0; r < R; r++) to[r] = y + r * y_stride + at;
        dot_rows(dtype, R, NO, row, x, stride, n, to);
    }
    for (; at < count; at++) {
        row[0] = weights + (index ? index[at] : first + at) * w->row_bytes;
        UNROLL for (int r = 0; r < R; r++) to[r] = y + r * y_stride + at;
        dot_rows(dtype, R, 1, row, x, stride, n, to);
    }
}

typedef void dot_products(const teal_weight *, const int32_t *, int32_t, int32_t, const float *, int64_t, int64_t,
                          int64_t, float *, int64_t);

#define DOT_PRODUCTS(dtype, R)                                                                                  \
    static void dots_##dtype##_##R(const teal_weight *w, const int32_t *index, int32_t first, int32_t count,    \
                                   const float *x, int64_t stride, int64_t input, int64_t n, float *y,          \
                                   int64_t y_stride) {                                                          \
        dots(dtype, R, w, index, first, count, x, stride, input, n, y, y_stride);                               \
    }
#define ALL_DOT_PRODUCTS(dtype) \
    DOT_PRODUCTS(dtype, 1) DOT_PRODUCTS(dtype, 2) DOT_PRODUCTS(dtype, 4) DOT_PRODUCTS(dtype, 8)
ALL_DOT_PRODUCTS(TEAL_F32)
ALL_DOT_PRODUCTS(TEAL_BF16)
ALL_DOT_PRODUCTS(TEAL_F16)

#define DOTS_BY_ROWS(dtype) \
    { dots_##dtype##_1, dots_##dtype##_2, dots_##dtype##_4, dots_##dtype##_8 }
static dot_products *const dot_functions[3][4] = {DOTS_BY_ROWS(TEAL_F32), DOTS_BY_ROWS(TEAL_BF16),
                                                  DOTS_BY_ROWS(TEAL_F16)};

INLINE int32_t which_rows(int32_t padded) { return padded == 8 ? 3 : padded == 4 ? 2 : padded - 1; }

#endif
