/* Stands between a process and the C library (LD_PRELOAD), counts what changes files under one folder, and lets one of these
   operations go wrong. Python, safetensors and tokenizers (Rust) all pass here; raw system calls and mapped writes do not. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum fault { NONE, KILL, HALF_AND_KILL, DISK_FULL, FAILS_ONCE };
enum needs_space { NO_SPACE, SPACE };

static char folder[PATH_MAX];
static enum fault fault;
static long target;
static atomic_long seen;
static atomic_int watching, fired;

/* From here on, operations under `path` are counted from 0; number `at` goes wrong. */
void faults_watch(const char *path, int what, long at) {
    snprintf(folder, sizeof folder, "%s", path);
    fault = what;
    target = at;
    seen = fired = 0;
    watching = 1;
}

/* Stop counting, and give how many there were. A disk that has become full stays full. */
long faults_count(void) {
    if (!(fault == DISK_FULL && fired)) watching = 0;
    return seen;
}

int faults_fired(void) { return fired; }

static int inside(const char *path) {
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int descriptor_inside(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

static int name_inside(int parent, const char *name) {
    return name[0] == '/' || parent == AT_FDCWD ? inside(name) : descriptor_inside(parent);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Counts an operation. Gives 0: do it; -1: it fails with errno; 1: do half of it, or all where it has no halves, and then die. */
static int next(enum needs_space space) {
    if (fault == DISK_FULL && space == NO_SPACE) return 0;
    long number = atomic_fetch_add(&seen, 1);
    if (fault == DISK_FULL && number >= target) {
        fired = 1;
        errno = ENOSPC;
        return -1;
    }
    if (number != target) return 0;
    if (fault == FAILS_ONCE) { /* a bad block, a network file system that had a bad moment */
        fired = 1;
        errno = EIO;
        return -1;
    }
    if (fault == KILL) die();
    return fault == HALF_AND_KILL;
}

#define ORIGINAL(name) \
    static typeof(&name) original; \
    if (!original) original = dlsym(RTLD_NEXT, #name)

#define PASS(condition, space, call) \
    if (!watching || !(condition)) return call; \
    int halved = next(space); \
    if (halved < 0) return -1; \
    typeof(call) result = call; \
    if (halved) die(); \
    return result

static int changes(int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE; }

#define MODE(flags) \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
    va_end(rest)

int open(const char *path, int flags, ...) {
    MODE(flags);
    ORIGINAL(open);
    PASS(changes(flags) && inside(path), SPACE, original(path, flags, mode));
}

int open64(const char *path, int flags, ...) {
    MODE(flags);
    ORIGINAL(open64);
    PASS(changes(flags) && inside(path), SPACE, original(path, flags, mode));
}

int openat(int parent, const char *path, int flags, ...) {
    MODE(flags);
    ORIGINAL(openat);
    PASS(changes(flags) && name_inside(parent, path), SPACE, original(parent, path, flags, mode));
}

int openat64(int parent, const char *path, int flags, ...) {
    MODE(flags);
    ORIGINAL(openat64);
    PASS(changes(flags) && name_inside(parent, path), SPACE, original(parent, path, flags, mode));
}

#define WRITE(half, call) \
    if (!watching || !descriptor_inside(descriptor)) return call; \
    int halved = next(SPACE); \
    if (halved < 0) return -1; \
    if (halved) { (void)!half; die(); } \
    return call

ssize_t write(int descriptor, const void *bytes, size_t size) {
    ORIGINAL(write);
    WRITE(original(descriptor, bytes, size / 2), original(descriptor, bytes, size));
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t at) {
    ORIGINAL(pwrite64);
    WRITE(original(descriptor, bytes, size / 2, at), original(descriptor, bytes, size, at));
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    ORIGINAL(writev);
    WRITE(original(descriptor, parts, count / 2), original(descriptor, parts, count));
}

ssize_t copy_file_range(int from, off64_t *from_at, int descriptor, off64_t *at, size_t size, unsigned flags) {
    ORIGINAL(copy_file_range);
    WRITE(original(from, from_at, descriptor, at, size / 2, flags), original(from, from_at, descriptor, at, size, flags));
}

ssize_t sendfile64(int descriptor, int from, off64_t *from_at, size_t size) {
    ORIGINAL(sendfile64);
    WRITE(original(descriptor, from, from_at, size / 2), original(descriptor, from, from_at, size));
}

int fsync(int descriptor) {
    ORIGINAL(fsync);
    PASS(descriptor_inside(descriptor), SPACE, original(descriptor)); /* delayed allocation: here a disk may first be found full */
}

int fdatasync(int descriptor) {
    ORIGINAL(fdatasync);
    PASS(descriptor_inside(descriptor), SPACE, original(descriptor));
}

int ftruncate64(int descriptor, off64_t size) {
    ORIGINAL(ftruncate64);
    PASS(descriptor_inside(descriptor), NO_SPACE, original(descriptor, size));
}

int rename(const char *from, const char *to) {
    ORIGINAL(rename);
    PASS(inside(from) || inside(to), SPACE, original(from, to));
}

int renameat(int from_parent, const char *from, int to_parent, const char *to) {
    ORIGINAL(renameat);
    PASS(name_inside(from_parent, from) || name_inside(to_parent, to), SPACE, original(from_parent, from, to_parent, to));
}

int renameat2(int from_parent, const char *from, int to_parent, const char *to, unsigned flags) {
    ORIGINAL(renameat2);
    PASS(name_inside(from_parent, from) || name_inside(to_parent, to), SPACE, original(from_parent, from, to_parent, to, flags));
}

int link(const char *from, const char *to) {
    ORIGINAL(link);
    PASS(inside(to), SPACE, original(from, to));
}

int linkat(int from_parent, const char *from, int to_parent, const char *to, int flags) {
    ORIGINAL(linkat);
    PASS(name_inside(to_parent, to), SPACE, original(from_parent, from, to_parent, to, flags));
}

int mkdirat(int parent, const char *path, mode_t mode) {
    ORIGINAL(mkdirat);
    PASS(name_inside(parent, path), SPACE, original(parent, path, mode));
}

int mkdir(const char *path, mode_t mode) {
    ORIGINAL(mkdir);
    PASS(inside(path), SPACE, original(path, mode));
}

int chmod(const char *path, mode_t mode) {
    ORIGINAL(chmod);
    PASS(inside(path), NO_SPACE, original(path, mode));
}

int unlink(const char *path) {
    ORIGINAL(unlink);
    PASS(inside(path), NO_SPACE, original(path));
}

int rmdir(const char *path) {
    ORIGINAL(rmdir);
    PASS(inside(path), NO_SPACE, original(path));
}

int unlinkat(int parent, const char *path, int flags) {
    ORIGINAL(unlinkat);
    PASS(name_inside(parent, path), NO_SPACE, original(parent, path, flags));
}
