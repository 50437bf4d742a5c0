//! The driver's functions, loaded when a device is first used.

use crate::error::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::sync::OnceLock;

pub(super) type Status = c_int;
pub(super) type Handle = *mut c_void;

const LIBRARY: &str = "libcuda.so.1";
/// CU_STREAM_CAPTURE_MODE_RELAXED: this thread's calls do not end a capture that another thread is making.
pub(super) const RELAXED: c_uint = 2;
/// CU_STREAM_NON_BLOCKING
const STREAM_FLAGS: c_uint = 1;

macro_rules! driver {
    (
        always { $($name:ident: $symbol:literal($($argument:ty),*);)* }
        newer { $($newer:ident: $newer_symbol:literal($($newer_argument:ty),*);)* }
    ) => {
        /// The driver's functions that are used here; those that older drivers lack are None there.
        pub(super) struct Driver {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> Status,)*
            $(pub(super) $newer: Option<unsafe extern "C" fn($($newer_argument),*) -> Status>,)*
            /// Keeps the functions where they are.
            _library: Library,
        }

        impl Driver {
            fn load() -> std::result::Result<Self, libloading::Error> {
                // SAFETY: the library is the driver's, whose initialisers any CUDA program runs; each symbol is given the
                // type that cuda.h declares for the name with that version suffix, which never changes.
                unsafe {
                    let library = Library::new(LIBRARY)?;
                    Ok(Self {
                        $($name: *library.get($symbol)?,)*
                        $($newer: library.get($newer_symbol).ok().map(|symbol| *symbol),)*
                        _library: library,
                    })
                }
            }
        }
    };
}

driver! {
    always {
        init: b"cuInit\0"(c_uint);
        error_name: b"cuGetErrorName\0"(Status, *mut *const c_char);
        device_get: b"cuDeviceGet\0"(*mut c_int, c_int);
        device_attribute: b"cuDeviceGetAttribute\0"(*mut c_int, c_int, c_int);
        retain_context: b"cuDevicePrimaryCtxRetain\0"(*mut Handle, c_int);
        release_context: b"cuDevicePrimaryCtxRelease_v2\0"(c_int);
        context_state: b"cuDevicePrimaryCtxGetState\0"(c_int, *mut c_uint, *mut c_int);
        current_context: b"cuCtxGetCurrent\0"(*mut Handle);
        push_context: b"cuCtxPushCurrent_v2\0"(Handle);
        pop_context: b"cuCtxPopCurrent_v2\0"(*mut Handle);
        register: b"cuMemHostRegister_v2\0"(*mut c_void, usize, c_uint);
        unregister: b"cuMemHostUnregister\0"(*mut c_void);
        device_pointer: b"cuMemHostGetDevicePointer_v2\0"(*mut u64, *mut c_void, c_uint);
        copy_to_host: b"cuMemcpyDtoHAsync_v2\0"(*mut c_void, u64, usize, Handle);
        copy_to_device: b"cuMemcpyHtoDAsync_v2\0"(u64, *const c_void, usize, Handle);
        set_words: b"cuMemsetD32Async\0"(u64, c_uint, usize, Handle);
        device_alloc: b"cuMemAlloc_v2\0"(*mut u64, usize);
        device_free: b"cuMemFree_v2\0"(u64);
        stream_create: b"cuStreamCreate\0"(*mut Handle, c_uint);
        stream_synchronize: b"cuStreamSynchronize\0"(Handle);
        stream_destroy: b"cuStreamDestroy_v2\0"(Handle);
        event_create: b"cuEventCreate\0"(*mut Handle, c_uint);
        event_record: b"cuEventRecord\0"(Handle, Handle);
        event_query: b"cuEventQuery\0"(Handle);
        event_destroy: b"cuEventDestroy_v2\0"(Handle);
        exchange_capture_mode: b"cuThreadExchangeStreamCaptureMode\0"(*mut c_uint);
    }
    newer {
        write_value: b"cuStreamWriteValue64_v2\0"(Handle, u64, u64, c_uint);
        context_id: b"cuCtxGetId\0"(Handle, *mut u64);
    }
}

/// A device's primary context, as it was when it was retained.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Context {
    /// Its CUdevice.
    pub device: c_int,
    /// Its CUcontext.
    pub handle: usize,
    /// Tells it from another one that is made there once it was reset; None of a driver that does not say.
    id: Option<u64>,
}

impl Driver {
    /// Loads the driver, once.
    ///
    /// # Errors
    /// [`Error::Cuda`] without one.
    pub fn get() -> Result<&'static Self> {
        static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
        let driver = DRIVER.get_or_init(|| {
            let driver = Driver::load().map_err(|error| format!("cannot load {LIBRARY}: {error}"))?;
            // SAFETY: cuInit takes flags, which must be 0, and may be called again and again.
            match unsafe { (driver.init)(0) } {
                0 => Ok(driver),
                status => Err(format!("cuInit failed: {}", driver.name_of(status))),
            }
        });
        driver.as_ref().map_err(|why| Error::Cuda { what: why.clone() })
    }

    fn name_of(&self, status: Status) -> String {
        let mut name = std::ptr::null();
        // SAFETY: `name` is a place for one pointer; where the call succeeds, it points to a constant string.
        let known = unsafe { (self.error_name)(status, &mut name) } == 0 && !name.is_null();
        if !known {
            return format!("error {status}");
        }
        // SAFETY: as above: a constant, NUL-terminated string of the driver.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    pub fn check(&self, call: &str, status: Status) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(Error::Cuda { what: format!("{call} failed: {}", self.name_of(status)) }) }
    }

    /// Whether a device has what this attribute tells of; an attribute that the driver does not know is one it has not.
    pub fn can(&self, device: c_int, attribute: c_int) -> bool {
        let mut value = 0;
        // SAFETY: a place for one value.
        let status = unsafe { (self.device_attribute)(&mut value, attribute, device) };
        status == 0 && value != 0
    }

    /// Retain the primary context of a device, which torch uses too: it lives until it is released as often, or reset.
    pub fn retain(&self, device: c_int) -> Result<Context> {
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: a place for one handle.
        self.check("cuDevicePrimaryCtxRetain", unsafe { (self.retain_context)(&mut handle, device) })?;
        let mut id = 0;
        // SAFETY: a place for one value; the context was retained just now.
        let told = self.context_id.is_some_and(|context_id| unsafe { context_id(handle, &mut id) } == 0);
        Ok(Context { device, handle: handle as usize, id: told.then_some(id) })
    }

    /// Give back what was retained once; a reset does not do that (CUDA driver API, "Primary Context Management",
    /// `cuDevicePrimaryCtxReset`).
    pub fn release(&self, context: Context) {
        // SAFETY: takes a device by value. Whoever has retained it calls this once.
        unsafe { (self.release_context)(context.device) };
    }

    /// Whether a context that is retained lives still: who resets it takes everything that was made in it, and whoever
    /// uses the device next makes another.
    pub fn lives(&self, context: Context) -> bool {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: places for one value each.
        let status = unsafe { (self.context_state)(context.device, &mut flags, &mut active) };
        if status != 0 || active == 0 {
            return false;
        }
        let now = self.retain(context.device).inspect(|&now| self.release(now));
        now.is_ok_and(|now| now == context)
    }

    /// A stream of the current context, which waits for no other.
    pub fn create_stream(&self) -> Result<Handle> {
        let mut stream: Handle = std::ptr::null_mut();
        // SAFETY: a place for one handle.
        self.check("cuStreamCreate", unsafe { (self.stream_create)(&mut stream, STREAM_FLAGS) }).map(|()| stream)
    }

    /// Let this thread's calls end no stream capture until the answer is dropped.
    pub fn relax(&'static self) -> Result<Entered> {
        let mut mode = RELAXED;
        // SAFETY: a place for one value; the call touches nothing but this thread's own state.
        let status = unsafe { (self.exchange_capture_mode)(&mut mode) };
        self.check("cuThreadExchangeStreamCaptureMode", status)?;
        Ok(Entered { driver: self, mode, pushed: false, _of_this_thread: PhantomData })
    }

    /// As [`Driver::relax`], with `context` current to this thread meanwhile.
    pub fn enter(&'static self, context: Context) -> Result<Entered> {
        let mut entered = self.relax()?;
        let mut current: Handle = std::ptr::null_mut();
        // SAFETY: a place for one value; the call touches nothing but this thread's own state.
        unsafe { (self.current_context)(&mut current) };
        if current as usize != context.handle {
            // SAFETY: a primary context, which whoever has this `Context` has retained and not released yet; the driver
            // refuses one that was reset.
            self.check("cuCtxPushCurrent", unsafe { (self.push_context)(context.handle as Handle) })?;
            entered.pushed = true;
        }
        Ok(entered)
    }

    /// Run `work` as [`Driver::enter`] says.
    pub fn within<T>(&'static self, context: Context, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let _entered = self.enter(context)?;
        work()
    }
}

/// How a thread's calls stand to captures, and which context is current, for a while: see [`Driver::enter`].
pub(super) struct Entered {
    driver: &'static Driver,
    /// How the thread's calls stood to stream captures before.
    mode: c_uint,
    /// Whether the context had to be made current.
    pushed: bool,
    _of_this_thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut popped: Handle = std::ptr::null_mut();
        // SAFETY: takes off what `enter` pushed, on the same thread, and puts back the mode that stood before; places for
        // one value each.
        unsafe {
            if self.pushed {
                (self.driver.pop_context)(&mut popped);
            }
            (self.driver.exchange_capture_mode)(&mut self.mode);
        }
    }
}
