/* Functions of cuBLAS and cuDNN that a training step calls: handles are made and set, products are counted.
 *
 * Those libraries link the CUDA runtime statically, so that cudart.c alone would not reach them. Convolutions are not here:
 * inside.py puts functions of their shapes in the place of torch's operators. Every function here returns 0, "success".
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define NOTHING(name) EXPORT int name() { return 0; }
#define PRODUCT(name) EXPORT int name() { standin_launch(#name, 0); return 0; }
#define HANDLE(name) EXPORT int name(void **handle) { *handle = calloc(1, 64); return 0; }
#define ZERO(name) EXPORT int name(void *handle, int *value) { *value = 0; return 0; }

extern void standin_launch(const char *name, void *stream);

HANDLE(cublasCreate_v2)
NOTHING(cublasDestroy_v2)
EXPORT int cublasGetStream_v2(void *handle, void **stream) { *stream = 0; return 0; }
NOTHING(cublasSetStream_v2)
NOTHING(cublasSetWorkspace_v2)
ZERO(cublasGetMathMode)
NOTHING(cublasSetMathMode)
ZERO(cublasGetPointerMode_v2)
NOTHING(cublasSetPointerMode_v2)
NOTHING(cublasSetSmCountTarget)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)

HANDLE(cublasLtCreate)
NOTHING(cublasLtMatmulDescCreate)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatrixLayoutCreate)
NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatmulPreferenceCreate)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy)
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *d, void *a, void *b, void *c, void *e, void *preference, int asked,
                                          void *result, int *found) {
  memset(result, 0, 96);
  *found = 1;
  return 0;
}
PRODUCT(cublasLtMatmul)

HANDLE(cudnnCreate)
EXPORT size_t cudnnGetVersion(void) { return 92400; }
EXPORT size_t cudnnGetCudartVersion(void) { return 13000; }
NOTHING(cudnnSetStream)
HANDLE(cudnnCreateTensorDescriptor)
NOTHING(cudnnSetTensorNdDescriptor)
NOTHING(cudnnDestroyTensorDescriptor)
HANDLE(cudnnCreateActivationDescriptor)
NOTHING(cudnnSetActivationDescriptor)
NOTHING(cudnnDestroyActivationDescriptor)
PRODUCT(cudnnBatchNormalizationForwardTrainingEx)
PRODUCT(cudnnBatchNormalizationForwardInference)
PRODUCT(cudnnBatchNormalizationBackwardEx)
EXPORT int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *handle, int mode, int ops, void *x, void *z, void *y,
                                                                    void *scale, void *activation, size_t *size) {
  *size = 0;
  return 0;
}
EXPORT int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *handle, int mode, int ops, void *x, void *y, void *dy, void *dz,
                                                             void *dx, void *scale, void *activation, size_t *size) {
  *size = 0;
  return 0;
}
EXPORT int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *handle, int mode, int ops, void *activation, void *x,
                                                                size_t *size) {
  *size = 0;
  return 0;
}
