/* libcuda.so.1 to cudart.c: what torch and Triton's launcher ask of the driver. Modules load, kernels are counted. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default"))) CUresult
#define NOTHING(name, arguments) API name arguments { return CUDA_SUCCESS; }
#define ANY(p) (*(p) = (void *)1, CUDA_SUCCESS)

/* functions of cudart.c, which is loaded first */
static void *runtime(const char *name) {
  void *found = dlsym(RTLD_DEFAULT, name);
  if (!found) { fprintf(stderr, "stand-in: the driver was loaded without the runtime (%s)\n", name); abort(); }
  return found;
}
static CUresult launch(const char *name, CUstream stream) {
  static void (*count)(const char *, void *);
  if (!count) count = (void (*)(const char *, void *))runtime("standin_launch");
  count(name, stream);
  return CUDA_SUCCESS;
}

NOTHING(cuInit, (unsigned flags))
API cuDriverGetVersion(int *version) { return ((int (*)(int *))runtime("cudaDriverGetVersion"))(version); }
API cuDeviceGetCount(int *count) { return ((int (*)(int *))runtime("cudaGetDeviceCount"))(count); }
API cuDeviceGet(CUdevice *device, int i) { *device = i; return CUDA_SUCCESS; }
API cuDeviceGetName(char *name, int size, CUdevice device) { snprintf(name, size, "stand-in"); return CUDA_SUCCESS; }
API cuDeviceGetUuid_v2(CUuuid *id, CUdevice device) { memset(id, 0, sizeof *id); return CUDA_SUCCESS; }
API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) { /* the runtime's numbers are the same */
  return ((int (*)(int *, int, int))runtime("cudaDeviceGetAttribute"))(value, attribute, device);
}

API cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return ANY((void **)context); }
NOTHING(cuDevicePrimaryCtxRelease_v2, (CUdevice device))
API cuCtxGetCurrent(CUcontext *context) { return ANY((void **)context); }
NOTHING(cuCtxSetCurrent, (CUcontext context))
API cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
NOTHING(cuCtxPushCurrent_v2, (CUcontext context))
API cuCtxPopCurrent_v2(CUcontext *context) { return ANY((void **)context); }
API cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
NOTHING(cuCtxSetLimit, (CUlimit limit, size_t value))
API cuCtxSynchronize(void) { return ((int (*)(void))runtime("cudaDeviceSynchronize"))(); }
API cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return ((int (*)(CUstream, void *))runtime("cudaStreamIsCapturing"))(stream, status);
}
API cuStreamGetCtx(CUstream stream, CUcontext *context) { return ANY((void **)context); }
API cuGetErrorString(CUresult e, const char **text) { *text = "an error of the stand-in"; return CUDA_SUCCESS; }
API cuGetErrorName(CUresult e, const char **text) { *text = "an error of the stand-in"; return CUDA_SUCCESS; }

/* Triton's launcher refuses a pointer that is not the device's. */
API cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr p) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
    *(CUdeviceptr *)value = p;
    return ((int (*)(const void *))runtime("standin_type_of"))((void *)p) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  }
  *(int *)value = attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? CU_MEMORYTYPE_DEVICE : 0;
  return CUDA_SUCCESS;
}
API cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr p) { *base = p; *size = 0; return CUDA_SUCCESS; }

API cuModuleLoad(CUmodule *module, const char *path) { return ANY((void **)module); }
API cuModuleLoadData(CUmodule *module, const void *image) { return ANY((void **)module); }
API cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *o, void **v) { return ANY((void **)module); }
NOTHING(cuModuleUnload, (CUmodule module))
API cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name); /* a function is its name */
  return CUDA_SUCCESS;
}
API cuModuleGetGlobal_v2(CUdeviceptr *p, size_t *n, CUmodule module, const char *name) { return CUDA_ERROR_NOT_FOUND; }
API cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
NOTHING(cuFuncSetAttribute, (CUfunction function, CUfunction_attribute attribute, int value))
NOTHING(cuFuncSetCacheConfig, (CUfunction function, CUfunc_cache config))
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int block, size_t shared) {
  *n = 2048 / (block ? block : 1);
  return CUDA_SUCCESS;
}
API cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) { *n = 1; return CUDA_SUCCESS; }

API cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   CUstream stream, void **parameters, void **extra) {
  return launch((char *)f, stream);
}
API cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
  return launch((char *)f, config->hStream);
}
API cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, CUstream stream, void **parameters) {
  return launch((char *)f, stream);
}
NOTHING(cuTensorMapEncodeTiled,
        (CUtensorMap *t, CUtensorMapDataType type, cuuint32_t rank, void *p, const cuuint64_t *a, const cuuint64_t *b,
         const cuuint32_t *c, const cuuint32_t *d, CUtensorMapInterleave i, CUtensorMapSwizzle s, CUtensorMapL2promotion l,
         CUtensorMapFloatOOBfill f))
