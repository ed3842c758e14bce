/* One decoding step of a whole model in one call: a token of each row goes in, the next one's logits come out.

   The numbers are those of the modules that step.py takes the weights of: where `half`, what a module would give in bf16 is rounded to bf16
   here too. Threads share the rows of each matrix and the heads of attention, and wait for one another in between. */

#include <math.h>
#include <sched.h>

#include "product.h"

enum { NO_NORM, LAYER_NORM, RMS_NORM };
enum { GELU_TANH, GELU_ERF, RELU2, SILU };

typedef struct {
    const void *gain, *bias; /* or null */
    long kind;
    double eps;
} norm;

typedef struct {
    norm before_attention, before_ffn;
    linear qkv, out, up, down;
    void *keys, *values; /* (b, kv_heads, room, head_width) */
    long room, size;     /* the cache has memory for `room` tokens and holds up to `size`, the newest in the oldest's place */
} layer;

typedef struct {
    long half, width, heads, kv_heads, head_width, hidden, depth, vocabulary, qk_norm, activation, gated;
    double scale, soft_cap, multiple; /* soft_cap: 0 where there is none */
    const void *embedding, *table;    /* (v, width), and (positions, width) or null */
    const float *cos, *sin;           /* (positions, head_width), or null */
    norm last;
    linear head;
    layer *layers;
} model;

typedef struct { /* two numbers on lines of their own, since every thread watches the second */
    _Alignas(64) long arrived;
    _Alignas(64) long turn;
} barrier;

static void wait_for_all(barrier *here, long threads) {
    if (threads == 1) return;
    const long turn = __atomic_load_n(&here->turn, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&here->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&here->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&here->turn, turn + 1, __ATOMIC_RELEASE);
        return;
    }
    for (long spins = 0; __atomic_load_n(&here->turn, __ATOMIC_ACQUIRE) == turn; spins++) {
        if (spins > 500) sched_yield(); /* the other may be waiting for this very core */
#ifdef __x86_64__
        else __builtin_ia32_pause();
#endif
    }
}

static inline float number(const void *from, long at, long half) {
    return half ? widened(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

static inline floats picked(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }

static inline floats exponential(floats x) { /* 2^n · e^r, |r| <= ln 2 / 2; its error is below 2 in the last place */
    const floats low = {}, most = low + 88, least = low - 87;
    x = picked(x > most, most, x);
    x = picked(x < least, least, x);
    const floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f, p = p * r + 1.6666665459e-1f, p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * (floats)((__builtin_convertvector(n, ints) + 127) << 23);
}

static float sum(const float *x, long n, float less, int squared) {
    floats sums = {}, v;
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        memcpy(&v, x + i, 64);
        v -= less;
        sums += squared ? v * v : v;
    }
    float all = total(sums);
    for (; i < n; i++) all += squared ? (x[i] - less) * (x[i] - less) : x[i] - less;
    return all;
}

static float greatest(const float *x, long n) {
    floats most = (floats){} + x[0], v;
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        memcpy(&v, x + i, 64);
        most = picked(v > most, v, most);
    }
    float all = most[0];
    for (int lane = 1; lane < LANES; lane++) all = most[lane] > all ? most[lane] : all;
    for (; i < n; i++) all = x[i] > all ? x[i] : all;
    return all;
}

static void normalise(float *out, const float *x, long n, const norm *by, int half) {
    if (by->kind == NO_NORM) {
        memcpy(out, x, n * sizeof(float));
    } else if (by->kind == LAYER_NORM) {
        const float mean = sum(x, n, 0, 0) / n, factor = 1 / sqrtf(sum(x, n, mean, 1) / n + (float)by->eps);
        for (long i = 0; i < n; i++) {
            const float value = (x[i] - mean) * factor * (by->gain ? number(by->gain, i, half) : 1);
            out[i] = kept(by->bias ? value + number(by->bias, i, half) : value, half);
        }
    } else {
        const float factor = kept(1 / sqrtf(sum(x, n, 0, 1) / n + (float)by->eps), half);
        for (long i = 0; i < n; i++) out[i] = kept(x[i] * factor, half);
        if (by->gain)
            for (long i = 0; i < n; i++) out[i] = kept(out[i] * number(by->gain, i, half), half);
    }
}

/* A head of queries or keys, as the scores see it at its place. */
static void turned(const model *m, float *out, const float *x, long place) {
    const long k = m->head_width;
    const norm rms = {0, 0, RMS_NORM, 1e-6};
    float plain[k];
    memcpy(plain, x, k * sizeof(float));
    if (m->qk_norm) normalise(plain, x, k, &rms, m->half);
    memcpy(out, plain, k * sizeof(float));
    if (!m->cos) return;
    for (long i = 0; i < k; i++) {
        const float cos = kept(m->cos[place * k + i], m->half), sin = kept(m->sin[place * k + i], m->half);
        out[i] = kept(kept(plain[i] * cos, m->half) + plain[(i + k / 2) % k] * sin, m->half);
    }
}

/* Of ROWS keys from the j-th on the products with the query, which is as `spread` leaves it. */
#define WEIGH(NAME, NUMBER, PARTS, ROWS)                                                                                              \
    static inline void NAME(const float *q, const char *keys, float *scores, long j, long k) {                                        \
        const long per = LANES * PARTS, whole = k / per * per, bytes = k * 4 / PARTS;                                                 \
        floats sums[ROWS] = {}, vector;                                                                                               \
        float found[ROWS];                                                                                                            \
        for (long at = 0; at < whole; at += per) {                                                                                    \
            ints words[ROWS];                                                                                                         \
            ALL for (int r = 0; r < ROWS; r++) {                                                                                      \
                memcpy(&words[r], keys + (j + r) * bytes + at * 4 / PARTS, 64);                                                       \
                __builtin_prefetch(keys + (j + r) * bytes + at * 4 / PARTS + AHEAD);                                                  \
            }                                                                                                                         \
            ALL for (int part = 0; part < PARTS; part++) {                                                                            \
                memcpy(&vector, q + at + part * LANES, 64);                                                                           \
                ALL for (int r = 0; r < ROWS; r++) sums[r] += NUMBER(words[r], part) * vector;                                        \
            }                                                                                                                         \
        }                                                                                                                             \
        ALL for (int r = 0; r < ROWS; r++) found[r] = total(sums[r]);                                                                 \
        for (int r = 0; whole < k && r < ROWS; r++)                                                                                   \
            for (long at = whole; at < k; at++) found[r] += q[at] * rest_##PARTS(keys, (j + r) * k + at);                             \
        memcpy(scores + j, found, sizeof found);                                                                                      \
    }
WEIGH(weigh_fp32, OF_FP32, 1, 1)
WEIGH(weigh_bf16, OF_BF16, 2, 1)
WEIGH(weigh_fp32_8, OF_FP32, 1, 8)
WEIGH(weigh_bf16_8, OF_BF16, 2, 8)

/* The values' weighted sum, in the order of `spread`; VECTORS registers of words of each at a time. */
#define GATHER(NAME, NUMBER, PARTS, VECTORS)                                                                                          \
    static inline long NAME(float *z, const char *values, const float *weights, long held, long k, long at) {                         \
        const long per = LANES * PARTS * VECTORS, bytes = k * 4 / PARTS;                                                              \
        for (; at + per <= k; at += per) {                                                                                            \
            floats sums[VECTORS * PARTS] = {};                                                                                        \
            for (long j = 0; j < held; j++) {                                                                                         \
                ints words;                                                                                                           \
                ALL for (int i = 0; i < VECTORS; i++) {                                                                               \
                    memcpy(&words, values + j * bytes + at * 4 / PARTS + 64 * i, 64);                                                 \
                    __builtin_prefetch(values + j * bytes + at * 4 / PARTS + 64 * i + AHEAD);                                         \
                    ALL for (int part = 0; part < PARTS; part++) sums[i * PARTS + part] += weights[j] * NUMBER(words, part);          \
                }                                                                                                                     \
            }                                                                                                                         \
            memcpy(z + at, sums, sizeof sums);                                                                                        \
        }                                                                                                                             \
        return at;                                                                                                                    \
    }
GATHER(gather_fp32, OF_FP32, 1, 1)
GATHER(gather_bf16, OF_BF16, 2, 1)
GATHER(gather_fp32_4, OF_FP32, 1, 4)
GATHER(gather_bf16_2, OF_BF16, 2, 2)

static void weigh(const float *q, const char *keys, float *scores, long held, long k, long half) {
    long j = 0;
    for (; j + 8 <= held; j += 8) half ? weigh_bf16_8(q, keys, scores, j, k) : weigh_fp32_8(q, keys, scores, j, k);
    for (; j < held; j++) half ? weigh_bf16(q, keys, scores, j, k) : weigh_fp32(q, keys, scores, j, k);
}

static void gather(float *z, const char *values, const float *weights, long held, long k, long half) {
    long at = half ? gather_bf16_2(z, values, weights, held, k, 0) : gather_fp32_4(z, values, weights, held, k, 0);
    at = half ? gather_bf16(z, values, weights, held, k, at) : gather_fp32(z, values, weights, held, k, at);
    for (; at < k; at++) {
        z[at] = 0;
        for (long j = 0; j < held; j++) z[at] += weights[j] * number(values, j * k + at, half);
    }
}

/* One head of one row. Every head of a group makes its newest key anew, and its first one stores it: so none waits for another. `qkv` and
   `z` are the row's, `work` has room for four heads and for a score of each token held and LANES more. */
static void attend(const model *m, const layer *at, const float *qkv, float *z, long row, long head, long length, float *work) {
    const long k = m->head_width, group = head / (m->heads / m->kv_heads), half = m->half, bytes = half ? 2 : 4, parts = half ? BF16 : FP32;
    const long slot = length % at->size, held = length + 1 < at->size ? length + 1 : at->size, from = (row * m->kv_heads + group) * at->room * k;
    const long per = LANES * parts, whole = k / per * per;
    char *keys = (char *)at->keys + from * bytes, *values = (char *)at->values + from * bytes;
    float *q = work, *key = q + k, *ordered = key + k, *mixed = ordered + k, *scores = mixed + k;
    const float *value = qkv + (m->heads + m->kv_heads + group) * k;
    turned(m, q, qkv + head * k, length);
    turned(m, key, qkv + (m->heads + group) * k, length);
    spread(ordered, q, 1, k, parts);
    weigh(ordered, keys, scores, held, k, half);
    weigh_fp32(q, (const char *)key, scores + slot, 0, k);
    const float most = greatest(scores, held);
    for (long j = 0; j < held; j += LANES) {
        floats v;
        memcpy(&v, scores + j, 64);
        v = exponential((v - most) * (float)m->scale);
        memcpy(scores + j, &v, 64);
    }
    const float all = sum(scores, held, 0, 0), newest = scores[slot];
    scores[slot] = 0; /* what lies there is older than the window, or being written */
    gather(mixed, values, scores, held, k, half);
    for (long i = 0; i < k; i++) {
        const long place = i < whole ? i / per * per + i % parts * LANES + i % per / parts : i; /* where `spread` puts it */
        z[i] = kept((mixed[place] + newest * value[i]) / all, half);
    }
    if (head % (m->heads / m->kv_heads)) return;
    for (long i = 0; i < k; i++) {
        if (half) ((uint16_t *)keys)[slot * k + i] = rounded(key[i]), ((uint16_t *)values)[slot * k + i] = rounded(value[i]);
        else ((float *)keys)[slot * k + i] = key[i], ((float *)values)[slot * k + i] = value[i];
    }
}

/* Hidden units of what the first product made of them, and of their gates where there are `gates`. */
static void activate(const model *m, float *out, const float *up, const float *beside, long n) {
    for (long at = 0; at < n; at += LANES) {
        const long count = n - at < LANES ? n - at : LANES;
        floats x = {}, made = {};
        memcpy(&x, up + at, count * sizeof(float));
        if (m->activation == GELU_TANH) made = x / (1 + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
        if (m->activation == SILU) made = x / (1 + exponential(-x));
        if (m->activation == RELU2) made = picked(x > 0, x * x, x * 0);
        if (m->activation == GELU_ERF) for (int i = 0; i < LANES; i++) made[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678f));
        for (long i = 0; i < count; i++) out[at + i] = kept(made[i], m->half);
        if (beside) for (long i = 0; i < count; i++) out[at + i] = kept(out[at + i] * beside[at + i], m->half);
    }
}

static long longest(const model *m) { /* the most numbers that any product takes, beyond a row's own where an int8 matrix is padded */
    long most = m->head.k;
    for (const layer *l = m->layers; l < m->layers + m->depth; l++) {
        const long found[] = {l->qkv.k, l->out.k, l->up.k, l->down.k};
        for (int i = 0; i < 4; i++) most = found[i] > most ? found[i] : most;
    }
    return (most + LANES - 1) / LANES * LANES;
}

static long shared_work(const model *m, long b) {
    const long qkv = (m->heads + 2 * m->kv_heads) * m->head_width, z = m->heads * m->head_width, up = (1 + m->gated) * m->hidden;
    return (b * (m->width + qkv + z + up + m->hidden) + LANES - 1) / LANES * LANES;
}

static long own_work(const model *m, long b, long tokens) {
    return (2 * b + wide(b)) * longest(m) + (4 * m->head_width + tokens + 2 * LANES) / LANES * LANES;
}

/* How many floats `step` needs to work with, where the longest row has so many tokens after it. */
long step_work(const model *m, long b, long tokens, long threads) { return shared_work(m, b) + threads * own_work(m, b, tokens); }

typedef struct {
    const model *m;
    long b, thread, threads;
    float *plain, *vectors; /* this thread's own */
} worker;

/* This thread's rows of a product of the vectors, (b, n) in `worker.plain` at `by.k` from one another; then of what comes next the beginning. */
static void multiply_own(const worker *w, const linear *by, long from, long rows, float *y, int form, const linear *next) {
    const long first = rows * w->thread / w->threads, end = rows * (w->thread + 1) / w->threads;
    const product of = {by, w->vectors, y, w->b, by == &w->m->head ? w->m->vocabulary : by->n, form, w->m->half};
    multiply_rows(&of, from + first, from + end);
    if (next) ask_ahead(next, w->b, next->n * w->thread / w->threads, next->n * (w->thread + 1) / w->threads);
}

/* Vectors (b, n), normalised where there is a norm, as the product takes them. */
static void take(const worker *w, const float *x, long n, const norm *by, const linear *into) {
    for (long j = 0; j < w->b; j++) {
        float *plain = w->plain + j * into->k;
        if (by) normalise(plain, x + j * n, n, by, w->m->half);
        else memcpy(plain, x + j * n, n * sizeof(float));
        memset(plain + n, 0, (into->k - n) * sizeof(float));
    }
    spread(w->vectors, w->plain, w->b, into->k, into->parts);
}

/* `tokens` and `lengths` (b): each row's newest token, and how many the cache holds before it. `logits` (b, vocabulary). */
void step(const model *m, const long *tokens, const long *lengths, long b, float *logits, float *work, long most, long asked) {
    const long width = m->width, k = m->head_width, heads = m->heads, qkv_n = (heads + 2 * m->kv_heads) * k, hidden = m->hidden;
    const long up_n = (1 + m->gated) * hidden, shared = shared_work(m, b), own = own_work(m, b, most), half = m->half;
    float *x = work, *qkv = x + b * width, *z = qkv + b * qkv_n, *up = z + b * heads * k, *units = up + b * up_n;
    barrier here = {0, 0};
    #pragma omp parallel num_threads(asked)
    {
        const long thread = omp_get_thread_num(), threads = omp_get_num_threads(); /* it may be fewer than were asked for */
        float *plain = work + shared + thread * own, *vectors = plain + b * longest(m), *scores = vectors + (b + wide(b)) * longest(m);
        const worker w = {m, b, thread, threads, plain, vectors};
        for (long at = b * width * thread / threads; at < b * width * (thread + 1) / threads; at++) {
            const long row = at / width, i = at % width;
            x[at] = number(m->embedding, tokens[row] * width + i, half);
            if (m->table) x[at] = kept(x[at] + number(m->table, lengths[row] * width + i, half), half);
        }
        wait_for_all(&here, threads);
        for (const layer *l = m->layers; l < m->layers + m->depth; l++) {
            take(&w, x, width, &l->before_attention, &l->qkv);
            multiply_own(&w, &l->qkv, 0, qkv_n, qkv, STORED, &l->out);
            wait_for_all(&here, threads);
            for (long task = b * heads * thread / threads; task < b * heads * (thread + 1) / threads; task++) {
                const long row = task / heads, head = task % heads;
                attend(m, l, qkv + row * qkv_n, z + task * k, row, head, lengths[row], scores);
            }
            wait_for_all(&here, threads);
            take(&w, z, heads * k, 0, &l->out);
            multiply_own(&w, &l->out, 0, width, x, ADDED, &l->up);
            wait_for_all(&here, threads);
            take(&w, x, width, &l->before_ffn, &l->up);
            if (m->gated) multiply_own(&w, &l->up, hidden, hidden, up, STORED, 0);
            multiply_own(&w, &l->up, 0, hidden, up, STORED, &l->down);
            const long first = hidden * thread / threads, end = hidden * (thread + 1) / threads;
            for (long j = 0; j < b; j++)
                activate(m, units + j * hidden + first, up + j * up_n + first, m->gated ? up + j * up_n + hidden + first : 0, end - first);
            wait_for_all(&here, threads);
            take(&w, units, hidden, 0, &l->down);
            multiply_own(&w, &l->down, 0, width, x, ADDED, l + 1 < m->layers + m->depth ? &l[1].qkv : &m->head);
            wait_for_all(&here, threads);
        }
        take(&w, x, width, &m->last, &m->head);
        if (m->multiple != 1) {
            for (long at = 0; at < b * m->head.k; at++) plain[at] = kept(plain[at] / (float)m->multiple, half);
            spread(vectors, plain, b, m->head.k, m->head.parts);
        }
        multiply_own(&w, &m->head, 0, m->vocabulary, logits, STORED, 0);
        if (m->soft_cap)
            for (long j = 0; j < b; j++)
                for (long i = m->vocabulary * thread / threads; i < m->vocabulary * (thread + 1) / threads; i++) {
                    float *logit = logits + j * m->vocabulary + i;
                    *logit = kept((float)m->soft_cap * tanhf(*logit / (float)m->soft_cap), half);
                }
    }
}
