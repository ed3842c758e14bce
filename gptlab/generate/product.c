/* Products of a matrix with few vectors, y = scale * (W x) + bias, for which reading W is all the time they take.

   W is (n, k), each row contiguous, of bf16 or of 8-bit numbers with a scale a row; x (b, k), bias (n) and y (b, n) are bf16; sums are
   fp32. Vectors are GNU C's, so that any CPU's compiler makes of them what the CPU has. Built and called by native.py. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Declared here, since omp.h belongs to a compiler's own OpenMP, and these are to be torch's. */
int omp_get_thread_num(void), omp_get_num_threads(void);

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));

#define LANES 16
#define AHEAD 2560      /* bytes: what is asked for so early is there when it is read */
#define SMALL (1 << 15) /* bytes of a matrix for which waking another thread takes longer than it saves */
#define ALL _Pragma("GCC unroll 8")

typedef struct {
    const char *matrix;
    const float *scale, *x; /* x as `spread` leaves it */
    const uint16_t *bias;
    uint16_t *y;
    long b, n, k;
} product;

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t rounded(float value) { /* to the nearest, ties to even, as torch does */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline float total(floats value) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += value[i];
    return sum;
}

/* A word of 32 bits holds PARTS numbers, so a register of words gives PARTS vectors: each word's first number, each word's second, … */
#define OF_BF16(words, part) ((floats)((part) ? (words) & -65536 : (words) << 16))
#define OF_INT8(words, part) __builtin_convertvector((words) << (24 - 8 * (part)) >> 24, floats)

/* ROWS rows, `apart` rows from one another, times WIDE vectors. Far-apart rows, since memory is faster the more places it is read at, and
   a place that goes on from row to row is what the CPU's own prefetching foresees. */
#define BLOCK(NAME, NUMBER, PARTS, ROWS, WIDE)                                                                                        \
    static void NAME(const product *of, long row, long apart, long first) {                                                           \
        const long per = LANES * PARTS, whole = of->k / per * per, bytes = of->k * 4 / PARTS;                                         \
        const char *from = of->matrix + row * bytes;                                                                                  \
        const float *x = of->x + first * of->k;                                                                                       \
        floats sums[ROWS][WIDE] = {};                                                                                                 \
        for (long at = 0; at < whole; at += per) {                                                                                    \
            ints words[ROWS];                                                                                                         \
            ALL for (int r = 0; r < ROWS; r++) {                                                                                      \
                const char *here = from + r * apart * bytes + at * 4 / PARTS;                                                         \
                memcpy(&words[r], here, 64);                                                                                          \
                __builtin_prefetch(here + AHEAD);                                                                                          \
            }                                                                                                                         \
            ALL for (int part = 0; part < PARTS; part++) {                                                                            \
                floats numbers[ROWS], vector;                                                                                         \
                ALL for (int r = 0; r < ROWS; r++) numbers[r] = NUMBER(words[r], part);                                               \
                ALL for (int j = 0; j < WIDE; j++) {                                                                                  \
                    memcpy(&vector, x + j * of->k + at + part * LANES, 64);                                                           \
                    ALL for (int r = 0; r < ROWS; r++) sums[r][j] += numbers[r] * vector;                                             \
                }                                                                                                                     \
            }                                                                                                                         \
        }                                                                                                                             \
        ALL for (int r = 0; r < ROWS; r++) ALL for (int j = 0; j < WIDE; j++) {                                                       \
            const long i = row + r * apart;                                                                                           \
            float sum = total(sums[r][j]);                                                                                            \
            for (long at = whole; at < of->k; at++) sum += rest_##PARTS(of->matrix, i * of->k + at) * x[j * of->k + at];              \
            if (of->scale) sum *= of->scale[i];                                                                                       \
            if (of->bias) sum += widened(of->bias[i]);                                                                                \
            if (first + j < of->b) of->y[(first + j) * of->n + i] = rounded(sum);                                                     \
        }                                                                                                                             \
    }

static inline float rest_2(const char *matrix, long at) { return widened(((const uint16_t *)matrix)[at]); }
static inline float rest_4(const char *matrix, long at) { return ((const int8_t *)matrix)[at]; }

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
BLOCKS(bf16, OF_BF16, 2)
BLOCKS(int8, OF_INT8, 4)

typedef void block(const product *, long, long, long);
typedef struct {
    int wide, rows;
    block *many, *one;
} shape;
static const shape shapes[2][4] = {
    {{1, 8, bf16_8_1, bf16_1_1}, {2, 8, bf16_8_2, bf16_1_2}, {4, 4, bf16_4_4, bf16_1_4}, {8, 2, bf16_2_8, bf16_1_8}},
    {{1, 8, int8_8_1, int8_1_1}, {2, 8, int8_8_2, int8_1_2}, {4, 4, int8_4_4, int8_1_4}, {8, 2, int8_2_8, int8_1_8}},
};

static void rows(const product *of, const shape *by, long row, long end) {
    const long apart = (end - row) / by->rows, middle = row + apart;
    for (; row < middle; row++)
        for (long first = 0; first < of->b; first += by->wide) by->many(of, row, apart, first);
    for (row += apart * (by->rows - 1); row < end; row++)
        for (long first = 0; first < of->b; first += by->wide) by->one(of, row, 0, first);
}

/* Each vector in fp32 and in the order in which a matrix's numbers come out of their words; `b` of them, and zeros up to `wide`. */
static float *spread(const uint16_t *x, long b, long wide, long k, int parts) {
    const long per = LANES * parts, whole = k / per * per;
    float *out = aligned_alloc(64, (wide * k * sizeof(float) + 63) / 64 * 64);
    if (!out) return 0;
    for (long j = 0; j < b; j++) {
        for (long at = 0; at < whole; at += per)
            for (int part = 0; part < parts; part++)
                for (int i = 0; i < LANES; i++) out[j * k + at + part * LANES + i] = widened(x[j * k + at + i * parts + part]);
        for (long at = whole; at < k; at++) out[j * k + at] = widened(x[j * k + at]);
    }
    memset(out + b * k, 0, (wide - b) * k * sizeof(float));
    return out;
}

/* Returns 0, or 1 where memory was wanting. `scale` is null for bf16, which is how the two are told apart; `bias` may be null. */
int multiply(const void *matrix, const float *scale, const uint16_t *x, const uint16_t *bias, uint16_t *y, long b, long n, long k, int threads) {
    const shape *by = &shapes[scale != 0][b > 4 ? 3 : b > 2 ? 2 : b - 1];
    float *vectors = spread(x, b, (b + by->wide - 1) / by->wide * by->wide, k, scale ? 4 : 2);
    if (!vectors) return 1;
    const product of = {matrix, scale, vectors, bias, y, b, n, k};
    if (n * k * (scale ? 1 : 2) < SMALL) threads = 1;
    #pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), all = omp_get_num_threads(); /* it may be fewer than were asked for */
        rows(&of, by, n * thread / all, n * (thread + 1) / all);
    }
    free(vectors);
    return 0;
}
