/* Sums of codes of a group, which share scales. */
#ifndef TEAL_GROUPS_H
#define TEAL_GROUPS_H

#include "rows.h"

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

/* Rows of inputs [begin, end) of a list, and those that stand `distance` behind them; `count` of each: of what is more than
 * there are, the last one again. */
INLINE void find_rows(const kept_list *list, int32_t begin, int32_t end, int32_t count, const uint8_t *weights,
                      int64_t row_bytes, int64_t distance, const uint8_t **row, const uint8_t **ahead) {
    const int32_t last = list->count - 1;
    for (int32_t i = 0; i < count; i++) {
        const int32_t at = begin + i < end ? begin + i : end - 1;
        const int64_t next = at + distance < last ? at + distance : last;
        row[i] = weights + list->index[at] * row_bytes;
        ahead[i] = weights + list->index[next] * row_bytes;
    }
}

/* y += one group of one row. */
INLINE void add_group_of_one(const int dtype, const teal_weight *w, const uint8_t *weights, const group_scales *g,
                             const kept_list *list, int32_t begin, int32_t end, int64_t n, float *y) {
    int64_t piece = bytes_of(dtype, n), distance = piece > 0 ? AHEAD_BYTES / piece : 8, at = 0;
    if (distance < end - begin) distance = end - begin; /* a nearer row is needed before it could come */
    float sum_of_x = 0;
    for (int32_t p = begin; p < end; p++) sum_of_x += list->value[p];
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

#endif
