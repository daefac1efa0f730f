/* NCCL's calls about communicators, one line each on standard error: "NCCL call ranks=N rank=R". Nothing is sent. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char internal[128]; } Id;
typedef struct { int ranks, rank; } Comm;

static void say(const char *what, int ranks, int rank) {
  fprintf(stderr, "NCCL %s ranks=%d rank=%d\n", what, ranks, rank);
  fflush(stderr);
}
static Comm *make(int ranks, int rank) {
  Comm *made = malloc(sizeof *made);
  made->ranks = ranks, made->rank = rank;
  return made;
}

int ncclGetVersion(int *version) { *version = 22907; return 0; }
int ncclGetUniqueId(Id *id) { memset(id, 7, sizeof *id); say("ncclGetUniqueId", 0, 0); return 0; }
int ncclCommInitRankConfig(Comm **c, int n, Id id, int r, void *config) {
  say("ncclCommInitRankConfig", n, r);
  *c = make(n, r);
  return 0;
}
int ncclCommInitRankScalable(Comm **c, int n, int r, int ids, Id *id, void *config) {
  say("ncclCommInitRankScalable", n, r);
  *c = make(n, r);
  return 0;
}
int ncclCommInitRank(Comm **c, int n, Id id, int r) { say("ncclCommInitRank", n, r); *c = make(n, r); return 0; }
/* Collective over the parent's ranks, which are what is written down. */
int ncclCommSplit(Comm *parent, int color, int key, Comm **c, void *config) {
  say("ncclCommSplit", parent->ranks, parent->rank);
  *c = color < 0 ? 0 : make(parent->ranks, key);
  return 0;
}
int ncclCommGetAsyncError(Comm *c, int *error) { *error = 0; return 0; }
int ncclCommCount(Comm *c, int *n) { *n = c->ranks; return 0; }
int ncclCommUserRank(Comm *c, int *r) { *r = c->rank; return 0; }
const char *ncclGetErrorString(int error) { return "none"; }
const char *ncclGetLastError(Comm *c) { return "none"; }
int ncclCommAbort(Comm *c) { return 0; }
int ncclCommDestroy(Comm *c) { return 0; }
int ncclCommFinalize(Comm *c) { return 0; }
int ncclGroupStart() { return 0; }
int ncclGroupEnd() { return 0; }
