/* Sessions: a program is checked, its work divided among threads, its buffers made; then tokens go through. */
#include <stdio.h>

#include "dispatch.h"

typedef struct {
    int32_t splits_of_heads; /* floats of `heads`, of one row */
    int32_t aside, own, sums, group, list, neurons, queries, scores;
    int32_t groups, rank; /* of routers of MLPs */
    int32_t experts, top_k, slots, chosen; /* floats of the sums of one chosen expert, chosen: inputs of `own` */
} needs;

static int32_t greater(int32_t a, int32_t b) { return a > b ? a : b; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int32_t common_divisor(int32_t a, int32_t b) { return b ? common_divisor(b, a % b) : a; }

/* Of a routed product, whose parts are weights. */
static const char *plan_routed(const teal_program *program, const teal_product *p, needs *n) {
    const teal_router *router = p->router;
    const teal_weight *first = router ? router->first : NULL, *logits = router ? router->logits : NULL;
    if (!logits || bad_weight(logits) || (first && bad_weight(first))) return "a routed product without a router";
    if (logits->layout != TEAL_ROW_MAJOR || (first && (first->layout != TEAL_ROW_MAJOR || first->inputs != program->hidden)) ||
        logits->inputs != (first ? first->outputs : program->hidden))
        return "a router that does not fit";
    if (p->n_parts != 2 || p->parts[1].outputs != p->parts[0].outputs) return "a gated product without two equal parts";
    if (p->parts[0].layout != TEAL_ROW_MAJOR || p->parts[1].layout != TEAL_ROW_MAJOR)
        return "routed parts that are not row-major";
    const int32_t neurons = p->parts[0].outputs;
    if (router->group < 1 || neurons % router->group || neurons / router->group != logits->outputs)
        return "groups that do not fit the neurons";
    n->groups = greater(n->groups, logits->outputs), n->rank = greater(n->rank, first ? first->outputs : 0);
    n->own = greater(n->own, neurons), n->neurons = greater(n->neurons, 2 * neurons);
    n->list = greater(n->list, neurons);
    return NULL;
}

static const char *plan_product(const teal_program *program, const teal_product *p, const teal_attention *attended,
                                int32_t neurons, int32_t threads, range *ranges, needs *n) {
    if (p->n_parts < 1 || p->n_parts > TEAL_MAX_PARTS) return "a product without parts, or with too many";
    for (int32_t i = 0; i < p->n_parts; i++) {
        const teal_weight *w = &p->parts[i];
        const char *bad = bad_weight(w);
        if (bad) return bad;
        if (w->counter >= program->counters) return "a counter that there is no place for";
        n->list = greater(n->list, w->inputs);
    }
    const teal_weight *w = p->parts;
    if (p->epilogue == TEAL_RESIDUAL) {
        int32_t before = attended ? attended->heads * attended->dim : neurons;
        if (p->n_parts != 1 || w->inputs != before || w->outputs != program->hidden)
            return "a residual product that does not fit what stands before it";
        if (p->input_norm && p->input_norm->kind != TEAL_RMS_NORM) return "a norm of inputs that is no RMS norm";
        n->group = greater(n->group, SUMS_TILE);
        return NULL;
    }
    for (int32_t i = 0; i < p->n_parts; i++)
        if (p->parts[i].inputs != program->hidden) return "a product of something else than the residual stream";
    if (p->epilogue > TEAL_ROUTED || p->activation < TEAL_SILU || p->activation > TEAL_XIELU)
        return "an unknown epilogue or activation";
    if ((p->epilogue == TEAL_ROUTED) != (p->router != NULL)) return "a router of another product";
    if (p->epilogue == TEAL_ROUTED) return plan_routed(program, p, n);
    int32_t outputs = 0;
    for (int32_t i = 0; i < p->n_parts; i++) {
        outputs += p->parts[i].outputs;
        for (int32_t t = 0; t < threads; t++) cut(p->parts[i].outputs, threads, t, &ranges[t].first[i], &ranges[t].last[i]);
    }
    n->sums = greater(n->sums, outputs);
    n->group = greater(n->group, SUMS_TILE);
    if (p->epilogue == TEAL_PLAIN) return NULL;
    int32_t parts = p->epilogue == TEAL_ACTIVATED ? 1 : 2;
    if (p->n_parts != parts || p->parts[parts - 1].outputs != w->outputs) return "a gated product without two equal parts";
    if (p->epilogue == TEAL_GATE_FIRST && p->parts[1].layout != TEAL_ROW_MAJOR)
        return "gate first with an up that is not row-major";
    for (int32_t t = 0; t < threads; t++) {
        int32_t own = ranges[t].last[0] - ranges[t].first[0];
        n->own = greater(n->own, own);
        n->neurons = greater(n->neurons, 2 * own);
        n->group = greater(n->group, own);
    }
    n->list = greater(n->list, w->outputs);
    return NULL;
}

static const char *plan_route(const teal_program *program, const teal_route *route, int32_t threads, range *ranges,
                              needs *n) {
    const teal_weight *w = route->router;
    const char *bad = w ? bad_weight(w) : "a route without a router";
    if (bad) return bad;
    if (w->layout != TEAL_ROW_MAJOR || w->inputs != program->hidden) return "a router that does not fit";
    if (route->scores < TEAL_SOFTMAX || route->scores > TEAL_SPARSEMIXER) return "unknown scores of experts";
    if (route->top_k < 1 || route->top_k > w->outputs || (route->scores == TEAL_SPARSEMIXER && route->top_k != 2))
        return "a number of experts that cannot be chosen";
    for (int32_t t = 0; t < threads; t++)
        ranges[t].first[0] = w->outputs * t / threads, ranges[t].last[0] = w->outputs * (t + 1) / threads;
    n->experts = greater(n->experts, w->outputs), n->top_k = greater(n->top_k, route->top_k);
    return NULL;
}

/* Of products of experts, behind `route`; `neurons`: of each expert, behind the gated one. */
static const char *plan_experts(const teal_program *program, const teal_product *p, const teal_route *route,
                                int32_t neurons, int32_t threads, range *ranges, needs *n) {
    const teal_weight *w = p->parts;
    const char *bad = bad_weight(w);
    if (bad) return bad;
    if (!route || p->experts != route->router->outputs || p->n_parts != 1 || w->inputs % p->experts || p->aside || p->norm ||
        p->scaled_by)
        return "experts that do not fit their router";
    if (w->counter >= program->counters) return "a counter that there is no place for";
    const int32_t inputs = w->inputs / p->experts, half = w->outputs / 2;
    if (w->layout != TEAL_INPUT_MAJOR) return "experts that lie otherwise";
    n->group = greater(n->group, SUMS_TILE);
    if (p->epilogue == TEAL_RESIDUAL)
        return inputs == neurons && w->outputs == program->hidden ? NULL : "a residual product that does not fit what stands before it";
    if (p->epilogue != TEAL_GATED || p->activation < TEAL_SILU || p->activation > TEAL_CLAMPED_SWIGLU || inputs != program->hidden || w->outputs % 2)
        return "experts that are not gated";
    n->slots = greater(n->slots, w->outputs);
    for (int32_t t = 0; t < threads; t++) {
        cut(half, threads, t, &ranges[t].first[0], &ranges[t].last[0]);
        n->chosen = greater(n->chosen, ranges[t].last[0] - ranges[t].first[0]);
    }
    n->neurons = greater(n->neurons, 4 * n->chosen);
    n->list = greater(n->list, greater(inputs, route->top_k * n->chosen));
    return NULL;
}

static const char *plan_attention(const teal_attention *a, int32_t columns, int32_t rows, int32_t threads,
                                  range *ranges, int32_t *splits, needs *n) {
    if (a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads || a->dim < 1) return "attention with heads that do not fit";
    if ((a->heads + (a->keys_as_values ? 1 : 2) * a->kv_heads) * a->dim != columns) return "attention after a product of another size";
    if (a->positions < 1 || a->positions % TEAL_KEY_BLOCK || a->sequences < 1 || !a->keys || !a->values) return "a cache of no use";
    if (a->dtype < TEAL_F32 || a->dtype > TEAL_F16) return "a cache of unknown dtype";
    if (a->cos && (!a->sin || a->rotary < 2 || a->rotary % 2 || a->rotary > a->dim)) return "a rotary embedding that does not fit";
    if (!a->q_norm != !a->k_norm || a->norms < TEAL_HEADS_FIRST || a->norms > TEAL_ALL_HEADS || (a->grouped && a->norms == TEAL_ALL_HEADS))
        return "norms of heads of no use";
    if (a->norm_kind > TEAL_LAYER_NORM || a->norm_kind < TEAL_RMS_NORM || (a->norm_kind == TEAL_LAYER_NORM && a->norms == TEAL_ALL_HEADS))
        return "norms of heads of a kind that there is not";
    if (a->keys_as_values && a->grouped) return "grouped heads without values";
    if (a->clip > 0 && a->norms == TEAL_ALL_HEADS && a->q_norm) return "heads that are clamped before a norm of all of them";
    const int32_t group = a->heads / a->kv_heads, inputs = a->heads * a->dim;
    const int aligned = a->kv_heads % threads == 0;
    /* As many as of one row: the bits of a row are then the same, however many there are. */
    *splits = aligned ? 1 : threads / common_divisor(threads, a->kv_heads);
    const int32_t per_row = aligned ? a->kv_heads / threads : a->kv_heads * *splits;
    const int32_t items = aligned ? rows * per_row : rows * per_row / threads;
    for (int32_t t = 0; t < threads; t++) {
        ranges[t].first[0] = aligned ? 0 : items * t;
        ranges[t].last[0] = ranges[t].first[0] + items;
        ranges[t].first[1] = aligned ? t * per_row : 0;
        ranges[t].last[1] = per_row;
        if (aligned) ranges[t].first[2] = t * per_row * group * a->dim, ranges[t].last[2] = (t + 1) * per_row * group * a->dim;
        else cut(inputs, threads, t, &ranges[t].first[2], &ranges[t].last[2]);
        n->own = greater(n->own, ranges[t].last[2] - ranges[t].first[2]);
    }
    n->splits_of_heads = greater(n->splits_of_heads, *splits * a->heads * (a->dim + HEAD_EXTRA));
    n->queries = greater(n->queries, (group + 2) * a->dim);
    n->scores = greater(n->scores, group * SCORE_TILE);
    return NULL;
}

/* Checks the program, divides its work, and says what memory that needs. */
static const char *plan(teal_session *s, needs *n) {
    const teal_program *p = s->program;
    const teal_attention *attended = NULL;
    const teal_route *routed = NULL;
    int32_t neurons = 0, columns = 0, normed = 0;
    if (p->hidden < 1 || !p->embedding || !p->output || p->n_steps < 1) return "a program without a part that all have";
    if (p->embedding->inputs != p->hidden || p->embedding->dtype > TEAL_F16) return "embeddings that do not fit";
    if (p->output->n_parts != 1 || p->output->epilogue != TEAL_PLAIN) return "an output layer of several parts";
    for (int32_t i = 0; i < p->n_steps; i++) {
        const teal_step *step = &p->steps[i];
        range *ranges = s->ranges + (int64_t)i * s->threads;
        const char *bad = NULL;
        if (step->kind == TEAL_STEP_PRODUCT) {
            const teal_product *product = step->of;
            if (product->epilogue != TEAL_RESIDUAL && !(product->aside ? n->aside : normed)) return "a product without a norm before it";
            if ((product->norm || product->input_norm || product->stream_scale != 0) && product->epilogue != TEAL_RESIDUAL) return "a norm of what is not added to the residual stream";
            if (product->scaled_by && (product->epilogue != TEAL_RESIDUAL || !normed || product->parts[0].bias ||
                                       bad_weight(product->scaled_by) || product->scaled_by->layout != TEAL_ROW_MAJOR ||
                                       product->scaled_by->inputs != p->hidden || product->scaled_by->outputs != 1))
                return "a scale that does not fit";
            if (product->norm) normed = 0; /* takes the memory */
            if (!product->experts != !routed) return "experts without a route, or a route without experts";
            bad = product->experts ? plan_experts(p, product, routed, neurons, s->threads, ranges, n)
                                   : plan_product(p, product, attended, neurons, s->threads, ranges, n);
            if (bad) return bad;
            columns = neurons = 0, attended = NULL;
            if (product->experts) {
                if (product->epilogue == TEAL_GATED) neurons = product->parts[0].outputs / 2;
                else routed = NULL;
                continue;
            }
            if (product->epilogue == TEAL_PLAIN)
                for (int32_t part = 0; part < product->n_parts; part++) columns += product->parts[part].outputs;
            else if (product->epilogue != TEAL_RESIDUAL) neurons = product->parts[0].outputs;
        } else if (step->kind == TEAL_STEP_ATTENTION) {
            attended = step->of;
            bad = plan_attention(attended, columns, s->rows, s->threads, ranges, &s->splits[i], n);
            if (bad) return bad;
            columns = 0;
        } else if (step->kind == TEAL_STEP_NORM) {
            if (((const teal_norm *)step->of)->aside) n->aside = p->hidden;
            else normed = 1;
        } else if (step->kind == TEAL_STEP_ROUTE) {
            if (!normed || routed || attended || columns || neurons) return "a route that does not stand behind a norm";
            routed = step->of;
            bad = plan_route(p, routed, s->threads, ranges, n);
            if (bad) return bad;
        } else {
            return "a step of unknown kind";
        }
    }
    if (columns || neurons || attended || routed) return "a last product that is not added to the residual stream";
    const char *bad = bad_weight(p->output->parts);
    if (bad) return bad;
    if (p->output->parts[0].inputs != p->hidden) return "an output layer that does not fit";
    range *ranges = s->ranges + (int64_t)p->n_steps * s->threads;
    for (int32_t t = 0; t < s->threads; t++)
        cut(p->output->parts[0].outputs, s->threads, t, &ranges[t].first[0], &ranges[t].last[0]);
    n->list = greater(n->list, p->hidden);
    n->group = greater(n->group, OUTPUT_TILE);
    return NULL;
}

static int take_buffers(teal_session *s, const needs *n) {
    const teal_program *p = s->program;
    const int64_t rows = s->rows, padded = s->padded_rows;
    const int64_t slots = rows * n->top_k + TEAL_MAX_ROWS; /* behind the last one, rows that are padding */
    arena a = {0};
    for (int measuring = 1; measuring >= 0; measuring--) {
        s->heads = take_floats(&a, rows * n->splits_of_heads);
        s->shared = take_floats(&a, rows * p->hidden);
        s->router = take_floats(&a, padded * n->experts);
        s->routed = take_floats(&a, padded * n->groups);
        s->ranked = take_floats(&a, padded * n->rank);
        for (int32_t t = 0; t < s->threads; t++) {
            thread_memory *m = &s->memory[t];
            m->hidden = take_floats(&a, padded * p->hidden);
            m->normed = take_floats(&a, padded * p->hidden);
            m->aside = take_floats(&a, padded * n->aside);
            m->own = take_floats(&a, larger(padded * n->own, slots * n->chosen));
            m->sums = take_floats(&a, larger(padded * n->sums, slots * n->slots));
            m->gathered = take_floats(&a, n->experts ? padded * p->hidden : 0);
            m->taken = take_floats(&a, n->top_k);
            m->shares = take_floats(&a, n->top_k);
            m->choices = take(&a, rows * n->top_k * (int64_t)sizeof *m->choices);
            m->group = take_floats(&a, padded * n->group);
            m->tile = take_floats(&a, padded * OUTPUT_TILE);
            m->neurons = take_floats(&a, padded * n->neurons);
            m->partial[0] = take_floats(&a, padded * p->hidden);
            m->partial[1] = take_floats(&a, padded * p->hidden);
            m->scores = take_floats(&a, n->scores);
            m->queries = take_floats(&a, n->queries);
            m->list.index = take_floats(&a, n->list + LIST_END);
            m->list.value = take_floats(&a, padded * (n->list + LIST_END));
            m->kept = take(&a, 8 * (int64_t)p->counters);
        }
        if (measuring && !arena_open(&a)) return 0;
    }
    s->block = a.memory;
    return 1;
}

EXPORTED teal_session *teal_session_open(const teal_program *program, teal_pool *pool, int32_t rows, const char *name,
                                         char *error, int64_t length) {
    const variant *chosen = find_variant(name);
    const char *bad = NULL;
    needs n = {0};
    teal_session *s = calloc(1, sizeof *s);
    if (!chosen) bad = "a variant that is not here, or that this processor cannot run";
    else if (rows < 1 || rows > TEAL_MAX_ROWS) bad = "more rows than can be decoded together";
    else if (!pool_can_wait(pool)) bad = "a pool of borrowed threads, which may not run at the same time";
    else if (program->n_steps < 1) bad = "a program without steps";
    if (s && !bad) {
        *s = (teal_session){.program = program, .pool = pool, .rows = rows, .padded_rows = padded_rows(rows),
                            .threads = pool_threads(pool), .run = chosen->run};
        const size_t steps = (size_t)program->n_steps + 1, threads = (size_t)s->threads;
        s->ranges = calloc(steps * threads, sizeof *s->ranges);
        s->splits = calloc(steps, sizeof *s->splits);
        s->memory = calloc(threads, sizeof *s->memory);
        if (s->ranges && s->splits && s->memory) bad = plan(s, &n);
    }
    if (!bad && !(s && s->ranges && s->splits && s->memory && take_buffers(s, &n))) bad = "not enough memory";
    if (!bad) {
        pages_of(program);
        return s;
    }
    if (error && length > 0) snprintf(error, (size_t)length, "%s", bad);
    teal_session_close(s);
    return NULL;
}

EXPORTED void teal_session_close(teal_session *s) {
    if (!s) return;
    free(s->block), free(s->memory), free(s->splits), free(s->ranges), free(s);
}

/* Positions that all caches and tables of the program have. */
static int64_t positions_of(const teal_program *p) {
    int64_t least = INT64_MAX;
    for (int32_t i = 0; i < p->n_steps; i++)
        if (p->steps[i].kind == TEAL_STEP_ATTENTION) {
            const teal_attention *a = p->steps[i].of;
            least = a->positions < least ? a->positions : least;
        }
    if (p->position_embedding) {
        int64_t learned = p->position_embedding->outputs - p->position_offset;
        least = learned < least ? learned : least;
    }
    return least;
}

static int64_t fewer_levels(const teal_product *product, int64_t than) {
    for (int32_t i = 0; i < product->n_parts; i++)
        if (product->parts[i].thresholds && product->parts[i].levels < than) than = product->parts[i].levels;
    return than;
}

/* Levels that all weights have which have thresholds of several. */
static int64_t levels_of(const teal_program *p) {
    int64_t least = fewer_levels(p->output, INT64_MAX);
    for (int32_t i = 0; i < p->n_steps; i++)
        if (p->steps[i].kind == TEAL_STEP_PRODUCT) least = fewer_levels(p->steps[i].of, least);
    return least;
}

/* Sequences that all caches have. */
static int32_t sequences_of(const teal_program *p) {
    int32_t least = INT32_MAX;
    for (int32_t i = 0; i < p->n_steps; i++)
        if (p->steps[i].kind == TEAL_STEP_ATTENTION) {
            const teal_attention *a = p->steps[i].of;
            least = a->sequences < least ? a->sequences : least;
        }
    return least;
}

/* Whether each row has a place of its own in the cache. */
static int are_placed(const teal_session *s, const int64_t *positions, const int32_t *sequences) {
    const int32_t count = sequences_of(s->program);
    if (!sequences) return s->rows <= count;
    for (int32_t r = 0; r < s->rows; r++) {
        if (sequences[r] < 0 || sequences[r] >= count) return 0;
        for (int32_t before = 0; before < r; before++)
            if (sequences[before] == sequences[r] && positions[before] == positions[r]) return 0;
    }
    return 1;
}

EXPORTED int32_t teal_session_step(teal_session *s, const int64_t *tokens, const int64_t *positions,
                                   const int32_t *levels, const int32_t *sequences, float *logits, int64_t *best) {
    const int64_t last = positions_of(s->program), most = levels ? levels_of(s->program) : 0;
    for (int32_t r = 0; r < s->rows; r++) {
        if (tokens[r] < 0 || tokens[r] >= s->program->embedding->outputs) return 1;
        if (positions[r] < 0 || positions[r] >= last) return 1;
        if (levels && (levels[r] < 0 || levels[r] >= most)) return 1;
    }
    if (!are_placed(s, positions, sequences)) return 1;
    s->tokens = tokens, s->positions = positions, s->levels = levels, s->sequences = sequences, s->logits = logits;
    pool_run(s->pool, s->run, s);
    for (int32_t r = 0; logits && r < s->rows; r++) {
        float most = s->memory[0].best_value[r];
        best[r] = s->memory[0].best[r];
        for (int32_t t = 1; t < s->threads; t++) {
            float value = s->memory[t].best_value[r];
            if (most == most && !(value <= most)) most = value, best[r] = s->memory[t].best[r];
        }
    }
    return 0;
}

EXPORTED void teal_session_kept(const teal_session *s, int64_t *kept) {
    for (int32_t c = 0; c < s->program->counters; c++) {
        kept[c] = 0;
        for (int32_t t = 0; t < s->threads; t++) kept[c] += s->memory[t].kept[c];
    }
}
