// Library to preload: system calls on files that match a pattern fail. See failing_files.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int num_matches;

// Returns whether a call must fail: the FAIL_FIRST-th that matches, and FAIL_COUNT - 1 after it.
static int fails(const char *call, int folder, const char *path) {
  const char *pattern = getenv("FAIL_PATTERN");
  char absolute[PATH_MAX], parent[PATH_MAX] = "", link[64];
  if (pattern == NULL || path == NULL) return 0;
  if (path[0] != '/' && folder != AT_FDCWD) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, parent, sizeof parent - 1);
    if (length < 0) return 0;
    parent[length] = 0;
  } else if (path[0] != '/') {
    if (getcwd(parent, sizeof parent) == NULL) return 0;
  }
  snprintf(absolute, sizeof absolute, "%s %s%s%s", call, parent, parent[0] ? "/" : "", path);
  if (fnmatch(pattern, absolute, 0) != 0) return 0;
  int index = __atomic_add_fetch(&num_matches, 1, __ATOMIC_SEQ_CST);
  int first = atoi(getenv("FAIL_FIRST")), count = atoi(getenv("FAIL_COUNT"));
  if (index < first || index - first >= count) return 0;
  // Opened by other functions than those below, which call this one.
  FILE *log = fopen(getenv("FAIL_LOG"), "a");
  if (log != NULL) {
    fprintf(log, "%s\n", absolute);
    fclose(log);
  }
  errno = atoi(getenv("FAIL_ERRNO"));
  return 1;
}

static int fd_fails(const char *call, int fd) {
  char link[64], path[PATH_MAX];
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (length < 0 || path[0] != '/') return 0;
  path[length] = 0;
  return fails(call, AT_FDCWD, path);
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                      \
  int name(const char *path, int flags, ...) {                          \
    va_list list;                                                       \
    va_start(list, flags);                                              \
    int mode = va_arg(list, int);                                       \
    va_end(list);                                                       \
    if ((flags & (O_WRONLY | O_RDWR)) && fails("open", AT_FDCWD, path)) \
      return -1;                                                        \
    return REAL(name)(path, flags, mode);                               \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                  \
  int name(int folder, const char *path, int flags, ...) {            \
    va_list list;                                                     \
    va_start(list, flags);                                            \
    int mode = va_arg(list, int);                                     \
    va_end(list);                                                     \
    if ((flags & (O_WRONLY | O_RDWR)) && fails("open", folder, path)) \
      return -1;                                                      \
    return REAL(name)(folder, path, flags, mode);                     \
  }
OPENAT(openat)
OPENAT(openat64)

FILE *fopen64(const char *path, const char *mode) {
  if (mode[0] != 'r' && fails("open", AT_FDCWD, path)) return NULL;
  return REAL(fopen64)(path, mode);
}
ssize_t write(int fd, const void *data, size_t size) {
  return fd_fails("write", fd) ? -1 : REAL(write)(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
  return fd_fails("write", fd) ? -1 : REAL(pwrite64)(fd, data, size, offset);
}
ssize_t writev(int fd, const struct iovec *data, int count) {
  return fd_fails("write", fd) ? -1 : REAL(writev)(fd, data, count);
}
int fsync(int fd) { return fd_fails("fsync", fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fd_fails("fsync", fd) ? -1 : REAL(fdatasync)(fd); }
int ftruncate64(int fd, off64_t size) {
  return fd_fails("ftruncate", fd) ? -1 : REAL(ftruncate64)(fd, size);
}
int rename(const char *source, const char *target) {
  return fails("rename", AT_FDCWD, source) ? -1 : REAL(rename)(source, target);
}
int renameat(int a, const char *source, int b, const char *target) {
  return fails("rename", a, source) ? -1 : REAL(renameat)(a, source, b, target);
}
int unlink(const char *path) {
  return fails("unlink", AT_FDCWD, path) ? -1 : REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
  return fails("unlink", folder, path) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) { return fails("rmdir", AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) {
  return fails("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
  return fails("mkdir", folder, path) ? -1 : REAL(mkdirat)(folder, path, mode);
}
