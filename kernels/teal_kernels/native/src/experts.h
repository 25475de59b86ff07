/* Mixtures of experts: a row's choice among them, and the products of those that were chosen. Part of variant.c. */
#ifndef TEAL_EXPERTS_H
#define TEAL_EXPERTS_H

/* The largest of the outputs (a NaN counts as larger than all) that are not among `taken`, of which there are `n`. */
static int32_t largest_left(const float *outputs, int32_t experts, const int32_t *taken, int32_t n) {
    int32_t best = -1;
    for (int32_t e = 0; e < experts; e++) {
        int free = 1;
        for (int32_t k = 0; k < n; k++) free &= taken[k] != e;
        if (free && (best < 0 || !(outputs[e] <= outputs[best]))) best = e;
    }
    return best;
}

/* Weight of expert `best` among those near to it: of sparsemixer. Those among `taken` are not asked. */
static float share_among_near(const float *outputs, int32_t experts, const int32_t *taken, int32_t n, int32_t best,
                              float jitter) {
    const float most = outputs[best];
    float total = 0;
    for (int32_t e = 0; e < experts; e++) {
        int free = 1;
        for (int32_t k = 0; k < n; k++) free &= taken[k] != e;
        float size = fabsf(outputs[e]);
        if (free && !((most - outputs[e]) / (size < most ? most : size) > 2 * jitter)) total += expf(outputs[e] - most);
    }
    return 1.0f / total;
}

/* Experts of one row into `taken`, and their weights. */
static void choose(const teal_route *route, const float *outputs, int32_t *taken, float *shares) {
    const int32_t experts = route->router->outputs;
    for (int32_t k = 0; k < route->top_k; k++) {
        taken[k] = largest_left(outputs, experts, taken, k);
        if (route->scores == TEAL_SPARSEMIXER)
            shares[k] = share_among_near(outputs, experts, taken, k, taken[k], route->jitter);
    }
    if (route->scores == TEAL_SPARSEMIXER) return;
    const float most = outputs[taken[0]];
    float total = 0;
    for (int32_t k = 0; k < route->top_k; k++) shares[k] = expf(outputs[taken[k]] - most);
    if (route->normalised)
        for (int32_t k = 0; k < route->top_k; k++) total += shares[k];
    else
        for (int32_t e = 0; e < experts; e++) total += expf(outputs[e] - most);
    for (int32_t k = 0; k < route->top_k; k++) shares[k] /= total;
}

/* Notes who chose what, so that each expert is read once for all its rows. They are in order, as lists are. */
static void note_choices(const teal_session *s, thread_memory *m, const teal_route *route) {
    const int32_t experts = route->router->outputs;
    m->n_choices = 0;
    for (int32_t r = 0; r < s->rows; r++) {
        choose(route, s->router + (int64_t)r * experts, m->taken, m->shares);
        for (int32_t k = 0; k < route->top_k; k++) {
            int32_t at = 0;
            while (at < m->n_choices && m->choices[at].expert < m->taken[k]) at++;
            choice *c = &m->choices[at];
            if (at == m->n_choices || c->expert != m->taken[k]) {
                memmove(c + 1, c, (size_t)(m->n_choices++ - at) * sizeof *c);
                *c = (choice){.expert = m->taken[k]};
            }
            c->row[c->rows] = r, c->share[c->rows++] = m->shares[k];
        }
    }
    for (int32_t at = 0, slot = 0; at < m->n_choices; slot += m->choices[at++].rows) {
        const int32_t rows = m->choices[at].rows;
        m->choices[at].slot = slot, m->choices[at].padded_rows = rows <= 2 ? rows : rows <= 4 ? 4 : 8;
    }
}

/* Every thread has some of the router's outputs, and then makes the choice by itself: all make the same one. */
static void route_rows(teal_session *s, thread_memory *m, const teal_route *route, const range *own) {
    const teal_weight *w = route->router;
    float *outputs = s->router + own->first[0];
    dot_functions[w->dtype][which_rows(s->padded_rows)](w, NULL, own->first[0], own->last[0] - own->first[0], m->normed,
                                                        w->inputs, 0, w->inputs, outputs, w->outputs);
    for (int32_t r = 0; w->bias && r < s->rows; r++)
        add_into(outputs + (int64_t)r * w->outputs, w->bias + own->first[0], own->last[0] - own->first[0]);
    pool_barrier(s->pool);
    note_choices(s, m, route);
}

/* The weights of one expert. */
static teal_weight weight_of_expert(const teal_weight *all, int32_t experts, int32_t expert) {
    teal_weight w = *all;
    w.inputs = all->inputs / experts;
    const int64_t groups = w.dtype >= TEAL_INT8 ? expert * (int64_t)((w.inputs + w.group - 1) / w.group) : 0;
    w.data = (const uint8_t *)all->data + (int64_t)expert * w.inputs * w.row_bytes;
    if (w.scales) w.scales = (const uint8_t *)all->scales + groups * w.scale_stride * (w.scale_dtype == TEAL_F16 ? 2 : 4);
    if (w.zeros) w.zeros = (const uint16_t *)all->zeros + groups * w.zero_stride;
    if (w.bias) w.bias = all->bias + (int64_t)expert * w.outputs;
    return w;
}

static int same_rows(const choice *a, const choice *b) {
    return a->rows == b->rows && !memcmp(a->row, b->row, (size_t)a->rows * sizeof *a->row);
}

/* This thread's sums of all outputs of chosen experts, of some kept inputs: (slots, outputs). Choices of the same rows share
 * a list. */
static void sums_of_experts(teal_session *s, thread_memory *m, int32_t thread, const teal_product *p) {
    const int64_t hidden = s->program->hidden;
    const float *x = m->normed;
    for (int32_t at = 0; at < m->n_choices; at++) {
        const choice *c = &m->choices[at];
        const teal_weight w = weight_of_expert(&p->parts[0], p->experts, c->expert);
        int64_t *kept = counter(&w, m, thread == 0);
        if (at > 0 && same_rows(c - 1, c)) {
            if (kept) *kept += m->list_kept;
        } else {
            for (int32_t r = 0; r < c->rows && c->rows < s->rows; r++)
                memcpy(m->gathered + r * hidden, m->normed + c->row[r] * hidden, (size_t)hidden * sizeof *x);
            x = c->rows < s->rows ? m->gathered : m->normed;
            m->list_kept = 0;
            make_list(x, hidden, c->rows, c->padded_rows, w.inputs, 0, limits_of(&w, s->levels, c->row, c->rows), &m->list, &m->list_kept);
            if (kept) *kept += m->list_kept;
        }
        const int32_t from = cut_list(&w, &m->list, thread, s->threads), to = cut_list(&w, &m->list, thread + 1, s->threads);
        for (int32_t tile = 0; tile < w.outputs; tile += SUMS_TILE) {
            int32_t n = w.outputs - tile < SUMS_TILE ? w.outputs - tile : SUMS_TILE;
            multiplications[w.dtype][which_rows(c->padded_rows)](
                &w, &m->list, from, to, tile, n, m->sums + (int64_t)c->slot * w.outputs + tile, w.outputs, m->group);
        }
    }
}

/* Of one slot the outputs [first, first + n): what all threads have of them, and the bias. */
static void outputs_of_slot(const teal_session *s, int64_t outputs, int32_t slot, const float *bias, int32_t first,
                            int32_t n, float *to) {
    const int64_t at = slot * outputs + first;
    memcpy(to, s->memory[0].sums + at, (size_t)n * sizeof *to);
    for (int32_t t = 1; t < s->threads; t++) add_into(to, s->memory[t].sums + at, n);
    if (bias) add_into(to, bias + first, n);
}

/* The neurons of this thread, of all chosen experts, into `own`: (slots, own neurons). */
static void neurons_of_experts(teal_session *s, thread_memory *m, const teal_product *p, const range *own) {
    const int32_t first = own->first[0], n = own->last[0] - first, outputs = p->parts[0].outputs;
    float *gates = m->neurons, *ups = m->neurons + n, *both = m->neurons + 2 * n;
    for (int32_t at = 0; at < m->n_choices; at++) {
        const choice *c = &m->choices[at];
        const float *bias = weight_of_expert(&p->parts[0], p->experts, c->expert).bias;
        for (int32_t slot = c->slot; slot < c->slot + c->rows; slot++) {
            if (p->interleaved) {
                outputs_of_slot(s, outputs, slot, bias, 2 * first, 2 * n, both);
                for (int32_t i = 0; i < n; i++) gates[i] = both[2 * i], ups[i] = both[2 * i + 1];
            } else {
                outputs_of_slot(s, outputs, slot, bias, first, n, gates);
                outputs_of_slot(s, outputs, slot, bias, outputs / 2 + first, n, ups);
            }
            activate(p, gates, ups, m->own + (int64_t)slot * n, n);
        }
    }
    m->own_first = first, m->own_last = first + n;
}

/* Appends to the list what this thread's neurons of one chosen expert keep, times their weights. Their numbers begin at
 * `first`. */
static void append_expert(const teal_session *s, thread_memory *m, const teal_weight *w, const choice *c, int32_t first) {
    const int32_t n = m->own_last - m->own_first, padded = c->padded_rows;
    kept_list more = {m->list.index + m->list.count, m->list.value + (int64_t)m->list.count * padded, 0};
    make_list(m->own + (int64_t)c->slot * n, n, c->rows, padded, n, first, limits_of(w, s->levels, c->row, c->rows), &more, counter(w, m, 1));
    for (int32_t i = 0; i < more.count; i++)
        for (int32_t r = 0; r < c->rows; r++) more.value[(int64_t)i * padded + r] *= c->share[r];
    m->list.count += more.count;
}

/* What this thread adds to the residual stream: its neurons of all chosen experts. Those of the same rows are one list, but
 * for codes whose last group is a smaller one. */
static void residual_of_experts(teal_session *s, thread_memory *m, int32_t thread, const teal_product *p, int which) {
    const teal_weight *w = &p->parts[0];
    const int32_t hidden = w->outputs, inputs = w->inputs / p->experts;
    const int apart = w->dtype >= TEAL_INT8 && inputs % w->group;
    float *y = m->partial[which];
    memset(y, 0, (size_t)s->rows * (size_t)hidden * sizeof *y);
    for (int32_t at = 0, next; at < m->n_choices; at = next) {
        const choice *c = &m->choices[at];
        const teal_weight own = apart ? weight_of_expert(w, p->experts, c->expert) : *w;
        m->list.count = 0;
        for (next = at; next < m->n_choices && (next == at || (!apart && same_rows(c, &m->choices[next]))); next++)
            append_expert(s, m, w, &m->choices[next], (apart ? 0 : m->choices[next].expert * inputs) + m->own_first);
        for (int32_t tile = 0; tile < hidden; tile += SUMS_TILE) {
            int32_t n = hidden - tile < SUMS_TILE ? hidden - tile : SUMS_TILE;
            multiplications[w->dtype][which_rows(c->padded_rows)](&own, &m->list, 0, m->list.count, tile, n, m->tile, n, m->group);
            for (int32_t r = 0; r < c->rows; r++)
                add_into(y + (int64_t)c->row[r] * hidden + tile, m->tile + (int64_t)r * n, n);
        }
    }
    for (int32_t at = 0; at < m->n_choices && w->bias && thread == 0; at++)
        for (int32_t r = 0; r < m->choices[at].rows; r++) {
            const choice *c = &m->choices[at];
            float *to = y + (int64_t)c->row[r] * hidden;
            for (int32_t i = 0; i < hidden; i++) to[i] += c->share[r] * w->bias[(int64_t)c->expert * hidden + i];
        }
}

/* Multiplies what this thread adds to the residual stream by the sigmoid of one output of the normed state. */
static void scale_partial(const teal_session *s, thread_memory *m, const teal_weight *w, int which) {
    const int64_t hidden = s->program->hidden;
    float outputs[TEAL_MAX_ROWS];
    dot_functions[w->dtype][which_rows(s->padded_rows)](w, NULL, 0, 1, m->normed, w->inputs, 0, w->inputs, outputs, 1);
    for (int32_t r = 0; r < s->rows; r++) {
        const float scale = 1.0f / (1.0f + expf(-outputs[r] - (w->bias ? w->bias[0] : 0.0f)));
        for (int32_t i = 0; i < hidden; i++) m->partial[which][r * hidden + i] *= scale;
    }
}

#endif
