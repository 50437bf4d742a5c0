//! Errors of the arena crate as Python exceptions: one base class, one subclass a cause.

use expert_lens_arena::Error;
use pyo3::exceptions::{PyException, PyOSError};
use pyo3::prelude::*;
use pyo3::{create_exception, import_exception};

// Two base classes, which create_exception! cannot give.
import_exception!(expert_lens.errors, OptionError);

create_exception!(expert_lens._core, ExpertLensError, PyException, "Base class of every error of expert_lens.");
create_exception!(expert_lens._core, ArenaError, ExpertLensError, "Something about an arena is not as it must be.");
create_exception!(expert_lens._core, CaptureNotFoundError, ArenaError, "No capture of that name.");
create_exception!(expert_lens._core, CaptureInUseError, ArenaError, "A live process publishes under that name.");
create_exception!(expert_lens._core, ArenaSpaceError, ArenaError, "The shared memory has no room for the arena.");
create_exception!(expert_lens._core, ArenaCorruptError, ArenaError, "The arena's contents contradict themselves.");
create_exception!(expert_lens._core, ArenaVersionError, ArenaError, "The arena has another layout version.");
create_exception!(expert_lens._core, ArenaPermissionError, ArenaError, "The arena is not this user's alone.");
create_exception!(expert_lens._core, CudaError, ExpertLensError, "The CUDA driver refused a call, or is not there.");
create_exception!(expert_lens._core, ReaderTableFullError, ArenaError, "Every reader entry of the arena is taken.");

/// The Python exception for an error of the arena crate.
pub fn to_python(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::CaptureNotFound { .. } => CaptureNotFoundError::new_err(message),
        Error::CaptureInUse { .. } => CaptureInUseError::new_err(message),
        Error::NoSpace { .. } => ArenaSpaceError::new_err(message),
        Error::Version { .. } => ArenaVersionError::new_err(message),
        Error::Corrupt { .. } => ArenaCorruptError::new_err(message),
        Error::Permission { .. } => ArenaPermissionError::new_err(message),
        Error::ReadersFull { .. } => ReaderTableFullError::new_err(message),
        Error::Cuda { .. } => CudaError::new_err(message),
        Error::Invalid { .. } => OptionError::new_err(message),
        Error::Io { .. } => PyOSError::new_err(message),
        _ => ArenaError::new_err(message),
    }
}
