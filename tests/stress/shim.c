/* Counts the calls of a process that concern files below one folder, and lets one of them fail.

   Loaded with LD_PRELOAD; does nothing until shim_arm is called (by ctypes, in the process). With
   a log, every call is written there with its data: what a power cut would leave is worked out of
   it (see powercuts.py). Counted are calls through the dynamic linker; stdio's own writes are
   counted as its fwrite. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SHORT = -1, CUT = -2, DIE = -3 };

static char root[PATH_MAX];
static size_t root_len;
static _Atomic long count;
static long fail_at;   /* 0: none */
static int fail_with;  /* an errno, or SHORT: half of the bytes, CUT: no bytes, DIE: SIGKILL */
static int log_fd = -1, data_too;
static int armed;
static __thread int inside;

/* Start to count calls below `folder`. The `at`-th (from 1; 0: none) fails with `how`. Each call is
   a line of `log` (a file descriptor; -1: none), with its data where `with_data`. */
void shim_arm(const char *folder, long at, int how, int log, int with_data)
{
    snprintf(root, sizeof root, "%s", folder);
    root_len = strlen(root);
    fail_at = at;
    fail_with = how;
    log_fd = log;
    data_too = with_data;
    atomic_store(&count, 0);
    armed = 1;
}

/* Stop; returns how many calls there were. */
long shim_disarm(void)
{
    armed = 0;
    return atomic_load(&count);
}

static int below(const char *path)
{
    return strncmp(path, root, root_len) == 0 && (path[root_len] == '/' || path[root_len] == 0);
}

static const char *absolute(int dir, const char *path, char *space)
{
    if (path[0] == '/')
        return path;
    char base[PATH_MAX];
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            return NULL;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0)
            return NULL;
        base[n] = 0;
    }
    if (strcmp(path, ".") == 0 || path[0] == 0)
        snprintf(space, PATH_MAX, "%s", base);
    else
        snprintf(space, PATH_MAX, "%s/%s", base, path);
    return space;
}

static const char *of_fd(int fd, char *space)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, space, PATH_MAX - 1);
    if (n < 0)
        return NULL;
    space[n] = 0;
    return space;
}

/* The log has a line a call: number, call, two numbers, path, second path; tabs between. Data
   follow the line of a write, as many bytes as its second number says. */
static void note(long n, const char *call, long long a, long long b, const char *path,
                 const char *other, const void *data, size_t length)
{
    if (log_fd < 0)
        return;
    char line[3 * PATH_MAX];
    int used = snprintf(line, sizeof line, "%ld\t%s\t%lld\t%lld\t%s\t%s\n", n, call, a, b, path,
                        other ? other : "");
    syscall(SYS_write, log_fd, line, used);
    if (data_too && data)
        for (size_t done = 0; done < length;) {
            long put = syscall(SYS_write, log_fd, (const char *)data + done, length - done);
            if (put <= 0)
                break;
            done += put;
        }
}

/* Counts a call; 0: go on, an errno: fail with it, SHORT or CUT: do less. */
static int met(long *number)
{
    *number = atomic_fetch_add(&count, 1) + 1;
    if (*number != fail_at)
        return 0;
    if (fail_with == DIE)
        syscall(SYS_kill, getpid(), 9);
    return fail_with;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define WATCHED(path) (armed && !inside && (path) && below(path))

/* A call on a path. */
#define ON_PATH(call, dir, path, go, failed) \
    do { \
        char space_[PATH_MAX]; \
        const char *full_ = armed && !inside && (path) ? absolute(dir, path, space_) : NULL; \
        if (!WATCHED(full_)) return go; \
        long n_; int how_ = met(&n_); \
        note(n_, call, 0, 0, full_, NULL, NULL, 0); \
        if (how_ > 0) { errno = how_; return failed; } \
        inside = 1; __typeof__(go) got_ = go; inside = 0; \
        return got_; \
    } while (0)

/* A call on an open file. */
#define ON_FD(call, fd, number, go, failed) \
    do { \
        char space_[PATH_MAX]; \
        const char *full_ = armed && !inside ? of_fd(fd, space_) : NULL; \
        if (!WATCHED(full_)) return go; \
        long n_; int how_ = met(&n_); \
        note(n_, call, number, 0, full_, NULL, NULL, 0); \
        if (how_ > 0) { errno = how_; return failed; } \
        return go; \
    } while (0)

/* ---- opening ---- */

static int opened(int fd, const char *full, int flags, long n)
{
    (void)n;
    note(0, "opened", fd >= 0 ? fd : -1, flags, full, NULL, NULL, 0);
    return fd;
}

#define OPEN(call, dir, path, flags, go) \
    do { \
        char space_[PATH_MAX]; \
        const char *full_ = armed && !inside ? absolute(dir, path, space_) : NULL; \
        if (!WATCHED(full_)) return go; \
        long n_; int how_ = met(&n_); \
        int there_ = syscall(SYS_access, full_, F_OK) == 0; \
        note(n_, (flags) & O_CREAT ? "create" : "open", flags, there_, full_, NULL, NULL, 0); \
        if (how_ > 0) { errno = how_; return -1; } \
        return opened(go, full_, flags, n_); \
    } while (0)

#define MODE mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list v; va_start(v, flags); mode = va_arg(v, mode_t); va_end(v); }

int open(const char *path, int flags, ...)
{ REAL(open); MODE; OPEN("open", AT_FDCWD, path, flags, real(path, flags, mode)); }
int open64(const char *path, int flags, ...)
{ REAL(open64); MODE; OPEN("open", AT_FDCWD, path, flags, real(path, flags, mode)); }
int openat(int dir, const char *path, int flags, ...)
{ REAL(openat); MODE; OPEN("open", dir, path, flags, real(dir, path, flags, mode)); }
int openat64(int dir, const char *path, int flags, ...)
{ REAL(openat64); MODE; OPEN("open", dir, path, flags, real(dir, path, flags, mode)); }
DIR *opendir(const char *path)
{ REAL(opendir); ON_PATH("opendir", AT_FDCWD, path, real(path), NULL); }

/* ---- reading ---- */

#define READ(fd, size, go_all, go_part) \
    do { \
        char space_[PATH_MAX]; \
        const char *full_ = armed && !inside ? of_fd(fd, space_) : NULL; \
        if (!WATCHED(full_)) return go_all; \
        long n_; int how_ = met(&n_); \
        note(n_, "read", size, 0, full_, NULL, NULL, 0); \
        if (how_ > 0) { errno = how_; return -1; } \
        if (how_ == CUT) return 0; \
        if (how_ == SHORT && (size) > 1) { size_t half = (size) / 2; return go_part; } \
        return go_all; \
    } while (0)

ssize_t read(int fd, void *b, size_t n)
{ REAL(read); READ(fd, n, real(fd, b, n), real(fd, b, half)); }
ssize_t pread(int fd, void *b, size_t n, off_t at)
{ REAL(pread); READ(fd, n, real(fd, b, n, at), real(fd, b, half, at)); }
ssize_t pread64(int fd, void *b, size_t n, off64_t at)
{ REAL(pread64); READ(fd, n, real(fd, b, n, at), real(fd, b, half, at)); }
ssize_t readv(int fd, const struct iovec *v, int k)
{ REAL(readv); READ(fd, v[0].iov_len, real(fd, v, k), read(fd, v[0].iov_base, half)); }
ssize_t preadv(int fd, const struct iovec *v, int k, off_t at)
{ REAL(preadv); READ(fd, v[0].iov_len, real(fd, v, k, at), syscall(SYS_pread64, fd, v[0].iov_base, half, at)); }
ssize_t preadv64(int fd, const struct iovec *v, int k, off64_t at)
{ REAL(preadv64); READ(fd, v[0].iov_len, real(fd, v, k, at), syscall(SYS_pread64, fd, v[0].iov_base, half, at)); }
ssize_t preadv2(int fd, const struct iovec *v, int k, off_t at, int f)
{ REAL(preadv2); READ(fd, v[0].iov_len, real(fd, v, k, at, f), syscall(SYS_pread64, fd, v[0].iov_base, half, at)); }
ssize_t preadv64v2(int fd, const struct iovec *v, int k, off64_t at, int f)
{ REAL(preadv64v2); READ(fd, v[0].iov_len, real(fd, v, k, at, f), syscall(SYS_pread64, fd, v[0].iov_base, half, at)); }

#define MAP(name, off) \
    void *name(void *a, size_t n, int prot, int flags, int fd, off at) \
    { REAL(name); if (fd < 0) return real(a, n, prot, flags, fd, at); \
      ON_FD("mmap", fd, n, real(a, n, prot, flags, fd, at), MAP_FAILED); }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

/* ---- writing ---- */

static long long place(int fd, long long at)
{
    if (at >= 0)
        return at;
    if (fcntl(fd, F_GETFL) & O_APPEND)
        return lseek(fd, 0, SEEK_END);
    return lseek(fd, 0, SEEK_CUR);
}

#define WRITE(fd, data, size, at, go_all, go_part) \
    do { \
        char space_[PATH_MAX]; \
        const char *full_ = armed && !inside ? of_fd(fd, space_) : NULL; \
        if (!WATCHED(full_)) return go_all; \
        long n_; int how_ = met(&n_); \
        if (how_ > 0) { note(n_, "write", 0, 0, full_, NULL, NULL, 0); errno = how_; return -1; } \
        if (how_ == SHORT && (size) > 1) { size_t half = (size) / 2; \
            note(n_, "write", place(fd, at), half, full_, NULL, data, half); return go_part; } \
        note(n_, "write", place(fd, at), size, full_, NULL, data, size); \
        return go_all; \
    } while (0)

ssize_t write(int fd, const void *b, size_t n)
{ REAL(write); WRITE(fd, b, n, -1, real(fd, b, n), real(fd, b, half)); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t at)
{ REAL(pwrite); WRITE(fd, b, n, at, real(fd, b, n, at), real(fd, b, half, at)); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t at)
{ REAL(pwrite64); WRITE(fd, b, n, at, real(fd, b, n, at), real(fd, b, half, at)); }
/* Written as one buffer after the other, which the callers must bear. */
ssize_t writev(int fd, const struct iovec *v, int k)
{
    REAL(writev);
    char space[PATH_MAX];
    if (!armed || inside || !WATCHED(of_fd(fd, space)))
        return real(fd, v, k);
    for (int i = 0; i < k; i++)
        if (v[i].iov_len)
            return write(fd, v[i].iov_base, v[i].iov_len);
    return 0;
}
size_t fwrite(const void *b, size_t size, size_t n, FILE *file)
{
    REAL(fwrite);
    char space[PATH_MAX];
    const char *full = armed && !inside ? of_fd(fileno(file), space) : NULL;
    if (!WATCHED(full))
        return real(b, size, n, file);
    long number;
    int how = met(&number);
    note(number, "fwrite", 0, 0, full, NULL, NULL, 0);
    if (how > 0) { errno = how; return 0; }
    return real(b, size, n, file);
}
ssize_t sendfile(int to, int from, off_t *at, size_t n)
{
    REAL(sendfile);
    char space[PATH_MAX];
    const char *full = armed && !inside ? of_fd(to, space) : NULL;
    if (!WATCHED(full))
        return real(to, from, at, n);
    long number;
    int how = met(&number);
    if (how > 0) { note(number, "sendfile", 0, 0, full, NULL, NULL, 0); errno = how; return -1; }
    long long source = at ? *at : lseek(from, 0, SEEK_CUR), target = place(to, -1);
    ssize_t got = real(to, from, at, n);
    char *data = data_too && got > 0 ? malloc(got) : NULL;
    if (data)
        got = syscall(SYS_pread64, from, data, got, source);
    note(number, "sendfile", target, got, full, NULL, data, got);
    free(data);
    return got;
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t n) { return sendfile(to, from, at, n); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned f)
{ REAL(copy_file_range); ON_FD("copy", to, n, real(from, a, to, b, n, f), -1); }

int ftruncate(int fd, off_t n) { REAL(ftruncate); ON_FD("truncate", fd, n, real(fd, n), -1); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); ON_FD("truncate", fd, n, real(fd, n), -1); }
int posix_fallocate(int fd, off_t a, off_t n)
{ REAL(posix_fallocate); ON_FD("fallocate", fd, n, real(fd, a, n), errno); }
int fsync(int fd) { REAL(fsync); ON_FD("fsync", fd, 0, real(fd), -1); }
int fdatasync(int fd) { REAL(fdatasync); ON_FD("fsync", fd, 0, real(fd), -1); }
int flock(int fd, int what) { REAL(flock); ON_FD("flock", fd, what, real(fd, what), -1); }

int close(int fd)
{
    REAL(close);
    char space[PATH_MAX];
    const char *full = armed && !inside ? of_fd(fd, space) : NULL;
    if (!WATCHED(full))
        return real(fd);
    long n;
    int how = met(&n);
    int reads = (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY; /* nothing to lose */
    note(n, reads ? "close read" : "close", 0, 0, full, NULL, NULL, 0);
    if (reads)
        how = 0;
    int got = real(fd); /* the descriptor is gone either way */
    if (how > 0) { errno = how; return -1; }
    return got;
}

/* ---- names ---- */

#define TWO(call, d1, from, d2, to, go) \
    do { \
        char s1_[PATH_MAX], s2_[PATH_MAX]; \
        const char *a_ = armed && !inside ? absolute(d1, from, s1_) : NULL; \
        const char *b_ = armed && !inside ? absolute(d2, to, s2_) : NULL; \
        if (!WATCHED(b_)) return go; \
        long n_; int how_ = met(&n_); \
        note(n_, call, how_, 0, a_, b_, NULL, 0); \
        if (how_ > 0) { errno = how_; return -1; } \
        return go; \
    } while (0)

int rename(const char *a, const char *b)
{ REAL(rename); TWO("rename", AT_FDCWD, a, AT_FDCWD, b, real(a, b)); }
int renameat(int d, const char *a, int e, const char *b)
{ REAL(renameat); TWO("rename", d, a, e, b, real(d, a, e, b)); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f)
{
    REAL(renameat2);
    if (f & 2)
        TWO("exchange", d, a, e, b, real(d, a, e, b, f));
    TWO("rename", d, a, e, b, real(d, a, e, b, f));
}
int link(const char *a, const char *b)
{ REAL(link); TWO("link", AT_FDCWD, a, AT_FDCWD, b, real(a, b)); }
int linkat(int d, const char *a, int e, const char *b, int f)
{ REAL(linkat); TWO("link", d, a, e, b, real(d, a, e, b, f)); }
int unlink(const char *p) { REAL(unlink); ON_PATH("unlink", AT_FDCWD, p, real(p), -1); }
int unlinkat(int d, const char *p, int f)
{
    REAL(unlinkat);
    if (f & AT_REMOVEDIR)
        ON_PATH("rmdir", d, p, real(d, p, f), -1);
    ON_PATH("unlink", d, p, real(d, p, f), -1);
}
int rmdir(const char *p) { REAL(rmdir); ON_PATH("rmdir", AT_FDCWD, p, real(p), -1); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); ON_PATH("mkdir", AT_FDCWD, p, real(p, m), -1); }
int mkdirat(int d, const char *p, mode_t m)
{ REAL(mkdirat); ON_PATH("mkdir", d, p, real(d, p, m), -1); }

/* ---- what is asked ---- */

int stat(const char *p, struct stat *s) { REAL(stat); ON_PATH("stat", AT_FDCWD, p, real(p, s), -1); }
int stat64(const char *p, struct stat64 *s) { REAL(stat64); ON_PATH("stat", AT_FDCWD, p, real(p, s), -1); }
int lstat(const char *p, struct stat *s) { REAL(lstat); ON_PATH("stat", AT_FDCWD, p, real(p, s), -1); }
int lstat64(const char *p, struct stat64 *s) { REAL(lstat64); ON_PATH("stat", AT_FDCWD, p, real(p, s), -1); }
int fstatat(int d, const char *p, struct stat *s, int f)
{ REAL(fstatat); ON_PATH("stat", d, p, real(d, p, s, f), -1); }
int fstat(int fd, struct stat *s) { REAL(fstat); ON_FD("fstat", fd, 0, real(fd, s), -1); }
int fstat64(int fd, struct stat64 *s) { REAL(fstat64); ON_FD("fstat", fd, 0, real(fd, s), -1); }
