// Preload library that injects faults into the system calls of a program.
//
// It counts the calls that change files below one folder. At a chosen call it kills the process,
// makes calls fail, or sets the clock back. It also logs these calls; from the log, `faults.py`
// computes what a power loss may discard.
//
// $FAULT_FOLDER has the shared state (`state`), the log (`calls.log`), and a hard link to every
// file that was removed or replaced (`removed/INODE`).

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

// Equal to `CALLS` in faults.py.
enum call { WRITE, SYNC, CREATE, RENAME, MKDIR, REMOVE, TRUNCATE, NUM_CALL_NAMES };
static const char *const NAMES[] = {"write",  "sync",   "create",  "rename",
                                    "mkdir",  "remove", "truncate"};

// Equal to `Action` in faults.py.
enum action { NONE, KILL, KILL_INSIDE, FAIL_ONCE, FAIL_FROM_THEN_ON, MOVE_CLOCK };

// Equal to `_State` in faults.py.
struct state {
  int64_t counts[NUM_CALL_NAMES];  // Calls below `root` so far.
  int64_t num_matches;             // Those of them that match `pattern`.
  int64_t at_match;                // Index of the call at which the fault happens, from 1; 0: none.
  int64_t clock_seconds;           // Added to the clock by MOVE_CLOCK.
  int32_t action;
  int32_t error;
  int32_t is_logging;
  char root[PATH_MAX];         // Folder whose files are watched; empty: none.
  char pattern[2 * PATH_MAX];  // Pattern of "NAME PATH", such as "@(write|sync) *.json".
};

static struct state *state;
static int log_fd = -1;
static char removed_folder[PATH_MAX];

#define REAL(function) \
  static __typeof__(function) *real; \
  if (!real) real = (__typeof__(function) *)dlsym(RTLD_NEXT, #function)

static int real_open(const char *path, int flags, mode_t mode) {
  REAL(open);
  return real(path, flags, mode);
}

__attribute__((constructor)) static void start(void) {
  const char *folder = getenv("FAULT_FOLDER");
  if (!folder) return;
  char path[PATH_MAX];
  snprintf(path, sizeof path, "%s/state", folder);
  int fd = real_open(path, O_RDWR | O_CLOEXEC, 0);
  if (fd < 0) return;
  void *shared = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  snprintf(path, sizeof path, "%s/calls.log", folder);
  log_fd = real_open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  snprintf(removed_folder, sizeof removed_folder, "%s/removed", folder);
  if (shared != MAP_FAILED) state = shared;
}

// Completes a path that may be relative to a folder. Returns whether it is the root or below it.
static int resolve(int folder, const char *path, char *full) {
  if (!state || !state->root[0] || !path) return 0;
  if (path[0] == '/') {
    snprintf(full, PATH_MAX, "%s", path);
  } else {
    char link[64], base[PATH_MAX];
    if (folder == AT_FDCWD) {
      snprintf(link, sizeof link, "/proc/self/cwd");
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    }
    ssize_t length = readlink(link, base, sizeof base - 1);
    if (length < 0) return 0;
    base[length] = 0;
    if (*path) {
      snprintf(full, PATH_MAX, "%s/%s", base, path);
    } else {
      snprintf(full, PATH_MAX, "%s", base);
    }
  }
  size_t length = strlen(state->root);
  return !strncmp(full, state->root, length) && (full[length] == '/' || !full[length]);
}

static int resolve_fd(int fd, char *full) {
  int saved = errno, is_below = resolve(fd, "", full);
  errno = saved;
  return is_below;
}

// Counts a call and injects the fault if it is due. Returns the error that the call must fail with,
// 0, or -1 if the process must be killed in the middle of the call.
static int inject(enum call call, const char *path) {
  __atomic_add_fetch(&state->counts[call], 1, __ATOMIC_SEQ_CST);
  char text[PATH_MAX + 16];
  snprintf(text, sizeof text, "%s %s", NAMES[call], path);
  if (fnmatch(state->pattern, text, FNM_EXTMATCH)) return 0;
  int64_t index = __atomic_add_fetch(&state->num_matches, 1, __ATOMIC_SEQ_CST);
  if (!state->at_match || index < state->at_match) return 0;
  if (state->action == FAIL_FROM_THEN_ON) return state->error;
  if (index > state->at_match) return 0;
  if (state->action == KILL) kill(getpid(), SIGKILL);
  if (state->action == KILL_INSIDE) return -1;
  return state->action == FAIL_ONCE ? state->error : 0;
}

static ino_t inode(const char *path) {
  struct stat status;
  return lstat(path, &status) ? 0 : status.st_ino;
}

static ino_t parent_inode(const char *path) {
  char folder[PATH_MAX];
  snprintf(folder, sizeof folder, "%s", path);
  char *slash = strrchr(folder, '/');
  if (slash) *slash = 0;
  return inode(folder);
}

// Logs a call that succeeded: name, inodes of the file and of its folder, size, path, other path,
// and the inode of a file that it replaced.
static void log_call(enum call call, ino_t file, ino_t folder, int64_t size, const char *path,
                     const char *other, ino_t replaced) {
  if (log_fd < 0 || !state->is_logging) return;
  char line[2 * PATH_MAX + 200];
  int saved = errno;
  int length = snprintf(line, sizeof line, "%s\t%ld\t%ld\t%ld\t%s\t%s\t%ld\n", NAMES[call],
                        (long)file, (long)folder, (long)size, path, other, (long)replaced);
  REAL(write);
  if (real(log_fd, line, length) < 0) abort();
  errno = saved;
}

static void log_fd_call(enum call call, int fd, const char *path) {
  struct stat status;
  int saved = errno;
  if (!fstat(fd, &status)) log_call(call, status.st_ino, 0, status.st_size, path, "", 0);
  errno = saved;
}

// Keeps the contents of a file that is about to be removed. Returns its inode.
static ino_t keep_removed(const char *path) {
  struct stat status;
  int saved = errno;
  ino_t found = 0;
  if (state->is_logging && !lstat(path, &status) && S_ISREG(status.st_mode)) {
    char target[PATH_MAX + 32];
    snprintf(target, sizeof target, "%s/%ld", removed_folder, (long)status.st_ino);
    link(path, target);
    found = status.st_ino;
  }
  errno = saved;
  return found;
}

// Calls that take a file descriptor. HALF is the call with half of the bytes, during which the
// process is killed.
#define FD_CALL(CALL, FD, REAL_CALL, HALF) \
  do { \
    char path[PATH_MAX]; \
    if (!resolve_fd(FD, path)) return REAL_CALL; \
    int error = inject(CALL, path); \
    if (error < 0) { \
      HALF; \
      kill(getpid(), SIGKILL); \
    } \
    if (error > 0) { \
      errno = error; \
      return -1; \
    } \
    __typeof__(REAL_CALL) result = REAL_CALL; \
    if (result >= 0) log_fd_call(CALL, FD, path); \
    return result; \
  } while (0)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  FD_CALL(WRITE, fd, real(fd, data, size), (void)!real(fd, data, size / 2));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  REAL(pwrite);
  FD_CALL(WRITE, fd, real(fd, data, size, offset), (void)!real(fd, data, size / 2, offset));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
  REAL(pwrite64);
  FD_CALL(WRITE, fd, real(fd, data, size, offset), (void)!real(fd, data, size / 2, offset));
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(writev);
  FD_CALL(WRITE, fd, real(fd, parts, count), (void)!real(fd, parts, count / 2));
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
  REAL(pwritev);
  FD_CALL(WRITE, fd, real(fd, parts, count, offset), (void)!real(fd, parts, count / 2, offset));
}

ssize_t sendfile(int fd, int source, off_t *offset, size_t size) {
  REAL(sendfile);
  FD_CALL(WRITE, fd, real(fd, source, offset, size), (void)!real(fd, source, offset, size / 2));
}

ssize_t sendfile64(int fd, int source, off64_t *offset, size_t size) {
  REAL(sendfile64);
  FD_CALL(WRITE, fd, real(fd, source, offset, size), (void)!real(fd, source, offset, size / 2));
}

int fsync(int fd) {
  REAL(fsync);
  FD_CALL(SYNC, fd, real(fd), );
}

int fdatasync(int fd) {
  REAL(fdatasync);
  FD_CALL(SYNC, fd, real(fd), );
}

int ftruncate(int fd, off_t size) {
  REAL(ftruncate);
  FD_CALL(TRUNCATE, fd, real(fd, size), );
}

int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64);
  FD_CALL(TRUNCATE, fd, real(fd, size), );
}

// Opens a file. Only calls that create or empty it are counted.
static int open_file(int folder, const char *name, int flags, mode_t mode) {
  static int (*real)(int, const char *, int, ...);
  if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat");
  char path[PATH_MAX];
  int saved = errno;
  int is_writing = flags & (O_CREAT | O_TRUNC) && resolve(folder, name, path);
  if (!is_writing) {
    errno = saved;
    return real(folder, name, flags, mode);
  }
  ino_t before = inode(path);
  errno = saved;
  int is_created = flags & O_CREAT && !before;
  if (!is_created && !(flags & O_TRUNC)) return real(folder, name, flags, mode);
  enum call call = is_created ? CREATE : TRUNCATE;
  int error = inject(call, path);
  if (error > 0) {
    errno = error;
    return -1;
  }
  int fd = real(folder, name, flags, mode);
  if (error < 0) kill(getpid(), SIGKILL);
  if (fd >= 0) log_call(call, inode(path), parent_inode(path), 0, path, "", 0);
  return fd;
}

#define OPEN_MODE \
  mode_t mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list arguments; \
    va_start(arguments, flags); \
    mode = va_arg(arguments, mode_t); \
    va_end(arguments); \
  }

int open(const char *path, int flags, ...) {
  OPEN_MODE return open_file(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  OPEN_MODE return open_file(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

int openat(int folder, const char *path, int flags, ...) {
  OPEN_MODE return open_file(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
  OPEN_MODE return open_file(folder, path, flags | O_LARGEFILE, mode);
}

int creat(const char *path, mode_t mode) {
  return open_file(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

int renameat2(int folder, const char *path, int other_folder, const char *other,
              unsigned int flags) {
  REAL(renameat2);
  char source[PATH_MAX], target[PATH_MAX];
  int is_below = resolve(folder, path, source);
  is_below = resolve(other_folder, other, target) && is_below;
  if (!is_below) return real(folder, path, other_folder, other, flags);
  int error = inject(RENAME, source);
  if (error > 0) {
    errno = error;
    return -1;
  }
  ino_t replaced = keep_removed(target);
  int result = real(folder, path, other_folder, other, flags);
  if (error < 0) kill(getpid(), SIGKILL);
  if (!result)
    log_call(RENAME, inode(target), parent_inode(target), 0, source, target, replaced);
  return result;
}

int renameat(int folder, const char *path, int other_folder, const char *other) {
  return renameat2(folder, path, other_folder, other, 0);
}

int rename(const char *path, const char *other) {
  return renameat2(AT_FDCWD, path, AT_FDCWD, other, 0);
}

int mkdirat(int folder, const char *name, mode_t mode) {
  REAL(mkdirat);
  char path[PATH_MAX];
  if (!resolve(folder, name, path)) return real(folder, name, mode);
  int error = inject(MKDIR, path);
  if (error > 0) {
    errno = error;
    return -1;
  }
  int result = real(folder, name, mode);
  if (error < 0) kill(getpid(), SIGKILL);
  if (!result) log_call(MKDIR, inode(path), parent_inode(path), 0, path, "", 0);
  return result;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int folder, const char *name, int flags) {
  REAL(unlinkat);
  char path[PATH_MAX];
  if (!resolve(folder, name, path)) return real(folder, name, flags);
  int error = inject(REMOVE, path);
  if (error > 0) {
    errno = error;
    return -1;
  }
  ino_t removed = flags & AT_REMOVEDIR ? 0 : keep_removed(path);
  int result = real(folder, name, flags);
  if (error < 0) kill(getpid(), SIGKILL);
  if (!result) log_call(REMOVE, removed, parent_inode(path), 0, path, "", removed);
  return result;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

static int64_t clock_offset(void) {
  int is_due = state && state->action == MOVE_CLOCK && state->num_matches >= state->at_match;
  return is_due ? state->clock_seconds : 0;
}

int clock_gettime(clockid_t clock, struct timespec *found) {
  REAL(clock_gettime);
  int result = real(clock, found);
  if (!result && clock == CLOCK_REALTIME) found->tv_sec += clock_offset();
  return result;
}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {
  REAL(gettimeofday);
  int result = real(found, zone);
  if (!result) found->tv_sec += clock_offset();
  return result;
}

time_t time(time_t *found) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (found) *found = now.tv_sec;
  return now.tv_sec;
}
