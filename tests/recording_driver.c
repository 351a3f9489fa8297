// CUDA's driver for tests: it launches nothing, and notes what it is told to launch.

#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "cuda.h"

enum { MOST = 64 };

typedef struct {
  char name[MOST];
  uint64_t function, grid[3], block[3], shared_bytes, stream;
  uint64_t attributes, attribute, attribute_value;
  uint64_t arguments[MOST];
} Record;

// What tests read, and set: how many launches are noted, less than zero for none to be; an error for
// those that follow, and how many get it; and how many microseconds a launch takes.
Record records[MOST];
int recorded = -1, error, errors, delay;

// A function's handle is its address here. Tests set how many bytes its arguments have.
typedef struct {
  char name[MOST];
  int sizes[MOST];
} Function;

static Function functions[1024];
static int known;

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                          void** extra) {
  (void)extra;
  if (errors > 0) {
    --errors;
    return (CUresult)error;
  }
  if (delay > 0) usleep(delay);
  if (recorded < 0) return CUDA_SUCCESS;
  if (recorded == MOST) return CUDA_ERROR_OUT_OF_MEMORY;
  const Function* launched = (const Function*)function;
  Record* record = &records[recorded++];
  memset(record, 0, sizeof *record);
  strcpy(record->name, launched->name);
  record->function = (uint64_t)function;
  record->grid[0] = config->gridDimX;
  record->grid[1] = config->gridDimY;
  record->grid[2] = config->gridDimZ;
  record->block[0] = config->blockDimX;
  record->block[1] = config->blockDimY;
  record->block[2] = config->blockDimZ;
  record->shared_bytes = config->sharedMemBytes;
  record->stream = (uint64_t)config->hStream;
  record->attributes = config->numAttrs;
  if (config->numAttrs > 0) {
    record->attribute = config->attrs[0].id;
    record->attribute_value = config->attrs[0].value.programmaticStreamSerializationAllowed;
  }
  const int* sizes = launched->sizes;
  for (int i = 0; sizes[i] > 0; ++i) memcpy(&record->arguments[i], arguments[i], sizes[i]);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  (void)module;
  strncpy(functions[known].name, name, MOST - 1);
  *function = (CUfunction)&functions[known++];
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult code, const char** text) {
  (void)code;
  *text = "an error of the tests";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  (void)which, (void)device;
  *value = 232448;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
  (void)function;
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)functions;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  (void)device;
  return cuCtxGetCurrent(context);
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  (void)image;
  *module = (CUmodule)functions;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int which) {
  *device = which;
  return CUDA_SUCCESS;
}

// Triton 3.2 launches by this.
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CUstream stream, void** arguments, void** extra) {
  const CUlaunchConfig config = {
      .gridDimX = grid_x,
      .gridDimY = grid_y,
      .gridDimZ = grid_z,
      .blockDimX = block_x,
      .blockDimY = block_y,
      .blockDimZ = block_z,
      .sharedMemBytes = shared_bytes,
      .hStream = stream,
  };
  return cuLaunchKernelEx(&config, function, arguments, extra);
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr address) {
  (void)which;
  *(CUdeviceptr*)value = address;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* which, void** values,
                                CUdeviceptr address) {
  for (unsigned i = 0; i < count; ++i) cuPointerGetAttribute(values[i], which[i], address);
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  (void)stream;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

// What else Triton's launchers are linked with.
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return (void)value, (void)limit, 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)value, (void)limit, 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  return (void)f, (void)a, (void)v, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) {
  return (void)f, (void)c, CUDA_SUCCESS;
}
