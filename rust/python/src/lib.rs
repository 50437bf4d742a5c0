//! `expert_lens._core`: types across, the GIL released around waits, errors named. All else is in the arena crate.
#![deny(unsafe_code)]

mod collector;
mod convert;
mod detached;
mod errors;
mod mailbox;
mod row_stream;
mod turn;
mod writer;

use pyo3::prelude::*;

/// The Rust side of expert_lens: arenas, the writer's and the reader's end of the handoff, and the collector.
#[pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::collector::{Collector, captures, clean, default_directory};
    #[pymodule_export]
    use crate::errors::{
        ArenaCorruptError, ArenaError, ArenaPermissionError, ArenaSpaceError, ArenaVersionError, CaptureInUseError,
        CaptureNotFoundError, CudaError, ExpertLensError, ReaderTableFullError,
    };
    #[pymodule_export]
    use crate::mailbox::{Mailbox, exchange_capture_mode};
    #[pymodule_export]
    use crate::row_stream::RowStream;
    #[pymodule_export]
    use crate::turn::Turn;
    #[pymodule_export]
    use crate::writer::Writer;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("LAYOUT_VERSION", expert_lens_arena::LAYOUT_VERSION)?;
        module.add("MISSING", expert_lens_arena::collector::MISSING)?;
        module.add("NO_SLOT", expert_lens_arena::collector::NO_SLOT)?;
        module.add("NO_TOKEN", expert_lens_arena::collector::NO_TOKEN)?;
        module.add("DEBUG_BUILD", cfg!(debug_assertions))
    }
}

/// The phase of that name.
fn phase_of(name: &str) -> PyResult<expert_lens_arena::Phase> {
    match name {
        "prefill" => Ok(expert_lens_arena::Phase::Prefill),
        "decode" => Ok(expert_lens_arena::Phase::Decode),
        other => Err(errors::OptionError::new_err(format!("phase is '{other}'; it is 'prefill' or 'decode'"))),
    }
}

/// A duration from a number of seconds given by a user.
fn seconds(name: &str, value: f64) -> PyResult<std::time::Duration> {
    std::time::Duration::try_from_secs_f64(value)
        .map_err(|_| errors::OptionError::new_err(format!("{name} is {value}; give a number of seconds, at least 0")))
}

/// The folder of the captures: the one given, or the default.
fn directory_or_default(directory: Option<std::path::PathBuf>) -> std::path::PathBuf {
    directory.unwrap_or_else(expert_lens_arena::default_directory)
}

/// An error in a fork of the process that made a reader: its thread is not there, and may have held a lock.
fn check_process(pid: u32, capture: &str) -> PyResult<()> {
    let here = std::process::id();
    if here == pid {
        return Ok(());
    }
    Err(errors::ExpertLensError::new_err(format!(
        "this reader of capture '{capture}' belongs to process {pid}, and this is its fork {here}; attach to \
         '{capture}' by name here"
    )))
}
