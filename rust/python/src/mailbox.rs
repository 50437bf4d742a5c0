//! `_core.Mailbox`: where the kernels of a CUDA graph look at each replay.

use crate::convert::contiguous;
use crate::detached::Detached;
use crate::errors::to_python;
use expert_lens_arena::GraphRows;
use numpy::PyReadonlyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// The mailbox of one CUDA graph.
#[pyclass(module = "expert_lens._core")]
pub struct Mailbox {
    pub inner: Detached<expert_lens_arena::Mailbox>,
    /// What its replays write, until other rows are stated.
    pub rows: Option<ReplayRows>,
}

/// [`GraphRows`] that last.
pub struct ReplayRows {
    pub rows: usize,
    pub token_ids: bool,
    pub positions: Option<Vec<u32>>,
    pub kv_slots: bool,
}

impl ReplayRows {
    pub fn as_graph_rows(&self) -> GraphRows<'_> {
        let &Self { rows, token_ids, ref positions, kv_slots } = self;
        GraphRows { rows, token_ids, positions: positions.as_deref(), kv_slots }
    }
}

#[pymethods]
impl Mailbox {
    #[pyo3(signature = (num_rows, *, token_ids, positions, kv_slots))]
    fn set_rows(
        &mut self,
        num_rows: usize,
        token_ids: bool,
        positions: Option<PyReadonlyArray1<'_, u32>>,
        kv_slots: bool,
    ) -> PyResult<()> {
        let positions =
            positions.as_ref().map(|array| contiguous("positions", array)).transpose()?.map(<[u32]>::to_vec);
        if let Some(positions) = &positions
            && positions.len() != num_rows
        {
            let found = positions.len();
            return Err(PyValueError::new_err(format!("{found} positions, and {num_rows} rows need {num_rows}")));
        }
        self.rows = Some(ReplayRows { rows: num_rows, token_ids, positions, kv_slots });
        Ok(())
    }

    fn pass_over(&mut self) {
        self.inner.pass_over();
    }

    fn retract(&mut self, stream: u64) -> PyResult<Option<u64>> {
        // SAFETY: the stub asks the caller for the raw stream of the replays.
        #[expect(unsafe_code, reason = "Python can only give handles")]
        let record = unsafe { self.inner.retract(stream) };
        record.map_err(to_python)
    }

    #[getter]
    fn num_entries(&self) -> usize {
        self.inner.num_entries()
    }

    #[getter]
    fn entries(&self) -> u64 {
        self.inner.entries()
    }

    #[getter]
    fn taken(&self) -> u64 {
        self.inner.taken_word()
    }

    #[getter]
    fn device(&self) -> i32 {
        self.inner.ordinal()
    }

    #[getter]
    fn stream(&self) -> u64 {
        self.inner.stream()
    }

    #[getter]
    fn state(&self) -> u64 {
        self.inner.state()
    }

    #[getter]
    fn table(&self) -> u64 {
        self.inner.table()
    }
}

/// Set how this thread's calls stand to stream captures; gives how they stood.
#[pyfunction]
pub fn exchange_capture_mode(mode: u32) -> PyResult<u32> {
    expert_lens_arena::exchange_capture_mode(mode).map_err(to_python)
}
