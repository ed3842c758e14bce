/* What product.c and step.c share: vectors of GNU C, of which any CPU's compiler makes what the CPU has, and the product itself. */

#include <stdint.h>
#include <string.h>

/* Declared here, since omp.h belongs to a compiler's own OpenMP, and these are to be torch's. */
int omp_get_thread_num(void), omp_get_num_threads(void);

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));

#define LANES 16
#define AHEAD 2560 /* bytes: what is asked for so early is there when it is read */
#define ALL _Pragma("GCC unroll 8")

/* How many numbers a word of 32 bits holds says what a matrix is of. */
enum { FP32 = 1, BF16 = 2, INT8 = 4 };

typedef struct {
    const void *matrix; /* (n, k), each row contiguous */
    const float *scale; /* of each row, for INT8; or null */
    const void *bias;   /* (n), in fp32 for FP32, else in bf16; or null */
    long n, k, parts;
} linear;

/* What becomes of a product's numbers in `y`: bf16; fp32, rounded to bf16 where `half`; the same added to what is there. */
enum { STORED_HALF, STORED, ADDED };

typedef struct {
    const linear *by;
    const float *x; /* (b and zeros up to `wide`, k) as `spread` leaves it */
    void *y;        /* (b, n) */
    long b, n;
    int form, half;
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

static inline float kept(float value, int half) { return half ? widened(rounded(value)) : value; }

/* Shuffles, and no halves by way of memory: a sum whose address is taken would stay in memory all the time. */
#define PLACES(n) n ^ 0, n ^ 1, n ^ 2, n ^ 3, n ^ 4, n ^ 5, n ^ 6, n ^ 7, n ^ 8, n ^ 9, n ^ 10, n ^ 11, n ^ 12, n ^ 13, n ^ 14, n ^ 15
#ifdef __clang__
#define MIRRORED(v, n) __builtin_shufflevector(v, v, PLACES(n))
#else
#define MIRRORED(v, n) __builtin_shuffle(v, (ints){PLACES(n)})
#endif

static inline float total(floats value) {
    value += MIRRORED(value, 8), value += MIRRORED(value, 4), value += MIRRORED(value, 2), value += MIRRORED(value, 1);
    return value[0];
}

/* A register of words gives PARTS vectors: each word's first number, each word's second, … */
#define OF_FP32(words, part) ((floats)(words))
#define OF_BF16(words, part) ((floats)((part) ? (words) & -65536 : (words) << 16))
#define OF_INT8(words, part) __builtin_convertvector((words) << (24 - 8 * (part)) >> 24, floats)

static inline float rest_1(const char *matrix, long at) { return ((const float *)matrix)[at]; }
static inline float rest_2(const char *matrix, long at) { return widened(((const uint16_t *)matrix)[at]); }
static inline float rest_4(const char *matrix, long at) { return ((const int8_t *)matrix)[at]; }

/* How many vectors are multiplied at once, of b. */
long wide(long b);

/* Vectors (b, k) in the order in which a matrix's numbers come out of their words, and zeros up to a multiple of `wide`. */
void spread(float *out, const float *x, long b, long k, long parts);

/* Rows `row` to `end` of the product. */
void multiply_rows(const product *of, long row, long end);

/* Ask memory for the beginning of what `multiply_rows` will read. */
void ask_ahead(const linear *by, long b, long row, long end);
