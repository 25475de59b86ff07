/* Vectors of floats of one variant's width, and what is loaded into them.
 *
 * GCC's vector types say most of it. Where compilers make poor code of them, intrinsics do: conversions, lists, codes. */
#ifndef TEAL_VECTOR_H
#define TEAL_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "teal_native.h"

#if defined(__AVX512F__) && defined(__AVX512VL__)
#include <immintrin.h>
#define VECTOR_BYTES 64
#define REGISTERS 16 /* accumulators that fit beside what is loaded */
#elif defined(__AVX2__)
#include <immintrin.h>
#define VECTOR_BYTES 32
#define REGISTERS 8
#else
#define VECTOR_BYTES 16
#define REGISTERS 8
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#define LANES (VECTOR_BYTES / 4)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));
typedef float vf_anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

INLINE vf all(float x) {
    return x - (vf){0}; /* becomes a broadcast; minus, so that -0 stays */
}
INLINE vf load(const float *p) { return *(const vf_anywhere *)p; }
INLINE void store(float *p, vf x) { *(vf_anywhere *)p = x; }

INLINE float sum(vf x) {
#if VECTOR_BYTES == 64
    return _mm512_reduce_add_ps((__m512)x);
#elif VECTOR_BYTES == 32
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

INLINE float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* One number. */
INLINE float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
}
INLINE uint16_t to_half(float x) { /* to the nearest, ties to even */
    uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) /* below the normal ones: the sum's last place is a half's */
        return (uint16_t)(sign | (float_bits(bits_float(bits) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
INLINE uint16_t to_bfloat(float x) {
    uint32_t bits = float_bits(x);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* LANES numbers of each kind. */
INLINE vf load_bfloat(const uint16_t *p) {
#if VECTOR_BYTES == 64
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif VECTOR_BYTES == 32
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#elif defined(__aarch64__)
    return (vf)vshll_n_u16(vld1_u16(p), 16);
#else
    vu x = {p[0], p[1], p[2], p[3]};
    return (vf)(x << 16);
#endif
}
INLINE vf load_half(const uint16_t *p) {
#if VECTOR_BYTES == 64
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif VECTOR_BYTES == 32
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    return (vf){from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])};
#endif
}
INLINE vf load_byte(const uint8_t *p) {
#if VECTOR_BYTES == 64
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif VECTOR_BYTES == 32
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vi x = {p[0], p[1], p[2], p[3]};
    return __builtin_convertvector(x, vf);
#endif
}

/* Codes of 4 bits, plus NIBBLE_OFFSET, in the order that `nibble_order` gives. With 16 lanes a code becomes the highest
 * bits of a mantissa: two instructions, and no conversion. */
#if VECTOR_BYTES == 64
#define NIBBLE_OFFSET 16.0f
INLINE vf load_nibbles(const uint8_t *p) {
    int64_t codes; /* lanes take turns between its halves: lane 2i is code i of the first, lane 2i + 1 of the second */
    memcpy(&codes, p, 8);
    const __m512i turns = _mm512_setr_epi32(19, 19, 15, 15, 11, 11, 7, 7, 3, 3, 31, 31, 27, 27, 23, 23);
    __m512i moved = _mm512_rolv_epi32(_mm512_set1_epi64(codes), turns);
    const __m512i mask = _mm512_set1_epi32(0x00780000), base = _mm512_set1_epi32(0x41800000);
    return (vf)_mm512_ternarylogic_epi32(moved, mask, base, 0xea); /* (moved & mask) | base */
}
INLINE vf nibble_order(vf natural) {
    const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    return (vf)_mm512_permutexvar_ps(order, (__m512)natural);
}
INLINE vf natural_order(vf nibbles) {
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return (vf)_mm512_permutexvar_ps(order, (__m512)nibbles);
}
#else
#define NIBBLE_OFFSET 0.0f
INLINE vf load_nibbles(const uint8_t *p) {
#if VECTOR_BYTES == 32
    int32_t codes;
    memcpy(&codes, p, 4);
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    __m256i moved = _mm256_srlv_epi32(_mm256_set1_epi32(codes), shifts);
    return (vf)_mm256_cvtepi32_ps(_mm256_and_si256(moved, _mm256_set1_epi32(15)));
#else
    vi x = {p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4};
    return __builtin_convertvector(x, vf);
#endif
}
INLINE vf nibble_order(vf natural) { return natural; }
INLINE vf natural_order(vf nibbles) { return nibbles; }
#endif

/* LANES weights of a row from output `at` on, which is a multiple of LANES. Codes as they are, those of 4 bits in the
 * order of nibbles. */
INLINE vf load_weights(const int dtype, const uint8_t *row, int64_t at) {
    switch (dtype) {
    case TEAL_F32: return load((const float *)row + at);
    case TEAL_BF16: return load_bfloat((const uint16_t *)row + at);
    case TEAL_F16: return load_half((const uint16_t *)row + at);
    case TEAL_INT8: return load_byte(row + at);
    default: return load_nibbles(row + at / 2);
    }
}
INLINE float one_weight(const int dtype, const uint8_t *row, int64_t at) {
    switch (dtype) {
    case TEAL_F32: return ((const float *)row)[at];
    case TEAL_BF16: return bits_float((uint32_t)((const uint16_t *)row)[at] << 16);
    case TEAL_F16: return from_half(((const uint16_t *)row)[at]);
    case TEAL_INT8: return row[at];
    default: return row[at / 2] >> (at % 2 * 4) & 15;
    }
}
INLINE int64_t bytes_of(const int dtype, int64_t weights) {
    switch (dtype) {
    case TEAL_F32: return weights * 4;
    case TEAL_BF16:
    case TEAL_F16: return weights * 2;
    case TEAL_INT8: return weights;
    default: return weights / 2;
    }
}

/* e to the x, to about two units in the last place (Cephes' polynomial); 0 below -87, +inf above 88.3, NaN of NaN. */
INLINE vf exponential(vf x) {
    vf low = all(-87.3f), high = all(88.37f);
    vi below = x < low, above = x > high;
    vf clamped = (vf)((~(below | above) & (vi)x) | (below & (vi)low) | (above & (vi)high));
    vf shifted = clamped * all(1.44269504f) + all(0x1.8p23f); /* the nearest whole number, in the lowest bits */
    vf whole = shifted - all(0x1.8p23f);
    vf r = clamped - whole * all(0.693359375f);
    r = r - whole * all(-2.12194440e-4f);
    vf p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    vi power = ((vi)shifted - (vi)all(0x1.8p23f)) << 23;
    vf result = (vf)((vi)p + power);
    vi number = x == x;
    result = (vf)(~below & (vi)result);
    result = (vf)((~above & (vi)result) | (above & (vi)all(INFINITY)));
    return (vf)((number & (vi)result) | (~number & (vi)x));
}

INLINE vf sigmoid(vf x) { return all(1.0f) / (all(1.0f) + exponential(-x)); }

/* Hyperbolic tangent, to about two units in the last place; near 0 by tanh(x) / x, an even polynomial fitted below 0.64. */
INLINE vf tangent(vf x) {
    vi sign = (vi)x & (vi)all(-0.0f);
    vf size = (vf)(~(vi)all(-0.0f) & (vi)x), z = x * x;
    vf p = all(-5.5448658572e-3f);
    p = p * z + all(2.0487088277e-2f);
    p = p * z + all(-5.3688625355e-2f);
    p = p * z + all(1.3330720045e-1f);
    p = p * z + all(-3.3333242949e-1f);
    p = p * z + all(9.9999999489e-1f);
    vf large = all(1.0f) - all(2.0f) / (exponential(size + size) + all(1.0f));
    vi near = size < all(0.64f);
    return (vf)((near & (vi)(x * p)) | (~near & (sign | (vi)large)));
}

/* x times the normal distribution at x. Of a, the size of x / sqrt(2), and t = 1 / (1 + a / 2):
 * erfc(a) = t exp(-a^2 + P(t - 0.5)), where P was fitted to 5e-8. So the tail of negative x keeps its digits. */
INLINE vf gelu(vf x) {
    vf a = (vf)(~(vi)all(-0.0f) & (vi)x) * all(0.7071067812f);
    vf t = all(1.0f) / (all(1.0f) + all(0.5f) * a), u = t - all(0.5f);
    vf p = all(1.4640520765e-1f);
    p = p * u + all(-3.0304781578e-2f);
    p = p * u + all(-2.6185546341e-1f);
    p = p * u + all(1.0849639784e-1f);
    p = p * u + all(2.7927118096e-1f);
    p = p * u + all(-1.5762638931e-1f);
    p = p * u + all(-3.7506088196e-1f);
    p = p * u + all(1.8936534044e-1f);
    p = p * u + all(1.3452854517f);
    p = p * u + all(-6.7179405765e-1f);
    vf tail = all(0.5f) * t * exponential(p - a * a);
    vi below = x < all(0.0f);
    return x * (vf)((below & (vi)tail) | (~below & (vi)(all(1.0f) - tail)));
}

/* x = cap tanh(x / cap), n of them. */
static inline void soft_cap(float *x, int64_t n, float cap) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(x + i, all(cap) * tangent(load(x + i) / all(cap)));
    for (; i < n; i++) x[i] = cap * tanhf(x[i] / cap);
}

#endif
