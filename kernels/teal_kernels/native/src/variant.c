/* A token's work of one thread. This file is compiled once for each variant, with that variant's instructions. */
#include "attention.h"
#include "internal.h"
#include "products.h"
#include "vector.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define NAMED(name) PASTE(name, TEAL_VARIANT)

static void embed(const teal_session *s, thread_memory *m) {
    const teal_program *p = s->program;
    for (int32_t r = 0; r < s->rows; r++) {
        float *hidden = m->hidden + (int64_t)r * p->hidden;
        const teal_weight *e = p->embedding;
        const uint8_t *row = (const uint8_t *)e->data + s->tokens[r] * e->row_bytes;
        for (int32_t i = 0; i < p->hidden; i++) hidden[i] = one_weight(e->dtype, row, i) * p->embedding_scale;
        if (!p->position_embedding) continue;
        e = p->position_embedding;
        row = (const uint8_t *)e->data + (s->positions[r] + p->position_offset) * e->row_bytes;
        for (int32_t i = 0; i < p->hidden; i++) hidden[i] += one_weight(e->dtype, row, i);
    }
}

INLINE void add_into(float *to, const float *from, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(to + i) + load(from + i));
    for (; i < n; i++) to[i] += from[i];
}

/* Adds what all threads made of the last residual product to this thread's copy of the residual stream. */
static void add_partials(teal_session *s, thread_memory *m, int32_t thread, int which, const float *bias) {
    const int32_t hidden = s->program->hidden;
    if (s->threads > MANY_THREADS) {
        int32_t first = (int32_t)((int64_t)hidden * thread / s->threads);
        int32_t n = (int32_t)((int64_t)hidden * (thread + 1) / s->threads) - first;
        for (int32_t r = 0; r < s->rows; r++) {
            float *to = s->shared + (int64_t)r * hidden + first;
            memset(to, 0, (size_t)n * sizeof *to);
            for (int32_t t = 0; t < s->threads; t++)
                add_into(to, s->memory[t].partial[which] + (int64_t)r * hidden + first, n);
        }
        pool_barrier(s->pool);
        add_into(m->hidden, s->shared, (int64_t)s->rows * hidden);
    } else {
        for (int32_t t = 0; t < s->threads; t++)
            add_into(m->hidden, s->memory[t].partial[which], (int64_t)s->rows * hidden);
    }
    if (bias)
        for (int32_t r = 0; r < s->rows; r++) add_into(m->hidden + (int64_t)r * hidden, bias, hidden);
}

static void normalise(const teal_norm *norm, const float *x, float *y, int32_t n) {
    float mean = 0, squares;
    vf sums = all(0.0f);
    int32_t i = 0;
    if (norm->kind == TEAL_LAYER_NORM) {
        for (; i + LANES <= n; i += LANES) sums += load(x + i);
        mean = sum(sums);
        for (; i < n; i++) mean += x[i];
        mean /= (float)n;
    }
    sums = all(0.0f);
    for (i = 0; i + LANES <= n; i += LANES) {
        vf from_mean = load(x + i) - all(mean);
        sums += from_mean * from_mean;
    }
    squares = sum(sums);
    for (; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf(squares / (float)n + norm->eps);
    for (i = 0; i + LANES <= n; i += LANES)
        store(y + i, (load(x + i) - all(mean)) * all(scale) * load(norm->weight + i));
    for (; i < n; i++) y[i] = (x[i] - mean) * scale * norm->weight[i];
    if (norm->bias) add_into(y, norm->bias, n);
}

/* y (rows, stride) = outputs [first, last) of one projection, with its bias, of x (rows, inputs). */
static void outputs_of(const teal_weight *w, int32_t rows, int32_t padded, const float *x, int32_t first, int32_t last,
                       thread_memory *m, int64_t *kept, int has_list, float *y, int64_t stride) {
    const int32_t n = last - first, size = which_rows(padded);
    if (w->layout == TEAL_ROW_MAJOR) {
        if (n > 0) dot_functions[w->dtype][size](w, NULL, first, n, x, w->inputs, 0, w->inputs, y, stride);
        if (kept) *kept += (int64_t)rows * w->inputs;
    } else {
        if (!has_list) make_list(x, w->inputs, rows, padded, w->inputs, 0, w->threshold, &m->list, kept);
        else if (kept) *kept += padded == 1 ? m->list.count : 0;
        if (n > 0) multiplications[w->dtype][size](w, &m->list, first, n, y, stride, m->group);
    }
    if (w->bias)
        for (int32_t r = 0; r < rows; r++) add_into(y + r * stride, w->bias + first, n);
}

static int64_t *counter(const teal_weight *w, thread_memory *m, int counts) {
    return counts && w->counter >= 0 ? m->kept + w->counter : NULL;
}

static int same_list(const teal_weight *a, const teal_weight *b, int32_t padded) {
    return padded == 1 && a->layout == TEAL_INPUT_MAJOR && b->layout == TEAL_INPUT_MAJOR && a->inputs == b->inputs &&
           a->threshold == b->threshold;
}

INLINE vf positive(vf x) { return (vf)(~(x <= all(0.0f)) & (vi)x); } /* a NaN stays */
INLINE vf sigmoid(vf x) { return all(1.0f) / (all(1.0f) + exponential(-x)); }
INLINE vf hyperbolic_tangent(vf x) { return all(2.0f) * sigmoid(all(2.0f) * x) - all(1.0f); }

INLINE vf activated(int32_t kind, vf g, float threshold) {
    switch (kind) {
    case TEAL_SILU: return g * sigmoid(g);
    case TEAL_GELU_TANH: {
        vf inner = all(0.7978845608f) * (g + all(0.044715f) * g * g * g);
        return all(0.5f) * g * (all(1.0f) + hyperbolic_tangent(inner));
    }
    case TEAL_GELU: {
        float x[LANES];
        memcpy(x, &g, sizeof x);
        for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.7071067812f));
        memcpy(&g, x, sizeof x);
        return g;
    }
    case TEAL_RELU2: return positive(g) * positive(g);
    case TEAL_FATRELU: return (vf)(~(g < all(threshold)) & (vi)g);
    default: return positive(g);
    }
}

/* y = activation(gate) * up, n of them; activation(gate) alone where `up` is NULL. */
static void activate(const teal_product *p, const float *gate, const float *up, float *y, int32_t n) {
    for (int32_t i = 0; i < n; i += LANES) {
        float parts[2][LANES] = {{0}};
        const float *g = gate + i, *u = up ? up + i : NULL;
        float *to = y + i;
        int whole = i + LANES <= n;
        if (!whole) { /* the rest, in vectors of its own */
            memcpy(parts[0], g, (size_t)(n - i) * sizeof *g);
            if (u) memcpy(parts[1], u, (size_t)(n - i) * sizeof *u);
            g = parts[0], u = u ? parts[1] : NULL, to = parts[0];
        }
        vf result = activated(p->activation, load(g), p->activation_threshold);
        if (u) result *= p->activation == TEAL_DRELU ? positive(load(u)) : load(u);
        store(to, result);
        if (!whole) memcpy(y + i, parts[0], (size_t)(n - i) * sizeof *y);
    }
}

static void plain_product(teal_session *s, thread_memory *m, int32_t thread, const teal_product *p, const range *own) {
    int64_t column = 0;
    for (int32_t i = 0; i < p->n_parts; i++) {
        const teal_weight *w = &p->parts[i];
        int has_list = i > 0 && same_list(w, w - 1, s->padded_rows);
        int32_t first = own->first[i], last = own->last[i];
        int64_t *kept = counter(w, m, thread == 0);
        if (first < last || kept) {
            outputs_of(w, s->rows, s->padded_rows, m->normed, first, last, m, kept, has_list, m->sums, last - first);
            for (int32_t r = 0; r < s->rows; r++)
                memcpy(s->qkv + (int64_t)r * s->qkv_stride + column + first, m->sums + (int64_t)r * (last - first),
                       (size_t)(last - first) * sizeof(float));
        } else if (i + 1 < p->n_parts && same_list(w + 1, w, s->padded_rows)) {
            make_list(m->normed, w->inputs, s->rows, s->padded_rows, w->inputs, 0, w->threshold, &m->list, NULL);
        }
        column += w->outputs;
    }
}

/* The neurons of this thread into `own`. */
static void neurons(teal_session *s, thread_memory *m, int32_t thread, const teal_product *p, const range *own) {
    const int32_t first = own->first[0], n = own->last[0] - first, counts = thread == 0;
    const teal_weight *gate = &p->parts[0], *up = &p->parts[1];
    float *gates = m->sums, *ups = m->sums + (int64_t)s->padded_rows * n;
    outputs_of(gate, s->rows, s->padded_rows, m->normed, first, first + n, m, counter(gate, m, counts), 0, gates, n);
    m->own_first = first, m->own_last = first + n;
    if (p->epilogue == TEAL_GATE_FIRST) {
        int32_t live = 0;
        int64_t *kept = counter(up, m, 1);
        for (int32_t i = 0; i < n; i++) {
            int32_t any = 0;
            for (int32_t r = 0; r < s->rows; r++) {
                float g = gates[(int64_t)r * n + i];
                any += !(p->activation == TEAL_FATRELU ? g < p->activation_threshold : g <= 0.0f);
            }
            m->list.index[live] = first + i;
            live += any > 0;
            if (kept) *kept += any;
        }
        float *found = m->group; /* (rows, live) */
        dot_functions[up->dtype][which_rows(s->padded_rows)](up, m->list.index, 0, live, m->normed, up->inputs, 0,
                                                             up->inputs, found, live);
        memset(ups, 0, (size_t)s->padded_rows * (size_t)n * sizeof *ups);
        for (int32_t r = 0; r < s->rows; r++)
            for (int32_t k = 0; k < live; k++) {
                int32_t neuron = m->list.index[k];
                float bias = up->bias ? up->bias[neuron] : 0.0f;
                ups[(int64_t)r * n + neuron - first] = found[(int64_t)r * live + k] + bias;
            }
    } else if (p->epilogue == TEAL_GATED) {
        outputs_of(up, s->rows, s->padded_rows, m->normed, first, first + n, m, counter(up, m, counts),
                   same_list(up, gate, s->padded_rows), ups, n);
    }
    for (int32_t r = 0; r < s->rows; r++)
        activate(p, gates + (int64_t)r * n, p->epilogue == TEAL_ACTIVATED ? NULL : ups + (int64_t)r * n,
                 m->own + (int64_t)r * n, n);
}

/* What this thread adds to the residual stream: `own` inputs times their weights. */
static void residual_product(teal_session *s, thread_memory *m, const teal_product *p, int which) {
    const teal_weight *w = &p->parts[0];
    const int32_t n = m->own_last - m->own_first, size = which_rows(s->padded_rows);
    int64_t *kept = counter(w, m, 1);
    float *y = m->partial[which];
    if (w->layout == TEAL_ROW_MAJOR) {
        dot_functions[w->dtype][size](w, NULL, 0, w->outputs, m->own, n, m->own_first, n, y, w->outputs);
        if (kept) *kept += (int64_t)s->rows * n;
        return;
    }
    make_list(m->own, n, s->rows, s->padded_rows, n, m->own_first, w->threshold, &m->list, kept);
    multiplications[w->dtype][size](w, &m->list, 0, w->outputs, y, w->outputs, m->group);
}

static void attention(teal_session *s, thread_memory *m, const teal_attention *a, const range *own, int32_t splits) {
    const int32_t group = a->heads / a->kv_heads;
    const int64_t of_head = a->dim + HEAD_EXTRA, of_split = (int64_t)a->heads * of_head;
    for (int32_t item = own->first[0]; item < own->last[0]; item++) {
        /* Rows are outermost where a head has one part: then a thread has the same heads of each. */
        int32_t per_row = own->last[1], row = item / per_row, rest = item % per_row;
        int32_t kv_head = own->first[1] + rest / splits, split = rest % splits;
        float *heads = s->heads + ((int64_t)row * splits + split) * of_split + (int64_t)kv_head * group * of_head;
        attend(a, s->qkv + (int64_t)row * s->qkv_stride, row, kv_head, split, splits, s->positions[row], m->queries,
               m->scores, heads, of_head);
    }
}

/* This thread's inputs of the product after attention into `own`. */
static void take_heads(teal_session *s, thread_memory *m, const teal_attention *a, const range *own, int32_t splits) {
    const int64_t of_head = a->dim + HEAD_EXTRA, of_split = (int64_t)a->heads * of_head;
    const int32_t first = own->first[2], n = own->last[2] - first, dim = a->dim;
    float x[dim];
    m->own_first = first, m->own_last = first + n;
    for (int32_t r = 0; r < s->rows; r++)
        for (int32_t at = first; at < first + n;) {
            int32_t head = at / dim, inside = at % dim, take = dim - inside;
            if (take > first + n - at) take = first + n - at;
            merge_parts(s->heads + (int64_t)r * splits * of_split + head * of_head, splits, of_split, dim, x);
            memcpy(m->own + (int64_t)r * n + at - first, x + inside, (size_t)take * sizeof *x);
            at += take;
        }
}

/* The largest logit of each row among outputs [first, last); the first of equals, and a NaN before all. */
static void find_best(const teal_session *s, thread_memory *m, int32_t first, int32_t last) {
    const int64_t vocabulary = s->program->output->parts[0].outputs;
    for (int32_t r = 0; r < s->rows; r++) {
        const float *logits = s->logits + r * vocabulary;
        float most = -INFINITY;
        int64_t best = first, at = first;
        while (at < last) {
            int64_t end = at + 8 * LANES;
            if (end <= last) {
                vi more = (vi)all(0.0f);
                for (int v = 0; v < 8; v++) more |= ~(load(logits + at + v * LANES) <= all(most));
                vu any = (vu)more;
                uint32_t bits = 0;
                for (int i = 0; i < LANES; i++) bits |= any[i];
                if (!bits) {
                    at = end;
                    continue;
                }
            }
            for (; at < last && at < end; at++)
                if (!(logits[at] <= most)) {
                    if (most != most) break;
                    most = logits[at], best = at;
                }
            if (most != most) break;
        }
        m->best_value[r] = first < last ? most : -INFINITY;
        m->best[r] = best;
    }
}

static void output(teal_session *s, thread_memory *m, int32_t thread, const float *x, const range *own) {
    const teal_weight *w = &s->program->output->parts[0];
    const int64_t vocabulary = w->outputs;
    const int32_t first = own->first[0], last = own->last[0];
    int64_t *kept = counter(w, m, thread == 0);
    if (w->layout == TEAL_ROW_MAJOR) {
        for (int32_t at = first; at < last || (at == first && kept); at += OUTPUT_TILE) {
            int32_t end = last - at < OUTPUT_TILE ? last : at + OUTPUT_TILE, n = end - at;
            outputs_of(w, s->rows, s->padded_rows, x, at, end, m, at == first ? kept : NULL, 0, m->sums, n);
            for (int32_t r = 0; r < s->rows; r++)
                memcpy(s->logits + r * vocabulary + at, m->sums + (int64_t)r * n, (size_t)n * sizeof(float));
        }
    } else {
        make_list(x, w->inputs, s->rows, s->padded_rows, w->inputs, 0, w->threshold, &m->list, kept);
        for (int32_t at = first; at < last; at += OUTPUT_TILE) {
            int32_t end = last - at < OUTPUT_TILE ? last : at + OUTPUT_TILE, n = end - at;
            outputs_of(w, s->rows, s->padded_rows, x, at, end, m, NULL, 1, m->sums, n);
            for (int32_t r = 0; r < s->rows; r++)
                memcpy(s->logits + r * vocabulary + at, m->sums + (int64_t)r * n, (size_t)n * sizeof(float));
        }
    }
    find_best(s, m, first, last);
}

void NAMED(teal_run_)(void *session, int32_t thread) {
    teal_session *s = session;
    const teal_program *p = s->program;
    thread_memory *m = &s->memory[thread];
    const float *bias = NULL;
    int parity = 0, pending = -1;
    const teal_attention *attended = NULL; /* whose heads the next residual product reads */
    int32_t attended_step = 0;
    embed(s, m);
    for (int32_t i = 0; i <= p->n_steps; i++) {
        const teal_step *step = &p->steps[i];
        const range *own = &s->ranges[(int64_t)i * s->threads + thread];
        const teal_norm *norm = i == p->n_steps ? p->norm : step->kind == TEAL_STEP_NORM ? step->of : NULL;
        if (pending >= 0) {
            add_partials(s, m, thread, pending, bias);
            pending = -1;
        }
        if (norm)
            for (int32_t r = 0; r < s->rows; r++)
                normalise(norm, m->hidden + (int64_t)r * p->hidden, m->normed + (int64_t)r * p->hidden, p->hidden);
        if (i == p->n_steps) {
            output(s, m, thread, norm ? m->normed : m->hidden, own);
        } else if (step->kind == TEAL_STEP_ATTENTION) {
            attended = step->of, attended_step = i;
            attention(s, m, attended, own, s->splits[i]);
            if (attended->kv_heads % s->threads) pool_barrier(s->pool); /* heads that others need */
        } else if (step->kind == TEAL_STEP_PRODUCT) {
            const teal_product *product = step->of;
            if (product->epilogue == TEAL_PLAIN) {
                plain_product(s, m, thread, product, own);
                pool_barrier(s->pool);
            } else if (product->epilogue == TEAL_RESIDUAL) {
                if (attended)
                    take_heads(s, m, attended, &s->ranges[(int64_t)attended_step * s->threads + thread],
                               s->splits[attended_step]);
                attended = NULL;
                residual_product(s, m, product, parity);
                pending = parity, parity ^= 1, bias = product->parts[0].bias;
                pool_barrier(s->pool);
            } else {
                neurons(s, m, thread, product, own);
            }
        }
    }
}

void NAMED(teal_linear_)(void *context, int32_t thread) {
    const linear_call *call = context;
    const teal_weight *w = call->weight;
    const range *own = &call->ranges[thread];
    thread_memory *m = &call->memory[thread];
    const int32_t n = own->last[0] - own->first[0];
    if (n <= 0) return;
    outputs_of(w, call->rows, call->padded_rows, call->x, own->first[0], own->last[0], m, NULL, 0, m->sums, n);
    for (int32_t r = 0; r < call->rows; r++)
        memcpy(call->y + (int64_t)r * w->outputs + own->first[0], m->sums + (int64_t)r * n, (size_t)n * sizeof(float));
}
