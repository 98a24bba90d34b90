// Preloaded into a process, it sets its clock CLOCK_OFFSET_SECONDS ahead of the machine's, as on a host whose clock is
// wrong. Clocks that only count on (CLOCK_MONOTONIC) stay as they are; waits until a time of day end when they should.
//
// Debian's libfaketime does not do: Python's time.sleep fails under it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset_seconds(void) {
    const char *text = getenv("CLOCK_OFFSET_SECONDS");
    return text ? atol(text) : 0;
}

static int tells_the_time_of_day(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    // Not syscall(), which is wrapped below.
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (status == 0 && tells_the_time_of_day(clock)) now->tv_sec += offset_seconds();
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

static struct timespec as_the_kernel_counts(const struct timespec *until) {
    struct timespec own = *until;
    // A time since the machine started, of CLOCK_MONOTONIC, is far smaller than any time of day.
    if (own.tv_sec > 1000000000) own.tv_sec -= offset_seconds();
    return own;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *wanted, struct timespec *left) {
    int (*real)(clockid_t, int, const struct timespec *, struct timespec *) = dlsym(RTLD_NEXT, "clock_nanosleep");
    struct timespec own = *wanted;
    if ((flags & TIMER_ABSTIME) && tells_the_time_of_day(clock)) own = as_the_kernel_counts(wanted);
    return real(clock, flags, &own, left);
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *) =
        dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    struct timespec own = as_the_kernel_counts(until);
    return real(condition, mutex, &own);
}

int pthread_cond_clockwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex, clockid_t clock,
                           const struct timespec *restrict until) {
    int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *) =
        dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    struct timespec own = as_the_kernel_counts(until);
    return real(condition, mutex, clock, &own);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    int (*real)(sem_t *, const struct timespec *) = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec own = as_the_kernel_counts(until);
    return real(semaphore, &own);
}

long syscall(long number, ...) {
    long (*real)(long, ...) = dlsym(RTLD_NEXT, "syscall");
    long given[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) given[i] = va_arg(list, long);
    va_end(list);
    struct timespec own;
    // Abseil, inside Ray, waits by the kernel's own call.
    if (number == SYS_futex && (given[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET && (given[1] & FUTEX_CLOCK_REALTIME) &&
        given[3]) {
        own = as_the_kernel_counts((const struct timespec *)given[3]);
        given[3] = (long)&own;
    }
    return real(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}
