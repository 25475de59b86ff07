/* Matrix-vector products: of kept inputs (rows of weights are added up), and of rows of weights with all inputs. */
#ifndef TEAL_PRODUCTS_H
#define TEAL_PRODUCTS_H

#include "groups.h"
#include "pairs.h"

#define DOTS_AHEAD_BYTES 8192 /* rows with all inputs are read one after the other */

/* y (R, stride) = kept inputs [from, to) of the list times outputs [first, first + n). `group` has room for
 * (R, n) floats. */
INLINE void multiply(const int dtype, const int R, const teal_weight *w, const kept_list *list, int32_t from,
                     int32_t to, int64_t first, int64_t n, float *y, int64_t stride, float *group) {
    const uint8_t *weights = (const uint8_t *)w->data + bytes_of(dtype, first);
    for (int r = 0; r < R; r++) memset(y + r * stride, 0, (size_t)n * sizeof *y);
    fetch_first(weights, w->row_bytes, list->index + from, to - from, bytes_of(dtype, n));
    if (dtype < TEAL_INT8) {
        add_list(dtype, R, weights, w->row_bytes, list, from, to, n, y, stride);
        return;
    }
#ifdef WHOLE_NUMBERS
    if (dtype == TEAL_INT4 && R == 1) {
        add_whole_numbers(w, weights, list, from, to, first, n, y, group);
        return;
    }
#endif
    for (int32_t begin = from, end; begin < to; begin = end) {
        int64_t number = list->index[begin] / w->group, next = (number + 1) * w->group;
        for (end = begin; end < to && list->index[end] < next;) end++;
        group_scales g = scales_of(w, number, first);
        if (R == 1 && w->group <= 128) {
            add_group_of_one(dtype, w, weights, &g, list, begin, end, n, y);
            continue;
        }
        float sum_of_x[R];
        memset(sum_of_x, 0, sizeof sum_of_x);
        for (int32_t at = begin; at < end; at++)
            for (int r = 0; r < R; r++) sum_of_x[r] += list->value[(int64_t)at * R + r];
        memset(group, 0, (size_t)(R * n) * sizeof *group);
        add_list(dtype, R, weights, w->row_bytes, list, begin, end, n, group, n);
        for (int r = 0; r < R; r++) {
            float *whole = y + r * stride, *codes = group + r * n;
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
            fetch(row[o] + DOTS_AHEAD_BYTES + bytes_of(dtype, at)); /* 1.05 times as fast in bfloat16 */
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
