/* Holds every variant that runs here against plain arithmetic in double: products alone, a decoder of two blocks, and
 * mixtures of experts.
 *
 * A program without Python, so that it can run under sanitizers and under an emulator of another processor.
 * Prints the variants' names; exits with 1 at the first number that is wrong. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "teal_native.h"

static void fail(const char *variant, const char *what, double found, double expected) {
    fprintf(stderr, "%s: %s is %.9g, not %.9g\n", variant, what, found, expected);
    exit(1);
}

/* Memory of exactly the size that is asked for, so that a sanitizer sees what is read beyond. */
static void *owned[4096];
static int n_owned;
static void *give(size_t bytes) {
    if (n_owned == 4096) abort();
    return owned[n_owned++] = calloc(1, bytes ? bytes : 1);
}
static double *doubles(int64_t n) { return give((size_t)n * sizeof(double)); }
static float *floats(int64_t n) { return give((size_t)n * sizeof(float)); }
static void release(void) {
    while (n_owned) free(owned[--n_owned]);
}

static uint32_t bits(void) { /* Marsaglia's xorshift */
    static uint32_t state = 2463534242u;
    state ^= state << 13, state ^= state >> 17;
    return state ^= state << 5;
}
static double uniform(void) { return (double)bits() / 2147483648.0 - 1; }
static float *random_floats(int64_t n) {
    float *x = floats(n);
    for (int64_t i = 0; i < n; i++) x[i] = (float)uniform();
    return x;
}

static double of_half(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}
static double of_bfloat(uint16_t b) {
    uint32_t word = (uint32_t)b << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}
static uint16_t random_half(void) { return (uint16_t)((bits() & 0x83ff) | (bits() % 5 + 10) << 10); }
static uint16_t random_bfloat(void) { return (uint16_t)((bits() & 0x807f) | (bits() % 5 + 122) << 7); }

/* A weight, and what it stands for: (inputs, outputs). */
typedef struct {
    teal_weight weight;
    double *values;
} matrix;

/* `apiece`: inputs of each of several tables, one behind the other, which have groups of their own. */
static matrix make_many(int inputs, int outputs, int dtype, int layout, int group, float threshold, int apiece) {
    matrix m = {.values = doubles((int64_t)inputs * outputs)};
    int rows = layout == TEAL_ROW_MAJOR ? outputs : inputs, columns = layout == TEAL_ROW_MAJOR ? inputs : outputs;
    int groups_apiece = (apiece + group - 1) / group, groups = inputs / apiece * groups_apiece;
    const int64_t sizes[] = {4 * columns, 2 * columns, 2 * columns, columns, (columns + 1) / 2};
    const int64_t row_bytes = sizes[dtype];
    uint8_t *data = give((size_t)(rows * row_bytes));
    float *scales = floats((int64_t)groups * outputs);
    uint16_t *half_scales = give((size_t)groups * (size_t)outputs * 2), *zeros = give((size_t)groups * (size_t)outputs * 2);
    int whole = dtype == TEAL_INT8 ? 256 : 16, halves = dtype == TEAL_INT4, with_zeros = group % 2;
    for (int64_t i = 0; i < (int64_t)groups * outputs; i++) {
        half_scales[i] = (uint16_t)(random_half() & 0x7fff), zeros[i] = (uint16_t)(0x4800 | (bits() % 8) << 7);
        scales[i] = halves ? (float)of_half(half_scales[i]) : (float)(uniform() / 100);
    }
    for (int i = 0; i < inputs; i++)
        for (int o = 0; o < outputs; o++) {
            int64_t row = layout == TEAL_ROW_MAJOR ? o : i, column = layout == TEAL_ROW_MAJOR ? i : o;
            uint8_t *at = data + row * row_bytes;
            double *value = &m.values[(int64_t)i * outputs + o];
            if (dtype == TEAL_F32) {
                float x = (float)uniform();
                memcpy(at + 4 * column, &x, 4), *value = x;
            } else if (dtype == TEAL_BF16 || dtype == TEAL_F16) {
                uint16_t x = dtype == TEAL_F16 ? random_half() : random_bfloat();
                memcpy(at + 2 * column, &x, 2), *value = dtype == TEAL_F16 ? of_half(x) : of_bfloat(x);
            } else {
                int code = (int)(bits() % (unsigned)whole);
                int64_t of = (int64_t)(i / apiece * groups_apiece + i % apiece / group) * outputs + o;
                if (dtype == TEAL_INT8) at[column] = (uint8_t)code;
                else at[column / 2] |= (uint8_t)(code << 4 * (column % 2));
                *value = (code - (with_zeros ? of_half(zeros[of]) : whole / 2)) * (double)scales[of];
            }
        }
    m.weight = (teal_weight){.data = data, .scales = halves ? (void *)half_scales : (void *)scales,
                             .zeros = with_zeros ? zeros : NULL, .bias = inputs % 2 ? random_floats(outputs) : NULL,
                             .row_bytes = row_bytes, .scale_stride = outputs, .zero_stride = outputs,
                             .inputs = inputs, .outputs = outputs, .dtype = dtype, .layout = layout,
                             .scale_dtype = halves ? TEAL_F16 : TEAL_F32, .group = group, .threshold = threshold,
                             .expected = 0.4f, .counter = -1};
    return m;
}

static matrix make(int inputs, int outputs, int dtype, int layout, int group, float threshold) {
    return make_many(inputs, outputs, dtype, layout, group, threshold, inputs);
}

/* y += x times the weight; what is added up in `size` is what errors are measured by. Returns inputs kept. */
static int64_t apply(const matrix *m, const double *x, double *y, double *size) {
    const teal_weight *w = &m->weight;
    int64_t kept = 0;
    for (int o = 0; o < w->outputs; o++) y[o] = w->bias ? w->bias[o] : 0;
    for (int i = 0; i < w->inputs; i++) {
        if (w->layout == TEAL_INPUT_MAJOR && fabs(x[i]) <= w->threshold) continue;
        kept++;
        for (int o = 0; o < w->outputs; o++) {
            double product = x[i] * m->values[(int64_t)i * w->outputs + o];
            y[o] += product;
            if (size) size[o] += fabs(product);
        }
    }
    return kept;
}

static void check_products(const char *variant, teal_pool *pool) {
    static const int sizes[][3] = {{1, 1, 8}, {7, 5, 3}, {33, 16, 32}, {64, 200, 32}, {131, 67, 17}, {96, 1030, 31}};
    static const int row_counts[] = {1, 2, 3, 8};
    for (int s = 0; s < (int)(sizeof sizes / sizeof *sizes); s++)
        for (int kind = 0; kind < 8; kind++) {
            const int inputs = sizes[s][0], outputs = sizes[s][1], dtype = kind < 5 ? kind : kind - 5;
            matrix m = make(inputs, outputs, dtype, kind < 5 ? TEAL_INPUT_MAJOR : TEAL_ROW_MAJOR, sizes[s][2],
                            s % 2 ? 0.4f : -INFINITY);
            for (int r = 0; r < 4; r++) {
                const int rows = row_counts[r];
                float *x = random_floats((int64_t)rows * inputs), *y = floats((int64_t)rows * outputs);
                if (teal_linear(pool, variant, &m.weight, rows, x, y)) fail(variant, "the answer to a weight", 1, 0);
                for (int row = 0; row < rows; row++) {
                    double *wide = doubles(inputs), *expected = doubles(outputs), *size = doubles(outputs);
                    for (int i = 0; i < inputs; i++) wide[i] = x[row * inputs + i];
                    apply(&m, wide, expected, size);
                    for (int o = 0; o < outputs; o++) {
                        double found = y[row * outputs + o];
                        /* float32 sums of at most 131 products. Codes are added up before their zero point is taken off. */
                        if (!(fabs(found - expected[o]) <= (dtype < TEAL_INT8 ? 2e-6 : 2e-5) * (size[o] + 1)))
                            fail(variant, "an output", found, expected[o]);
                    }
                }
            }
            release();
        }
}

enum { HIDDEN = 48, HEADS = 6, KV_HEADS = 2, DIM = 8, WIDE = 70, VOCABULARY = 90, POSITIONS = 48, ROWS = 2, TOKENS = 40 };
enum { COLUMNS = (HEADS + 2 * KV_HEADS) * DIM };

typedef struct {
    matrix q, k, v, o, gate, up, down;
    teal_norm norms[3]; /* before attention and MLP, and of what attention adds */
    teal_norm inner[2]; /* of what the residual products read, where there is no gate */
    teal_attention attention;
    double *keys, *values; /* (ROWS, POSITIONS, KV_HEADS * DIM) */
    int gated;
} block;

static teal_norm norm_of(int kind) {
    return (teal_norm){random_floats(HIDDEN), kind == TEAL_LAYER_NORM ? random_floats(HIDDEN) : NULL, 1e-5f, kind};
}

static void normalise_some(const teal_norm *norm, int n, const double *x, double *y) {
    double mean = 0, squares = 0;
    if (norm->kind == TEAL_NO_NORM) {
        for (int i = 0; i < n; i++) y[i] = x[i];
        return;
    }
    for (int i = 0; i < n && norm->kind == TEAL_LAYER_NORM; i++) mean += x[i] / n;
    for (int i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean) / n;
    for (int i = 0; i < n; i++)
        y[i] = (x[i] - mean) / sqrt(squares + (double)norm->eps) * (double)norm->weight[i] +
               (norm->bias ? (double)norm->bias[i] : 0);
}

static void normalise(const teal_norm *norm, const double *x, double *y) { normalise_some(norm, HIDDEN, x, y); }

/* `norm`, `bias`: of the first of all heads, or NULL. */
static void prepare(const teal_attention *a, const float *norm, const float *bias, int head, int position, double *x) {
    double turned[DIM];
    for (int last = 0; last < 2; last++) {
        const teal_norm own = {norm + head * DIM, bias ? bias + head * DIM : NULL, a->eps, a->norm_kind, 0};
        if (norm && last == (a->norms == TEAL_HEADS_LAST)) normalise_some(&own, DIM, x, x);
        if (last || !a->cos) continue;
        for (int i = 0; i < a->rotary; i++) {
            int half = a->rotary / 2, at = position * a->rotary + (a->neighbours ? i / 2 : i);
            double other = a->neighbours ? (i % 2 ? x[i - 1] : -x[i + 1]) : i < half ? -x[i + half] : x[i - half];
            turned[i] = x[i] * (double)a->cos[at] + other * (double)a->sin[at];
        }
        memcpy(x, turned, sizeof(double) * (size_t)a->rotary);
    }
}

static void normalise_heads(const teal_attention *a, const float *norm, int heads, double *x) {
    double squares = 0;
    for (int i = 0; i < heads * DIM; i++) squares += x[i] * x[i] / (heads * DIM);
    for (int i = 0; i < heads * DIM; i++) x[i] *= (double)norm[i] / sqrt(squares + (double)a->eps);
}

static double clamp(double x, double most) { return fmin(fmax(x, -most), most); }

static void attend(block *b, int row, int position, double *q, const double *k, const double *v, double *y) {
    const teal_attention *a = &b->attention;
    double *keys = b->keys + (int64_t)row * POSITIONS * KV_HEADS * DIM, *values = b->values + (keys - b->keys);
    const int all_heads = a->norms == TEAL_ALL_HEADS;
    const float *q_norm = all_heads ? NULL : a->q_norm, *k_norm = all_heads ? NULL : a->k_norm;
    for (int i = 0; i < HEADS * DIM && a->clip > 0; i++) q[i] = clamp(q[i], (double)a->clip);
    memcpy(values + position * KV_HEADS * DIM, v, sizeof(double) * KV_HEADS * DIM);
    memcpy(keys + position * KV_HEADS * DIM, k, sizeof(double) * KV_HEADS * DIM);
    for (int i = position * KV_HEADS * DIM; i < (position + 1) * KV_HEADS * DIM && a->clip > 0; i++)
        keys[i] = clamp(keys[i], (double)a->clip), values[i] = clamp(values[i], (double)a->clip);
    for (int h = 0; h < KV_HEADS && a->v_norm; h++) {
        const teal_norm own = {a->v_norm + h * DIM, NULL, a->eps, a->norm_kind, 0};
        double *value = values + (position * KV_HEADS + h) * DIM;
        normalise_some(&own, DIM, value, value);
    }
    if (all_heads) {
        normalise_heads(a, a->q_norm, HEADS, q);
        normalise_heads(a, a->k_norm, KV_HEADS, keys + position * KV_HEADS * DIM);
    }
    for (int h = 0; h < KV_HEADS; h++) prepare(a, k_norm, a->k_bias, h, position, keys + (position * KV_HEADS + h) * DIM);
    int first = a->window && position >= a->window ? position + 1 - a->window : 0;
    for (int h = 0; h < HEADS; h++) {
        double total = a->sinks ? exp((double)a->sinks[h]) : 0, scores[POSITIONS], *head = y + h * DIM;
        int kv = h / (HEADS / KV_HEADS);
        prepare(a, q_norm, a->q_bias, h, position, q + h * DIM);
        memset(head, 0, sizeof(double) * DIM);
        for (int p = first; p <= position; p++) {
            scores[p] = 0;
            for (int i = 0; i < DIM; i++) scores[p] += q[h * DIM + i] * keys[(p * KV_HEADS + kv) * DIM + i];
            scores[p] *= (double)a->scale * (a->query_scale ? (double)a->query_scale[position] : 1);
            if (a->cap > 0) scores[p] = (double)a->cap * tanh(scores[p] / (double)a->cap);
            if (a->bias) scores[p] += (double)a->bias[h * POSITIONS + p];
            total += scores[p] = exp(scores[p]);
        }
        for (int p = first; p <= position; p++)
            for (int i = 0; i < DIM; i++) head[i] += scores[p] / total * values[(p * KV_HEADS + kv) * DIM + i];
    }
}

static void run_block(block *b, int row, int position, double *x, int64_t *kept) {
    double normed[HIDDEN], q[HEADS * DIM], k[KV_HEADS * DIM], v[KV_HEADS * DIM], heads[HEADS * DIM], added[HIDDEN];
    double gate[WIDE], up[WIDE];
    double aside[HIDDEN], columns[COLUMNS];
    normalise(&b->norms[0], x, normed), normalise(&b->norms[1], x, aside);
    kept[0] += apply(&b->q, normed, q, NULL);
    apply(&b->k, normed, k, NULL), apply(&b->v, normed, v, NULL);
    memcpy(columns, q, sizeof q), memcpy(columns + HEADS * DIM, k, sizeof k);
    memcpy(columns + (HEADS + KV_HEADS) * DIM, v, sizeof v);
    for (int h = 0; h < KV_HEADS && b->attention.grouped; h++) {
        const int group = HEADS / KV_HEADS;
        const double *own = columns + h * (group + 2) * DIM;
        memcpy(q + h * group * DIM, own, sizeof(double) * (size_t)(group * DIM));
        memcpy(k + h * DIM, own + group * DIM, sizeof(double) * DIM);
        memcpy(v + h * DIM, own + (group + 1) * DIM, sizeof(double) * DIM);
    }
    attend(b, row, position, q, k, v, heads);
    if (!b->gated) normalise_some(&b->inner[0], HEADS * DIM, heads, heads);
    kept[1] += apply(&b->o, heads, added, NULL);
    if (!b->gated) normalise(&b->norms[2], added, added);
    for (int i = 0; i < HIDDEN; i++) x[i] += added[i];
    if (b->gated) normalise(&b->norms[1], x, normed);
    else memcpy(normed, aside, sizeof normed);
    kept[2] += apply(&b->gate, normed, gate, NULL);
    if (b->gated) apply(&b->up, normed, up, NULL);
    for (int i = 0; i < WIDE; i++)
        gate[i] = b->gated ? gate[i] / (1 + exp(-gate[i])) * up[i] : gate[i] * (1 + erf(gate[i] / sqrt(2))) / 2;
    if (!b->gated) normalise_some(&b->inner[1], WIDE, gate, gate);
    kept[3] += apply(&b->down, gate, added, NULL);
    for (int i = 0; i < HIDDEN; i++) x[i] = (x[i] + added[i]) * (b->gated ? 1 : 0.75);
}

/* One of each kind: a Llama's with codes, whose MLP reads the stream as it is and with a norm of all heads, and one with all that Llama has not:
 * LayerNorm, of heads too, after a rotary embedding of neighbours, a window, a cap, growing queries, sinks, ALiBi, clamps,
 * norms of what the residual products read and no gate, whose MLP stands beside attention, behind a norm of its own. */
static block make_block(int gated) {
    const int dtype = gated ? TEAL_INT8 : TEAL_F32;
    block b = {.gated = gated};
    matrix *all[] = {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down};
    const int sizes[][2] = {{HIDDEN, HEADS * DIM}, {HIDDEN, KV_HEADS * DIM}, {HIDDEN, KV_HEADS * DIM},
                            {HEADS * DIM, HIDDEN}, {HIDDEN, WIDE}, {HIDDEN, WIDE}, {WIDE, HIDDEN}};
    for (int i = 0; i < 7; i++)
        *all[i] = make(sizes[i][0], sizes[i][1], i == 4 && gated ? TEAL_INT4 : dtype, TEAL_INPUT_MAJOR, 16,
                       i == 3 ? 0.05f : 0.2f);
    b.q.weight.counter = 0, b.o.weight.counter = 1, b.gate.weight.counter = 2, b.down.weight.counter = 3;
    b.norms[0] = norm_of(gated ? TEAL_RMS_NORM : TEAL_LAYER_NORM), b.norms[2] = norm_of(b.norms[0].kind);
    b.norms[1] = gated ? (teal_norm){.kind = TEAL_NO_NORM} : norm_of(b.norms[0].kind);
    b.keys = doubles(ROWS * POSITIONS * KV_HEADS * DIM), b.values = doubles(ROWS * POSITIONS * KV_HEADS * DIM);
    b.attention = (teal_attention){.keys = floats(ROWS * POSITIONS * KV_HEADS * DIM),
                                   .values = floats(ROWS * POSITIONS * KV_HEADS * DIM), .positions = POSITIONS,
                                   .sequences = ROWS, .heads = HEADS, .kv_heads = KV_HEADS, .dim = DIM, .dtype = TEAL_F32, .scale = 0.35f,
                                   .eps = 1e-6f, .window = gated ? 0 : 19};
    float *cos_table = floats(POSITIONS * (DIM - 2)), *sin_table = floats(POSITIONS * (DIM - 2));
    for (int i = 0; i < POSITIONS * (DIM - 2); i++) {
        double angle = i / (DIM - 2) * pow(100, -(double)(i % ((DIM - 2) / 2)) / DIM);
        cos_table[i] = (float)cos(angle), sin_table[i] = (float)sin(angle);
    }
    b.attention.cos = cos_table, b.attention.sin = sin_table, b.attention.rotary = DIM - 2;
    if (gated) {
        b.attention.q_norm = random_floats(HEADS * DIM), b.attention.k_norm = random_floats(KV_HEADS * DIM);
        b.attention.norms = TEAL_ALL_HEADS;
        return b;
    }
    float *growth = random_floats(POSITIONS);
    for (int i = 0; i < POSITIONS; i++) growth[i] += 2;
    b.attention.q_norm = random_floats(HEADS * DIM), b.attention.k_norm = random_floats(KV_HEADS * DIM);
    b.attention.q_bias = random_floats(HEADS * DIM), b.attention.k_bias = random_floats(KV_HEADS * DIM);
    b.attention.norms = TEAL_HEADS_LAST, b.attention.norm_kind = TEAL_LAYER_NORM;
    b.attention.v_norm = random_floats(KV_HEADS * DIM), b.attention.sinks = random_floats(HEADS), b.attention.bias = random_floats(HEADS * POSITIONS), b.attention.clip = 0.6f;
    b.inner[0] = (teal_norm){random_floats(HEADS * DIM), NULL, 1e-5f, TEAL_RMS_NORM, 0};
    b.inner[1] = (teal_norm){random_floats(WIDE), NULL, 1e-5f, TEAL_RMS_NORM, 0};
    b.attention.grouped = 1, b.norms[1].aside = 1;
    b.attention.neighbours = 1, b.attention.cap = 1.5f, b.attention.query_scale = growth;
    return b;
}

static void check_decoder(const char *variant, teal_pool *pool) {
    block blocks[2] = {make_block(1), make_block(0)};
    teal_product products[2][4];
    teal_step steps[14];
    int n = 0;
    for (int i = 0; i < 2; i++) {
        block *b = &blocks[i];
        teal_product *p = products[i];
        p[0] = (teal_product){.parts = {b->q.weight, b->k.weight, b->v.weight}, .n_parts = 3, .epilogue = TEAL_PLAIN};
        p[1] = (teal_product){.parts = {b->o.weight}, .norm = b->gated ? NULL : &b->norms[2], .n_parts = 1,
                              .input_norm = b->gated ? NULL : &b->inner[0], .epilogue = TEAL_RESIDUAL};
        p[2] = (teal_product){.parts = {b->gate.weight, b->up.weight}, .n_parts = 1 + b->gated,
                              .epilogue = b->gated ? TEAL_GATED : TEAL_ACTIVATED,
                              .activation = b->gated ? TEAL_SILU : TEAL_GELU};
        p[3] = (teal_product){.parts = {b->down.weight}, .n_parts = 1, .epilogue = TEAL_RESIDUAL,
                              .input_norm = b->gated ? NULL : &b->inner[1], .stream_scale = b->gated ? 0 : 0.75f};
        p[2].aside = b->norms[1].aside;
        const teal_step norm = {&b->norms[1], TEAL_STEP_NORM, 0};
        steps[n++] = (teal_step){&b->norms[0], TEAL_STEP_NORM, 0};
        if (b->norms[1].aside) steps[n++] = norm;
        steps[n++] = (teal_step){&p[0], TEAL_STEP_PRODUCT, 0};
        steps[n++] = (teal_step){&b->attention, TEAL_STEP_ATTENTION, 0};
        steps[n++] = (teal_step){&p[1], TEAL_STEP_PRODUCT, 0};
        if (!b->norms[1].aside) steps[n++] = norm;
        steps[n++] = (teal_step){&p[2], TEAL_STEP_PRODUCT, 0};
        steps[n++] = (teal_step){&p[3], TEAL_STEP_PRODUCT, 0};
    }
    matrix embedding = make(HIDDEN, VOCABULARY, TEAL_BF16, TEAL_ROW_MAJOR, 1, -INFINITY);
    matrix output = make(HIDDEN, VOCABULARY, TEAL_F16, TEAL_INPUT_MAJOR, 1, 0.1f);
    teal_norm last = norm_of(TEAL_RMS_NORM), first = norm_of(TEAL_LAYER_NORM);
    teal_product layer = {.parts = {output.weight}, .n_parts = 1, .epilogue = TEAL_PLAIN};
    teal_program program = {.steps = steps, .embedding = &embedding.weight, .embedding_norm = &first, .norm = &last,
                            .output = &layer, .n_steps = n, .hidden = HIDDEN, .counters = 4, .embedding_scale = 1.5f,
                            .logits_scale = 0.6f, .logits_cap = 2};
    char error[200] = "";
    teal_session *session = teal_session_open(&program, pool, ROWS, variant, error, sizeof error);
    if (!session) fprintf(stderr, "%s\n", error), exit(1);

    float *logits = floats(ROWS * VOCABULARY);
    int64_t best[ROWS], kept[4], expected_kept[4] = {0};
    for (int t = 0; t < TOKENS; t++) {
        int64_t tokens[ROWS] = {bits() % VOCABULARY, bits() % VOCABULARY}, positions[ROWS] = {t, t % 7};
        int64_t wrong[ROWS] = {tokens[0], t % 2 ? VOCABULARY : -1}, same[ROWS] = {t, t};
        const int32_t one[ROWS] = {0, 0}, beyond[ROWS] = {0, ROWS}, *sequences = t % 3 == 2 ? one : NULL;
        if (sequences) positions[1] = t + 1; /* of one sequence: this one is overwritten by the next step */
        if (teal_session_step(session, wrong, positions, NULL, NULL, logits, best) != 1) fail(variant, "a wrong token's answer", 0, 1);
        if (teal_session_step(session, tokens, same, NULL, one, logits, best) != 1) fail(variant, "one place's answer", 0, 1);
        if (teal_session_step(session, tokens, positions, NULL, beyond, logits, best) != 1) fail(variant, "a wrong sequence's answer", 0, 1);
        if (teal_session_step(session, tokens, positions, NULL, sequences, logits, best)) fail(variant, "a step's answer", 1, 0);
        for (int row = 0; row < ROWS; row++) {
            double x[HIDDEN], normed[HIDDEN], expected[VOCABULARY];
            const float *found = logits + row * VOCABULARY;
            for (int i = 0; i < HIDDEN; i++) x[i] = 1.5 * embedding.values[i * VOCABULARY + tokens[row]];
            normalise(&first, x, x);
            for (int i = 0; i < 2; i++) run_block(&blocks[i], sequences ? sequences[row] : row, (int)positions[row], x, expected_kept);
            normalise(&last, x, normed);
            apply(&output, normed, expected, NULL);
            for (int o = 0; o < VOCABULARY; o++) expected[o] = 2 * tanh(0.6f * expected[o] / 2);
            for (int o = 0; o < VOCABULARY; o++) {
                /* Logits are around 2; through two blocks of float32 errors of 1e-7 grow about a hundredfold. */
                if (!(fabs((double)found[o] - expected[o]) <= 5e-5)) fail(variant, "a logit", found[o], expected[o]);
                if (found[o] > found[best[row]]) fail(variant, "the largest logit", found[best[row]], found[o]);
            }
        }
    }
    teal_session_kept(session, kept);
    for (int i = 0; i < 4; i++)
        if (kept[i] != expected_kept[i]) fail(variant, "a number of inputs kept", (double)kept[i], (double)expected_kept[i]);
    teal_session_close(session);
    release();
}

enum { EXPERTS = 5, NEURONS = 40, SHARED = 20, MIXED_TOKENS = 3, MOST_ROWS = 8 };

/* A block of experts and one that is every token's. */
typedef struct {
    matrix router, gate_up, down, shared_gate, shared_up, shared_down, scale;
    teal_norm norm;
    teal_route route;
    int clamped; /* gate and up beside one another, as gpt-oss has them */
} mixture;

/* y of one of many experts. */
static int64_t apply_expert(const matrix *all, int expert, const double *x, double *y) {
    matrix one = *all;
    one.weight.inputs /= EXPERTS;
    one.values += (int64_t)expert * one.weight.inputs * one.weight.outputs;
    if (one.weight.bias) one.weight.bias += expert * one.weight.outputs;
    return apply(&one, x, y, NULL);
}

static double silu(double x) { return x / (1 + exp(-x)); }
static double clamped_swiglu(double gate, double up) {
    gate = gate > 0.75 ? 0.75 : gate;
    up = up > 0.75 ? 0.75 : up < -0.75 ? -0.75 : up;
    return (up + 1) * gate / (1 + exp(-1.5 * gate));
}

/* Experts and their weights, in the order in which they are chosen. */
static void choose(const teal_route *route, const double *outputs, int *taken, double *shares) {
    double left[EXPERTS], total = 0;
    memcpy(left, outputs, sizeof left);
    for (int k = 0; k < route->top_k; k++) {
        int best = 0;
        for (int e = 1; e < EXPERTS; e++) best = left[e] > left[best] ? e : best;
        taken[k] = best, shares[k] = exp(outputs[best]);
        double near = 0;
        for (int e = 0; e < EXPERTS; e++) {
            double size = fabs(outputs[e]) > outputs[best] ? fabs(outputs[e]) : outputs[best];
            if (left[e] > -INFINITY && (outputs[best] - left[e]) / size <= 2 * (double)route->jitter) near += exp(left[e]);
        }
        if (route->scores == TEAL_SPARSEMIXER) shares[k] /= near;
        left[best] = -INFINITY;
        if (route->normalised) total += exp(outputs[best]);
    }
    for (int e = 0; e < EXPERTS && !route->normalised; e++) total += exp(outputs[e]);
    for (int k = 0; k < route->top_k && route->scores == TEAL_SOFTMAX; k++) shares[k] /= total;
}

static void run_mixture(const mixture *b, double *x, int64_t *kept) {
    double normed[HIDDEN], outputs[EXPERTS], shares[EXPERTS], both[2 * NEURONS], made[NEURONS], up[SHARED], gate[SHARED];
    double added[HIDDEN], scale[1];
    int taken[EXPERTS];
    normalise(&b->norm, x, normed);
    apply(&b->router, normed, outputs, NULL);
    choose(&b->route, outputs, taken, shares);
    for (int k = 0; k < b->route.top_k; k++) {
        kept[0] += apply_expert(&b->gate_up, taken[k], normed, both);
        for (int i = 0; i < NEURONS; i++)
            made[i] = b->clamped ? clamped_swiglu(both[2 * i], both[2 * i + 1]) : silu(both[i]) * both[NEURONS + i];
        kept[1] += apply_expert(&b->down, taken[k], made, added);
        for (int i = 0; i < HIDDEN; i++) x[i] += shares[k] * added[i];
    }
    apply(&b->shared_gate, normed, gate, NULL), apply(&b->shared_up, normed, up, NULL);
    for (int i = 0; i < SHARED; i++) gate[i] = silu(gate[i]) * up[i];
    apply(&b->shared_down, gate, added, NULL), apply(&b->scale, normed, scale, NULL);
    for (int i = 0; i < HIDDEN; i++) x[i] += added[i] / (1 + exp(-scale[0]));
}

/* One of each dtype and number of rows; the choice is made in another way in each. */
static void check_mixture(const char *variant, teal_pool *pool, int dtype, int rows) {
    const int way = (dtype + rows) % 3;
    mixture b = {.router = make(HIDDEN, EXPERTS, dtype % 3, TEAL_ROW_MAJOR, 1, -INFINITY),
                 .gate_up = make_many(EXPERTS * HIDDEN, 2 * NEURONS, dtype, TEAL_INPUT_MAJOR, 16, 0.2f, HIDDEN),
                 .down = make_many(EXPERTS * NEURONS, HIDDEN, dtype, TEAL_INPUT_MAJOR, rows % 2 ? 8 : 32, 0.1f, NEURONS),
                 .shared_gate = make(HIDDEN, SHARED, TEAL_F32, TEAL_INPUT_MAJOR, 1, 0.2f),
                 .shared_up = make(HIDDEN, SHARED, TEAL_F32, TEAL_INPUT_MAJOR, 1, 0.2f),
                 .shared_down = make(SHARED, HIDDEN, TEAL_F32, TEAL_INPUT_MAJOR, 1, -INFINITY),
                 .scale = make(HIDDEN, 1, TEAL_F32, TEAL_ROW_MAJOR, 1, -INFINITY),
                 .norm = norm_of(TEAL_RMS_NORM), .clamped = way == 0};
    if (way == 0) b.gate_up.weight.bias = random_floats(EXPERTS * 2 * NEURONS), b.down.weight.bias = random_floats(EXPERTS * HIDDEN);
    b.router.weight.bias = way == 1 ? random_floats(EXPERTS) : NULL;
    b.route = (teal_route){.router = &b.router.weight, .top_k = way == 2 ? 2 : 1 + rows % 3, .normalised = way == 1,
                           .scores = way == 2 ? TEAL_SPARSEMIXER : TEAL_SOFTMAX, .jitter = 0.3f};
    b.gate_up.weight.counter = 0, b.down.weight.counter = 1;
    teal_product p[4] = {
        {.parts = {b.gate_up.weight}, .n_parts = 1, .epilogue = TEAL_GATED, .activation_threshold = 0.75f, .curve = {1.5f},
         .activation = b.clamped ? TEAL_CLAMPED_SWIGLU : TEAL_SILU, .experts = EXPERTS, .interleaved = b.clamped},
        {.parts = {b.down.weight}, .n_parts = 1, .epilogue = TEAL_RESIDUAL, .experts = EXPERTS},
        {.parts = {b.shared_gate.weight, b.shared_up.weight}, .n_parts = 2, .epilogue = TEAL_GATED},
        {.parts = {b.shared_down.weight}, .n_parts = 1, .epilogue = TEAL_RESIDUAL, .scaled_by = &b.scale.weight}};
    teal_step steps[12];
    int n = 0;
    for (int times = 0; times < 2; times++) { /* the same block twice */
        steps[n++] = (teal_step){&b.norm, TEAL_STEP_NORM, 0}, steps[n++] = (teal_step){&b.route, TEAL_STEP_ROUTE, 0};
        for (int i = 0; i < 4; i++) steps[n++] = (teal_step){&p[i], TEAL_STEP_PRODUCT, 0};
    }
    matrix embedding = make(HIDDEN, VOCABULARY, TEAL_F32, TEAL_ROW_MAJOR, 1, -INFINITY);
    teal_norm last = norm_of(TEAL_RMS_NORM);
    teal_product layer = {.parts = {embedding.weight}, .n_parts = 1, .epilogue = TEAL_PLAIN};
    teal_program program = {.steps = steps, .embedding = &embedding.weight, .norm = &last, .output = &layer,
                            .n_steps = n, .hidden = HIDDEN, .counters = 2, .embedding_scale = 1, .logits_scale = 1};
    char error[200] = "";
    teal_session *session = teal_session_open(&program, pool, rows, variant, error, sizeof error);
    if (!session) fprintf(stderr, "%s\n", error), exit(1);
    int64_t tokens[MOST_ROWS], positions[MOST_ROWS] = {0}, best[MOST_ROWS], kept[2], expected_kept[2] = {0};
    float *logits = floats(rows * VOCABULARY);
    for (int t = 0; t < MIXED_TOKENS; t++) {
        for (int row = 0; row < rows; row++) tokens[row] = bits() % VOCABULARY;
        if (teal_session_step(session, tokens, positions, NULL, NULL, logits, best)) fail(variant, "a step's answer", 1, 0);
        for (int row = 0; row < rows; row++) {
            double x[HIDDEN], normed[HIDDEN], expected[VOCABULARY], size = 1;
            for (int i = 0; i < HIDDEN; i++) x[i] = embedding.values[i * VOCABULARY + tokens[row]];
            for (int times = 0; times < 2; times++) run_mixture(&b, x, expected_kept);
            normalise(&last, x, normed);
            apply(&embedding, normed, expected, NULL);
            for (int o = 0; o < VOCABULARY; o++) size = fabs(expected[o]) > size ? fabs(expected[o]) : size;
            for (int o = 0; o < VOCABULARY; o++) {
                /* Of one row, inputs of 4-bit codes are rounded to 16 bits. */
                const double limit = dtype == TEAL_INT4 ? 5e-4 : 2e-5;
                const double found = logits[row * VOCABULARY + o];
                if (!(fabs(found - expected[o]) <= limit * size)) fail(variant, "a logit of experts", found, expected[o]);
            }
        }
    }
    teal_session_kept(session, kept);
    for (int i = 0; i < 2 && dtype != TEAL_INT4; i++) /* what is rounded may fall on the other side of a threshold */
        if (kept[i] != expected_kept[i])
            fail(variant, "a number of inputs kept by experts", (double)kept[i], (double)expected_kept[i]);
    teal_session_close(session);
    release();
}

static void check_mixtures(const char *variant, teal_pool *pool) {
    static const int row_counts[] = {1, 2, 3, 5, 8};
    for (int dtype = TEAL_F32; dtype <= TEAL_INT4; dtype++)
        for (int i = 0; i < 5; i++) check_mixture(variant, pool, dtype, row_counts[i]);
}

enum { RANK = 12 };

/* A routed MLP, whose router has one layer or two. */
typedef struct {
    matrix first, logits, gate, up, down;
    teal_norm norm;
    teal_router router;
} routed;

static void run_routed(const routed *b, double *x, int64_t *kept) {
    double normed[HIDDEN], ranked[RANK], logits[NEURONS], gate[NEURONS], up[NEURONS], added[HIDDEN];
    const double *seen = normed;
    normalise(&b->norm, x, normed);
    if (b->router.first) {
        apply(&b->first, normed, ranked, NULL);
        for (int i = 0; i < RANK; i++) ranked[i] = ranked[i] > 0 ? ranked[i] : 0;
        seen = ranked;
    }
    apply(&b->logits, seen, logits, NULL);
    apply(&b->gate, normed, gate, NULL), apply(&b->up, normed, up, NULL);
    for (int i = 0; i < NEURONS; i++) {
        const int chosen = logits[i / b->router.group] > 0;
        gate[i] = chosen ? silu(gate[i]) * up[i] : 0;
        kept[0] += chosen, kept[1] += chosen;
    }
    kept[2] += apply(&b->down, gate, added, NULL);
    for (int i = 0; i < HIDDEN; i++) x[i] += added[i];
}

/* Of each dtype of down; groups, layers of the router and whether all is computed change with it and with the rows. */
static void check_routed(const char *variant, teal_pool *pool, int dtype, int rows) {
    const int floats_of = (dtype + rows) % 3, group = rows % 2 ? 4 : rows == 2 ? 1 : 20, blocks = dtype == TEAL_INT4 ? 1 : 2;
    const int layers = 1 + (dtype + rows / 2) % 2;
    routed b = {.first = make(HIDDEN, RANK, floats_of, TEAL_ROW_MAJOR, 1, -INFINITY),
                .logits = make(layers == 2 ? RANK : HIDDEN, NEURONS / group, floats_of, TEAL_ROW_MAJOR, 1, -INFINITY),
                .gate = make(HIDDEN, NEURONS, floats_of, TEAL_ROW_MAJOR, 1, -INFINITY),
                .up = make(HIDDEN, NEURONS, floats_of, TEAL_ROW_MAJOR, 1, -INFINITY),
                .down = make(NEURONS, HIDDEN, dtype, TEAL_INPUT_MAJOR, 8, 0), .norm = norm_of(TEAL_RMS_NORM)};
    b.logits.weight.bias = random_floats(NEURONS / group);
    if (dtype == TEAL_BF16) b.gate.weight.bias = random_floats(NEURONS), b.up.weight.bias = random_floats(NEURONS);
    b.router = (teal_router){.first = layers == 2 ? &b.first.weight : NULL, .logits = &b.logits.weight, .group = group,
                             .whole = rows == 3};
    b.gate.weight.counter = 0, b.up.weight.counter = 1, b.down.weight.counter = 2;
    teal_product p[2] = {{.parts = {b.gate.weight, b.up.weight}, .n_parts = 2, .epilogue = TEAL_ROUTED, .router = &b.router},
                         {.parts = {b.down.weight}, .n_parts = 1, .epilogue = TEAL_RESIDUAL}};
    teal_step steps[6];
    for (int times = 0; times < blocks; times++) {
        steps[3 * times] = (teal_step){&b.norm, TEAL_STEP_NORM, 0};
        for (int i = 0; i < 2; i++) steps[3 * times + 1 + i] = (teal_step){&p[i], TEAL_STEP_PRODUCT, 0};
    }
    matrix embedding = make(HIDDEN, VOCABULARY, TEAL_F32, TEAL_ROW_MAJOR, 1, -INFINITY);
    teal_norm last = norm_of(TEAL_RMS_NORM);
    teal_product layer = {.parts = {embedding.weight}, .n_parts = 1, .epilogue = TEAL_PLAIN};
    teal_program program = {.steps = steps, .embedding = &embedding.weight, .norm = &last, .output = &layer,
                            .n_steps = 3 * blocks, .hidden = HIDDEN, .counters = 3, .embedding_scale = 1, .logits_scale = 1};
    char error[200] = "";
    teal_session *session = teal_session_open(&program, pool, rows, variant, error, sizeof error);
    if (!session) fprintf(stderr, "%s\n", error), exit(1);
    int64_t tokens[MOST_ROWS], positions[MOST_ROWS] = {0}, best[MOST_ROWS], kept[3], expected_kept[3] = {0};
    float *logits = floats(rows * VOCABULARY);
    for (int t = 0; t < MIXED_TOKENS; t++) {
        for (int row = 0; row < rows; row++) tokens[row] = bits() % VOCABULARY;
        if (teal_session_step(session, tokens, positions, NULL, NULL, logits, best)) fail(variant, "a step's answer", 1, 0);
        for (int row = 0; row < rows; row++) {
            double x[HIDDEN], normed[HIDDEN], expected[VOCABULARY], size = 1;
            for (int i = 0; i < HIDDEN; i++) x[i] = embedding.values[i * VOCABULARY + tokens[row]];
            for (int times = 0; times < blocks; times++) run_routed(&b, x, expected_kept);
            normalise(&last, x, normed);
            apply(&embedding, normed, expected, NULL);
            for (int o = 0; o < VOCABULARY; o++) size = fabs(expected[o]) > size ? fabs(expected[o]) : size;
            for (int o = 0; o < VOCABULARY; o++) {
                const double limit = dtype == TEAL_INT4 ? 5e-4 : 2e-5; /* as of experts */
                const double found = logits[row * VOCABULARY + o];
                if (!(fabs(found - expected[o]) <= limit * size)) fail(variant, "a routed logit", found, expected[o]);
            }
        }
    }
    teal_session_kept(session, kept);
    for (int i = 0; i < 3; i++)
        if (kept[i] != expected_kept[i])
            fail(variant, "a number of routed neurons kept", (double)kept[i], (double)expected_kept[i]);
    teal_session_close(session);
    release();
}

static void check_all_routed(const char *variant, teal_pool *pool) {
    static const int row_counts[] = {1, 2, 3, 5, 8};
    for (int dtype = TEAL_F32; dtype <= TEAL_INT4; dtype++)
        for (int i = 0; i < 5; i++) check_routed(variant, pool, dtype, row_counts[i]);
}

/* As GOMP_parallel, with a thread fewer than was asked for. */
typedef struct {
    void (*work)(void *);
    void *data;
} call;
static void *called(void *given) {
    call *c = given;
    c->work(c->data);
    return NULL;
}
static void by_threads(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    pthread_t others[8];
    call c = {work, data};
    if (flags || threads > 8) abort();
    for (unsigned t = 2; t < threads; t++)
        if (pthread_create(&others[t], NULL, called, &c)) abort();
    work(data);
    for (unsigned t = 2; t < threads; t++) pthread_join(others[t], NULL);
}

/* Products run on threads of others, and decoders do not. */
static void check_borrowed(const char *variant, int threads) {
    teal_pool *pool = teal_pool_borrow(by_threads, threads);
    char error[100] = "";
    teal_program none = {0};
    if (!pool || teal_pool_borrow(NULL, 1)) fail(variant, "a borrowed pool", 0, 1);
    check_products(variant, pool);
    if (teal_session_open(&none, pool, 1, variant, error, sizeof error) || !strstr(error, "borrowed"))
        fail(variant, "a session on borrowed threads", 1, 0);
    teal_pool_close(pool);
}

int main(void) {
    if (teal_abi() != TEAL_ABI) fail("library", "the interface", teal_abi(), TEAL_ABI);
    char names[100];
    snprintf(names, sizeof names, "%s", teal_variants());
    puts(names);
    for (char *variant = strtok(names, " "); variant; variant = strtok(NULL, " "))
        for (int threads = 1; threads <= 3; threads++) {
            teal_pool *pool = teal_pool_open(threads);
            if (!pool) fail(variant, "a pool", 0, threads);
            check_products(variant, pool);
            check_decoder(variant, pool);
            check_mixtures(variant, pool);
            check_all_routed(variant, pool);
            teal_pool_close(pool);
            check_borrowed(variant, threads);
        }
    return 0;
}
