/* What the files of the library share. */
#ifndef TEAL_INTERNAL_H
#define TEAL_INTERNAL_H

#include <stdatomic.h>

#include "teal_native.h"

#define EXPORTED __attribute__((visibility("default")))

/* Runs `work` on all threads of a pool, each with its number; returns when all are done. */
void pool_run(teal_pool *pool, void (*work)(void *context, int32_t thread), void *context);
int32_t pool_threads(const teal_pool *pool);
/* Whether its threads run at the same time, so that they can wait for one another. */
int pool_can_wait(const teal_pool *pool);
/* Waits until all threads of the running work have come here. */
void pool_barrier(teal_pool *pool);

/* An expert that was chosen, and by which rows. */
typedef struct {
    int32_t expert, rows, padded_rows; /* 1, 2, 4 or 8 */
    int32_t slot; /* of the first row, in all that is kept of chosen experts; those of the others follow */
    int32_t row[TEAL_MAX_ROWS];
    float share[TEAL_MAX_ROWS]; /* of the rows: their weights */
} choice;

/* Has the weights of a program in large pages, where the system gives them. */
void pages_of(const teal_program *program);

/* What one thread does of a step: outputs [first, last) of each part that is row-major,
 * and in [0] the neurons, of a route the experts. Of attention: [0] items, in `last[1]` those of a
 * row, in `first[1]` the first key head, in [2] the inputs of the product after it. */
typedef struct {
    int32_t first[TEAL_MAX_PARTS], last[TEAL_MAX_PARTS];
} range;

/* Inputs that are kept: their numbers, and their values, those of the rows side by side. */
typedef struct {
    int32_t *index;
    float *value;
    int32_t count;
} kept_list;

/* The memory of one thread. */
typedef struct {
    float *hidden;  /* (rows, hidden): the residual stream, of which each thread has a copy */
    float *normed;  /* (rows, hidden) */
    float *aside;   /* (rows, hidden), where a norm goes there */
    float *own;     /* (rows, own inputs): what this thread made and multiplies next */
    float *sums;    /* (rows, outputs of a product): of the inputs that this thread multiplies; others read it */
    float *group;   /* (rows, outputs of a tile): of one group of codes; or live ups */
    float *tile;    /* (rows, OUTPUT_TILE) */
    float *neurons; /* (2, rows, own neurons): gates and ups; of a routed MLP all neurons */
    float *partial[2]; /* (rows, hidden): what it adds to the residual stream; two, since one is read while one is written */
    float *scores;  /* (query heads of a key head, positions of a tile) */
    float *queries; /* (query heads of a key head, then its key and its value, dim) */
    float *gathered; /* (rows, hidden): rows that chose one expert */
    int32_t *taken;  /* (top_k,): experts of one row */
    float *shares;   /* (top_k,): their weights */
    choice *choices; /* (rows * top_k,) */
    int32_t n_choices;
    kept_list list;
    int64_t list_kept; /* inputs that the list's rows keep, all together */
    int64_t *kept; /* (counters,) */
    float squares[TEAL_MAX_ROWS]; /* of `own`, of each row: others read it */
    float best_value[TEAL_MAX_ROWS];
    int64_t best[TEAL_MAX_ROWS];
    int32_t own_first, own_last; /* the inputs of the next residual product that are in `own` */
} thread_memory;

struct teal_session {
    const teal_program *program;
    teal_pool *pool;
    int32_t rows, padded_rows; /* 1, 2, 4 or 8 of which the last ones are zero */
    int32_t threads;
    void (*run)(void *session, int32_t thread);
    range *ranges;     /* (steps + 1, threads); the last ones are the output layer's */
    int32_t *splits;   /* (steps,) of attention: parts of the positions */
    thread_memory *memory;
    float *heads;      /* (rows, splits, heads, dim + HEAD_EXTRA): what `attend` leaves */
    float *router;     /* (rows, experts): outputs of the router */
    float *routed;     /* (rows, groups): logits of the groups of a routed MLP */
    float *ranked;     /* (rows, rank): what the first layer of its router makes */
    float *shared;     /* (rows, hidden): sums of `partial`, where many threads would each add them up */
    void *block; /* all of the above is in it */
    /* Of the step under way. */
    const int64_t *tokens, *positions;
    const int32_t *levels, *sequences; /* or NULL */
    float *logits;
};

#define OUTPUT_TILE 4096 /* logits that are computed before the next ones */
#define SUMS_TILE 4096   /* outputs whose sums stay in the first cache */
#define SCORE_TILE 64 /* positions whose scores are computed before their values are read */
#define HEAD_EXTRA 2  /* floats behind the values of a head: maximum and sum of its scores' exponentials */
#define MANY_THREADS 4 /* from more on, partial sums are added up by slices */

/* The variants' entries: a token's work of one thread, and a product alone. */
#define DECLARE_VARIANT(name)                          \
    void teal_run_##name(void *session, int32_t thread); \
    void teal_linear_##name(void *call, int32_t thread);
DECLARE_VARIANT(avx512)
DECLARE_VARIANT(avx2)
DECLARE_VARIANT(neon)
DECLARE_VARIANT(baseline)

typedef struct {
    const teal_weight *weight;
    teal_pool *pool;
    const float *x;
    float *y;
    thread_memory *memory;
    range *ranges;
    int32_t rows, padded_rows;
} linear_call;

#endif
