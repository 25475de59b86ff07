/* Attention of one token over the KV cache. Positions are divided into parts where key heads do not fill the threads. */
#ifndef TEAL_ATTENTION_H
#define TEAL_ATTENTION_H

#include "internal.h"
#include "vector.h"

#define KEYS TEAL_KEY_BLOCK

static void normalise_head(const teal_attention *a, float *x, const float *weight, const float *bias) {
    const int32_t dim = a->dim;
    float mean = 0, squares = 0;
    if (a->norm_kind == TEAL_LAYER_NORM) {
        for (int32_t i = 0; i < dim; i++) mean += x[i];
        mean /= (float)dim;
    }
    for (int32_t i = 0; i < dim; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf(squares / (float)dim + a->eps);
    for (int32_t i = 0; i < dim; i++) x[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f);
}

static void rotate_head(float *x, const float *cos, const float *sin, int32_t rotary) {
    int32_t half = rotary / 2;
    for (int32_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

static void rotate_neighbours(float *x, const float *cos, const float *sin, int32_t rotary) {
    for (int32_t i = 0; i < rotary / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
}

/* `norm`, `bias`: of this head, or NULL. */
static void prepare_head(const teal_attention *a, float *x, const float *norm, const float *bias, int64_t position) {
    if (norm && a->norms == TEAL_HEADS_FIRST) normalise_head(a, x, norm, bias);
    if (a->cos) {
        const float *cos = a->cos + position * a->rotary, *sin = a->sin + position * a->rotary;
        if (a->neighbours) rotate_neighbours(x, cos, sin, a->rotary);
        else rotate_head(x, cos, sin, a->rotary);
    }
    if (norm && a->norms == TEAL_HEADS_LAST) normalise_head(a, x, norm, bias);
}

static const float *of_head(const float *table, int32_t head, int64_t size) { return table ? table + head * size : NULL; }

static void put(int32_t dtype, void *to, int64_t at, float x) {
    if (dtype == TEAL_F32) ((float *)to)[at] = x;
    else ((uint16_t *)to)[at] = dtype == TEAL_BF16 ? to_bfloat(x) : to_half(x);
}

static void write_cache(const teal_attention *a, int64_t sequence, int32_t kv_head, int64_t position, float *key,
                        float *value) {
    const int64_t head = sequence * a->kv_heads + kv_head;
    if (a->v_norm) normalise_head(a, value, of_head(a->v_norm, kv_head, a->dim), NULL);
    prepare_head(a, key, of_head(a->k_norm, kv_head, a->dim), of_head(a->k_bias, kv_head, a->dim), position);
    int64_t keys = ((head * (a->positions / KEYS) + position / KEYS) * a->dim) * KEYS + position % KEYS;
    int64_t values = (head * a->positions + position) * a->dim;
    for (int32_t i = 0; i < a->dim; i++) {
        put(a->dtype, a->keys, keys + i * KEYS, key[i]);
        put(a->dtype, a->values, values + i, value[i]);
    }
}

/* Scores of H queries (dim each, one behind the other) with B blocks of keys: (H, SCORE_TILE). */
INLINE void score_blocks(const int dtype, const int H, const int B, const uint8_t *keys, const float *queries,
                         int32_t dim, float *scores) {
    enum { V = KEYS / LANES };
    vf sums[REGISTERS * 2];
    const int64_t block = bytes_of(dtype, (int64_t)dim * KEYS);
    UNROLL for (int i = 0; i < H * B * V; i++) sums[i] = all(0.0f);
    for (int32_t d = 0; d < dim; d++)
        UNROLL for (int b = 0; b < B; b++)
            UNROLL for (int v = 0; v < V; v++) {
                vf key = load_weights(dtype, keys + b * block, (int64_t)d * KEYS + v * LANES);
                UNROLL for (int h = 0; h < H; h++) sums[(h * B + b) * V + v] += key * all(queries[h * dim + d]);
            }
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int b = 0; b < B; b++)
            UNROLL for (int v = 0; v < V; v++)
                store(scores + h * SCORE_TILE + b * KEYS + v * LANES, sums[(h * B + b) * V + v]);
}

INLINE void score_heads(const int dtype, const int H, const uint8_t *keys, const float *queries, int32_t dim,
                        int32_t blocks, float *scores) {
    const int B = LANES == 16 ? 2 : 1;
    int32_t b = 0;
    const int64_t block = bytes_of(dtype, (int64_t)dim * KEYS);
    for (; b + B <= blocks; b += B) score_blocks(dtype, H, B, keys + b * block, queries, dim, scores + b * KEYS);
    for (; b < blocks; b++) score_blocks(dtype, H, 1, keys + b * block, queries, dim, scores + b * KEYS);
}

/* Values of H heads (stride floats apart) += weights (H, SCORE_TILE) of `count` positions, N vectors of dim from `at`. */
INLINE void add_values(const int dtype, const int H, const int N, const uint8_t *values, int32_t dim, int32_t at,
                       const float *weights, int32_t count, float *heads, int64_t stride) {
    vf sums[REGISTERS * 2];
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int v = 0; v < N; v++) sums[h * N + v] = load(heads + h * stride + at + v * LANES);
    for (int32_t p = 0; p < count; p++) {
        const uint8_t *row = values + bytes_of(dtype, (int64_t)p * dim);
        UNROLL for (int v = 0; v < N; v++) {
            vf value = load_weights(dtype, row, at + v * LANES);
            UNROLL for (int h = 0; h < H; h++) sums[h * N + v] += value * all(weights[h * SCORE_TILE + p]);
        }
    }
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int v = 0; v < N; v++) store(heads + h * stride + at + v * LANES, sums[h * N + v]);
}

INLINE void value_heads(const int dtype, const int H, const uint8_t *values, int32_t dim, const float *weights,
                        int32_t count, float *heads, int64_t stride) {
    int32_t at = 0;
    for (; at + 4 * LANES <= dim; at += 4 * LANES)
        add_values(dtype, H, 4, values, dim, at, weights, count, heads, stride);
    for (; at + LANES <= dim; at += LANES)
        add_values(dtype, H, 1, values, dim, at, weights, count, heads, stride);
    for (; at < dim; at++)
        for (int h = 0; h < H; h++)
            for (int32_t p = 0; p < count; p++)
                heads[h * stride + at] +=
                    weights[h * SCORE_TILE + p] * one_weight(dtype, values, (int64_t)p * dim + at);
}

INLINE float largest(const float *x, int32_t n) { /* n is a multiple of KEYS */
    vf most = load(x);
    for (int32_t i = LANES; i < n; i += LANES) {
        vf one = load(x + i);
        vi more = one > most;
        most = (vf)((more & (vi)one) | (~more & (vi)most));
    }
    float parts[LANES], result;
    memcpy(parts, &most, sizeof parts);
    result = parts[0];
    for (int i = 1; i < LANES; i++) result = parts[i] > result ? parts[i] : result;
    return result;
}

/* Queries of one key head, from block `begin` to `end` of its keys, into `heads` (group, stride): values that are not
 * divided by the sum yet, then maximum and sum. `bias`: of the first of these queries, or NULL. */
INLINE void attend_group(const int dtype, const teal_attention *a, const float *bias, int64_t head, int32_t group, int64_t first,
                         int64_t position, int64_t begin, int64_t end, const float *queries, float *scores,
                         float *heads, int64_t stride) {
    const int32_t dim = a->dim;
    const uint8_t *keys = (const uint8_t *)a->keys + bytes_of(dtype, head * a->positions * dim);
    const uint8_t *values = (const uint8_t *)a->values + bytes_of(dtype, head * a->positions * dim);
    for (int32_t h = 0; h < group; h++) {
        memset(heads + h * stride, 0, (size_t)dim * sizeof *heads);
        heads[h * stride + dim] = -INFINITY;
        heads[h * stride + dim + 1] = 0;
    }
    for (int64_t block = begin; block < end; block += SCORE_TILE / KEYS) {
        int32_t blocks = (int32_t)(end - block < SCORE_TILE / KEYS ? end - block : SCORE_TILE / KEYS);
        const uint8_t *of_tile = keys + bytes_of(dtype, block * dim * KEYS);
        int32_t h = 0;
        for (; h + 4 <= group; h += 4)
            score_heads(dtype, 4, of_tile, queries + h * dim, dim, blocks, scores + h * SCORE_TILE);
        if (group - h == 3) score_heads(dtype, 3, of_tile, queries + h * dim, dim, blocks, scores + h * SCORE_TILE);
        if (group - h == 2) score_heads(dtype, 2, of_tile, queries + h * dim, dim, blocks, scores + h * SCORE_TILE);
        if (group - h == 1) score_heads(dtype, 1, of_tile, queries + h * dim, dim, blocks, scores + h * SCORE_TILE);

        int32_t count = blocks * KEYS;
        int64_t start = block * KEYS;
        int32_t seen = (int32_t)(position + 1 - start < count ? position + 1 - start : count);
        for (h = 0; h < group; h++) {
            float *own = scores + h * SCORE_TILE, *maximum = heads + h * stride + dim;
            if (a->cap > 0) soft_cap(own, seen, a->cap);
            if (bias)
                for (int32_t p = 0; p < seen; p++) own[p] += bias[h * a->positions + start + p];
            for (int64_t p = start; p < first; p++) own[p - start] = -INFINITY;
            for (int32_t p = seen; p < count; p++) own[p] = -INFINITY;
            float most = largest(own, count), before = *maximum;
            most = most > before ? most : before;
            if (most > before && before > -INFINITY) {
                float factor = expf(before - most);
                for (int32_t i = 0; i < dim; i++) heads[h * stride + i] *= factor;
                maximum[1] *= factor;
            }
            *maximum = most;
            vf total = all(0.0f), shift = all(most);
            for (int32_t p = 0; p < count; p += LANES) {
                vf weight = exponential(load(own + p) - shift);
                store(own + p, weight);
                total += weight;
            }
            maximum[1] += sum(total);
        }
        const uint8_t *rows = values + bytes_of(dtype, start * dim);
        const int H = REGISTERS >= 16 ? 4 : 2;
        for (h = 0; h + H <= group; h += H)
            value_heads(dtype, H, rows, dim, scores + h * SCORE_TILE, seen, heads + h * stride, stride);
        if (H == 4 && group - h == 3) {
            value_heads(dtype, 3, rows, dim, scores + h * SCORE_TILE, seen, heads + h * stride, stride);
            h += 3;
        }
        if (H == 4 && group - h == 2) {
            value_heads(dtype, 2, rows, dim, scores + h * SCORE_TILE, seen, heads + h * stride, stride);
            h += 2;
        }
        if (h < group)
            value_heads(dtype, 1, rows, dim, scores + h * SCORE_TILE, seen, heads + h * stride, stride);
    }
}

/* One item: of one row, one key head and one part of the positions. `queries` holds the head's queries, then its key
 * and its value, as the product before gave them; `written`: these are in the cache already. */
static void attend(const teal_attention *a, int64_t sequence, int32_t kv_head, int32_t part, int32_t parts, int written,
                   int64_t position, float *queries, float *scores, float *heads, int64_t stride) {
    const int32_t group = a->heads / a->kv_heads, dim = a->dim;
    const int64_t head = sequence * a->kv_heads + kv_head;
    int64_t first = a->window > 0 && position + 1 > a->window ? position + 1 - a->window : 0;
    int64_t first_block = first / KEYS, blocks = position / KEYS + 1 - first_block;
    int64_t begin = first_block + blocks * part / parts, end = first_block + blocks * (part + 1) / parts;
    const float scale = a->query_scale ? a->scale * a->query_scale[position] : a->scale;
    for (int32_t h = 0; h < group; h++) {
        float *query = queries + h * dim;
        const int32_t own = kv_head * group + h;
        prepare_head(a, query, of_head(a->q_norm, own, dim), of_head(a->q_bias, own, dim), position);
        for (int32_t i = 0; i < dim; i++) query[i] *= scale;
    }
    if (part == parts - 1 && !written) /* whose block holds the new position */
        write_cache(a, sequence, kv_head, position, queries + group * dim, queries + (group + 1) * dim);
    const float *bias = of_head(a->bias, kv_head * group, a->positions);
    if (a->dtype == TEAL_F32)
        attend_group(TEAL_F32, a, bias, head, group, first, position, begin, end, queries, scores, heads, stride);
    else if (a->dtype == TEAL_BF16)
        attend_group(TEAL_BF16, a, bias, head, group, first, position, begin, end, queries, scores, heads, stride);
    else
        attend_group(TEAL_F16, a, bias, head, group, first, position, begin, end, queries, scores, heads, stride);
}

/* One head's values of all parts, `distance` floats apart, into x (dim,). `sink`: a score of no value, or -infinity. */
static void merge_parts(const float *heads, int32_t parts, int64_t distance, int32_t dim, float sink, float *x) {
    float most = sink, total = 0;
    for (int32_t part = 0; part < parts; part++) {
        float maximum = heads[part * distance + dim];
        most = maximum > most ? maximum : most;
    }
    memset(x, 0, (size_t)dim * sizeof *x);
    if (sink > -INFINITY) total = expf(sink - most);
    for (int32_t part = 0; part < parts; part++) {
        const float *own = heads + part * distance;
        if (own[dim + 1] == 0.0f) continue; /* a part without positions */
        float factor = own[dim] == most ? 1.0f : expf(own[dim] - most);
        total += factor * own[dim + 1];
        for (int32_t i = 0; i < dim; i++) x[i] += factor * own[i];
    }
    for (int32_t i = 0; i < dim; i++) x[i] /= total;
}

#endif
