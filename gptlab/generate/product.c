/* Products of a matrix with few vectors, y = scale * (W x) + bias, for which reading W is all the time they take.

   Sums are fp32. Built and called by native.py; step.c makes a model's whole step of them. */

#include "product.h"

#include <stdlib.h>

#define SMALL (1 << 15) /* bytes of a matrix for which waking another thread takes longer than it saves */

static inline void finish(const product *of, long i, long j, float sum) {
    const linear *by = of->by;
    const long at = j * of->n + i;
    float *y = of->y;
    if (by->scale) sum *= by->scale[i];
    if (by->bias) sum += by->parts == FP32 ? ((const float *)by->bias)[i] : widened(((const uint16_t *)by->bias)[i]);
    if (of->form == STORED_HALF)
        ((uint16_t *)of->y)[at] = rounded(sum);
    else if (of->form == STORED)
        y[at] = kept(sum, of->half);
    else
        y[at] = kept(y[at] + kept(sum, of->half), of->half);
}

/* ROWS rows, `apart` rows from one another, times WIDE vectors. Far-apart rows, since memory is faster the more places it is read at, and
   a place that goes on from row to row is what the CPU's own prefetching foresees. */
#define BLOCK(NAME, NUMBER, PARTS, ROWS, WIDE)                                                                                        \
    static void NAME(const product *of, long row, long apart, long first) {                                                           \
        const long k = of->by->k, per = LANES * PARTS, whole = k / per * per, bytes = k * 4 / PARTS;                                  \
        const char *matrix = of->by->matrix, *from = matrix + row * bytes;                                                            \
        const float *x = of->x + first * k;                                                                                           \
        floats sums[ROWS][WIDE] = {};                                                                                                 \
        for (long at = 0; at < whole; at += per) {                                                                                    \
            ints words[ROWS];                                                                                                         \
            ALL for (int r = 0; r < ROWS; r++) {                                                                                      \
                const char *here = from + r * apart * bytes + at * 4 / PARTS;                                                         \
                memcpy(&words[r], here, 64);                                                                                          \
                __builtin_prefetch(here + AHEAD);                                                                                     \
            }                                                                                                                         \
            ALL for (int part = 0; part < PARTS; part++) {                                                                            \
                floats numbers[ROWS], vector;                                                                                         \
                ALL for (int r = 0; r < ROWS; r++) numbers[r] = NUMBER(words[r], part);                                               \
                ALL for (int j = 0; j < WIDE; j++) {                                                                                  \
                    memcpy(&vector, x + j * k + at + part * LANES, 64);                                                               \
                    ALL for (int r = 0; r < ROWS; r++) sums[r][j] += numbers[r] * vector;                                             \
                }                                                                                                                     \
            }                                                                                                                         \
        }                                                                                                                             \
        float found[ROWS][WIDE];                                                                                                      \
        ALL for (int r = 0; r < ROWS; r++) ALL for (int j = 0; j < WIDE; j++) found[r][j] = total(sums[r][j]);                        \
        for (int r = 0; r < ROWS; r++) for (int j = 0; j < WIDE; j++) {                                                               \
            const long i = row + r * apart;                                                                                           \
            float sum = found[r][j];                                                                                                  \
            for (long at = whole; at < k; at++) sum += rest_##PARTS(matrix, i * k + at) * x[j * k + at];                              \
            if (first + j < of->b) finish(of, i, first + j, sum);                                                                     \
        }                                                                                                                             \
    }

/* As many sums as registers hold beside what they are made of: fewer rows at a time for more vectors. */
#define BLOCKS(KIND, NUMBER, PARTS)                                                                                                   \
    BLOCK(KIND##_1_1, NUMBER, PARTS, 1, 1)                                                                                            \
    BLOCK(KIND##_8_1, NUMBER, PARTS, 8, 1)                                                                                            \
    BLOCK(KIND##_1_2, NUMBER, PARTS, 1, 2)                                                                                            \
    BLOCK(KIND##_8_2, NUMBER, PARTS, 8, 2)                                                                                            \
    BLOCK(KIND##_1_4, NUMBER, PARTS, 1, 4)                                                                                            \
    BLOCK(KIND##_4_4, NUMBER, PARTS, 4, 4)                                                                                            \
    BLOCK(KIND##_1_8, NUMBER, PARTS, 1, 8)                                                                                            \
    BLOCK(KIND##_2_8, NUMBER, PARTS, 2, 8)
BLOCKS(fp32, OF_FP32, 1)
BLOCKS(bf16, OF_BF16, 2)
BLOCKS(int8, OF_INT8, 4)

typedef void block(const product *, long, long, long);
typedef struct {
    int wide, rows;
    block *many, *one;
} shape;
#define SHAPES(KIND)                                                                                                                  \
    {{1, 8, KIND##_8_1, KIND##_1_1}, {2, 8, KIND##_8_2, KIND##_1_2}, {4, 4, KIND##_4_4, KIND##_1_4}, {8, 2, KIND##_2_8, KIND##_1_8}}
static const shape shapes[3][4] = {SHAPES(fp32), SHAPES(bf16), SHAPES(int8)};

static const shape *shape_for(long parts, long b) { return &shapes[parts / 2][b > 4 ? 3 : b > 2 ? 2 : b - 1]; }

long wide(long b) { return shape_for(FP32, b)->wide; }

void multiply_rows(const product *of, long row, long end) {
    const shape *by = shape_for(of->by->parts, of->b);
    const long apart = (end - row) / by->rows, middle = row + apart;
    for (; row < middle; row++)
        for (long first = 0; first < of->b; first += by->wide) by->many(of, row, apart, first);
    for (row += apart * (by->rows - 1); row < end; row++)
        for (long first = 0; first < of->b; first += by->wide) by->one(of, row, 0, first);
}

void ask_ahead(const linear *by, long b, long row, long end) {
    const long rows = shape_for(by->parts, b)->rows, bytes = by->k * 4 / by->parts, apart = (end - row) / rows;
    const long most = bytes * apart < AHEAD ? bytes * apart : AHEAD;
    for (long at = 0; at < most; at += 64)
        for (long r = 0; r < rows; r++) __builtin_prefetch((const char *)by->matrix + (row + r * apart) * bytes + at);
}

void spread(float *out, const float *x, long b, long k, long parts) {
    const long per = LANES * parts, whole = k / per * per, all = (b + wide(b) - 1) / wide(b) * wide(b);
    for (long j = 0; j < b; j++) {
        for (long at = 0; at < whole; at += per)
            for (long part = 0; part < parts; part++)
                for (int i = 0; i < LANES; i++) out[j * k + at + part * LANES + i] = x[j * k + at + i * parts + part];
        memcpy(out + j * k + whole, x + j * k + whole, (k - whole) * sizeof(float));
    }
    memset(out + b * k, 0, (all - b) * k * sizeof(float));
}

/* Of bf16 vectors (b, k), to bf16. Returns 0, or 1 where memory was wanting. */
int multiply(const linear *by, const uint16_t *x, uint16_t *y, long b, int threads) {
    const long all = (b + wide(b) - 1) / wide(b) * wide(b);
    float *plain = aligned_alloc(64, ((b + all) * by->k * sizeof(float) + 63) / 64 * 64);
    if (!plain) return 1;
    float *vectors = plain + b * by->k;
    for (long at = 0; at < b * by->k; at++) plain[at] = widened(x[at]);
    spread(vectors, plain, b, by->k, by->parts);
    const product of = {by, vectors, y, b, by->n, STORED_HALF, 1};
    if (by->n * by->k * 4 / by->parts < SMALL) threads = 1;
    #pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), all = omp_get_num_threads(); /* it may be fewer than were asked for */
        multiply_rows(&of, by->n * thread / all, by->n * (thread + 1) / all);
    }
    free(plain);
    return 0;
}
