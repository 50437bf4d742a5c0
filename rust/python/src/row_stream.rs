//! `_core.RowStream`: rows in the order of their records, for a recorder.

use crate::errors::to_python;
use crate::{convert, directory_or_default, seconds};
use expert_lens_arena::collector::{self, ArenaId, RecordRange};
use expert_lens_arena::{Facts, Outcome, Producer};
use numpy::PyArray1;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

/// A lossless reader whose space is released only when told that the rows are durable.
#[pyclass(module = "expert_lens._core")]
pub struct RowStream {
    stream: Option<collector::RowStream>,
    facts: Facts,
    capture: String,
}

/// (rank, pid, start time, created, record).
type Resume = (u32, u32, u64, u64, u64);

impl RowStream {
    fn open(&mut self) -> PyResult<&mut collector::RowStream> {
        self.stream.as_mut().ok_or_else(|| PyRuntimeError::new_err("this row stream is closed"))
    }
}

fn range_to_python(range: &RecordRange) -> (u32, u32, u64, u64, u64, u64) {
    let ArenaId { rank, producer, created_ns } = range.arena;
    (rank, producer.pid, producer.start_time, created_ns, range.first, range.last)
}

#[pymethods]
impl RowStream {
    #[new]
    #[pyo3(signature = (capture, *, directory=None, resume=Vec::new()))]
    fn new(py: Python<'_>, capture: &str, directory: Option<PathBuf>, resume: Vec<Resume>) -> PyResult<Self> {
        let arena = |(rank, pid, start_time, created_ns, last): Resume| {
            (ArenaId { rank, producer: Producer { pid, start_time }, created_ns }, last)
        };
        let resume: Vec<_> = resume.into_iter().map(arena).collect();
        let directory = directory_or_default(directory);
        let stream = py.detach(|| collector::RowStream::open(directory, capture, &resume)).map_err(to_python)?;
        let facts = stream.facts().clone();
        Ok(Self { stream: Some(stream), facts, capture: capture.to_owned() })
    }

    fn take<'py>(&mut self, py: Python<'py>, rows: usize, timeout: f64) -> PyResult<Bound<'py, PyDict>> {
        let timeout = seconds("timeout", timeout)?;
        let stream = self.open()?;
        let block = py.detach(|| stream.take(rows, timeout)).map_err(to_python)?;
        let dict = PyDict::new(py);
        dict.set_item("ids", block.ids)?;
        dict.set_item("requests", PyArray1::from_vec(py, block.requests))?;
        dict.set_item("arenas", PyArray1::from_vec(py, block.arenas))?;
        dict.set_item("positions", PyArray1::from_vec(py, block.positions))?;
        dict.set_item("token_ids", PyArray1::from_vec(py, block.token_ids))?;
        dict.set_item("phases", PyArray1::from_vec(py, block.phases))?;
        dict.set_item("steps", PyArray1::from_vec(py, block.steps))?;
        dict.set_item("times", PyArray1::from_vec(py, block.times))?;
        dict.set_item("experts", convert::experts(py, &self.facts, block.experts)?)?;
        dict.set_item("weights", convert::weights(py, &self.facts, block.weights)?)?;
        let end = |end: &expert_lens_arena::End| {
            (
                end.request.clone(),
                end.num_positions,
                if end.outcome == Outcome::Finished { "finished" } else { "aborted" },
            )
        };
        dict.set_item("ends", block.ends.iter().map(end).collect::<Vec<_>>())?;
        dict.set_item("ranges", block.ranges.iter().map(range_to_python).collect::<Vec<_>>())?;
        dict.set_item("unattributed", block.unattributed)?;
        dict.set_item("corrupt", block.corrupt)?;
        Ok(dict)
    }

    fn release(&mut self) -> PyResult<()> {
        self.open()?.release();
        Ok(())
    }

    #[getter]
    fn facts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        convert::facts(py, &self.capture, &self.facts)
    }

    #[getter]
    fn skipped_records(&mut self) -> PyResult<u64> {
        Ok(self.open()?.skipped_records())
    }

    #[getter]
    fn dropped_tokens(&mut self) -> PyResult<u64> {
        Ok(self.open()?.dropped_rows())
    }

    #[getter]
    fn is_over(&mut self) -> PyResult<bool> {
        Ok(self.open()?.is_over())
    }

    fn close(&mut self) {
        self.stream = None;
    }
}
