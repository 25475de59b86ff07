/* A token's work of one thread. This file is compiled once for each variant, with that variant's instructions. */
#include "attention.h"
#include "internal.h"
#include "products.h"
#include "vector.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define NAMED(name) PASTE(name, TEAL_VARIANT)

INLINE void add_into(float *to, const float *from, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(to + i) + load(from + i));
    for (; i < n; i++) to[i] += from[i];
}

static void normalise(const teal_norm *norm, const float *x, float *y, int32_t n) {
    if (norm->kind == TEAL_NO_NORM) {
        memcpy(y, x, (size_t)n * sizeof *y);
        return;
    }
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

static void embed(const teal_session *s, thread_memory *m) {
    const teal_program *p = s->program;
    for (int32_t r = 0; r < s->rows; r++) {
        float *hidden = m->hidden + (int64_t)r * p->hidden;
        const teal_weight *e = p->embedding;
        const uint8_t *row = (const uint8_t *)e->data + s->tokens[r] * e->row_bytes;
        if (e->layout == TEAL_INPUT_MAJOR) /* tied to an output layer that skips inputs */
            for (int32_t i = 0; i < p->hidden; i++)
                hidden[i] = one_weight(e->dtype, (const uint8_t *)e->data + i * e->row_bytes, s->tokens[r]) * p->embedding_scale;
        else
            for (int32_t i = 0; i < p->hidden; i++) hidden[i] = one_weight(e->dtype, row, i) * p->embedding_scale;
        if (p->position_embedding) {
            e = p->position_embedding;
            row = (const uint8_t *)e->data + (s->positions[r] + p->position_offset) * e->row_bytes;
            for (int32_t i = 0; i < p->hidden; i++) hidden[i] += one_weight(e->dtype, row, i);
        }
        if (p->embedding_norm) normalise(p->embedding_norm, hidden, hidden, p->hidden);
    }
}

/* Adds what all threads made of the last residual product to this thread's copy of the residual stream. */
static void add_partials(teal_session *s, thread_memory *m, int32_t thread, int which, const teal_product *product) {
    const int32_t hidden = s->program->hidden;
    const float *bias = product->experts ? NULL : product->parts[0].bias;
    float *onto = product->norm ? m->normed : m->hidden;
    if (product->norm) memset(onto, 0, (size_t)s->rows * (size_t)hidden * sizeof *onto);
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
        add_into(onto, s->shared, (int64_t)s->rows * hidden);
    } else {
        for (int32_t t = 0; t < s->threads; t++) add_into(onto, s->memory[t].partial[which], (int64_t)s->rows * hidden);
    }
    if (bias)
        for (int32_t r = 0; r < s->rows; r++) add_into(onto + (int64_t)r * hidden, bias, hidden);
    if (product->norm) {
        for (int32_t r = 0; r < s->rows; r++)
            normalise(product->norm, onto + (int64_t)r * hidden, onto + (int64_t)r * hidden, hidden);
        add_into(m->hidden, onto, (int64_t)s->rows * hidden);
    }
    for (int64_t i = 0; i < (int64_t)s->rows * hidden && product->stream_scale != 0; i++) m->hidden[i] *= product->stream_scale;
}

/* Parts that are multiplied before the epilogue: of gate first, the gate. */
static int32_t summed_parts(const teal_product *p) { return p->epilogue == TEAL_GATE_FIRST ? 1 : p->n_parts; }

/* What a product reads that is not a residual one. */
static const float *input_of(const teal_product *p, const thread_memory *m) { return p->aside ? m->aside : m->normed; }

/* Outputs of these, side by side. */
static int32_t outputs_of(const teal_product *p) {
    int32_t outputs = 0;
    for (int32_t i = 0; i < summed_parts(p); i++) outputs += p->parts[i].outputs;
    return outputs;
}

static int64_t *counter(const teal_weight *w, thread_memory *m, int counts) {
    return counts && w->counter >= 0 ? m->kept + w->counter : NULL;
}

static int same_list(const teal_session *s, const teal_weight *a, const teal_weight *b) {
    return s->padded_rows == 1 && a->layout == TEAL_INPUT_MAJOR && b->layout == TEAL_INPUT_MAJOR && a->inputs == b->inputs &&
           limits_of(a, s->levels, NULL, 1).of[0] == limits_of(b, s->levels, NULL, 1).of[0];
}

INLINE vf positive(vf x) { return (vf)(~(x <= all(0.0f)) & (vi)x); } /* a NaN stays */
INLINE vf lower(vf x, float most) { /* the lower one; a NaN stays */
    const vi above = x > all(most);
    return (vf)((above & (vi)all(most)) | (~above & (vi)x));
}

INLINE vf activated(const teal_product *p, vf g) {
    switch (p->activation) {
    case TEAL_SILU: return g * sigmoid(g);
    case TEAL_GELU_TANH: {
        vf inner = all(0.7978845608f) * (g + all(0.044715f) * g * g * g);
        return g * sigmoid(inner + inner); /* 1 + tanh is twice that */
    }
    case TEAL_CLAMPED_SWIGLU: {
        vf low = lower(g, p->activation_threshold);
        return low * sigmoid(all(p->curve[0]) * low);
    }
    case TEAL_GELU: return gelu(g);
    case TEAL_RELU2: return positive(g) * positive(g);
    case TEAL_FATRELU: return (vf)(~(g < all(p->activation_threshold)) & (vi)g);
    case TEAL_XIELU: {
        float x[LANES];
        memcpy(x, &g, sizeof x);
        for (int i = 0; i < LANES; i++) {
            float curved = x[i] > 0.0f ? p->curve[0] * x[i] * x[i]
                                       : p->curve[1] * (expm1f(x[i] > -1e-6f ? -1e-6f : x[i]) - x[i]);
            x[i] = curved + p->curve[2] * x[i];
        }
        memcpy(&g, x, sizeof x);
        return g;
    }
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
        vf result = activated(p, load(g));
        if (u && p->activation == TEAL_DRELU) result *= positive(load(u));
        else if (u && p->activation == TEAL_CLAMPED_SWIGLU)
            result *= all(1.0f) - lower(-lower(load(u), p->activation_threshold), p->activation_threshold);
        else if (u) result *= load(u);
        store(to, result);
        if (!whole) memcpy(y + i, parts[0], (size_t)(n - i) * sizeof *y);
    }
}

/* Parts [i, end) that read one list and lie side by side in one table, as one weight: pieces of rows are longer then.
 * Returns `end`. */
static int32_t side_by_side(const teal_session *s, const teal_product *p, int32_t i, teal_weight *whole) {
    int32_t end = i + 1;
    *whole = p->parts[i];
    for (; end < summed_parts(p) && same_list(s, &p->parts[end - 1], &p->parts[end]); end++) {
        const teal_weight *w = &p->parts[end];
        if (w->dtype != whole->dtype || w->row_bytes != whole->row_bytes || whole->outputs % 2 ||
            (const uint8_t *)w->data != (const uint8_t *)whole->data + bytes_of(w->dtype, whole->outputs))
            break;
        if (w->dtype >= TEAL_INT8) {
            const group_scales behind = scales_of(whole, 0, whole->outputs), own = scales_of(w, 0, 0);
            if (w->group != whole->group || w->scale_stride != whole->scale_stride || w->zero_stride != whole->zero_stride ||
                own.scale_dtype != behind.scale_dtype || own.scales != behind.scales || own.zeros != behind.zeros)
                break;
        }
        whole->outputs += w->outputs;
    }
    return end;
}

/* Where this thread's part of a list begins; of codes between two groups, so that scales are read once. */
static int32_t cut_list(const teal_weight *w, const kept_list *list, int32_t thread, int32_t threads) {
    int32_t at = (int32_t)((int64_t)list->count * thread / threads);
    if (w->dtype >= TEAL_INT8 && w->group < w->inputs)
        while (at > 0 && at < list->count && list->index[at] / w->group == list->index[at - 1] / w->group) at++;
    return at;
}

/* This thread's sums of all parts, side by side: of some kept inputs each output, of row-major parts some outputs. */
static void partial_sums(teal_session *s, thread_memory *m, int32_t thread, const teal_product *p, const range *own) {
    const int32_t size = which_rows(s->padded_rows), stride = outputs_of(p);
    const float *x = input_of(p, m);
    float *y = m->sums;
    for (int32_t i = 0, end; i < summed_parts(p); i = end) {
        const teal_weight *w = &p->parts[i];
        int64_t *kept = counter(w, m, thread == 0);
        if (w->layout == TEAL_ROW_MAJOR) {
            for (int32_t r = 0; r < s->rows; r++) memset(y + (int64_t)r * stride, 0, (size_t)w->outputs * sizeof *y);
            dot_functions[w->dtype][size](w, NULL, own->first[i], own->last[i] - own->first[i], x, w->inputs, 0,
                                          w->inputs, y + own->first[i], stride);
            if (kept) *kept += (int64_t)s->rows * w->inputs;
            y += w->outputs;
            end = i + 1;
            continue;
        }
        teal_weight whole;
        end = side_by_side(s, p, i, &whole);
        const int again = i > 0 && same_list(s, w - 1, w);
        if (!again) make_list(x, w->inputs, s->rows, s->padded_rows, w->inputs, 0, limits_of(w, s->levels, NULL, s->rows), &m->list, kept);
        for (int32_t k = again ? i : i + 1; k < end; k++) { /* parts of a list that was counted for another */
            kept = counter(&p->parts[k], m, thread == 0);
            if (kept) *kept += m->list.count;
        }
        int32_t from = cut_list(w, &m->list, thread, s->threads), to = cut_list(w, &m->list, thread + 1, s->threads);
        for (int32_t at = 0; at < whole.outputs; at += SUMS_TILE) {
            int32_t n = whole.outputs - at < SUMS_TILE ? whole.outputs - at : SUMS_TILE;
            multiplications[w->dtype][size](&whole, &m->list, from, to, at, n, y + at, stride, m->group);
        }
        y += whole.outputs;
    }
}

/* Outputs [first, first + n) of one row, all parts side by side: what all threads have of them, and the bias. */
static void sum_outputs(const teal_session *s, const teal_product *p, int32_t row, int32_t first, int32_t n, float *to) {
    const int64_t at = (int64_t)row * outputs_of(p) + first;
    memcpy(to, s->memory[0].sums + at, (size_t)n * sizeof *to);
    for (int32_t t = 1; t < s->threads; t++) add_into(to, s->memory[t].sums + at, n);
    int32_t begin = 0;
    for (int32_t i = 0; i < summed_parts(p); begin += p->parts[i++].outputs) {
        const float *bias = p->parts[i].bias;
        int32_t from = first > begin ? first : begin, end = begin + p->parts[i].outputs;
        int32_t last = first + n < end ? first + n : end;
        if (bias && from < last) add_into(to + from - first, bias + from - begin, last - from);
    }
}

/* Products of `up` for the neurons that live, into ups (rows, n), zero for the others. */
static void live_ups(teal_session *s, thread_memory *m, const teal_product *p, const float *gates, int32_t first,
                     int32_t n, float *ups) {
    const teal_weight *up = &p->parts[1];
    int64_t *kept = counter(up, m, 1);
    int32_t live = 0;
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
    dot_functions[up->dtype][which_rows(s->padded_rows)](up, m->list.index, 0, live, input_of(p, m), up->inputs, 0,
                                                         up->inputs, m->group, live);
    memset(ups, 0, (size_t)s->padded_rows * (size_t)n * sizeof *ups);
    for (int32_t r = 0; r < s->rows; r++)
        for (int32_t k = 0; k < live; k++) {
            int32_t neuron = m->list.index[k];
            float bias = up->bias ? up->bias[neuron] : 0.0f;
            ups[(int64_t)r * n + neuron - first] = m->group[(int64_t)r * live + k] + bias;
        }
}

/* The neurons of this thread into `own`, from what all threads have of their gates and ups. */
static void neurons(teal_session *s, thread_memory *m, const teal_product *p, const range *own) {
    const int32_t first = own->first[0], n = own->last[0] - first;
    float *gates = m->neurons, *ups = p->epilogue == TEAL_ACTIVATED ? NULL : m->neurons + (int64_t)s->padded_rows * n;
    for (int32_t r = 0; r < s->rows; r++) {
        sum_outputs(s, p, r, first, n, gates + (int64_t)r * n);
        if (p->epilogue == TEAL_GATED) sum_outputs(s, p, r, p->parts[0].outputs + first, n, ups + (int64_t)r * n);
    }
    if (p->epilogue == TEAL_GATE_FIRST) live_ups(s, m, p, gates, first, n, ups);
    for (int32_t r = 0; r < s->rows; r++)
        activate(p, gates + (int64_t)r * n, ups ? ups + (int64_t)r * n : NULL, m->own + (int64_t)r * n, n);
    m->own_first = first, m->own_last = first + n;
}

/* An RMS norm of what a residual product reads, of which each thread has some in `own`. */
static void normalise_own(teal_session *s, thread_memory *m, const teal_norm *norm, int32_t inputs) {
    const int32_t n = m->own_last - m->own_first;
    for (int32_t r = 0; r < s->rows; r++) {
        const float *own = m->own + (int64_t)r * n;
        m->squares[r] = 0;
        for (int32_t i = 0; i < n; i++) m->squares[r] += own[i] * own[i];
    }
    pool_barrier(s->pool);
    for (int32_t r = 0; r < s->rows; r++) {
        float squares = 0, *own = m->own + (int64_t)r * n;
        for (int32_t t = 0; t < s->threads; t++) squares += s->memory[t].squares[r];
        const float scale = 1.0f / sqrtf(squares / (float)inputs + norm->eps);
        for (int32_t i = 0; i < n; i++) own[i] *= scale * norm->weight[m->own_first + i];
    }
}

/* What this thread adds to the residual stream: `own` inputs times their weights. */
static void residual_product(teal_session *s, thread_memory *m, const teal_product *p, int which) {
    const teal_weight *w = &p->parts[0];
    const int32_t n = m->own_last - m->own_first, size = which_rows(s->padded_rows);
    int64_t *kept = counter(w, m, 1);
    float *y = m->partial[which];
    if (p->input_norm) normalise_own(s, m, p->input_norm, w->inputs);
    if (w->layout == TEAL_ROW_MAJOR) {
        dot_functions[w->dtype][size](w, NULL, 0, w->outputs, m->own, n, m->own_first, n, y, w->outputs);
        if (kept) *kept += (int64_t)s->rows * n;
        return;
    }
    make_list(m->own, n, s->rows, s->padded_rows, n, m->own_first, limits_of(w, s->levels, NULL, s->rows), &m->list, kept);
    for (int32_t at = 0; at < w->outputs; at += SUMS_TILE) {
        int32_t tile = w->outputs - at < SUMS_TILE ? w->outputs - at : SUMS_TILE;
        multiplications[w->dtype][size](w, &m->list, 0, m->list.count, at, tile, y + at, w->outputs, m->group);
    }
}

/* By what the norm of all `heads` heads multiplies those from output `first` of a product on. */
static float scale_of_heads(const teal_session *s, const teal_attention *a, const teal_product *qkv, int32_t row,
                            int32_t first, int32_t heads, float *head) {
    float squares = 0;
    for (int32_t h = 0; h < heads; h++) {
        sum_outputs(s, qkv, row, first + h * a->dim, a->dim, head);
        for (int32_t i = 0; i < a->dim; i++) squares += head[i] * head[i];
    }
    return 1.0f / sqrtf(squares / (float)(heads * a->dim) + a->eps);
}

static void clamp(float *x, int32_t n, float most) {
    for (int32_t i = 0; i < n; i++) x[i] = x[i] > most ? most : x[i] < -most ? -most : x[i]; /* a NaN stays */
}

/* Queries, key and value of a key head of one row into `queries`, as the product gave them. `scale`: of all heads, of queries
 * and of keys. */
static void take_projections(const teal_session *s, thread_memory *m, const teal_attention *a, const teal_product *qkv,
                             int32_t row, int32_t kv_head, const float *scale) {
    const int32_t group = a->heads / a->kv_heads, dim = a->dim;
    if (a->grouped) {
        sum_outputs(s, qkv, row, kv_head * (group + 2) * dim, (group + 2) * dim, m->queries);
    } else {
        sum_outputs(s, qkv, row, kv_head * group * dim, group * dim, m->queries);
        sum_outputs(s, qkv, row, (a->heads + kv_head) * dim, dim, m->queries + group * dim);
        if (a->keys_as_values) memcpy(m->queries + (group + 1) * dim, m->queries + group * dim, (size_t)dim * sizeof(float));
        else sum_outputs(s, qkv, row, (a->heads + a->kv_heads + kv_head) * dim, dim, m->queries + (group + 1) * dim);
    }
    if (a->clip > 0) clamp(m->queries, (group + 2) * dim, a->clip);
    if (scale) {
        const float *q_norm = a->q_norm + kv_head * group * dim, *k_norm = a->k_norm + kv_head * dim;
        for (int32_t i = 0; i < group * dim; i++) m->queries[i] *= scale[0] * q_norm[i];
        for (int32_t i = 0; i < dim; i++) m->queries[group * dim + i] *= scale[1] * k_norm[i];
    }
}

/* `scale` of `take_projections` for a row. */
static void scales_of_heads(const teal_session *s, thread_memory *m, const teal_attention *a, const teal_product *qkv,
                            int32_t row, float *scale) {
    scale[0] = scale_of_heads(s, a, qkv, row, 0, a->heads, m->queries);
    scale[1] = scale_of_heads(s, a, qkv, row, a->heads * a->dim, a->kv_heads, m->queries);
}

/* Keys and values of all rows into the cache, those of some key heads by each thread; returns when all are written. */
static void write_rows(teal_session *s, thread_memory *m, int32_t thread, const teal_attention *a, const teal_product *qkv) {
    const int32_t group = a->heads / a->kv_heads, dim = a->dim;
    const int all_heads = a->norms == TEAL_ALL_HEADS && a->q_norm;
    float scale[2];
    for (int32_t item = thread; item < s->rows * a->kv_heads; item += s->threads) {
        const int32_t row = item / a->kv_heads, kv_head = item % a->kv_heads;
        if (all_heads) scales_of_heads(s, m, a, qkv, row, scale);
        take_projections(s, m, a, qkv, row, kv_head, all_heads ? scale : NULL);
        write_cache(a, s->sequences[row], kv_head, s->positions[row], m->queries + group * dim, m->queries + (group + 1) * dim);
    }
    pool_barrier(s->pool);
}

static void attention(teal_session *s, thread_memory *m, int32_t thread, const teal_attention *a, const teal_product *qkv,
                      const range *own, int32_t splits) {
    const int32_t group = a->heads / a->kv_heads, dim = a->dim;
    const int64_t of_head = dim + HEAD_EXTRA, of_split = (int64_t)a->heads * of_head;
    const int all_heads = a->norms == TEAL_ALL_HEADS && a->q_norm;
    float scale[2];
    int32_t scaled_row = -1;
    if (s->sequences) write_rows(s, m, thread, a, qkv);
    for (int32_t item = own->first[0]; item < own->last[0]; item++) {
        /* Rows are outermost where a head has one part: then a thread has the same heads of each. */
        int32_t per_row = own->last[1], row = item / per_row, rest = item % per_row;
        int32_t kv_head = own->first[1] + rest / splits, split = rest % splits;
        float *heads = s->heads + ((int64_t)row * splits + split) * of_split + (int64_t)kv_head * group * of_head;
        if (all_heads && row != scaled_row) {
            scales_of_heads(s, m, a, qkv, row, scale);
            scaled_row = row;
        }
        take_projections(s, m, a, qkv, row, kv_head, all_heads ? scale : NULL);
        attend(a, s->sequences ? s->sequences[row] : row, kv_head, split, splits, s->sequences != NULL, s->positions[row], m->queries,
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
            merge_parts(s->heads + (int64_t)r * splits * of_split + head * of_head, splits, of_split, dim,
                        a->sinks ? a->sinks[head] : -INFINITY, x);
            memcpy(m->own + (int64_t)r * n + at - first, x + inside, (size_t)take * sizeof *x);
            at += take;
        }
}

/* Scale and soft cap of logits [first, last). */
static void finish_logits(const teal_session *s, int32_t first, int32_t last) {
    const teal_program *p = s->program;
    for (int32_t r = 0; r < s->rows; r++) {
        float *logits = s->logits + (int64_t)r * p->output->parts[0].outputs;
        for (int32_t i = first; i < last; i++) logits[i] *= p->logits_scale;
        if (p->logits_cap > 0) soft_cap(logits + first, last - first, p->logits_cap);
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

/* Outputs [first, last) of one projection of x, with its bias, into y (rows, stride), whose output 0 is the first of all. */
static void some_outputs(const teal_weight *w, const int32_t *levels, int32_t rows, int32_t padded, const float *x,
                         int32_t first, int32_t last, thread_memory *m, int64_t *kept, float *y, int64_t stride) {
    const int32_t size = which_rows(padded);
    if (w->layout == TEAL_INPUT_MAJOR) make_list(x, w->inputs, rows, padded, w->inputs, 0, limits_of(w, levels, NULL, rows), &m->list, kept);
    else if (kept) *kept += (int64_t)rows * w->inputs;
    for (int32_t at = first; at < last; at += OUTPUT_TILE) {
        int32_t n = last - at < OUTPUT_TILE ? last - at : OUTPUT_TILE;
        if (w->layout == TEAL_ROW_MAJOR)
            dot_functions[w->dtype][size](w, NULL, at, n, x, w->inputs, 0, w->inputs, m->tile, n);
        else multiplications[w->dtype][size](w, &m->list, 0, m->list.count, at, n, m->tile, n, m->group);
        for (int32_t r = 0; r < rows; r++) {
            memcpy(y + r * stride + at, m->tile + (int64_t)r * n, (size_t)n * sizeof *y);
            if (w->bias) add_into(y + r * stride + at, w->bias + at, n);
        }
    }
}

#include "experts.h"
#include "routed.h"

void NAMED(teal_run_)(void *session, int32_t thread) {
    teal_session *s = session;
    const teal_program *p = s->program;
    thread_memory *m = &s->memory[thread];
    const teal_product *before = NULL;     /* the last product, until its sums are read */
    const teal_attention *attended = NULL; /* whose heads the next residual product reads */
    int32_t attended_step = 0, parity = 0;
    const int32_t steps = p->n_steps + (s->logits != NULL); /* the output layer is the last one */
    embed(s, m);
    for (int32_t i = 0; i < steps; i++) {
        const teal_step *step = &p->steps[i];
        const range *own = &s->ranges[(int64_t)i * s->threads + thread];
        const teal_norm *norm = i == p->n_steps ? p->norm : step->kind == TEAL_STEP_NORM ? step->of : NULL;
        if (before && before->epilogue == TEAL_RESIDUAL) {
            add_partials(s, m, thread, parity ^ 1, before);
            before = NULL;
        }
        if (norm)
            for (int32_t r = 0; r < s->rows; r++)
                normalise(norm, m->hidden + (int64_t)r * p->hidden,
                          (norm->aside ? m->aside : m->normed) + (int64_t)r * p->hidden, p->hidden);
        if (i == p->n_steps) {
            const teal_weight *w = &p->output->parts[0];
            some_outputs(w, s->levels, s->rows, s->padded_rows, norm ? m->normed : m->hidden, own->first[0], own->last[0], m,
                         counter(w, m, thread == 0), s->logits, w->outputs);
            if (p->logits_scale != 1 || p->logits_cap > 0) finish_logits(s, own->first[0], own->last[0]);
            find_best(s, m, own->first[0], own->last[0]);
        } else if (step->kind == TEAL_STEP_ATTENTION) {
            attended = step->of, attended_step = i;
            attention(s, m, thread, attended, before, own, s->splits[i]);
            if (attended->kv_heads % s->threads) pool_barrier(s->pool); /* heads that others need */
        } else if (step->kind == TEAL_STEP_PRODUCT) {
            const teal_product *product = step->of;
            if (product->epilogue == TEAL_RESIDUAL) {
                if (attended)
                    take_heads(s, m, attended, &s->ranges[(int64_t)attended_step * s->threads + thread],
                               s->splits[attended_step]);
                attended = NULL;
                if (product->experts) residual_of_experts(s, m, thread, product, parity);
                else residual_product(s, m, product, parity);
                if (product->scaled_by) scale_partial(s, m, product->scaled_by, parity);
                parity ^= 1;
                pool_barrier(s->pool);
            } else if (product->epilogue == TEAL_ROUTED) {
                route_groups(s, m, product, thread);
                routed_neurons(s, m, product, thread);
            } else {
                if (product->experts) sums_of_experts(s, m, thread, product);
                else partial_sums(s, m, thread, product, own);
                pool_barrier(s->pool);
                if (product->experts) neurons_of_experts(s, m, product, own);
                else if (product->epilogue != TEAL_PLAIN) neurons(s, m, product, own);
            }
            before = product;
        } else if (step->kind == TEAL_STEP_ROUTE) {
            route_rows(s, m, step->of, own);
        }
    }
}

void NAMED(teal_linear_)(void *context, int32_t thread) {
    const linear_call *call = context;
    const teal_weight *w = call->weight;
    const range *own = &call->ranges[thread];
    some_outputs(w, NULL, call->rows, call->padded_rows, call->x, own->first[0], own->last[0], &call->memory[thread], NULL,
                 call->y, w->outputs);
}
