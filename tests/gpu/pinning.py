"""Which of this process's memory a CUDA driver knows as pinned; imported without torch."""

import ctypes
from collections.abc import Iterable
from pathlib import Path

INVALID_VALUE = 1
MEMORY_TYPE = 2
"""CU_POINTER_ATTRIBUTE_MEMORY_TYPE"""


def mapped(path: str) -> set[int]:
    """Where this process has mapped the file, be it removed since or not."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.partition("-")[0], 16) for line in lines if line.removesuffix(" (deleted)").endswith(f" {path}")}


def pinned(addresses: Iterable[int], device: int = 0) -> set[int]:
    """Those of the addresses that the driver knows; asked in the device's primary context, as it is now."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, kind, found = ctypes.c_void_p(), ctypes.c_uint(), set()
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    assert cuda.cuCtxPushCurrent_v2(context) == 0
    for address in addresses:
        status = cuda.cuPointerGetAttribute(ctypes.byref(kind), MEMORY_TYPE, ctypes.c_uint64(address))
        assert status in (0, INVALID_VALUE), status
        if status == 0:
            found.add(address)
    assert cuda.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    assert cuda.cuDevicePrimaryCtxRelease_v2(device) == 0
    return found
