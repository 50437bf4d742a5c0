//! `_core.Mailbox`: where the kernels of a CUDA graph look at each replay.

use crate::errors::to_python;
use pyo3::prelude::*;

/// The mailbox of one CUDA graph.
#[pyclass(module = "expert_lens._core")]
pub struct Mailbox(pub expert_lens_arena::Mailbox);

#[pymethods]
impl Mailbox {
    fn pass_over(&mut self) {
        self.0.pass_over();
    }

    fn retract(&mut self, stream: u64) -> PyResult<Option<u64>> {
        // SAFETY: the stub asks the caller for the raw stream of the replays.
        #[expect(unsafe_code, reason = "Python can only give handles")]
        let record = unsafe { self.0.retract(stream) };
        record.map_err(to_python)
    }

    #[getter]
    fn entries(&self) -> u64 {
        self.0.entries()
    }

    #[getter]
    fn taken(&self) -> u64 {
        self.0.taken_word()
    }

    #[getter]
    fn device(&self) -> i32 {
        self.0.ordinal()
    }

    #[getter]
    fn stream(&self) -> u64 {
        self.0.stream()
    }

    #[getter]
    fn state(&self) -> u64 {
        self.0.state()
    }

    #[getter]
    fn table(&self) -> u64 {
        self.0.table()
    }

    #[getter]
    fn replays(&self) -> u64 {
        self.0.replays()
    }
}

/// Set how this thread's calls stand to stream captures; gives how they stood.
#[pyfunction]
pub fn exchange_capture_mode(mode: u32) -> PyResult<u32> {
    expert_lens_arena::exchange_capture_mode(mode).map_err(to_python)
}
