/* The CUDA runtime and driver, as far as torch asks for devices, streams and events: eight devices that do nothing. */
#include <string.h>

#define DONE(name) int name() { return 0; }
static int device = 0;
static long handles = 1000;

int cudaGetDeviceCount(int *n) { *n = 8; return 0; }
int cudaGetDevice(int *d) { *d = device; return 0; }
int cudaSetDevice(int d) { device = d; return 0; }
int cudaStreamGetPriority(void *stream, int *p) { *p = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int p) { *stream = (void *)++handles; return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = (void *)++handles; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)++handles; return 0; }
int cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaStreamGetCaptureInfo_v2(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
/* The attributes 75 and 76 are the compute capability, 16 the number of multiprocessors. */
int cudaDeviceGetAttribute(int *value, int attribute, int d) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1;
  return 0;
}

/* The first members of cudaDeviceProp in CUDA 13. */
struct properties {
  char name[256], uuid[16], luid[8];
  unsigned node_mask;
  unsigned long total_memory, shared_memory;
  int registers, warp;
  unsigned long pitch;
  int threads, block[3], grid[3];
  unsigned long constant_memory;
  int major, minor;
  unsigned long alignment[2];
  int multiprocessors;
};
int cudaGetDeviceProperties(struct properties *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "pretended");
  p->uuid[0] = d + 1;
  p->major = 9, p->minor = 0, p->warp = 32, p->multiprocessors = 132, p->total_memory = 80ul << 30;
  return 0;
}

DONE(cudaEventRecord) DONE(cudaEventQuery) DONE(cudaEventDestroy) DONE(cudaEventSynchronize) DONE(cudaStreamWaitEvent)
DONE(cudaStreamSynchronize) DONE(cudaStreamQuery) DONE(cudaDeviceSynchronize) DONE(cudaGetLastError)
DONE(cudaPeekAtLastError) DONE(cudaFree) DONE(cudaStreamDestroy)

/* torch registers its kernels as it is loaded. */
void **__cudaRegisterFatBinary(void *image) { static void *handle; return &handle; }
DONE(__cudaRegisterFatBinaryEnd) DONE(__cudaUnregisterFatBinary) DONE(__cudaRegisterFunction) DONE(__cudaRegisterVar)
DONE(__cudaInitModule) DONE(cuptiActivityRegisterCallbacks)
const char *cudaGetErrorString(int error) { return "none"; }
const char *cudaGetErrorName(int error) { return "none"; }

/* The driver, which torch opens by name. */
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 8; return 0; }
int cuCtxGetCurrent(void **context) { *context = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
