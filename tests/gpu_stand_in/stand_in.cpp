// Stands for a GPU: the parts of CUDA's runtime, cuBLAS, NCCL and the driver that must answer with more than success.
// Memory is the host's, up to a limit; copies copy; kernels do nothing; everything that matters is counted.
//
// One file, compiled five times (stand_in.py), with RUNTIME, BLAS, BLASLT, NCCL or DRIVER defined. Every other function
// of the real libraries is generated there and returns 0, which means success in all of them.
#include <dlfcn.h>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#define API extern "C" __attribute__((visibility("default")))

static bool is_hopper() { static bool h = atoi(getenv("STAND_IN_SM")) >= 90; return h; }
[[maybe_unused]] static void* new_handle() { return calloc(1, 512); }

#ifndef RUNTIME
// Counts `what` in the runtime's table.
static void count(const std::string& what) {
  static auto f = (void (*)(const char*))dlsym(RTLD_DEFAULT, "stand_in_count");
  if (f) f(what.c_str());
}
#endif

#ifdef RUNTIME
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <map>
#include <mutex>
static std::mutex lock;
using Blocks = std::map<uintptr_t, size_t>;  // address and size; leaked, because PyTorch frees memory at its exit
static Blocks& on_device() { static auto* m = new Blocks; return *m; }
static Blocks& pinned() { static auto* m = new Blocks; return *m; }
static std::map<std::string, long>& counts() { static auto* m = new std::map<std::string, long>; return *m; }
static std::map<const void*, std::string>& kernels() { static auto* m = new std::map<const void*, std::string>; return *m; }
static thread_local int device = 0;
static size_t used = 0;
static int devices() { const char* n = getenv("STAND_IN_DEVICES"); return n ? atoi(n) : 1; }
static size_t total() { return (size_t)(atof(getenv("STAND_IN_GB")) * 1e9); }
static const size_t context = 500'000'000;  // what CUDA takes for itself

API void stand_in_count(const char* what) { std::lock_guard<std::mutex> g(lock); counts()[what]++; }
API void stand_in_reset() { std::lock_guard<std::mutex> g(lock); counts().clear(); }
API const char* stand_in_counts() {  // one "name<tab>number" a line
  static std::string text;
  std::lock_guard<std::mutex> g(lock);
  text.clear();
  for (auto& [name, n] : counts()) text += name + "\t" + std::to_string(n) + "\n";
  return text.c_str();
}

// Kernels that the library holds: the host's function stands for a name.
API void** __cudaRegisterFatBinary(void*) { static void* h[4]; return h; }
API void __cudaRegisterFunction(void**, const char* f, char*, const char*, int, void*, void*, void*, void*, int*) { kernels()[f] = ""; }
API cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* shared, void* stream) {
  *g = *b = dim3(1); *shared = 0; *(void**)stream = nullptr; return cudaSuccess;
}
static cudaError_t launch() { stand_in_count("kernel"); return cudaSuccess; }
API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) { *k = (cudaKernel_t)f; return cudaSuccess; }
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return launch(); }
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return launch(); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return launch(); }

API cudaError_t cudaGetDeviceCount(int* n) { *n = devices(); return cudaSuccess; }
API cudaError_t cudaGetDevice(int* d) { *d = device; return cudaSuccess; }
API cudaError_t cudaSetDevice(int d) { if (d >= devices()) return cudaErrorInvalidDevice; device = d; return cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {  // from the white papers of A100 and H100
  bool h = is_hopper();
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", h ? "NVIDIA H100 80GB HBM3" : "NVIDIA A100-SXM4-80GB");
  p->major = h ? 9 : 8; p->totalGlobalMem = total(); p->multiProcessorCount = h ? 132 : 108; p->warpSize = 32;
  p->maxThreadsPerMultiProcessor = 2048; p->maxThreadsPerBlock = 1024; p->maxBlocksPerMultiProcessor = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536; p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = h ? 232448 : 166912; p->sharedMemPerMultiprocessor = h ? 233472 : 167936;
  p->l2CacheSize = h ? 52428800 : 41943040; p->memoryBusWidth = 5120; p->textureAlignment = 512; p->memPitch = 2147483647;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->unifiedAddressing = p->concurrentKernels = p->managedMemory = 1; p->asyncEngineCount = 3;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int d) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, d);
  switch ((int)a) {
    case cudaDevAttrComputeCapabilityMajor: *v = p.major; break;
    case cudaDevAttrMultiProcessorCount: *v = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrWarpSize: *v = p.warpSize; break;
    case cudaDevAttrL2CacheSize: *v = p.l2CacheSize; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *v = p.regsPerBlock; break;
    case cudaDevAttrMaxGridDimX: *v = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *v = p.maxGridSize[1]; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *v = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *v = 64; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *v = 32; break;
    default: *v = 0;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) { snprintf(s, n, "0000:00:%02d.0", d + 4); return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) { if (low) *low = 0; if (high) *high = -5; return cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 1; return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* v) { *v = 13000; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* v) { *v = 13000; return cudaSuccess; }
API const char* cudaGetErrorName(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError"; }
API const char* cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "unknown error"; }

static void* map(Blocks& blocks, size_t n) {  // pages that nobody writes take no memory
  void* p = mmap(nullptr, n ? n : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  blocks[(uintptr_t)p] = n;
  return p;
}
static size_t unmap(Blocks& blocks, void* p) {
  auto it = blocks.find((uintptr_t)p);
  if (it == blocks.end()) return 0;
  size_t n = it->second;
  munmap(p, n ? n : 1);
  blocks.erase(it);
  return n;
}
static char place(const void* p) {  // D: device, P: pinned, H: other memory of the host
  std::lock_guard<std::mutex> g(lock);
  auto holds = [p](Blocks& blocks) {
    auto it = blocks.upper_bound((uintptr_t)p);
    return it != blocks.begin() && (--it, (uintptr_t)p < it->first + it->second);
  };
  return holds(on_device()) ? 'D' : holds(pinned()) ? 'P' : 'H';
}
API cudaError_t cudaMalloc(void** p, size_t n) {
  std::lock_guard<std::mutex> g(lock);
  if (used + n > total() - context) { *p = nullptr; return cudaErrorMemoryAllocation; }
  used += n; *p = map(on_device(), n);
  return cudaSuccess;
}
API cudaError_t cudaFree(void* p) { std::lock_guard<std::mutex> g(lock); used -= unmap(on_device(), p); return cudaSuccess; }
API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) { *t = total(); *f = total() - used - context; return cudaSuccess; }
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { std::lock_guard<std::mutex> g(lock); *p = map(pinned(), n); return cudaSuccess; }
API cudaError_t cudaFreeHost(void* p) { std::lock_guard<std::mutex> g(lock); unmap(pinned(), p); return cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  char at = place(p);
  memset(a, 0, sizeof *a);
  a->type = at == 'D' ? cudaMemoryTypeDevice : at == 'P' ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->device = device; a->devicePointer = at == 'H' ? nullptr : (void*)p; a->hostPointer = at == 'D' ? nullptr : (void*)p;
  return cudaSuccess;
}
static cudaError_t copy(void* to, const void* from, size_t n) {
  char f = place(from), t = place(to);
  stand_in_count((std::string("copy ") + f + "2" + t).c_str());
  if (f == 'D' && t == 'D' && n > 1 << 20) return cudaSuccess;  // what no kernel wrote; small ones may have come from the host
  memmove(to, from, n);
  // No kernel wrote the memory, so it holds anything; a number read from it shall be finite.
  if (f == 'D')
    for (size_t i = 0; i + 4 <= n; i += 4) { auto* w = (uint32_t*)((char*)to + i); if ((*w & 0x7f800000u) == 0x7f800000u) *w = 0; }
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) { return copy(to, from, n); }
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) { return copy(to, from, n); }
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t) { return copy(to, from, n); }
API cudaError_t cudaGetSymbolAddress(void** p, const void*) { *p = calloc(1, 1 << 16); return cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { *e = (cudaEvent_t)new_handle(); return cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 0.01f; return cudaSuccess; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { *s = (cudaStream_t)new_handle(); return cudaSuccess; }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { *s = (cudaStream_t)new_handle(); return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; return cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) { *s = cudaStreamCaptureStatusNone; return cudaSuccess; }
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* n) {
  if (s) *s = cudaStreamCaptureStatusNone; if (id) *id = 0; if (n) *n = 0; return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* data) { f(data); return cudaSuccess; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->numRegs = 32; a->maxDynamicSharedSizeBytes = 163840;
  a->ptxVersion = a->binaryVersion = is_hopper() ? 90 : 80; return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 2; return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) { *n = 2; return cudaSuccess; }
static int nothing() { return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* r) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *f = driver ? dlsym(driver, name) : nullptr;
  if (!*f) *f = (void*)nothing;
  if (r) *r = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
#endif

// Without the headers, which need more than PyTorch's wheels hold: enums are ints, handles are pointers, and a function
// may ignore arguments that it is called with.
#ifdef BLAS
API int cublasCreate_v2(void** handle) { *handle = new_handle(); return 0; }
API int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
API int cublasGetVersion_v2(void*, int* version) { *version = 130101; return 0; }
API int cublasGemmEx() { count("matmul"); return 0; }
API int cublasSgemm_v2() { count("matmul"); return 0; }
API int cublasGemmStridedBatchedEx() { count("matmul"); return 0; }
API int cublasSgemmStridedBatched() { count("matmul"); return 0; }
#endif

#ifdef BLASLT
API size_t cublasLtGetVersion() { return 130101; }
API int cublasLtCreate(void** handle) { *handle = new_handle(); return 0; }
API int cublasLtMatmulDescCreate(void** d, int, int) { *d = new_handle(); return 0; }
API int cublasLtMatmulPreferenceCreate(void** d) { *d = new_handle(); return 0; }
API int cublasLtMatrixLayoutCreate(void** d, int, uint64_t, uint64_t, int64_t) { *d = new_handle(); return 0; }
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* n) {
  memset(result, 0, 96);  // the whole structure: algorithm, workspace, state
  *n = 1;
  return 0;
}
API int cublasLtMatmul() { count("matmul"); return 0; }
#endif

#ifdef NCCL
// A communicator is its number of processes. All are taken to hold the same numbers.
static int create(int** c, int n) { *c = (int*)new_handle(); **c = n; return 0; }
struct Id { char bytes[128]; };  // passed by value
API int ncclGetVersion(int* v) { *v = 22907; return 0; }
API const char* ncclGetErrorString() { return "unknown error"; }
API const char* ncclGetLastError() { return "unknown error"; }
API int ncclCommInitRankConfig(int** c, int n, Id, int, void*) { return create(c, n); }
API int ncclCommInitRankScalable(int** c, int n, int, int, Id*, void*) { return create(c, n); }
API int ncclCommGetAsyncError(void*, int* result) { *result = 0; return 0; }
API int ncclAllReduce() { count("all-reduce"); return 0; }
API int ncclBroadcast() { count("broadcast"); return 0; }
API int ncclAllGather(const void* from, void* to, size_t n, int type, int* c, void*) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  for (int i = 0; i < *c; i++) memmove((char*)to + i * n * sizes[type], from, n * sizes[type]);
  count("all-gather");
  return 0;
}
#endif

#ifdef DRIVER
#include <cuda.h>
struct Function { std::string name; };  // Triton's kernels
API CUresult cuDriverGetVersion(int* v) { *v = 13000; return CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult, const char** s) { *s = "unknown error"; return CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice* d, int n) { *d = n; return CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* n) { *n = 1; return CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
  bool h = is_hopper();
  switch ((int)a) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *v = h ? 232448 : 166912; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *v = h ? 233472 : 167936; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *v = 49152; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *v = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = h ? 132 : 108; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *v = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *v = 1024; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = h ? 9 : 8; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *v = 0; break;
    default: *v = 1;
  }
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* c) { static int context; *c = (CUcontext)&context; return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { return cuCtxGetCurrent(c); }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* d) { *d = 0; return CUDA_SUCCESS; }
API CUresult cuModuleLoadData(CUmodule* m, const void*) { *m = (CUmodule)new_handle(); return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) { *f = (CUfunction) new Function{name}; return CUDA_SUCCESS; }
API CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0; return CUDA_SUCCESS;
}
static CUresult launch(CUfunction f) { count("triton " + ((Function*)f)->name); return CUDA_SUCCESS; }
API CUresult cuLaunchKernel(CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**) { return launch(f); }
API CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction f, void**, void**) { return launch(f); }
API CUresult cuPointerGetAttribute(void* d, CUpointer_attribute, CUdeviceptr p) { *(CUdeviceptr*)d = p; return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { *n = 1; return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) { *n = 2; return CUDA_SUCCESS; }
#endif
