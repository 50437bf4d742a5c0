/* A driver of a device that lacks what LACKS says, in place of libcuda.so.1: for what no device at hand can be made to do.
 *
 * LACKS: numbers of device attributes, the name of a function that fails (or never says that an event has come), or
 * "another context", if one is made as soon as one was reset. Compiled with OLD, it has no function that came with a
 * later driver. The device's memory is the process's, but for its first page; what a stream is given is done at once, and
 * an event comes at the third query. When the process ends, what is left is printed to stderr: the numbers of pinned
 * mappings, retained contexts and events, and how often an event of a context that was reset was asked for.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NOT_SUPPORTED 801
#define NOT_READY 600
#define OF_NO_USE(name) int name(void) { return NOT_SUPPORTED; }

static int pinned, retained, events, resets, late;
static uintptr_t streams = 0x1000;

static int lacks(const char *what) {
    const char *list = getenv("LACKS");
    return list && strstr(list, what) != NULL;
}

__attribute__((destructor)) static void tell(void) { fprintf(stderr, "left: %d pinned, %d retained, %d events, %d late\n", pinned, retained, events, late); }

int reset(void) { return ++resets; } /* for the tests */

int cuInit(unsigned flags) { return (int)flags; }
int cuGetErrorName(int status, const char **name) {
    *name = "CUDA_ERROR_NOT_SUPPORTED";
    return status == NOT_SUPPORTED ? 0 : 1;
}
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    char number[16];
    snprintf(number, sizeof number, "%d", attribute);
    *value = !lacks(number);
    return device;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &retained; retained++; return device; }
int cuDevicePrimaryCtxRelease_v2(int device) { retained--; return device; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = retained > 0 && (!resets || lacks("another context")); return device; }
int cuCtxGetCurrent(void **context) { *context = NULL; return 0; }
int cuCtxPushCurrent_v2(void *context) { return context != &retained; }
int cuCtxPopCurrent_v2(void **context) { *context = &retained; return 0; }
int cuMemHostRegister_v2(void *memory, size_t bytes, unsigned flags) {
    if (lacks("cuMemHostRegister") || !memory || !bytes || flags != 3)
        return NOT_SUPPORTED;
    pinned++;
    return 0;
}
int cuMemHostUnregister(void *memory) { pinned--; return memory == NULL; }
int cuMemHostGetDevicePointer_v2(uint64_t *address, void *memory, unsigned flags) {
    *address = (uint64_t)memory;
    return lacks("cuMemHostGetDevicePointer") ? NOT_SUPPORTED : (int)flags;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    if (from < 4096 || stream)
        return NOT_SUPPORTED;
    memcpy(to, (const void *)from, bytes);
    return 0;
}
#ifndef OLD
int cuCtxGetId(void *context, uint64_t *id) {
    *id = (uint64_t)resets;
    return context != &retained;
}
int cuStreamWriteValue64_v2(void *stream, uint64_t at, uint64_t value, unsigned flags) {
    if (stream || flags || lacks("122"))
        return NOT_SUPPORTED;
    __atomic_store_n((uint64_t *)at, value, __ATOMIC_RELEASE);
    return 0;
}
#endif
int cuStreamCreate(void **made, unsigned flags) { *made = (void *)++streams; return flags != 1; }
int cuEventCreate(void **made, unsigned flags) { *made = calloc(1, sizeof(int)); events++; return flags != 2; }
int cuEventRecord(void *event, void *stream) { *(int *)event = 3; return stream != NULL; }
int cuEventQuery(void *event) { late += resets > 0; return --*(int *)event <= 0 && !lacks("cuEventQuery") ? 0 : NOT_READY; }
int cuEventDestroy_v2(void *event) { free(event); events--; return 0; }
int cuThreadExchangeStreamCaptureMode(unsigned *mode) { return *mode > 2; }

int cuMemAlloc_v2(uint64_t *memory, size_t bytes) { *memory = (uint64_t)calloc(bytes, 1); return 0; }
int cuMemFree_v2(uint64_t memory) { free((void *)memory); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) { memcpy((void *)to, from, bytes); return stream == NULL; }
int cuStreamSynchronize(void *stream) { return stream == NULL; }
int cuStreamDestroy_v2(void *stream) { return stream == NULL; }
int cuMemsetD32Async(uint64_t at, unsigned value, size_t count, void *stream) {
    if (stream || lacks("cuMemsetD32Async"))
        return NOT_SUPPORTED;
    for (size_t i = 0; i < count; i++)
        ((unsigned *)at)[i] = value;
    return 0;
}
