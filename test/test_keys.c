/* test_keys.c - the official configuration is obeyed, or refused: schedules of the learning rate. */
#include "test.h"
#include "training/training.h"

#define LR "model.params.scheduler_config."

/* key, value, key, value ...: a recipe */
static Config recipe(const char *const *said) {
    Config c = {0};
    for (; *said; said += 2) CHECK_OK(config_set(&c, said[0], "%s", said[1]));
    return c;
}
#define RECIPE(...) recipe((const char *const[]){__VA_ARGS__, NULL})

static Err rate_of(Rate *r, Config c, size_t steps) {
    Err e = rate_read(r, &c, steps);
    config_free(&c);
    return e;
}

static int close_to(double a, double b) {
    return fabs(a - b) <= 1e-12 * fabs(b);
}

/* A first stage of taming has a rate and nothing else: a constant one. Ours begins without a rate. */
static void test_constant(void) {
    Rate r;
    CHECK_OK(rate_of(&r, RECIPE("model.base_learning_rate", "4.5e-6", "train.steps", "10"), 10));
    CHECK(r.kind == RATE_CONSTANT && rate_peak(&r) == 1);
    for (uint64_t n = 0; n < 1000000; n = 3 * n + 1) CHECK(rate_at(&r, n) == 1);
    CHECK_OK(rate_of(&r, RECIPE("model.base_learning_rate", "none"), 10));
    CHECK(r.kind == RATE_COSINE && rate_at(&r, 0) == 1e-4 && rate_peak(&r) == 1e-4);
    CHECK_OK(rate_of(&r, RECIPE("train.steps", "10"), 10));
    CHECK(r.kind == RATE_COSINE && rate_at(&r, 10) == 1e-8);
    CHECK_OK(rate_of(&r, RECIPE(LR "params.lr_max", "1e-3", LR "params.warm_up_steps", "4"), 10));
    CHECK(rate_at(&r, 0) == 2.5e-6 && rate_at(&r, 4) == 1e-3);
    CHECK_OK(rate_of(
        &r, RECIPE("model.base_learning_rate", "1", LR "params.lr_start", "0", LR "params.warm_up_steps", "4"), 10));
    CHECK(rate_at(&r, 0) == 0 && rate_at(&r, 1) == 0.25 && rate_at(&r, 4) == 1 && rate_at(&r, 10) == 1);
    CHECK_OK(rate_of(&r, RECIPE("model.base_learning_rate", "1", LR "params.lr_max", "0.5"), 10));
    CHECK(rate_at(&r, 0) == 0.5 && rate_at(&r, 10) == 0.5);
    static const char *const factors[] = {"lr_start", "lr_max", "lr_min"};
    for (int i = 0; i < 3; i++) { /* the official class has no usual values */
        Config c = RECIPE(LR "target", "imagebart.lr_scheduler.LambdaWarmUpCosineScheduler", "model.base_learning_rate",
                          "0.0625", LR "params.lr_start", "0", LR "params.lr_max", "1e-4", LR "params.lr_min", "1e-8",
                          LR "params.max_decay_steps", "7");
        for (size_t k = 0; k < c.n; k++)
            if (strstr(c.kv[k].key, factors[i])) c.kv[k].key[0] = 'x';
        CHECK_ERR(rate_of(&r, c, 10), factors[i]);
    }
}

/* The formulas of SPEC section 7 and of rate.c, at the points where they change */
static void test_cycles(void) {
    static const char module[] = "imagebart.lr_scheduler.";
    const double pi = 3.14159265358979323846;
    for (int linear = 0; linear < 2; linear++) {
        char target[96];
        Rate r;
        snprintf(target, sizeof target, "%s%s", module,
                 linear ? "LambdaLinearScheduler" : "LambdaWarmUpCosineScheduler2");
        CHECK_OK(rate_of(&r,
                         RECIPE(LR "target", target, LR "params.warm_up_steps", "[10, 0]", LR "params.f_start",
                                "[0.1, 0.5]", LR "params.f_max", "1,2", LR "params.f_min", "0.25, 1.0e-2",
                                LR "params.cycle_lengths", "[100, 50]", "model.base_learning_rate", "1"),
                         151));
        CHECK(r.n_cycles == 2 && rate_peak(&r) == 2);
        CHECK(close_to(rate_at(&r, 0), 0.1) && close_to(rate_at(&r, 5), 0.55));
        CHECK(close_to(rate_at(&r, 10), linear ? 0.25 + 0.75 * 90 / 100 : 1));
        CHECK(close_to(rate_at(&r, 40), linear ? 0.25 + 0.75 * 60 / 100 : 0.25 + 0.375 * (1 + cos(pi / 3))));
        CHECK(close_to(rate_at(&r, 100), 0.25)); /* the first cycle's last */
        CHECK(close_to(rate_at(&r, 101), linear ? 0.01 + 1.99 * 49 / 50 : 0.01 + 0.995 * (1 + cos(pi / 50))));
        CHECK(close_to(rate_at(&r, 150), 0.01));
    }
}

static void test_rate_refusals(void) {
    static const char *const cycle[] = {"cycle_lengths", "warm_up_steps", "f_start", "f_max", "f_min"};
    static const struct {
        const char *target, *key, *value, *error;
    } wrong[] = {
        {"torch.optim.lr_scheduler.StepLR", "lr_max", "1", "target is torch.optim.lr_scheduler.StepLR"},
        {"LambdaLinearScheduler", "f_max", "1", "target is LambdaLinearScheduler"},
        {"imagebart.lr_scheduler.LambdaWarmUpCosineScheduler", "f_max", "1", "f_max: is not a key of"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "lr_max", "1", "lr_max: is not a key of"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "0,0", "f_min has 2 numbers, cycle_lengths 1"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "x", "1 to 64 numbers"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "[0", "1 to 64 numbers"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "0,", "1 to 64 numbers"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "-", "1 to 64 numbers"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "cycle_lengths", "8", "end at step 8, train.steps is 10"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char key[96];
        Rate r;
        Config c = RECIPE(LR "target", wrong[i].target);
        for (int k = 0; k < 5 && strstr(wrong[i].target, ".LambdaLinear"); k++) {
            snprintf(key, sizeof key, LR "params.%s", cycle[k]);
            CHECK_OK(config_set(&c, key, "%s", "10"));
        }
        snprintf(key, sizeof key, LR "params.%s", wrong[i].key);
        CHECK_OK(config_set(&c, key, "%s", wrong[i].value));
        CHECK_ERR(rate_of(&r, c, 10), wrong[i].error);
    }
}

int main(void) {
    test_constant();
    test_cycles();
    test_rate_refusals();
    return test_report();
}
