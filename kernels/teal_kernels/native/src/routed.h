/* Routed MLPs: groups of neurons that a router chooses, of which alone gate and up are read. Part of variant.c. */
#ifndef TEAL_ROUTED_H
#define TEAL_ROUTED_H

/* This thread's part of the outputs of a row-major layer of a router into y (rows, outputs), with its bias. */
static void router_outputs(const teal_session *s, const teal_weight *w, const float *x, int32_t thread, int positive_only,
                           float *y) {
    const int32_t first = (int32_t)((int64_t)w->outputs * thread / s->threads);
    const int32_t n = (int32_t)((int64_t)w->outputs * (thread + 1) / s->threads) - first;
    dot_functions[w->dtype][which_rows(s->padded_rows)](w, NULL, first, n, x, w->inputs, 0, w->inputs, y + first, w->outputs);
    for (int32_t r = 0; r < s->rows; r++) {
        float *own = y + (int64_t)r * w->outputs + first;
        if (w->bias) add_into(own, w->bias + first, n);
        for (int32_t i = 0; positive_only && i < n; i++) own[i] = own[i] <= 0.0f ? 0.0f : own[i]; /* a NaN stays */
    }
}

static int is_chosen(float logit) { return !(logit <= 0.0f); } /* as where the sigmoid is above 1/2; a NaN chooses */

/* Whether the neurons of a group are computed: where any row chose it, or all are. */
static int is_computed(const teal_session *s, const teal_router *router, int32_t group) {
    const int32_t groups = router->logits->outputs;
    int any = router->whole;
    for (int32_t r = 0; r < s->rows; r++) any |= is_chosen(s->routed[(int64_t)r * groups + group]);
    return any;
}

/* The router's logits, which all threads then have. */
static void route_groups(teal_session *s, thread_memory *m, const teal_product *p, int32_t thread) {
    const teal_router *router = p->router;
    const float *x = input_of(p, m);
    if (router->first) {
        router_outputs(s, router->first, x, thread, 1, s->ranked);
        pool_barrier(s->pool);
        x = s->ranked;
    }
    router_outputs(s, router->logits, x, thread, 0, s->routed);
    pool_barrier(s->pool);
}

/* The neurons of this thread into `own`, zero where their group was left out. Threads have neighbouring groups, and as many
 * of those that are computed. */
static void routed_neurons(teal_session *s, thread_memory *m, const teal_product *p, int32_t thread) {
    const teal_router *router = p->router;
    const int32_t groups = router->logits->outputs, size = router->group, padded = s->padded_rows;
    int32_t computed = 0, first = thread == 0 ? 0 : groups, last = groups;
    for (int32_t g = 0; g < groups; g++) computed += is_computed(s, router, g);
    const int32_t begin = (int32_t)((int64_t)computed * thread / s->threads);
    const int32_t end = (int32_t)((int64_t)computed * (thread + 1) / s->threads);
    for (int32_t g = 0, number = 0; g < groups; g++) {
        if (!is_computed(s, router, g)) continue;
        if (number == begin && thread > 0) first = g;
        if (number == end && thread + 1 < s->threads) last = g;
        number++;
    }
    if (last < first) last = first;
    int32_t live = 0;
    for (int32_t g = first; g < last; g++)
        if (is_computed(s, router, g))
            for (int32_t i = 0; i < size; i++) m->list.index[live++] = g * size + i;
    float *const products[2] = {m->neurons, m->neurons + (int64_t)padded * p->parts[0].outputs};
    for (int32_t part = 0; part < 2; part++) {
        const teal_weight *w = &p->parts[part];
        dot_functions[w->dtype][which_rows(padded)](w, m->list.index, 0, live, input_of(p, m), w->inputs, 0, w->inputs,
                                                    products[part], live);
        for (int32_t r = 0; w->bias && r < s->rows; r++)
            for (int32_t k = 0; k < live; k++) products[part][(int64_t)r * live + k] += w->bias[m->list.index[k]];
    }
    const int32_t n = (last - first) * size;
    memset(m->own, 0, (size_t)padded * (size_t)n * sizeof *m->own);
    for (int32_t r = 0; r < s->rows; r++) {
        const float *logits = s->routed + (int64_t)r * groups;
        float *made = products[0] + (int64_t)r * live, *own = m->own + (int64_t)r * n;
        activate(p, made, products[1] + (int64_t)r * live, made, live);
        for (int32_t k = 0; k < live; k++)
            if (is_chosen(logits[m->list.index[k] / size])) own[m->list.index[k] - first * size] = made[k];
        for (int32_t g = first; g < last; g++)
            for (int32_t part = 0; part < 2; part++) {
                int64_t *kept = counter(&p->parts[part], m, is_chosen(logits[g]));
                if (kept) *kept += size;
            }
    }
    m->own_first = first * size, m->own_last = last * size;
}

#endif
