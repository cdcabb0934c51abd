/* A CUDA runtime that computes nothing, to be loaded before torch's own (LD_PRELOAD).
 *
 * torch's CUDA build links the runtime dynamically, so that with this library in front it sees a GPU on any machine.
 * Device memory is memory of the host, copies and memsets are made at once, a kernel is counted and computes nothing.
 * Two rules that a real driver sets are kept: what waits for the device is counted and reported with the call's name, and
 * what a stream capture forbids is counted and answered with error 900.
 *
 * Which GPU: STANDIN_GPU, a row of `kinds` below. STANDIN_DRIVER: the driver's CUDA version, 13000 if not given; below
 * 13000 the runtime refuses it, as the real one does. Made for the runtime of CUDA 13 (torch 2.14 and 2.15).
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* the header renames these to versioned symbols; torch asks for the names below */
#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo
#undef cudaEventElapsedTime
#undef cudaGetDriverEntryPointByVersion

#define EXPORT __attribute__((visibility("default")))
#define API EXPORT cudaError_t
#define NOTHING(name, arguments) API name arguments { return cudaSuccess; }
#define MISSING(name, arguments) API name arguments { return last_error = cudaErrorNotSupported; }

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last_error = cudaSuccess;
static __thread int device;

/* ---- what is counted ---- */

enum { WAITS, LAUNCHES, COPIES, MEMSETS, MALLOCS, CAPTURES, GRAPH_LAUNCHES, FORBIDDEN, COUNTERS };
static const char *counter_names[COUNTERS] = {"waits",    "launches",       "copies",   "memsets",
                                              "mallocs",  "captures",       "graph_launches", "forbidden"};
EXPORT volatile long standin_counts[COUNTERS];
EXPORT const char *standin_counter_name(int i) { return i < COUNTERS ? counter_names[i] : NULL; }

/* Called with "wait", "forbidden" or "kernel" and the name of the call or kernel. */
static void (*listener)(const char *kind, const char *name);
EXPORT void standin_listen(void (*function)(const char *, const char *)) { listener = function; }
static void tell(int counter, const char *kind, const char *name) {
  __sync_fetch_and_add(&standin_counts[counter], 1);
  if (listener) listener(kind, name);
}

/* ---- streams and captures ---- */

typedef struct { long nodes; } Graph;
typedef struct { int capturing, mode, invalid; unsigned long long id; Graph *graph; pthread_t thread; } Stream;
typedef struct { Stream *captured_on; } Event;

static Stream default_stream;
static Stream *captures[64];
static int open_captures;
static unsigned long long capture_ids;
static __thread int thread_mode = cudaStreamCaptureModeGlobal;

static Stream *stream_of(cudaStream_t s) { return (uintptr_t)s <= 2 ? &default_stream : (Stream *)s; }

/* Whether a capture under way forbids this thread such a call; see cudaThreadExchangeStreamCaptureMode. */
static int forbidden(const char *name) {
  int found = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < open_captures; i++) {
    Stream *s = captures[i];
    int mine = pthread_equal(s->thread, pthread_self());
    int strict = mine ? s->mode != cudaStreamCaptureModeRelaxed
                      : s->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (thread_mode != cudaStreamCaptureModeRelaxed && strict) found = s->invalid = 1;
  }
  pthread_mutex_unlock(&lock);
  if (found) tell(FORBIDDEN, "forbidden", name);
  return found;
}
#define NOT_WHILE_CAPTURING(name) if (forbidden(name)) return last_error = cudaErrorStreamCaptureUnsupported

API cudaStreamCreate(cudaStream_t *s) { *s = (cudaStream_t)calloc(1, sizeof(Stream)); return cudaSuccess; }
API cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return cudaStreamCreate(s); }
API cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return cudaStreamCreate(s); }
NOTHING(cudaStreamDestroy, (cudaStream_t s))
API cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return cudaSuccess; }
API cudaStreamQuery(cudaStream_t s) { NOT_WHILE_CAPTURING("cudaStreamQuery"); return cudaSuccess; }

API cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  Stream *stream = stream_of(s);
  if (stream == &default_stream) return last_error = cudaErrorStreamCaptureUnsupported;
  pthread_mutex_lock(&lock);
  *stream = (Stream){1, mode, 0, ++capture_ids, calloc(1, sizeof(Graph)), pthread_self()};
  captures[open_captures++] = stream;
  pthread_mutex_unlock(&lock);
  standin_counts[CAPTURES]++;
  return cudaSuccess;
}

API cudaStreamBeginCaptureToGraph(cudaStream_t s, cudaGraph_t g, const cudaGraphNode_t *d, const cudaGraphEdgeData *e,
                                  size_t n, enum cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(s, mode);
}

API cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  Stream *stream = stream_of(s);
  if (!stream->capturing) return last_error = cudaErrorIllegalState;
  stream->capturing = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < open_captures; i++)
    if (captures[i] == stream) captures[i] = captures[--open_captures];
  pthread_mutex_unlock(&lock);
  *graph = stream->invalid ? NULL : (cudaGraph_t)stream->graph;
  return stream->invalid ? (last_error = cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

API cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  Stream *stream = stream_of(s);
  *status = !stream->capturing  ? cudaStreamCaptureStatusNone
            : stream->invalid   ? cudaStreamCaptureStatusInvalidated
                                : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

API cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
                             const cudaGraphNode_t **before, const cudaGraphEdgeData **edges, size_t *count) {
  if (id) *id = stream_of(s)->id;
  if (graph) *graph = (cudaGraph_t)stream_of(s)->graph;
  if (before) *before = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaStreamIsCapturing(s, status);
}

API cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  int before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

NOTHING(cudaStreamUpdateCaptureDependencies,
        (cudaStream_t s, cudaGraphNode_t *d, const cudaGraphEdgeData *e, size_t n, unsigned flags))
API cudaGraphInstantiate(cudaGraphExec_t *run, cudaGraph_t graph, unsigned long long flags) {
  *run = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
API cudaGraphInstantiateWithFlags(cudaGraphExec_t *run, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(run, graph, flags);
}
API cudaGraphLaunch(cudaGraphExec_t run, cudaStream_t s) { standin_counts[GRAPH_LAUNCHES]++; return cudaSuccess; }
API cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  if (!nodes) *count = ((Graph *)graph)->nodes;
  return cudaSuccess;
}
API cudaGraphNodeGetDependencies(cudaGraphNode_t a, cudaGraphNode_t *b, cudaGraphEdgeData *edges, size_t *count) {
  *count = 0;
  return cudaSuccess;
}
NOTHING(cudaGraphDestroy, (cudaGraph_t graph))
NOTHING(cudaGraphExecDestroy, (cudaGraphExec_t run))
NOTHING(cudaGraphRetainUserObject, (cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags))
API cudaUserObjectCreate(cudaUserObject_t *object, void *p, cudaHostFn_t destroy, unsigned count, unsigned flags) {
  *object = (cudaUserObject_t)1;
  return cudaSuccess;
}
NOTHING(cudaUserObjectRelease, (cudaUserObject_t object, unsigned count))
MISSING(cudaGraphAddNode, (cudaGraphNode_t *n, cudaGraph_t g, const cudaGraphNode_t *d, const cudaGraphEdgeData *e, size_t k,
                           struct cudaGraphNodeParams *p))
MISSING(cudaGraphConditionalHandleCreate, (cudaGraphConditionalHandle *h, cudaGraph_t g, unsigned value, unsigned flags))

/* ---- events, and everything that waits ---- */

API cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = (cudaEvent_t)calloc(1, sizeof(Event)); return cudaSuccess; }
API cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
API cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
API cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  ((Event *)e)->captured_on = stream_of(s)->capturing ? stream_of(s) : NULL;
  return cudaSuccess;
}
API cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
API cudaEventQuery(cudaEvent_t e) { NOT_WHILE_CAPTURING("cudaEventQuery"); return cudaSuccess; }
API cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return cudaSuccess; }
/* A stream that waits for an event of a capture takes part in it, until it waits for another. */
API cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
  Stream *stream = stream_of(s), *from = e ? ((Event *)e)->captured_on : NULL;
  if (from && from->capturing && !stream->capturing && stream != &default_stream) *stream = *from;
  else if (from && !from->capturing) stream->capturing = 0;
  return cudaSuccess;
}
API cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *p, unsigned flags) { f(s, 0, p); return cudaSuccess; }
API cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *p) { f(p); return cudaSuccess; }

static cudaError_t wait(const char *name) {
  NOT_WHILE_CAPTURING(name);
  tell(WAITS, "wait", name);
  return cudaSuccess;
}
API cudaDeviceSynchronize(void) { return wait("cudaDeviceSynchronize"); }
API cudaStreamSynchronize(cudaStream_t s) { return wait("cudaStreamSynchronize"); }
API cudaEventSynchronize(cudaEvent_t e) { return wait("cudaEventSynchronize"); }

/* ---- memory ---- */

typedef struct { char *start; size_t size; int type; } Block;
static Block blocks[1 << 16];
static int used_blocks;
static size_t in_use;

static const struct { const char *name; int major, minor, processors, threads, shared; size_t memory, l2; } kinds[] = {
    {"NVIDIA H100 80GB HBM3", 9, 0, 132, 2048, 232448, 85017493504, 52428800},
    {"NVIDIA H200", 9, 0, 132, 2048, 232448, 150000000000, 62914560},
    {"NVIDIA A100-SXM4-80GB", 8, 0, 108, 2048, 166912, 85017493504, 41943040},
    {"Tesla T4", 7, 5, 40, 1024, 65536, 15000000000, 4194304},
};
static int setting(const char *name, int otherwise) { const char *p = getenv(name); return p ? atoi(p) : otherwise; }
#define KIND kinds[setting("STANDIN_GPU", 0)]
#define DRIVER setting("STANDIN_DRIVER", CUDART_VERSION)

static void remember(void *p, size_t size, int type) {
  pthread_mutex_lock(&lock);
  if (used_blocks == sizeof blocks / sizeof *blocks) { fputs("stand-in: too many blocks of memory\n", stderr); abort(); }
  blocks[used_blocks++] = (Block){p, size, type};
  if (type == cudaMemoryTypeDevice) in_use += size;
  pthread_mutex_unlock(&lock);
}
static Block forget(void *p) {
  Block found = {0};
  pthread_mutex_lock(&lock);
  for (int i = 0; i < used_blocks; i++)
    if (blocks[i].start == p) {
      found = blocks[i];
      if (found.type == cudaMemoryTypeDevice) in_use -= found.size;
      blocks[i] = blocks[--used_blocks];
      break;
    }
  pthread_mutex_unlock(&lock);
  return found;
}
EXPORT int standin_type_of(const void *p) {
  int type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < used_blocks; i++)
    if ((char *)p >= blocks[i].start && (char *)p < blocks[i].start + blocks[i].size) type = blocks[i].type;
  pthread_mutex_unlock(&lock);
  return type;
}
static cudaError_t allocate(void **p, size_t size, int type) {
  *p = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*p == MAP_FAILED) return last_error = cudaErrorMemoryAllocation;
  remember(*p, size, type);
  return cudaSuccess;
}
static cudaError_t release(void *p) {
  Block block = p ? forget(p) : (Block){0};
  if (block.size) munmap(p, block.size);
  return cudaSuccess;
}

API cudaMalloc(void **p, size_t size) {
  NOT_WHILE_CAPTURING("cudaMalloc");
  standin_counts[MALLOCS]++;
  if (in_use + size > KIND.memory) return last_error = cudaErrorMemoryAllocation;
  return allocate(p, size, cudaMemoryTypeDevice);
}
API cudaMallocManaged(void **p, size_t size, unsigned flags) { return cudaMalloc(p, size); }
API cudaMallocAsync(void **p, size_t size, cudaStream_t s) { return cudaMalloc(p, size); }
API cudaFree(void *p) { if (p) { NOT_WHILE_CAPTURING("cudaFree"); } return release(p); }
API cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
API cudaHostAlloc(void **p, size_t size, unsigned flags) {
  NOT_WHILE_CAPTURING("cudaHostAlloc");
  return allocate(p, size, cudaMemoryTypeHost);
}
API cudaMallocHost(void **p, size_t size) { return cudaHostAlloc(p, size, cudaHostAllocDefault); }
API cudaFreeHost(void *p) { NOT_WHILE_CAPTURING("cudaFreeHost"); return release(p); }
API cudaHostRegister(void *p, size_t size, unsigned flags) { remember(p, size, cudaMemoryTypeHost); return cudaSuccess; }
API cudaHostUnregister(void *p) { forget(p); return cudaSuccess; }
API cudaMemGetInfo(size_t *available, size_t *total) {
  *total = KIND.memory;
  *available = *total - in_use;
  return cudaSuccess;
}
API cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p) {
  memset(found, 0, sizeof *found);
  found->type = standin_type_of(p);
  found->device = found->type == cudaMemoryTypeUnregistered ? -2 : device;
  found->devicePointer = found->hostPointer = (void *)p;
  return cudaSuccess;
}

API cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  cudaError_t error = wait("cudaMemcpy");
  if (!error) memmove(to, from, size);
  return error;
}
API cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t s) {
  standin_counts[COPIES]++;
  int pageable = standin_type_of(from) == cudaMemoryTypeUnregistered || standin_type_of(to) == cudaMemoryTypeUnregistered;
  if (!stream_of(s)->capturing) memmove(to, from, size);
  else if (pageable) { NOT_WHILE_CAPTURING("cudaMemcpyAsync of pageable memory"); }
  else stream_of(s)->graph->nodes++;
  return cudaSuccess;
}
API cudaMemcpyPeerAsync(void *to, int td, const void *from, int fd, size_t size, cudaStream_t s) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, s);
}
MISSING(cudaMemcpy2DAsync, (void *to, size_t tp, const void *from, size_t fp, size_t w, size_t h, enum cudaMemcpyKind kind,
                            cudaStream_t s))
NOTHING(cudaMemcpyToSymbol, (const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind kind))
API cudaMemset(void *p, int value, size_t size) { NOT_WHILE_CAPTURING("cudaMemset"); memset(p, value, size); return cudaSuccess; }
API cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) {
  standin_counts[MEMSETS]++;
  if (stream_of(s)->capturing) stream_of(s)->graph->nodes++;
  else memset(p, value, size);
  return cudaSuccess;
}
API cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr a, void *v) { *(uint64_t *)v = 0; return cudaSuccess; }
NOTHING(cudaMemPoolSetAttribute, (cudaMemPool_t pool, enum cudaMemPoolAttr a, void *v))
NOTHING(cudaMemPoolSetAccess, (cudaMemPool_t pool, const struct cudaMemAccessDesc *d, size_t n))
NOTHING(cudaMemPoolTrimTo, (cudaMemPool_t pool, size_t size))
MISSING(cudaIpcGetMemHandle, (cudaIpcMemHandle_t *h, void *p))
MISSING(cudaIpcOpenMemHandle, (void **p, cudaIpcMemHandle_t h, unsigned flags))
MISSING(cudaIpcCloseMemHandle, (void *p))
MISSING(cudaIpcGetEventHandle, (cudaIpcEventHandle_t *h, cudaEvent_t e))
MISSING(cudaIpcOpenEventHandle, (cudaEvent_t *e, cudaIpcEventHandle_t h))

/* ---- the device ---- */

API cudaDriverGetVersion(int *version) { *version = DRIVER; return cudaSuccess; }
API cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
API cudaGetDeviceCount(int *count) {
  *count = DRIVER >= 13000;
  return *count ? cudaSuccess : (last_error = cudaErrorInsufficientDriver);
}
API cudaGetDevice(int *d) { *d = device; return cudaSuccess; }
API cudaSetDevice(int d) { device = d; return cudaSuccess; }

API cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, KIND.name);
  p->major = KIND.major;
  p->minor = KIND.minor;
  p->totalGlobalMem = KIND.memory;
  p->l2CacheSize = KIND.l2;
  p->multiProcessorCount = KIND.processors;
  p->maxThreadsPerMultiProcessor = KIND.threads;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->warpSize = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = KIND.shared;
  p->sharedMemPerMultiprocessor = KIND.shared + 1024;
  p->reservedSharedMemPerBlock = 1024;
  p->textureAlignment = 512;
  p->memPitch = 2147483647;
  p->memoryBusWidth = 5120;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->managedMemory = p->concurrentManagedAccess = 1;
  p->streamPrioritiesSupported = p->cooperativeLaunch = p->memoryPoolsSupported = p->hostRegisterSupported = 1;
  p->clusterLaunch = KIND.major >= 9;
  return cudaSuccess;
}
API cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int d) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = KIND.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = KIND.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = KIND.processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = KIND.shared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = KIND.shared + 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = KIND.threads; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    case cudaDevAttrL2CacheSize: *value = KIND.l2; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
API cudaDeviceGetPCIBusId(char *text, int size, int d) { snprintf(text, size, "0000:%02x:00.0", d + 1); return cudaSuccess; }
API cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return cudaSuccess; }
MISSING(cudaDeviceEnablePeerAccess, (int a, unsigned flags))
API cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int d) { *pool = (cudaMemPool_t)1; return cudaSuccess; }
API cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
API cudaDeviceGetGraphMemAttribute(int d, enum cudaGraphMemAttributeType a, void *v) { *(uint64_t *)v = 0; return cudaSuccess; }
NOTHING(cudaDeviceSetGraphMemAttribute, (int d, enum cudaGraphMemAttributeType a, void *v))
NOTHING(cudaProfilerStart, (void))
NOTHING(cudaProfilerStop, (void))

API cudaGetLastError(void) { cudaError_t e = last_error; last_error = cudaSuccess; return e; }
API cudaPeekAtLastError(void) { return last_error; }
EXPORT const char *cudaGetErrorName(cudaError_t e) { return e ? "an error of the stand-in" : "cudaSuccess"; }
EXPORT const char *cudaGetErrorString(cudaError_t e) {
  if (e == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
  if (e == cudaErrorStreamCaptureInvalidated) return "operation failed due to a previous error during capture";
  if (e == cudaErrorMemoryAllocation) return "out of memory";
  return e ? "an error of the stand-in" : "no error";
}

/* ---- kernels ---- */

typedef struct { const void *host; const char *name; } Kernel;
static Kernel *kernels; /* a hash table that is at most half full */
static size_t capacity, registered;

static Kernel *slot(Kernel *table, size_t size, const void *host) {
  size_t i = ((uintptr_t)host >> 4) * 11400714819323198485u & (size - 1);
  while (table[i].host && table[i].host != host) i = (i + 1) & (size - 1);
  return &table[i];
}
EXPORT void **__cudaRegisterFatBinary(void *p) { static void *handle; return &handle; }
EXPORT char __cudaInitModule(void **handle) { return 1; }
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) {}
EXPORT void __cudaRegisterVar(void **handle, char *a, char *b, const char *c, int d, size_t e, int f, int g) {}
EXPORT void __cudaRegisterFunction(void **handle, const char *host, char *fun, const char *name, int limit, void *tid, void *bid,
                                   void *block, void *grid, int *warp) {
  pthread_mutex_lock(&lock);
  if (2 * registered >= capacity) {
    size_t larger = capacity ? 2 * capacity : 1 << 16;
    Kernel *table = calloc(larger, sizeof *table);
    for (size_t i = 0; i < capacity; i++)
      if (kernels[i].host) *slot(table, larger, kernels[i].host) = kernels[i];
    free(kernels);
    kernels = table;
    capacity = larger;
  }
  *slot(kernels, capacity, host) = (Kernel){host, name};
  registered++;
  pthread_mutex_unlock(&lock);
}

EXPORT void standin_launch(const char *name, void *stream) {
  if (stream_of(stream)->capturing) stream_of(stream)->graph->nodes++;
  tell(LAUNCHES, "kernel", name ? name : "?");
}
static cudaError_t launch(const void *host, cudaStream_t s) {
  standin_launch(capacity ? slot(kernels, capacity, host)->name : NULL, s);
  return cudaSuccess;
}
API cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **p, size_t shared, cudaStream_t s) { return launch(f, s); }
API __cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **p, size_t shared, cudaStream_t s) { return launch(f, s); }
API __cudaLaunchKernel_ptsz(const void *f, dim3 grid, dim3 b, void **p, size_t shared, cudaStream_t s) { return launch(f, s); }
API cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **p, size_t shared, cudaStream_t s) { return launch(f, s); }
API cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **p) { return launch(f, config->stream); }
API __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return cudaSuccess; }

/* f<<<grid, block, shared, stream>>>(...) pushes here what the function that it calls takes back */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } calls[8];
static __thread int depth;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  calls[depth].grid = grid;
  calls[depth].block = block;
  calls[depth].shared = shared;
  calls[depth++].stream = stream;
  return 0;
}
API __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = calls[--depth].grid;
  *block = calls[depth].block;
  *shared = calls[depth].shared;
  *(void **)stream = calls[depth].stream;
  return cudaSuccess;
}

API cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = 10 * KIND.major + KIND.minor;
  return cudaSuccess;
}
NOTHING(cudaFuncSetAttribute, (const void *f, enum cudaFuncAttribute a, int value))
NOTHING(cudaKernelSetAttributeForDevice, (cudaKernel_t k, enum cudaFuncAttribute a, int value, int d))
API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t shared, unsigned flags) {
  *n = KIND.threads / (block ? block : 1);
  return cudaSuccess;
}
API cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int block, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, block, shared, 0);
}
API cudaGetSymbolAddress(void **p, const void *symbol) { static char bytes[4096]; *p = bytes; return cudaSuccess; }
API cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *a, void **b, unsigned n,
                        enum cudaLibraryOption *c, void **d, unsigned m) {
  *library = (cudaLibrary_t)1;
  return cudaSuccess;
}
API cudaLibraryGetKernel(cudaKernel_t *k, cudaLibrary_t library, const char *name) { *k = (cudaKernel_t)1; return cudaSuccess; }
NOTHING(cudaLibraryUnload, (cudaLibrary_t library))
MISSING(cudaLibraryLoadFromFile, (cudaLibrary_t *library, const char *path, enum cudaJitOption *a, void **b, unsigned n,
                                  enum cudaLibraryOption *c, void **d, unsigned m))
MISSING(cudaLibraryGetKernelCount, (unsigned *count, cudaLibrary_t library))
MISSING(cudaLibraryGetGlobal, (void **p, size_t *size, cudaLibrary_t library, const char *name))
MISSING(cudaLibraryGetManaged, (void **p, size_t *size, cudaLibrary_t library, const char *name))
MISSING(cudaLibraryGetUnifiedFunction, (void **f, cudaLibrary_t library, const char *name))

/* torch asks the runtime for functions of the driver: those of driver.c, and for others one that answers "not supported" */
static int not_supported(void) { return cudaErrorNotSupported; }
API cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                     enum cudaDriverEntryPointQueryResult *result) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *f = driver ? dlsym(driver, name) : NULL;
  if (!*f) *f = (void *)not_supported;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
