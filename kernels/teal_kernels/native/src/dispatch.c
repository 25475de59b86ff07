/* Which variant runs, and a product alone. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>

static int has_bits(unsigned value, unsigned bits) { return (value & bits) == bits; }

/* Whether processor and operating system have AVX2 with FMA and half floats (wide = 0), or AVX-512 with VNNI too, as
 * Cascade Lake, Ice Lake and Zen 4 have (wide = 1). */
static int has_vectors(int wide) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has_bits(c, 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!has_bits(low, wide ? 0xe6 : 6) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (wide && !has_bits(c, 1u << 11)) return 0;
    return has_bits(b, 1u << 5 | (wide ? 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31 : 0));
}
static int has_avx512(void) { return has_vectors(1); }
static int has_avx2(void) { return has_vectors(0); }
#endif
__attribute__((unused)) static int always(void) { return 1; }

static const struct {
    variant variant;
    int (*runs)(void);
} compiled[] = {
#ifdef TEAL_HAS_AVX512
    {{"avx512", teal_run_avx512, teal_linear_avx512}, has_avx512},
#endif
#ifdef TEAL_HAS_AVX2
    {{"avx2", teal_run_avx2, teal_linear_avx2}, has_avx2},
#endif
#ifdef TEAL_HAS_NEON
    {{"neon", teal_run_neon, teal_linear_neon}, always},
#endif
#ifdef TEAL_HAS_BASELINE
    {{"baseline", teal_run_baseline, teal_linear_baseline}, always},
#endif
};
#define COMPILED ((int)(sizeof compiled / sizeof *compiled))

EXPORTED int32_t teal_abi(void) { return TEAL_ABI; }

EXPORTED const char *teal_variants(void) {
    static char names[64];
    char found[64] = "";
    for (int i = 0; i < COMPILED; i++)
        if (compiled[i].runs()) {
            if (*found) strcat(found, " ");
            strcat(found, compiled[i].variant.name);
        }
    return strcpy(names, found); /* the same bytes at every call */
}

const variant *find_variant(const char *name) {
    for (int i = 0; i < COMPILED; i++)
        if (!strcmp(name, compiled[i].variant.name)) return compiled[i].runs() ? &compiled[i].variant : NULL;
    return NULL;
}

const char *bad_weight(const teal_weight *w) {
    int codes = w->dtype == TEAL_INT8 || w->dtype == TEAL_INT4;
    if (!w->data || w->inputs < 1 || w->outputs < 1) return "a weight without data or sizes";
    if (w->dtype < TEAL_F32 || w->dtype > TEAL_INT4) return "a weight of unknown dtype";
    if (w->layout != TEAL_INPUT_MAJOR && w->layout != TEAL_ROW_MAJOR) return "a weight of unknown layout";
    if (codes && w->layout == TEAL_ROW_MAJOR) return "codes that are row-major";
    if (codes && (!w->scales || w->group < 1)) return "codes without scales";
    if (codes && w->scale_dtype != TEAL_F16 && w->scale_dtype != TEAL_F32) return "scales of unknown dtype";
    if (w->thresholds && w->levels < 1) return "thresholds of no level";
    return NULL;
}

EXPORTED int32_t teal_linear(teal_pool *pool, const char *name, const teal_weight *weight, int32_t rows,
                             const float *x, float *y) {
    const variant *chosen = find_variant(name);
    if (!pool || !chosen || bad_weight(weight) || rows < 1 || rows > TEAL_MAX_ROWS) return 1;
    const int32_t threads = pool_threads(pool), padded = padded_rows(rows);
    range *ranges = calloc((size_t)threads, sizeof *ranges);
    thread_memory *memory = calloc((size_t)threads, sizeof *memory);
    float *padded_x = calloc((size_t)padded * (size_t)weight->inputs, sizeof *padded_x);
    arena a = {0};
    if (ranges && memory && padded_x) {
        memcpy(padded_x, x, (size_t)rows * (size_t)weight->inputs * sizeof *x);
        for (int32_t t = 0; t < threads; t++) cut(weight->outputs, threads, t, &ranges[t].first[0], &ranges[t].last[0]);
        for (int measuring = 1; measuring >= 0; measuring--) {
            for (int32_t t = 0; t < threads; t++) {
                thread_memory *m = &memory[t];
                m->tile = take_floats(&a, (int64_t)padded * OUTPUT_TILE);
                m->group = take_floats(&a, (int64_t)padded * OUTPUT_TILE);
                m->list.index = take_floats(&a, weight->inputs + LIST_END);
                m->list.value = take_floats(&a, (int64_t)padded * (weight->inputs + LIST_END));
            }
            if (measuring && !arena_open(&a)) break;
        }
    }
    int32_t failed = a.memory == NULL;
    if (!failed) {
        linear_call call = {weight, pool, padded_x, y, memory, ranges, rows, padded};
        pool_run(pool, chosen->linear, &call);
    }
    free(a.memory), free(padded_x), free(memory), free(ranges);
    return failed;
}
