/* The engine's inner and outer loop of a row MLP and a concatenating global block, for a CPU: fused_tasks.h compiled for float and
   double and for each instruction set, and the choice among them. Called through ctypes by fused.py, which says what it is for. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One call. Pointers to numbers of the called type; tasks are the leading dimension. fused.py holds the same struct. */
typedef struct {
    long width, features, hidden, dim, wide, narrow;      /* F, C, H, D, G, P of fused_tasks.h */
    long steps, second, train, support_rows, query_rows;  /* rows: the padded number */
    const long *support_len, *query_len;                  /* (T) real rows, the first ones; no query: NULL */
    const void *support_x, *support_y, *query_x, *query_y; /* (T, rows, F), (T, rows), (T, rows, C), (T, rows) */
    const void *sw1, *sb1, *sw2, *sb2;                    /* (T) step sizes of both layers' weights and biases */
    void *const *weights;                                 /* m1 b1 m2 b2 empty w1 c1 w2 c2 w3 c3, as torch stores them */
    void *embedding_TD, *loss_T;
} Call;

typedef struct {
    long tasks, support, query;
} Shape;

/* Rows of a chunk, unless one task has more. The reference work took 11.8, 11.4, 11.3, 11.4 ms with 32, 64, 128, 256 of them. */
#define CHUNK_ROWS 64
#define CHUNK_TASKS 64

/* The number of tasks from `first` on that are worked on together, and where each one's rows begin. */
static long next_chunk(const Call *call, long first, long last, long *off, long *query_off) {
    long tasks = 0, rows = 0, query_rows = 0;
    while (first + tasks < last && tasks < CHUNK_TASKS) {
        long more = call->support_len[first + tasks], more_query = call->query_len ? call->query_len[first + tasks] : 0;
        if (tasks && (rows + more > CHUNK_ROWS || query_rows + more_query > CHUNK_ROWS)) break;
        if (off) off[tasks] = rows, query_off[tasks] = query_rows;
        rows += more, query_rows += more_query, tasks++;
        if (off) off[tasks] = rows, query_off[tasks] = query_rows;
    }
    return tasks;
}

static Shape largest_chunk(const Call *call, long first, long last) {
    Shape most = {0, 0, 0};
    for (long tasks; first < last; first += tasks) {
        long support = 0, query = 0;
        tasks = next_chunk(call, first, last, NULL, NULL);
        for (long t = first; t < first + tasks; t++) support += call->support_len[t], query += call->query_len ? call->query_len[t] : 0;
        most.tasks = tasks > most.tasks ? tasks : most.tasks;
        most.support = support > most.support ? support : most.support;
        most.query = query > most.query ? query : most.query;
    }
    return most;
}

/* A row of n numbers in whole cache lines. */
#define PAD(n) (((n) + LINE - 1) / LINE * LINE)
#define LINE (64 / (long)sizeof(real))

/* TILE_ROWS by TILE_UNITS cache lines of sums stand in registers: 16 of 32, 12 of 16, 16 of 32 (NEON), 8 of 16 (SSE). */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CHOOSES 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#define TILE_UNITS 2
#define DOUBLE 0
#define NAME(name) name##_f32_v4
#include "fused_tasks.h"
#define DOUBLE 1
#define NAME(name) name##_f64_v4
#include "fused_tasks.h"
#undef VECTOR_BYTES
#undef TILE_ROWS
#undef TILE_UNITS
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#define TILE_UNITS 1
#define DOUBLE 0
#define NAME(name) name##_f32_v3
#include "fused_tasks.h"
#define DOUBLE 1
#define NAME(name) name##_f64_v3
#include "fused_tasks.h"
#undef VECTOR_BYTES
#undef TILE_ROWS
#undef TILE_UNITS
#pragma GCC pop_options
#endif

#define VECTOR_BYTES 16
#ifdef __aarch64__
#define TILE_ROWS 4
#else
#define TILE_ROWS 2
#endif
#define TILE_UNITS 1
#define DOUBLE 0
#define NAME(name) name##_f32_base
#include "fused_tasks.h"
#define DOUBLE 1
#define NAME(name) name##_f64_base
#include "fused_tasks.h"

/* To tell a library that was built from another version of `Call`. */
int limaml_fused_call_bytes(void) {
    return sizeof(Call);
}

/* The best instruction set here: 2 (AVX-512), 1 (AVX2) or 0. */
int limaml_fused_level(void) {
#ifdef CHOOSES
    if (__builtin_cpu_supports("x86-64-v4")) return 2;
    if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
    return 0;
}

/* Tasks first to last - 1, with instruction set `level` or the best below it; 0, or 1 if there was no memory. */
int limaml_fused_run(const Call *call, long first, long last, void *const *gradients, int is_double, int level) {
#ifdef CHOOSES
    if (level == 2) return (is_double ? run_f64_v4 : run_f32_v4)(call, first, last, gradients);
    if (level == 1) return (is_double ? run_f64_v3 : run_f32_v3)(call, first, last, gradients);
#endif
    (void)level;
    return (is_double ? run_f64_base : run_f32_base)(call, first, last, gradients);
}
