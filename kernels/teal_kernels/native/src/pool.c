/* Threads that work on one token together. They meet many times a token, so they spin; but not for long. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "internal.h"

#define SPINS 4000       /* looks at a barrier before others may run: some 50 us */
#define SPINS_CROWDED 16 /* the same, where there are more threads than processors */
#define YIELDS 200       /* times that others may run before a thread without work sleeps */

struct teal_pool {
    int32_t threads, spins;
    teal_parallel *parallel; /* whose threads these are; NULL: `workers` */
    void (*work)(void *, int32_t);
    void *context;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int closing; /* under the mutex */
    _Alignas(64) atomic_uint runs; /* that were begun */
    _Alignas(64) atomic_int running; /* workers that have not ended the last one */
    _Alignas(64) atomic_int sleeping;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int taken; /* numbers that borrowed threads have taken in this run */
    _Alignas(64) atomic_uint barriers; /* that all have passed */
};

typedef struct {
    teal_pool *pool;
    int32_t number;
} worker;

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int32_t processors(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return (int32_t)sysconf(_SC_NPROCESSORS_ONLN);
}

int32_t pool_threads(const teal_pool *pool) { return pool->threads; }
int pool_can_wait(const teal_pool *pool) { return !pool->parallel; }

void pool_barrier(teal_pool *pool) {
    if (pool->threads == 1) return;
    unsigned passed = atomic_load_explicit(&pool->barriers, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) == pool->threads - 1) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->barriers, passed + 1, memory_order_release);
        return;
    }
    for (int32_t spin = 0; atomic_load_explicit(&pool->barriers, memory_order_acquire) == passed; spin++)
        if (spin < pool->spins) pause_briefly();
        else sched_yield();
}

/* The number of runs begun, as soon as it is another than `done`. */
static unsigned next_run(teal_pool *pool, unsigned done) {
    for (int32_t look = 0; look < pool->spins + YIELDS; look++) {
        unsigned runs = atomic_load_explicit(&pool->runs, memory_order_acquire);
        if (runs != done) return runs;
        if (look < pool->spins) pause_briefly();
        else sched_yield();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleeping, 1); /* then look, while `pool_run` counts a run, then looks who sleeps */
    while (atomic_load(&pool->runs) == done) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleeping, 1);
    pthread_mutex_unlock(&pool->mutex);
    return atomic_load_explicit(&pool->runs, memory_order_acquire);
}

static void begin_run(teal_pool *pool) {
    atomic_fetch_add(&pool->runs, 1);
    if (atomic_load(&pool->sleeping) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void *work(void *given) {
    worker self = *(worker *)given;
    free(given);
    teal_pool *pool = self.pool;
    for (unsigned done = 0;;) {
        done = next_run(pool, done);
        if (pool->closing) return NULL;
        pool->work(pool->context, self.number);
        atomic_fetch_sub_explicit(&pool->running, 1, memory_order_release);
    }
}

/* As many threads as came, for as many as were asked for. */
static void take_numbers(void *given) {
    teal_pool *pool = given;
    for (int32_t number; (number = atomic_fetch_add(&pool->taken, 1)) < pool->threads;)
        pool->work(pool->context, number);
}

void pool_run(teal_pool *pool, void (*function)(void *, int32_t), void *context) {
    pool->work = function;
    pool->context = context;
    if (pool->parallel) {
        atomic_store(&pool->taken, 0);
        pool->parallel(take_numbers, pool, (unsigned)pool->threads, 0);
        return;
    }
    if (pool->threads > 1) {
        atomic_store_explicit(&pool->running, pool->threads - 1, memory_order_relaxed);
        begin_run(pool);
    }
    function(context, 0);
    for (int32_t spin = 0; atomic_load_explicit(&pool->running, memory_order_acquire) > 0; spin++)
        if (spin < pool->spins) pause_briefly();
        else sched_yield();
}

static teal_pool *new_pool(int32_t threads, teal_parallel *parallel) {
    teal_pool *pool;
    if (threads < 1 || threads > 1024 || posix_memalign((void **)&pool, 64, sizeof *pool)) return NULL;
    *pool = (teal_pool){.threads = threads, .parallel = parallel};
    return pool;
}

EXPORTED teal_pool *teal_pool_borrow(teal_parallel *parallel, int32_t threads) {
    return parallel ? new_pool(threads, parallel) : NULL;
}

EXPORTED teal_pool *teal_pool_open(int32_t threads) {
    teal_pool *pool = new_pool(threads, NULL);
    if (!pool) return NULL;
    pool->threads = 1;
    pool->spins = threads > processors() ? SPINS_CROWDED : SPINS;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->workers = calloc((size_t)threads, sizeof *pool->workers);
    for (; pool->workers && pool->threads < threads; pool->threads++) {
        worker *one = malloc(sizeof *one);
        if (!one) break;
        *one = (worker){pool, pool->threads};
        if (pthread_create(&pool->workers[pool->threads], NULL, work, one)) {
            free(one);
            break;
        }
    }
    if (pool->threads == threads) return pool;
    teal_pool_close(pool);
    return NULL;
}

EXPORTED void teal_pool_close(teal_pool *pool) {
    if (!pool) return;
    if (pool->parallel) {
        free(pool);
        return;
    }
    pool->closing = 1; /* seen with the run that follows */
    begin_run(pool);
    for (int32_t i = 1; i < pool->threads; i++) pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool);
}
