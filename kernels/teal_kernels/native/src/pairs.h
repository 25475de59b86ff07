/* Products of 4-bit codes in whole numbers (AVX2), for one row: as `whole.h`, by an instruction that multiplies two inputs of
 * 16 bits with their codes and adds the two up in 32 bits. A code need not stand at the lowest bits: sums of codes that stand
 * higher are shifted down when a block is done, which saves a shift of each code. */
#ifndef TEAL_PAIRS_H
#define TEAL_PAIRS_H

#include "whole.h"

#if VECTOR_BYTES == 32
#define WHOLE_NUMBERS
#define BLOCK_INPUTS 32 /* whose sums fit 32 bits: 32 * 32767 * 255 */
#define HALF_LINE 64    /* outputs, codes of 32 bytes: their sums fill eight registers */
#define LEAST_INPUTS 4  /* of a block: fewer are done sooner in floats */

typedef struct {
    int16_t x[BLOCK_INPUTS]; /* zero behind the last one */
    const uint8_t *row[BLOCK_INPUTS], *ahead[BLOCK_INPUTS];
    int32_t pairs;
    int32_t at_once; /* pairs whose rows are read side by side: eight rows, and with 16 or 4 it was slower from memory */
    float step, sum; /* of the numbers, and of the inputs as they are now */
} input_block;

/* Inputs [begin, end) of a list, at most BLOCK_INPUTS; 0 where one is infinite or not a number. */
static int take_block(const kept_list *list, int32_t begin, int32_t end, const uint8_t *weights, int64_t row_bytes,
                      int64_t distance, input_block *b) {
    static const int32_t here[2 * BLOCK_INPUTS] = {[0 ... BLOCK_INPUTS - 1] = -1};
    const int32_t n = end - begin, *const mask = here + BLOCK_INPUTS - n;
    const __m256 sign = _mm256_set1_ps(-0.0f), infinite = _mm256_set1_ps(INFINITY);
    __m256 x[4], largest = _mm256_setzero_ps(), usual = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    UNROLL for (int i = 0; i < 4; i++) {
        x[i] = _mm256_maskload_ps(list->value + begin + i * LANES, _mm256_loadu_si256((const __m256i *)(mask + i * LANES)));
        const __m256 size = _mm256_andnot_ps(sign, x[i]);
        usual = _mm256_and_ps(usual, _mm256_cmp_ps(size, infinite, _CMP_LT_OQ));
        largest = _mm256_max_ps(largest, size);
    }
    if (_mm256_movemask_ps(usual) != 255) return 0;
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    const float top = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
    const __m256 factor = _mm256_set1_ps(top > 1e-30f ? 32767.0f / top : 0.0f); /* smaller ones are zero: no overflow */
    __m256i total = _mm256_setzero_si256();
    UNROLL for (int i = 0; i < 4; i += 2) {
        const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], factor));
        const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(x[i + 1], factor));
        total = _mm256_add_epi32(total, _mm256_add_epi32(first, second));
        const __m256i numbers = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
        _mm256_storeu_si256((__m256i *)(b->x + i * LANES), numbers);
    }
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    const __m128i quarter = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
    const int32_t sum = _mm_cvtsi128_si32(quarter) + _mm_extract_epi32(quarter, 1);
    b->step = top / 32767.0f;
    b->sum = b->step * (float)sum;
    b->pairs = (n + 1) / 2;
    b->at_once = rows_at_once(row_bytes) / 2;
    /* what is too many is multiplied with zero */
    find_rows(list, begin, end, 2 * b->pairs, weights, row_bytes, distance, b->row, b->ahead);
    return 1;
}

/* Sums of pairs [from, to) of a block for the outputs of 32 bytes from `at` on. Of two halves of each part of 128 bits: of four
 * codes, the first plus 16 times the second, 16 times the second, the third plus 16 times the fourth, 16 times the fourth. */
INLINE void add_pairs(const input_block *b, int32_t from, int32_t to, int64_t at, const int fetches, __m256i of[2][4]) {
    const __m256i two = _mm256_set1_epi16(0xff), upper = _mm256_set1_epi16(0xf0);
    for (int32_t p = from; p < to; p++) {
        int32_t both;
        memcpy(&both, b->x + 2 * p, sizeof both);
        const __m256i x = _mm256_set1_epi32(both);
        const __m256i first = _mm256_loadu_si256((const __m256i *)(b->row[2 * p] + at));
        const __m256i second = _mm256_loadu_si256((const __m256i *)(b->row[2 * p + 1] + at));
        if (fetches) fetch(b->ahead[2 * p] + at), fetch(b->ahead[2 * p + 1] + at);
        UNROLL for (int half = 0; half < 2; half++) {
            const __m256i low = half ? _mm256_unpackhi_epi16(first, second) : _mm256_unpacklo_epi16(first, second);
            const __m256i high = _mm256_srli_epi16(low, 8);
            __m256i *sums = of[half];
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_and_si256(low, two), x));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_and_si256(low, upper), x));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(high, x));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_and_si256(high, upper), x));
        }
        /* GCC keeps two of them in memory otherwise, and waits for them: a third slower */
        UNROLL for (int i = 0; i < 8; i++) __asm__("" : "+x"(of[i / 4][i % 4]));
    }
}

/* The same, as sums of codes of eight outputs after the other. */
INLINE void in_order(__m256i of[2][4], vi *sums) {
    UNROLL for (int half = 0; half < 2; half++) {
        const __m256i *s = of[half];
        const __m256i code0 = _mm256_sub_epi32(s[0], s[1]), code1 = _mm256_srai_epi32(s[1], 4);
        const __m256i code2 = _mm256_sub_epi32(s[2], s[3]), code3 = _mm256_srai_epi32(s[3], 4);
        const __m256i a = _mm256_unpacklo_epi32(code0, code1), b = _mm256_unpacklo_epi32(code2, code3);
        const __m256i c = _mm256_unpackhi_epi32(code0, code1), d = _mm256_unpackhi_epi32(code2, code3);
        const __m256i four0 = _mm256_unpacklo_epi64(a, b), four1 = _mm256_unpackhi_epi64(a, b);
        const __m256i four2 = _mm256_unpacklo_epi64(c, d), four3 = _mm256_unpackhi_epi64(c, d);
        sums[2 * half] = (vi)_mm256_permute2x128_si256(four0, four1, 0x20);
        sums[2 * half + 1] = (vi)_mm256_permute2x128_si256(four2, four3, 0x20);
        sums[4 + 2 * half] = (vi)_mm256_permute2x128_si256(four0, four1, 0x31);
        sums[4 + 2 * half + 1] = (vi)_mm256_permute2x128_si256(four2, four3, 0x31);
    }
}

/* y += outputs [0, n) of a block, of which pairs [from, to) are added to what `partial` holds of those before; with the last
 * pairs. Lines of rows ahead are fetched, and scales of the group `next`. */
INLINE void add_some(const input_block *b, int32_t from, int32_t to, const int starts, const int ends, const group_scales *g,
                     const group_scales *next, int64_t n, float *y, float *partial) {
    const int64_t scale_bytes = g->scale_dtype == TEAL_F16 ? 2 : 4;
    const vf step = all(b->step), sum_of_x = all(b->sum);
    for (int64_t at = 0; at < n; at += HALF_LINE) {
        __m256i of[2][4], *kept = (__m256i *)(partial + at);
        UNROLL for (int i = 0; i < 8; i++)
            of[i / 4][i % 4] = starts ? _mm256_setzero_si256() : _mm256_loadu_si256(kept + i);
        if (at % (2 * HALF_LINE)) add_pairs(b, from, to, at / 2, 0, of);
        else add_pairs(b, from, to, at / 2, 1, of);
        if (!ends) {
            UNROLL for (int i = 0; i < 8; i++) _mm256_storeu_si256(kept + i, of[i / 4][i % 4]);
            continue;
        }
        for (int64_t i = 0; i < HALF_LINE * scale_bytes; i += 64)
            fetch((const uint8_t *)next->scales + at * scale_bytes + i);
        if (g->zeros)
            UNROLL for (int i = 0; i < HALF_LINE; i += 32) fetch((const uint8_t *)(next->zeros + at + i));
        vi sums[8];
        in_order(of, sums);
        UNROLL for (int v = 0; v < 8; v++) {
            const int64_t here = at + v * LANES;
            const vf zero = g->zeros ? load_half(g->zeros + here) : all(g->middle);
            const vf codes = __builtin_convertvector(sums[v], vf) * step - zero * sum_of_x;
            store(y + here, load(y + here) + codes * load_scale(g->scale_dtype, g->scales, here));
        }
    }
}

/* y += a block. `partial`: memory for n sums. Returns how many of the outputs were whole halves of lines. */
INLINE int64_t add_block(const input_block *b, const group_scales *g, const group_scales *next, int64_t n, float *y,
                         float *partial) {
    const int64_t whole = n - n % HALF_LINE;
    for (int32_t from = 0, to; from < b->pairs; from = to) {
        to = b->pairs - from <= b->at_once + 1 ? b->pairs : from + b->at_once;
        if (from == 0 && to == b->pairs) add_some(b, from, to, 1, 1, g, next, whole, y, partial);
        else if (from == 0) add_some(b, from, to, 1, 0, g, next, whole, y, partial);
        else if (to == b->pairs) add_some(b, from, to, 0, 1, g, next, whole, y, partial);
        else add_some(b, from, to, 0, 0, g, next, whole, y, partial);
    }
    return whole;
}
#endif

#ifdef WHOLE_NUMBERS
/* y += kept inputs [from, to) of the list times n outputs from `first` on, which stand at `weights`. `partial`: memory for n. */
static void add_whole_numbers(const teal_weight *w, const uint8_t *weights, const kept_list *list, int32_t from, int32_t to,
                              int64_t first, int64_t n, float *y, float *partial) {
    const int64_t distance = AHEAD_BYTES / bytes_of(TEAL_INT4, n + 1) + ROWS_AT_ONCE;
    input_block b;
    for (int32_t begin = from, end; begin < to; begin = end) {
        const int64_t number = list->index[begin] / w->group, stop = (number + 1) * w->group;
        for (end = begin; end < to && end < begin + BLOCK_INPUTS && list->index[end] < stop;) end++;
        const group_scales g = scales_of(w, number, first), next = scales_of(w, number + (stop < w->inputs), first);
        int64_t done = 0;
        if (end - begin >= LEAST_INPUTS && take_block(list, begin, end, weights, w->row_bytes, distance, &b))
            done = add_block(&b, &g, &next, n, y, partial);
        if (done == n) continue;
        const group_scales rest = scales_of(w, number, first + done);
        add_group_of_one(TEAL_INT4, w, weights + done / 2, &rest, list, begin, end, n - done, y + done);
    }
}
#endif

#endif
