//! `_core.RowStream`: rows in the order of their records, for a recorder.

use crate::errors::to_python;
use crate::{check_process, convert, directory_or_default, seconds};
use expert_lens_arena::collector::{self, ArenaId, RecordRange};
use expert_lens_arena::{End, Error, Facts, Outcome, Producer};
use numpy::PyArray1;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

/// A lossless reader whose space is released only when told that the rows are durable.
#[pyclass(module = "expert_lens._core", frozen)]
pub struct RowStream {
    /// Held while a block is being waited for: lock it only without the GIL.
    stream: Mutex<Option<collector::RowStream>>,
    stop: Arc<AtomicBool>,
    facts: Facts,
    capture: String,
    pid: u32,
}

/// (rank, pid, start time, created, record).
type Resume = (u32, u32, u64, u64, u64);

impl RowStream {
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        ask: impl FnOnce(&mut collector::RowStream) -> Result<T, Error> + Send,
    ) -> PyResult<T> {
        check_process(self.pid, &self.capture)?;
        let answer = py.detach(|| {
            let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
            stream.as_mut().map(ask)
        });
        answer.ok_or_else(|| PyRuntimeError::new_err("this row stream is closed"))?.map_err(to_python)
    }
}

fn range_to_python(range: &RecordRange) -> (u32, u32, u64, u64, u64, u64) {
    let ArenaId { rank, producer, created_ns } = range.arena;
    (rank, producer.pid, producer.start_time, created_ns, range.first, range.last)
}

#[pymethods]
impl RowStream {
    #[new]
    #[pyo3(signature = (capture, *, directory=None, resume=None))]
    fn new(py: Python<'_>, capture: &str, directory: Option<PathBuf>, resume: Option<Vec<Resume>>) -> PyResult<Self> {
        let arena = |(rank, pid, start_time, created_ns, last): Resume| {
            (ArenaId { rank, producer: Producer { pid, start_time }, created_ns }, last)
        };
        let resume: Vec<_> = resume.into_iter().flatten().map(arena).collect();
        let directory = directory_or_default(directory);
        let stream = py.detach(|| collector::RowStream::open(directory, capture, &resume)).map_err(to_python)?;
        let facts = stream.facts().clone();
        let stop = stream.stop_flag();
        Ok(Self { stream: Mutex::new(Some(stream)), stop, facts, capture: capture.to_owned(), pid: std::process::id() })
    }

    fn take<'py>(&self, py: Python<'py>, rows: usize, timeout: f64) -> PyResult<Bound<'py, PyDict>> {
        let timeout = seconds("timeout", timeout)?;
        let block = self.with(py, |stream| stream.take(rows, timeout))?;
        let dict = PyDict::new(py);
        dict.set_item("ids", block.ids)?;
        dict.set_item("requests", PyArray1::from_vec(py, block.requests))?;
        dict.set_item("arenas", PyArray1::from_vec(py, block.arenas))?;
        dict.set_item("positions", PyArray1::from_vec(py, block.positions))?;
        dict.set_item("token_ids", PyArray1::from_vec(py, block.token_ids))?;
        dict.set_item("kv_slots", PyArray1::from_vec(py, block.kv_slots))?;
        dict.set_item("phases", PyArray1::from_vec(py, block.phases))?;
        dict.set_item("steps", PyArray1::from_vec(py, block.steps))?;
        dict.set_item("times", PyArray1::from_vec(py, block.times))?;
        dict.set_item("experts", convert::experts(py, &self.facts, block.experts)?)?;
        dict.set_item("weights", convert::weights(py, &self.facts, block.weights)?)?;
        let end = |(arena, end): (u32, End)| {
            let state = if end.outcome == Outcome::Finished { "finished" } else { "aborted" };
            (arena, end.request, end.num_positions, state)
        };
        dict.set_item("ends", block.ends.into_iter().map(end).collect::<Vec<_>>())?;
        dict.set_item("ranges", block.ranges.iter().map(range_to_python).collect::<Vec<_>>())?;
        dict.set_item("unattributed", block.unattributed)?;
        dict.set_item("corrupt", block.corrupt)?;
        Ok(dict)
    }

    fn release(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |stream| {
            stream.release();
            Ok(())
        })
    }

    fn stop(&self) {
        self.stop.store(true, Relaxed);
    }

    #[getter]
    fn facts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        convert::facts(py, &self.capture, &self.facts)
    }

    #[getter]
    fn skipped_records(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |stream| Ok(stream.skipped_records()))
    }

    #[getter]
    fn left_out_tokens(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |stream| Ok(stream.left_out_rows()))
    }

    #[getter]
    fn dropped_tokens(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |stream| Ok(stream.dropped_rows()))
    }

    #[getter]
    fn is_over(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |stream| Ok(stream.is_over()))
    }

    fn close(&self, py: Python<'_>) {
        if std::process::id() != self.pid {
            return; // the entry is the parent's, and its thread may have held the lock
        }
        py.detach(|| *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = None);
    }
}
