/* Preloaded into a process: kills it, or lets a system call fail, at the n-th change that it makes below a folder.

It sees what Python's audit hooks do not: the writes of safetensors and Lance (Rust), of torch and Arrow (C++). Only
the process that calls fault_arm is changed, and not those that it starts. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, ONCE, FROM };
/* What a call has to do instead of itself; everything above 0 is an error number. */
enum { GO_ON = 0, HALF = -1 };

static struct {
    int mode, error, log, sockets;
    long at;
    pid_t process;
    size_t length;
    char root[PATH_MAX];
} plan;
static atomic_long counter;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = dlsym(RTLD_NEXT, #name)

void fault_arm(const char *root, int mode, long at, int error, const char *log, int sockets) {
    plan.log = open(log, O_WRONLY | O_CREAT | O_APPEND, 0666);
    plan.length = strlen(strncpy(plan.root, root, PATH_MAX - 1));
    plan.at = at, plan.error = error, plan.sockets = sockets, plan.process = getpid();
    atomic_store(&counter, 0);
    plan.mode = mode;
}

static int active(void) { return plan.mode != OFF && getpid() == plan.process; }

static void die(void) {
    for (;;) kill(getpid(), SIGKILL);
}

static void note(long number, const char *kind, const char *path) {
    REAL(write);
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%ld\t%s\t%s\n", number, kind, path);
    if (real(plan.log, line, size) < 0) abort();
}

/* A full disk or quota lets files be opened, renamed, flushed and deleted; a read-only one does not. */
static int fails(const char *kind) {
    if (plan.error != ENOSPC && plan.error != EDQUOT) return 1;
    return !strcmp(kind, "write") || !strcmp(kind, "create") || !strcmp(kind, "mkdir") || !strcmp(kind, "allocate");
}

static int decide(const char *kind, const char *path) {
    long number = atomic_fetch_add(&counter, 1) + 1;
    int half = !strcmp(kind, "write") || !strcmp(kind, "create") || !strcmp(kind, "open");
    if (plan.mode == COUNT || number == plan.at) note(number, kind, path);
    if (plan.mode == COUNT || number < plan.at) return GO_ON;
    if (plan.mode == KILL) {
        if (number > plan.at) return GO_ON; /* another thread is dying */
        if (!half) die();
        return HALF;
    }
    if (plan.mode == ONCE) return number == plan.at ? plan.error : GO_ON;
    if (!fails(kind)) return GO_ON;
    return number == plan.at && !strcmp(kind, "write") ? HALF : plan.error;
}

static int inside(const char *path) {
    return !strncmp(path, plan.root, plan.length) && (path[plan.length] == '/' || path[plan.length] == 0);
}

static int descriptor_path(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    path[size < 0 ? 0 : size] = 0;
    return size > 0;
}

static int on_path(const char *kind, int folder, const char *path) {
    if (!active() || !path) return GO_ON;
    int saved = errno, verdict = GO_ON;
    char full[2 * PATH_MAX] = "";
    if (path[0] == '/') snprintf(full, sizeof full, "%s", path);
    else {
        if (folder == AT_FDCWD ? !getcwd(full, PATH_MAX) : !descriptor_path(folder, full)) full[0] = 0;
        size_t size = strlen(full);
        snprintf(full + size, sizeof full - size, "/%s", path);
    }
    if (inside(full)) verdict = decide(kind, full);
    errno = saved;
    return verdict;
}

static int on_descriptor(const char *kind, int fd) {
    if (!active() || fd == plan.log) return GO_ON;
    int saved = errno, verdict = GO_ON;
    char path[PATH_MAX];
    if (descriptor_path(fd, path) && inside(path)) verdict = decide(kind, path);
    errno = saved;
    return verdict;
}

static int fail(int error) {
    errno = error;
    return -1;
}

/* Files are opened. */

static const char *opening(int folder, const char *path, int flags) {
    struct stat found;
    if (flags & O_CREAT && path && fstatat(folder, path, &found, 0)) return "create";
    return flags & (O_WRONLY | O_RDWR | O_TRUNC) ? "open" : NULL;
}

#define OPEN(name, folder, ...) \
    REAL(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    } \
    const char *kind = active() ? opening(folder, path, flags) : NULL; \
    int verdict = kind ? on_path(kind, folder, path) : GO_ON; \
    if (verdict > 0) return fail(verdict); \
    int fd = real(__VA_ARGS__, flags, mode); \
    if (verdict == HALF) die(); \
    return fd

int open(const char *path, int flags, ...) { OPEN(open, AT_FDCWD, path); }
int open64(const char *path, int flags, ...) { OPEN(open64, AT_FDCWD, path); }
int openat(int folder, const char *path, int flags, ...) { OPEN(openat, folder, folder, path); }
int openat64(int folder, const char *path, int flags, ...) { OPEN(openat64, folder, folder, path); }

#define FOPEN(name) \
    REAL(name); \
    int flags = strchr(mode, 'r') ? (strchr(mode, '+') ? O_RDWR : O_RDONLY) : O_WRONLY | O_CREAT; \
    const char *kind = active() ? opening(AT_FDCWD, path, flags) : NULL; \
    int verdict = kind ? on_path(kind, AT_FDCWD, path) : GO_ON; \
    if (verdict > 0) return fail(verdict), NULL; \
    FILE *file = real(path, mode); \
    if (verdict == HALF) die(); \
    return file

FILE *fopen(const char *path, const char *mode) { FOPEN(fopen); }
FILE *fopen64(const char *path, const char *mode) { FOPEN(fopen64); }

/* Bytes are written: half of them arrive. */

#define WRITE(fd, whole, part) \
    int verdict = on_descriptor("write", fd); \
    if (verdict == GO_ON) return whole; \
    if (verdict > 0) return fail(verdict); \
    ssize_t done = part; \
    if (plan.mode == KILL) die(); \
    return done > 0 ? done : fail(plan.error)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    WRITE(fd, real(fd, data, size), size > 1 ? real(fd, data, size / 2) : 0);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    REAL(pwrite);
    WRITE(fd, real(fd, data, size, offset), size > 1 ? real(fd, data, size / 2, offset) : 0);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    WRITE(fd, real(fd, data, size, offset), size > 1 ? real(fd, data, size / 2, offset) : 0);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    WRITE(fd, real(fd, parts, count), count > 1 ? real(fd, parts, count / 2) : 0);
}
ssize_t sendfile(int fd, int from, off_t *offset, size_t size) {
    REAL(sendfile);
    WRITE(fd, real(fd, from, offset, size), real(fd, from, offset, size < 2048 ? size / 2 : 1024));
}
ssize_t sendfile64(int fd, int from, off64_t *offset, size_t size) {
    REAL(sendfile64);
    WRITE(fd, real(fd, from, offset, size), real(fd, from, offset, size < 2048 ? size / 2 : 1024));
}
ssize_t copy_file_range(int from, off64_t *start, int fd, off64_t *offset, size_t size, unsigned flags) {
    REAL(copy_file_range);
    WRITE(fd, real(from, start, fd, offset, size, flags), real(from, start, fd, offset, size < 2048 ? size / 2 : 1024, flags));
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    REAL(fwrite);
    int verdict = active() ? on_descriptor("write", fileno(file)) : GO_ON;
    if (verdict == GO_ON) return real(data, size, count, file);
    if (verdict > 0) return fail(verdict), 0;
    size_t done = real(data, size, count / 2, file);
    if (plan.mode == KILL) fflush(file), die();
    errno = plan.error;
    return done;
}

/* Files and folders get names and lose them, reach the disk, change their size. */

#define CALL(name, where, ...) \
    REAL(name); \
    int verdict = where; \
    return verdict > 0 ? fail(verdict) : real(__VA_ARGS__)

int rename(const char *from, const char *to) { CALL(rename, on_path("rename", AT_FDCWD, to), from, to); }
int renameat(int a, const char *from, int b, const char *to) {
    CALL(renameat, on_path("rename", b, to), a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    CALL(renameat2, on_path("rename", b, to), a, from, b, to, flags);
}
int link(const char *from, const char *to) { CALL(link, on_path("link", AT_FDCWD, to), from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    CALL(linkat, on_path("link", b, to), a, from, b, to, flags);
}
int unlink(const char *path) { CALL(unlink, on_path("unlink", AT_FDCWD, path), path); }
int unlinkat(int folder, const char *path, int flags) {
    CALL(unlinkat, on_path("unlink", folder, path), folder, path, flags);
}
int rmdir(const char *path) { CALL(rmdir, on_path("unlink", AT_FDCWD, path), path); }
int mkdir(const char *path, mode_t mode) { CALL(mkdir, on_path("mkdir", AT_FDCWD, path), path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { CALL(mkdirat, on_path("mkdir", folder, path), folder, path, mode); }
int fsync(int fd) { CALL(fsync, on_descriptor("fsync", fd), fd); }
int fdatasync(int fd) { CALL(fdatasync, on_descriptor("fsync", fd), fd); }
int ftruncate(int fd, off_t size) { CALL(ftruncate, on_descriptor("allocate", fd), fd, size); }
int ftruncate64(int fd, off64_t size) { CALL(ftruncate64, on_descriptor("allocate", fd), fd, size); }
int fallocate(int fd, int mode, off_t offset, off_t size) {
    CALL(fallocate, on_descriptor("allocate", fd), fd, mode, offset, size);
}

/* This one returns its error. */
#define ALLOCATE(name) \
    REAL(name); \
    int verdict = on_descriptor("allocate", fd); \
    return verdict > 0 ? verdict : real(fd, offset, size)

int posix_fallocate(int fd, off_t offset, off_t size) { ALLOCATE(posix_fallocate); }
int posix_fallocate64(int fd, off64_t offset, off64_t size) { ALLOCATE(posix_fallocate64); }

/* Something is sent: for commands that write to the Hub. */

/* A connection that is reset has no answer either. */
static int on_socket(int fd) {
    int verdict = active() && plan.sockets ? decide("send", "socket") : GO_ON;
    if (verdict > 0) shutdown(fd, SHUT_RDWR);
    return verdict;
}

ssize_t send(int fd, const void *data, size_t size, int flags) { CALL(send, on_socket(fd), fd, data, size, flags); }
ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t length) {
    CALL(sendto, on_socket(fd), fd, data, size, flags, to, length);
}
