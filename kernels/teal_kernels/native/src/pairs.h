/* Products of 4-bit codes in whole numbers (AVX2), for one row: as `whole.h`, by an instruction that multiplies a byte of two
 * inputs with their codes and adds the two up in 16 bits. */
#ifndef TEAL_PAIRS_H
#define TEAL_PAIRS_H

#include "whole.h"

#if VECTOR_BYTES == 32
#define WHOLE_NUMBERS
#define BLOCK_INPUTS 32
#define MOST_PAIRS 8 /* whose sums fit 16 bits: 16 * 128 * 15 */
#define LINE_OUTPUTS 64 /* codes of 32 bytes: what sums of two bytes leave registers for */

typedef struct {
    int16_t high[BLOCK_INPUTS / 2], low[BLOCK_INPUTS / 2]; /* bytes of two inputs each, of 256 * high + low */
    const uint8_t *row[BLOCK_INPUTS], *ahead[BLOCK_INPUTS];
    int32_t pairs;
    float step, sum; /* of the numbers, and of the inputs as they are now */
} input_block;

/* Inputs [begin, end) of a list, at most BLOCK_INPUTS; 0 where one is infinite or not a number. */
static int take_block(const kept_list *list, int32_t begin, int32_t end, const uint8_t *weights, int64_t row_bytes,
                      int64_t distance, input_block *b) {
    const int32_t n = end - begin;
    float x[BLOCK_INPUTS] = {0}, largest = 0;
    int32_t number[BLOCK_INPUTS], total = 0, unusual = 0;
    int8_t high[BLOCK_INPUTS], low[BLOCK_INPUTS];
    memcpy(x, list->value + begin, (size_t)n * sizeof *x);
    for (int i = 0; i < BLOCK_INPUTS; i++) {
        const float size = fabsf(x[i]);
        unusual |= !(size < INFINITY);
        largest = size > largest ? size : largest;
    }
    if (unusual) return 0;
    const float factor = largest > 1e-30f ? 32512.0f / largest : 0.0f; /* smaller ones are zero: no overflow */
    for (int i = 0; i < BLOCK_INPUTS; i += LANES)
        _mm256_storeu_si256((__m256i *)(number + i), _mm256_cvtps_epi32((__m256)(load(x + i) * all(factor))));
    for (int i = 0; i < BLOCK_INPUTS; i++) {
        total += number[i];
        high[i] = (int8_t)((number[i] + 128) >> 8);
        low[i] = (int8_t)number[i];
    }
    memcpy(b->high, high, sizeof high);
    memcpy(b->low, low, sizeof low);
    b->step = largest / 32512.0f;
    b->sum = b->step * (float)total;
    b->pairs = (n + 1) / 2;
    /* what is too many is multiplied with zero */
    find_rows(list, begin, end, 2 * b->pairs, weights, row_bytes, distance, b->row, b->ahead);
    return 1;
}

/* Whether inputs [begin, end) of a list are done sooner so than in floats: where at least three quarters are kept. A line of
 * many rows is read before the next line of each, which is slow where rows between are left out: at 50 %, 0.85 times as fast
 * as floats; dense, 1.3 times (benchmarks/NOTES.md). */
INLINE int pays(const kept_list *list, int32_t begin, int32_t end) {
    return end - begin >= 4 && 3 * (list->index[end - 1] + 1 - list->index[begin]) <= 4 * (end - begin);
}

/* sums (8 vectors) += what some pairs of a block give LINE_OUTPUTS outputs from byte `at` on. */
INLINE void add_pairs(const input_block *b, int32_t from, int32_t to, int64_t at, __m256i *sums) {
    const __m256i codes = _mm256_set1_epi8(15);
    __m256i high[4], low[4]; /* of two halves of each part of 128 bits: even outputs, odd ones */
    UNROLL for (int i = 0; i < 4; i++) high[i] = low[i] = _mm256_setzero_si256();
    for (int32_t p = from; p < to; p++) {
        const __m256i x_high = _mm256_set1_epi16(b->high[p]), x_low = _mm256_set1_epi16(b->low[p]);
        const __m256i first = _mm256_loadu_si256((const __m256i *)(b->row[2 * p] + at));
        const __m256i second = _mm256_loadu_si256((const __m256i *)(b->row[2 * p + 1] + at));
        fetch(b->ahead[2 * p] + at), fetch(b->ahead[2 * p + 1] + at);
        UNROLL for (int half = 0; half < 2; half++) {
            const __m256i both = half ? _mm256_unpackhi_epi8(first, second) : _mm256_unpacklo_epi8(first, second);
            const __m256i even = _mm256_and_si256(both, codes);
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), codes);
            high[2 * half] = _mm256_add_epi16(high[2 * half], _mm256_maddubs_epi16(even, x_high));
            low[2 * half] = _mm256_add_epi16(low[2 * half], _mm256_maddubs_epi16(even, x_low));
            high[2 * half + 1] = _mm256_add_epi16(high[2 * half + 1], _mm256_maddubs_epi16(odd, x_high));
            low[2 * half + 1] = _mm256_add_epi16(low[2 * half + 1], _mm256_maddubs_epi16(odd, x_low));
        }
    }
    const __m256i bytes = _mm256_set1_epi32(256 | 1 << 16);
    UNROLL for (int i = 0; i < 4; i++) {
        sums[2 * i] = _mm256_add_epi32(sums[2 * i], _mm256_madd_epi16(_mm256_unpacklo_epi16(high[i], low[i]), bytes));
        sums[2 * i + 1] =
            _mm256_add_epi32(sums[2 * i + 1], _mm256_madd_epi16(_mm256_unpackhi_epi16(high[i], low[i]), bytes));
    }
}

/* sums (8 vectors): a block's sums of LINE_OUTPUTS outputs from byte `at` on. */
INLINE void line_sums(const input_block *b, int64_t at, vi *sums) {
    __m256i parts[8]; /* of each half: even outputs, the first four of each part of 128 bits and the last; odd ones */
    UNROLL for (int i = 0; i < 8; i++) parts[i] = _mm256_setzero_si256();
    for (int32_t from = 0, to; from < b->pairs; from = to) {
        to = b->pairs - from > MOST_PAIRS ? from + MOST_PAIRS : b->pairs;
        add_pairs(b, from, to, at, parts);
    }
    UNROLL for (int half = 0; half < 2; half++)
        UNROLL for (int four = 0; four < 2; four++) {
            const __m256i even = parts[4 * half + four], odd = parts[4 * half + 2 + four];
            const __m256i lower = _mm256_unpacklo_epi32(even, odd), upper = _mm256_unpackhi_epi32(even, odd);
            sums[2 * half + four] = (vi)_mm256_permute2x128_si256(lower, upper, 0x20);
            sums[4 + 2 * half + four] = (vi)_mm256_permute2x128_si256(lower, upper, 0x31);
        }
}

/* y += a block; scales of the group `next` are fetched. Returns how many of the outputs were whole lines. */
INLINE int64_t add_block(const input_block *b, const group_scales *g, const group_scales *next, int64_t n, float *y) {
    const int64_t scale_bytes = g->scale_dtype == TEAL_F16 ? 2 : 4;
    const vf step = all(b->step), sum_of_x = all(b->sum);
    int64_t at = 0;
    for (; at + LINE_OUTPUTS <= n; at += LINE_OUTPUTS) {
        for (int64_t i = 0; i < LINE_OUTPUTS * scale_bytes; i += 64)
            fetch((const uint8_t *)next->scales + at * scale_bytes + i);
        if (g->zeros)
            UNROLL for (int i = 0; i < LINE_OUTPUTS; i += 32) fetch((const uint8_t *)(next->zeros + at + i));
        vi sums[8];
        line_sums(b, at / 2, sums);
        UNROLL for (int v = 0; v < 8; v++) {
            const int64_t from = at + v * LANES;
            const vf zero = g->zeros ? load_half(g->zeros + from) : all(g->middle);
            const vf codes = __builtin_convertvector(sums[v], vf) * step - zero * sum_of_x;
            store(y + from, load(y + from) + codes * load_scale(g->scale_dtype, g->scales, from));
        }
    }
    return at;
}
#endif

#ifdef WHOLE_NUMBERS
/* y += kept inputs [from, to) of the list times n outputs from `first` on, which stand at `weights`. */
static void add_whole_numbers(const teal_weight *w, const uint8_t *weights, const kept_list *list, int32_t from, int32_t to,
                              int64_t first, int64_t n, float *y) {
    const int64_t distance = AHEAD_BYTES / bytes_of(TEAL_INT4, n + 1) + BLOCK_INPUTS;
    input_block b;
    for (int32_t begin = from, end; begin < to; begin = end) {
        const int64_t number = list->index[begin] / w->group, stop = (number + 1) * w->group;
        for (end = begin; end < to && end < begin + BLOCK_INPUTS && list->index[end] < stop;) end++;
        const group_scales g = scales_of(w, number, first), next = scales_of(w, number + (stop < w->inputs), first);
        int64_t done = 0;
        if (pays(list, begin, end) && take_block(list, begin, end, weights, w->row_bytes, distance, &b))
            done = add_block(&b, &g, &next, n, y);
        if (done == n) continue;
        const group_scales rest = scales_of(w, number, first + done);
        add_group_of_one(TEAL_INT4, w, weights + done / 2, &rest, list, begin, end, n - done, y + done);
    }
}
#endif

#endif
