/* Large pages for weights: a token reads all of them, and with pages of 4 KB much of the time goes into looking them up.
 *
 * Linux keeps memory of which nobody says so in small pages on most machines. It is asked here, once a session, to put what
 * is there already together; where it does not, nothing is lost but speed. */
#define _GNU_SOURCE
#include "internal.h"

#if defined(__linux__)
#include <sys/mman.h>

#define LARGE_PAGE ((uintptr_t)2 << 20)
#define COLLAPSE 25 /* MADV_COLLAPSE, of Linux 6.1; the C library may be older */

static void use_large_pages(const void *memory, int64_t bytes) {
    uintptr_t begin = (uintptr_t)memory, end = begin + (uintptr_t)bytes;
    if (bytes < (int64_t)LARGE_PAGE) return;
    for (uintptr_t page = begin & ~(LARGE_PAGE - 1); page < end; page += LARGE_PAGE) {
        madvise((void *)page, LARGE_PAGE, MADV_HUGEPAGE);
        madvise((void *)page, LARGE_PAGE, COLLAPSE);
    }
}
#else
static void use_large_pages(const void *memory, int64_t bytes) { (void)memory, (void)bytes; }
#endif

static void pages_of_weight(const teal_weight *w) {
    use_large_pages(w->data, w->row_bytes * (w->layout == TEAL_INPUT_MAJOR ? w->inputs : w->outputs));
}

void pages_of(const teal_program *program) {
    for (int32_t i = 0; i < program->n_steps; i++) {
        if (program->steps[i].kind != TEAL_STEP_PRODUCT) continue;
        const teal_product *product = program->steps[i].of;
        for (int32_t part = 0; part < product->n_parts; part++) pages_of_weight(&product->parts[part]);
    }
    pages_of_weight(program->output->parts);
}
