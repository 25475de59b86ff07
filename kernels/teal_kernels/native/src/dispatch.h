/* Variants, memory and division of work, which sessions and products alone need. */
#ifndef TEAL_DISPATCH_H
#define TEAL_DISPATCH_H

#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define LIST_END 16 /* places behind a list, which vectors may overwrite */

typedef struct {
    const char *name;
    void (*run)(void *session, int32_t thread);
    void (*linear)(void *call, int32_t thread);
} variant;

/* The variant of a name; NULL where there is none or this processor cannot run it. */
const variant *find_variant(const char *name);

/* Why a weight cannot be multiplied with; NULL where it can. */
const char *bad_weight(const teal_weight *weight);

/* Memory in one block, zeroed: sizes are taken twice, to measure and then, after arena_open, to have. */
typedef struct {
    char *memory;
    int64_t used;
} arena;

static inline void *take(arena *a, int64_t bytes) {
    void *found = a->memory ? a->memory + a->used : NULL;
    a->used += (bytes + 127) / 128 * 128; /* threads do not share lines, nor pairs of them */
    return found;
}
static inline void *take_floats(arena *a, int64_t count) { return take(a, count * 4); }
static inline int arena_open(arena *a) {
    void *memory;
    if (posix_memalign(&memory, 128, (size_t)a->used + 128)) return 0;
    memset(memory, 0, (size_t)a->used + 128);
    *a = (arena){memory, 0};
    return 1;
}

static inline int32_t padded_rows(int32_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : 8; }

/* Outputs are divided by so many: whole lines of memory, where there are enough. */
static inline int32_t unit_of(int64_t outputs, int32_t threads) { return outputs >= 128 * (int64_t)threads ? 64 : 16; }

/* One thread's part of n. */
static inline void cut(int32_t n, int32_t threads, int32_t thread, int32_t *first, int32_t *last) {
    int64_t unit = unit_of(n, threads), units = (n + unit - 1) / unit;
    int64_t begin = units * thread / threads * unit, end = units * (thread + 1) / threads * unit;
    *first = (int32_t)(begin < n ? begin : n);
    *last = (int32_t)(end < n ? end : n);
}

#endif
