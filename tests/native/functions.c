/* Holds the functions of vector.h that are not plain arithmetic against those of the C library in double, in the vectors of
 * the variant that this is compiled as. Prints the greatest errors; exits with 1 where one is too large. */
#include <stdio.h>

#include "vector.h"

#define STEP 0x1p-12
#define ULP 0x1p-23

static int failed;

static void report(const char *what, double error, double limit) {
    printf("%s %.2g\n", what, error);
    failed |= !(error <= limit);
}

static double error_of(double found, double expected, double size) {
    return expected == found ? 0 : fabs(found - expected) / fabs(size);
}

int main(void) {
    double of_tangent = 0, of_gelu = 0, of_tail = 0, of_cap = 0;
    float x[LANES + 3], found[LANES + 3];
    for (double from = -20; from < 20; from += LANES * STEP) {
        for (int i = 0; i < LANES; i++) x[i] = (float)(from + i * STEP);
        store(found, tangent(load(x)));
        for (int i = 0; i < LANES; i++) of_tangent = fmax(of_tangent, error_of(found[i], tanh(x[i]), tanh(x[i])));
        store(found, gelu(load(x)));
        for (int i = 0; i < LANES; i++) {
            double expected = 0.5 * x[i] * erfc(-x[i] * sqrt(0.5));
            of_gelu = fmax(of_gelu, error_of(found[i], expected, x[i]));
            if (x[i] > -8) of_tail = fmax(of_tail, error_of(found[i], expected, expected));
        }
        for (int i = 0; i < LANES + 3; i++) x[i] = found[i] = (float)(from * 5 + i);
        soft_cap(found, LANES + 3, 30.0f);
        for (int i = 0; i < LANES + 3; i++)
            of_cap = fmax(of_cap, error_of(found[i], 30 * tanh(x[i] / 30.0), 30 * tanh(x[i] / 30.0)));
    }
    report("tanh", of_tangent, 3 * ULP);
    report("gelu, of its argument", of_gelu, 3 * ULP);
    report("gelu, of itself", of_tail, 100 * ULP);
    report("soft cap", of_cap, 4 * ULP);

    const float edges[] = {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 1e-40f, 3e38f, -3e38f};
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++) {
        float x = edges[i], capped, passed;
        store(found, tangent(all(x))), capped = found[0];
        store(found, gelu(all(x))), passed = found[0];
        double expected = x == -INFINITY ? NAN : 0.5 * x * erfc(-x * sqrt(0.5));
        int same = x != x ? capped != capped && passed != passed
                          : fabs(capped - tanh(x)) <= 1e-7 * fabs(tanh(x)) &&
                                (expected != expected || passed == (float)expected);
        if (!same) printf("of %g: %g and %g\n", x, capped, passed);
        failed |= !same;
    }
    return failed;
}
