/* Products of 4-bit codes in whole numbers (AVX-512 VNNI), for one row.
 *
 * Kept inputs are taken in blocks of up to eight. Those of a block become whole numbers of 16 bits, in steps of the 32,512th
 * part of the largest one: two bytes. An instruction multiplies a byte of four inputs with their codes and adds that up.
 * What is rounded is 2^-16 of the block's largest input, far below the steps of the codes. From the second cache this is
 * twice as fast as floats; from memory 1.1 to 1.2 times (benchmarks/NOTES.md).
 *
 * Codes of 8 bits stay in floats: those are bound by memory, and were 3 to 7 % slower so. */
#ifndef TEAL_WHOLE_H
#define TEAL_WHOLE_H

#include "groups.h"

#if defined(__AVX512VNNI__)
#define WHOLE_NUMBERS
#define BLOCK_INPUTS 8   /* rows that are read side by side; 16 and 32 were slower from memory */
#define LEAST_INPUTS 1   /* of a block: floats are never sooner */
#define LINE_OUTPUTS 128 /* codes of a line of 64 bytes */

typedef struct {
    int32_t high[BLOCK_INPUTS / 4], low[BLOCK_INPUTS / 4]; /* bytes of four inputs each, of 256 * high + low */
    const uint8_t *row[BLOCK_INPUTS], *ahead[BLOCK_INPUTS];
    int32_t quads;
    float step, sum; /* of the numbers, and of the inputs as they are now */
} input_block;

/* Inputs [begin, end) of a list, at most BLOCK_INPUTS; 0 where one is infinite or not a number. */
static int take_block(const kept_list *list, int32_t begin, int32_t end, const uint8_t *weights, int64_t row_bytes,
                      int64_t distance, input_block *b) {
    const int32_t n = end - begin;
    const __mmask16 here = (__mmask16)((1 << n) - 1);
    const __m512 x = _mm512_maskz_loadu_ps(here, list->value + begin);
    if (_mm512_fpclass_ps_mask(x, 0x99)) return 0;
    const float largest = _mm512_reduce_max_ps(_mm512_abs_ps(x));
    const float factor = largest > 1e-30f ? 32512.0f / largest : 0.0f; /* smaller ones are zero: no overflow */
    const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(factor)));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
    const __m128i high_bytes = _mm512_cvtepi32_epi8(high), low_bytes = _mm512_cvtepi32_epi8(number);
    memcpy(b->high, &high_bytes, sizeof b->high);
    memcpy(b->low, &low_bytes, sizeof b->low);
    b->step = largest / 32512.0f;
    b->sum = b->step * (float)_mm512_reduce_add_epi32(number);
    b->quads = (n + 3) / 4;
    /* what is too many is multiplied with zero */
    find_rows(list, begin, end, 4 * b->quads, weights, row_bytes, distance, b->row, b->ahead);
    return 1;
}

/* Four vectors of a row each: every four bytes of them become a vector's four lanes, with a byte of each row. Parts of
 * 128 bits stay where they are. */
INLINE void turn_rows(const __m512i *row, __m512i *turned) {
    __m512i t0 = _mm512_unpacklo_epi8(row[0], row[1]), t1 = _mm512_unpackhi_epi8(row[0], row[1]);
    __m512i t2 = _mm512_unpacklo_epi8(row[2], row[3]), t3 = _mm512_unpackhi_epi8(row[2], row[3]);
    turned[0] = _mm512_unpacklo_epi16(t0, t2), turned[1] = _mm512_unpackhi_epi16(t0, t2);
    turned[2] = _mm512_unpacklo_epi16(t1, t3), turned[3] = _mm512_unpackhi_epi16(t1, t3);
}

/* Four vectors, of four parts of 128 bits: the first parts of all become the first vector, and so on. */
INLINE void turn_parts(__m512i *v) {
    __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_i32x4(a, c, 0x88), v[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[2] = _mm512_shuffle_i32x4(b, d, 0x88), v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

/* sums (8 vectors): a block's sums of LINE_OUTPUTS outputs from byte `at` on; of those only whose bytes are `here`. */
INLINE void line_sums(const int QUADS, const input_block *b, int64_t at, __mmask64 here, __m512i *sums) {
    __m512i high[8], low[8]; /* [0, 4): of bytes, so of even outputs and 16 times the odd ones; [4, 8): even ones */
    UNROLL for (int i = 0; i < 8; i++) high[i] = low[i] = _mm512_setzero_si512();
    UNROLL for (int q = 0; q < QUADS; q++) {
        __m512i row[4], turned[4];
        const __m512i x_high = _mm512_set1_epi32(b->high[q]), x_low = _mm512_set1_epi32(b->low[q]);
        UNROLL for (int u = 0; u < 4; u++) {
            fetch(b->ahead[4 * q + u] + at);
            row[u] = _mm512_maskz_loadu_epi8(here, b->row[4 * q + u] + at);
        }
        turn_rows(row, turned);
        UNROLL for (int k = 0; k < 4; k++) {
            high[k] = _mm512_dpbusd_epi32(high[k], turned[k], x_high);
            low[k] = _mm512_dpbusd_epi32(low[k], turned[k], x_low);
            turned[k] = _mm512_and_si512(turned[k], _mm512_set1_epi8(15));
            high[4 + k] = _mm512_dpbusd_epi32(high[4 + k], turned[k], x_high);
            low[4 + k] = _mm512_dpbusd_epi32(low[4 + k], turned[k], x_low);
        }
    }
    UNROLL for (int i = 0; i < 8; i++) high[i] = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]);
    __m512i first[4], second[4]; /* of each part of 128 bits, eight outputs: */
    UNROLL for (int k = 0; k < 4; k++) {
        const __m512i even = high[4 + k], odd = _mm512_srai_epi32(_mm512_sub_epi32(high[k], even), 4);
        __m512i *side = k < 2 ? first : second;
        side[k % 2 * 2] = _mm512_unpacklo_epi32(even, odd), side[k % 2 * 2 + 1] = _mm512_unpackhi_epi32(even, odd);
    }
    turn_parts(first), turn_parts(second);
    UNROLL for (int k = 0; k < 4; k++) sums[2 * k] = first[k], sums[2 * k + 1] = second[k];
}

INLINE __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1 << n) - 1); }

/* y += a block's sums of up to LINE_OUTPUTS outputs from `at` on, with their scales. */
INLINE void add_line(const int QUADS, const input_block *b, const group_scales *g, int64_t at, int64_t n, float *y) {
    __m512i sums[8];
    const int64_t bytes = (n + 1) / 2;
    line_sums(QUADS, b, at / 2, bytes < 64 ? ((__mmask64)1 << bytes) - 1 : ~(__mmask64)0, sums);
    const __m512 step = _mm512_set1_ps(b->step), sum_of_x = _mm512_set1_ps(b->sum);
    UNROLL for (int v = 0; v < 8; v++) {
        const __mmask16 here = first_lanes(n - 16 * v);
        const int64_t from = at + 16 * v;
        const __m512 zero = g->zeros ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, g->zeros + from))
                                     : _mm512_set1_ps(g->middle);
        const __m512 scale = g->scale_dtype == TEAL_F16
                                 ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, (const uint16_t *)g->scales + from))
                                 : _mm512_maskz_loadu_ps(here, (const float *)g->scales + from);
        const __m512 codes = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), step);
        const __m512 found = _mm512_fmadd_ps(_mm512_fnmadd_ps(zero, sum_of_x, codes), scale,
                                             _mm512_maskz_loadu_ps(here, y + from));
        _mm512_mask_storeu_ps(y + from, here, found);
    }
}

/* y += QUADS times four inputs of a block; scales of the group `next` are fetched. */
INLINE void add_quads(const int QUADS, const input_block *b, const group_scales *g, const group_scales *next, int64_t n,
                      float *y) {
    const int64_t scale_bytes = g->scale_dtype == TEAL_F16 ? 2 : 4;
    int64_t at = 0;
    for (; at + LINE_OUTPUTS <= n; at += LINE_OUTPUTS) {
        for (int64_t i = 0; i < LINE_OUTPUTS * scale_bytes; i += 64)
            fetch((const uint8_t *)next->scales + at * scale_bytes + i);
        if (g->zeros)
            UNROLL for (int i = 0; i < LINE_OUTPUTS; i += 32) fetch((const uint8_t *)(next->zeros + at + i));
        add_line(QUADS, b, g, at, LINE_OUTPUTS, y);
    }
    if (at < n) add_line(QUADS, b, g, at, n - at, y);
}

/* y += a block. Returns how many outputs that are: all. */
INLINE int64_t add_block(const input_block *b, const group_scales *g, const group_scales *next, int64_t n, float *y,
                         float *partial) {
    (void)partial;
    if (b->quads == 1) add_quads(1, b, g, next, n, y);
    else add_quads(2, b, g, next, n, y);
    return n;
}

#endif
#endif
