/* signals.c - SIGINT and SIGTERM end the server: they come to the thread that waits for them, no other. */
#include "serving/serving.h"

#include <signal.h>
#include <sys/select.h>

static volatile sig_atomic_t came;

static void note(int number) {
    came = number;
}

void signals_hold(void) {
    const struct sigaction noted = {.sa_handler = note};
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    sigaction(SIGINT, &noted, NULL);
    sigaction(SIGTERM, &noted, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* Only this lets them through. (There is no sigtimedwait on macOS.) */
int signal_within(time_t seconds) {
    const struct timespec span = {seconds, 0};
    sigset_t others;
    pthread_sigmask(SIG_SETMASK, NULL, &others);
    sigdelset(&others, SIGINT);
    sigdelset(&others, SIGTERM);
    if (!came) pselect(0, NULL, NULL, NULL, &span, &others);
    return came != 0;
}
