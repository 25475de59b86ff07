/* The interface of the native library: a token of a decoder in one call, on the CPU.
 *
 * Plain data and some functions; what calls it is teal_kernels/native/library.py (ctypes). All memory that a program
 * points to belongs to the caller and must stay while a session is open. Hidden states are float32 throughout.
 */
#ifndef TEAL_NATIVE_H
#define TEAL_NATIVE_H

#include <stdint.h>

#define TEAL_ABI 9 /* raised with every change in this file */
#define TEAL_MAX_ROWS 8
#define TEAL_MAX_PARTS 4
#define TEAL_KEY_BLOCK 16 /* positions whose keys lie side by side */

typedef enum { TEAL_F32, TEAL_BF16, TEAL_F16, TEAL_INT8, TEAL_INT4 } teal_dtype;

typedef enum {
    TEAL_INPUT_MAJOR, /* a row of weights is an input's: what is skipped is not read */
    TEAL_ROW_MAJOR,   /* a row of weights is an output's, as torch.nn.Linear has it; not for codes; nothing is skipped */
} teal_layout;

/* The weights of one projection. */
typedef struct {
    const void *data;
    const void *scales; /* of codes: (groups, outputs) float16 or float32, else NULL */
    const void *zeros;  /* of codes: (groups, outputs) float16; NULL is 2^(bits - 1) everywhere */
    const float *bias;  /* (outputs,) or NULL */
    const float *thresholds; /* (levels,) in place of `threshold`, where each row has a level of its own; or NULL */
    int64_t row_bytes;  /* from one row of weights to the next */
    int64_t scale_stride, zero_stride; /* from one group to the next, in elements */
    int32_t inputs, outputs;
    int32_t dtype;       /* teal_dtype. Codes lie as bytes, those of 4 bits the first output in the low half */
    int32_t layout;      /* teal_layout */
    int32_t scale_dtype; /* TEAL_F16 or TEAL_F32 */
    int32_t group;       /* inputs that share a scale */
    float threshold;     /* inputs with |x| <= threshold are skipped; -infinity skips none, a NaN never is */
    float expected;      /* expected sparsity, from which work is divided among threads */
    int32_t counter;     /* where kept inputs are counted, below teal_program.counters; -1 nowhere */
    int32_t levels;
} teal_weight;

typedef enum { TEAL_RMS_NORM, TEAL_LAYER_NORM, TEAL_NO_NORM } teal_norm_kind;

/* A norm of the residual stream, or of what is added to it. TEAL_NO_NORM: products read the stream as it is. */
typedef struct {
    const float *weight; /* (hidden,), or NULL of TEAL_NO_NORM */
    const float *bias;   /* (hidden,) or NULL */
    float eps;
    int32_t kind;  /* teal_norm_kind */
    int32_t aside; /* whether its result is for the products that say so, and the one of the norm before it stays */
} teal_norm;

typedef enum {
    TEAL_PLAIN,      /* parts side by side, for attention */
    TEAL_GATED,      /* activation(first part) * second part */
    TEAL_ACTIVATED,  /* activation(the one part) */
    TEAL_GATE_FIRST, /* as gated; the second part, TEAL_ROW_MAJOR, is read where the gate lives only */
    TEAL_RESIDUAL,   /* the one part is added to the residual stream */
    TEAL_ROUTED,     /* as gated; both parts, TEAL_ROW_MAJOR, are read for the groups of neurons that a router chose only */
} teal_epilogue;

typedef enum {
    TEAL_SILU,
    TEAL_GELU,      /* by erf */
    TEAL_GELU_TANH,
    TEAL_RELU,
    TEAL_RELU2,   /* max(g, 0) squared */
    TEAL_FATRELU, /* g where g >= activation_threshold, else 0 */
    TEAL_DRELU,   /* max(g, 0), and max(up, 0) in the place of up */
    TEAL_XIELU,   /* by `curve`: positive * g^2 + linear * g, below 0 negative * (e^min(g, -1e-6) - 1 - g) + linear * g */
    TEAL_CLAMPED_SWIGLU, /* min(g, t) * sigmoid(curve[0] * min(g, t)), and up clamped to [-t, t], plus 1; t: threshold */
} teal_activation;

/* What chooses groups of neurons: those whose logit is above 0, and a NaN. It reads what its product reads. */
typedef struct {
    const teal_weight *first;  /* TEAL_ROW_MAJOR (rank, hidden), floats, with ReLU behind it; or NULL */
    const teal_weight *logits; /* TEAL_ROW_MAJOR (groups, rank or hidden), floats */
    int32_t group; /* neurons of each */
    int32_t whole; /* whether all neurons are computed; those of groups that were left out are zero then too */
} teal_router;

/* Projections that read one hidden state. A plain, gated or activated product reads what the norm before it made of the
 * residual stream, behind a residual product too (attention and MLP in parallel); a residual one reads what attention or
 * the product before it left. */
typedef struct {
    teal_weight parts[TEAL_MAX_PARTS];
    const teal_norm *norm; /* of a residual one: of what it gives, before that is added; or NULL */
    const teal_norm *input_norm; /* of a residual one: an RMS norm (inputs,) of what it reads; or NULL */
    int32_t n_parts;
    int32_t epilogue;   /* teal_epilogue */
    int32_t activation; /* teal_activation, of gated, activated and gate first */
    float activation_threshold;
    float curve[3]; /* of TEAL_XIELU: positive, negative, linear; of TEAL_CLAMPED_SWIGLU the first */
    float stream_scale; /* of a residual one: what the whole stream is multiplied by afterwards; 0: nothing */
    int32_t aside; /* whether it reads what the norm aside made; not of a residual one */
    /* Of experts how many there are, else 0. The one part has the weights of all, one expert's inputs behind the other's,
     * and so their groups: `inputs` are those of all experts, `bias` is (experts, outputs). Behind a teal_route stand a
     * gated one, whose outputs are gate, then up, and a residual one, which adds the weighted sum of the chosen experts. */
    int32_t experts;
    int32_t interleaved; /* of gated experts: whether up of a neuron stands beside its gate */
    /* Of a residual one: by the sigmoid of this weight's one output, of what the norm before made, its result is
     * multiplied. TEAL_ROW_MAJOR; or NULL. */
    const teal_weight *scaled_by;
    const teal_router *router; /* of TEAL_ROUTED, else NULL */
} teal_product;

typedef enum {
    TEAL_SOFTMAX,     /* the largest outputs; weights are the softmax over all experts */
    TEAL_SPARSEMIXER, /* two, each the largest output of those left; its weight is the softmax over those near to it */
} teal_scores;

/* Which experts a row is sent to, and with which weights; it reads what the norm before it made. */
typedef struct {
    const teal_weight *router; /* TEAL_ROW_MAJOR, floats; an output for each expert */
    int32_t top_k;
    int32_t scores;     /* teal_scores */
    int32_t normalised; /* of TEAL_SOFTMAX: whether the weights of the chosen ones are divided by their sum */
    float jitter;       /* of TEAL_SPARSEMIXER: near is what lies within twice this, relatively */
} teal_route;

/* Where q_norm and k_norm stand: of each head before the rotary embedding or after it, or before it of all heads at once. */
typedef enum { TEAL_HEADS_FIRST, TEAL_HEADS_LAST, TEAL_ALL_HEADS } teal_head_norms;

/* Attention of the new token over the KV cache; it reads a plain product whose parts are q, k and v, side by side. */
typedef struct {
    void *keys;   /* (sequences, kv_heads, positions / TEAL_KEY_BLOCK, dim, TEAL_KEY_BLOCK) */
    void *values; /* (sequences, kv_heads, positions, dim) */
    const float *q_norm, *k_norm; /* (heads, dim), (kv_heads, dim) weights of norms of heads; or NULL */
    const float *v_norm;          /* (kv_heads, dim) weights of norms of values, of norm_kind; or NULL */
    const float *q_bias, *k_bias; /* of the norms of queries and keys, or NULL */
    const float *bias;            /* (heads, positions) added to the scores of keys, for ALiBi; or NULL */
    const float *sinks;           /* (heads,) scores that count in the sum of the exponentials alone; or NULL */
    const float *cos, *sin;       /* (>= positions, rotary) each, twice the angles of all pairs; NULL: no rotary embedding */
    const float *query_scale;     /* (>= positions,) what queries are multiplied with beside `scale`, or NULL */
    int64_t positions;            /* a multiple of TEAL_KEY_BLOCK */
    int32_t sequences;            /* that keys and values have */
    int32_t heads, kv_heads, dim, rotary;
    int32_t dtype;  /* of keys and values: TEAL_F32, TEAL_BF16 or TEAL_F16 */
    int32_t window; /* positions that are seen, the token's own among them; 0 for all */
    int32_t neighbours; /* whether a pair that is rotated lies side by side; else it is in the two halves */
    int32_t norms; /* teal_head_norms */
    int32_t norm_kind; /* of those: TEAL_RMS_NORM, or TEAL_LAYER_NORM of each head before the rotary embedding */
    int32_t keys_as_values; /* whether values are keys as they come from the product, which then has no values */
    int32_t grouped; /* whether the product has each key head's queries, key and value side by side */
    float scale, eps;
    float cap; /* scores become cap * tanh(score / cap); 0: none */
    float clip; /* what queries, keys and values are clamped to before all else; 0: none */
} teal_attention;

typedef enum { TEAL_STEP_NORM, TEAL_STEP_PRODUCT, TEAL_STEP_ATTENTION, TEAL_STEP_ROUTE } teal_step_kind;

typedef struct {
    const void *of; /* a teal_norm, teal_product, teal_attention or teal_route */
    int32_t kind;   /* teal_step_kind */
    int32_t unused;
} teal_step;

/* A decoder. Steps as teal_cli/models/programs.py has them, of all blocks one after the other. */
typedef struct {
    const teal_step *steps;
    const teal_weight *embedding; /* TEAL_ROW_MAJOR (vocabulary, hidden): inputs = hidden, outputs = vocabulary */
    const teal_weight *position_embedding; /* learned, (positions, hidden), or NULL */
    const teal_norm *embedding_norm;       /* of what embeddings are; or NULL */
    const teal_norm *norm;                 /* the last one, or NULL */
    const teal_product *output;            /* one part, plain */
    int64_t position_offset;               /* added to a position before position_embedding is read */
    int32_t n_steps, hidden, counters;
    float embedding_scale, logits_scale;
    float logits_cap; /* logits, when they are scaled, become cap * tanh(logit / cap); 0: none */
} teal_program;

typedef struct teal_pool teal_pool;       /* threads */
typedef struct teal_session teal_session; /* a program with its buffers, on a pool */

/* TEAL_ABI of the library. */
int32_t teal_abi(void);

/* Names of the variants that this processor can run, the fastest first, with spaces between. */
const char *teal_variants(void);

/* Threads that wait for work: `threads` in all, the caller of a step being one of them. NULL: no memory, no threads.
 * While a pool waits it uses no processor time. */
teal_pool *teal_pool_open(int32_t threads);
void teal_pool_close(teal_pool *pool);

/* The threads of another library, for products between calls of that library: threads of our own would wait for
 * processors on which its threads still spin. `parallel` is GOMP_parallel of an OpenMP, which calls `work` on up to
 * `threads` threads and returns when all are done. They may come one after the other: no session runs on such a pool. */
typedef void teal_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
teal_pool *teal_pool_borrow(teal_parallel *parallel, int32_t threads);

/* A session of `rows` sequences. NULL, and why in `error` (of `length` bytes), where the program is not one that can
 * run. A pool runs one step at a time. */
teal_session *teal_session_open(const teal_program *program, teal_pool *pool, int32_t rows, const char *variant,
                                char *error, int64_t length);
void teal_session_close(teal_session *session);

/* One token of every row.
 *
 * tokens, positions: (rows,), the token and where it stands in its sequence; its keys and values go to the cache there.
 * levels: (rows,) which of a weight's `thresholds` is a row's; NULL: the first one of all.
 * sequences: (rows,) which sequence of the cache a row is of; NULL: each of its own, the first of the first. Rows of one
 * sequence stand at different positions. The keys and values of all are written before attention reads them, so that
 * each sees what stands before it and itself: rows that follow one another are tokens that follow one another. A row
 * whose inputs are not skipped gets the bits that it gets alone (of 4-bit weights on x86-64, up to rounding).
 * logits: (rows, vocabulary); NULL: none are computed, and best is left as it is.
 * best: (rows,) where they are largest (the first; a NaN counts as larger than all).
 * Returns 0; 1 where a token, position, level or sequence is out of range or two rows stand at one place, and then
 * nothing was done. */
int32_t teal_session_step(teal_session *session, const int64_t *tokens, const int64_t *positions, const int32_t *levels,
                          const int32_t *sequences, float *logits, int64_t *best);

/* Inputs kept so far, (counters,), summed over rows. Of a gate first `up`, and of routed parts: outputs kept. */
void teal_session_kept(const teal_session *session, int64_t *kept);

/* A product alone: x (rows, inputs) -> y (rows, outputs), with the bias. 0, or 1: refused. */
int32_t teal_linear(teal_pool *pool, const char *variant, const teal_weight *weight, int32_t rows, const float *x,
                    float *y);

#endif
