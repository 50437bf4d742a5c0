//! `_core.Collector`: counts and rows of a running capture; and the list of captures.

use crate::errors::to_python;
use crate::{check_process, convert, directory_or_default, phase_of, seconds};
use expert_lens_arena::collector::{self, ArenaId, Options, Pace, State};
use expert_lens_arena::{Facts, Header, Mode, is_alive, list};
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

/// Counts and rows of a running capture.
#[pyclass(module = "expert_lens._core", frozen)]
pub struct Collector {
    inner: collector::Collector,
    facts: Facts,
    capture: String,
    pid: u32,
}

impl Collector {
    fn inner(&self) -> PyResult<&collector::Collector> {
        check_process(self.pid, &self.capture)?;
        Ok(&self.inner)
    }
}

#[pymethods]
impl Collector {
    #[new]
    #[pyo3(signature = (capture, *, directory=None, lossless=true, memory_bytes=1_073_741_824, history=16_384, prompt=true))]
    fn new(
        py: Python<'_>,
        capture: &str,
        directory: Option<PathBuf>,
        lossless: bool,
        memory_bytes: usize,
        history: usize,
        prompt: bool,
    ) -> PyResult<Self> {
        let options = Options {
            directory: directory_or_default(directory),
            mode: if lossless { Mode::Lossless } else { Mode::Lossy },
            memory: memory_bytes,
            history,
            pace: if prompt { Pace::PROMPT } else { Pace::CALM },
        };
        let inner = py.detach(|| collector::Collector::open(capture, options)).map_err(to_python)?;
        let facts = inner.facts().clone();
        Ok(Self { inner, facts, capture: capture.to_owned(), pid: std::process::id() })
    }

    #[getter]
    fn facts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        convert::facts(py, &self.capture, &self.facts)
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.inner.tokens()
    }

    #[pyo3(signature = (timeout=1.0))]
    fn sync(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let (inner, timeout) = (self.inner()?, seconds("timeout", timeout)?);
        Ok(py.detach(|| inner.sync(timeout)))
    }

    #[pyo3(signature = (phase=None, last=None))]
    fn counts<'py>(&self, py: Python<'py>, phase: Option<&str>, last: Option<u64>) -> PyResult<Bound<'py, PyAny>> {
        let (inner, phase) = (self.inner()?, phase.map(phase_of).transpose()?);
        let counts = py.detach(|| inner.counts(phase, last)).map_err(to_python)?;
        let shape = [self.facts.layers.len(), self.facts.num_experts as usize];
        Ok(PyArray1::from_vec(py, counts).reshape(shape)?.into_any())
    }

    fn requests<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let inner = self.inner()?;
        let requests = py.detach(|| inner.requests());
        let state = |state| match state {
            State::Running => "running",
            State::Finished => "finished",
            State::Aborted => "aborted",
        };
        let dict = PyDict::new(py);
        dict.set_item("request", requests.iter().map(|r| r.request.as_str()).collect::<Vec<_>>())?;
        dict.set_item("state", requests.iter().map(|r| state(r.state)).collect::<Vec<_>>())?;
        dict.set_item("prompt_tokens", requests.iter().map(|r| r.prompt_tokens).collect::<Vec<_>>())?;
        dict.set_item("tokens", requests.iter().map(|r| r.tokens).collect::<Vec<_>>())?;
        dict.set_item("missing", requests.iter().map(|r| r.missing).collect::<Vec<_>>())?;
        dict.set_item("arena", requests.iter().map(|r| r.arena).collect::<Vec<_>>())?;
        Ok(dict)
    }

    fn rows<'py>(&self, py: Python<'py>, request: &str) -> PyResult<Option<Bound<'py, PyDict>>> {
        let inner = self.inner()?;
        let Some(rows) = py.detach(|| inner.rows(request)) else {
            return Ok(None);
        };
        let dict = PyDict::new(py);
        dict.set_item("experts", convert::experts(py, &self.facts, rows.experts)?)?;
        dict.set_item("weights", convert::weights(py, &self.facts, rows.weights)?)?;
        dict.set_item("token_ids", PyArray1::from_vec(py, rows.token_ids))?;
        dict.set_item("phases", PyArray1::from_vec(py, rows.phases))?;
        dict.set_item("steps", PyArray1::from_vec(py, rows.steps))?;
        dict.set_item("times", PyArray1::from_vec(py, rows.times))?;
        Ok(Some(dict))
    }

    fn was_evicted(&self, request: &str) -> PyResult<bool> {
        Ok(self.inner()?.was_evicted(request))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let inner = self.inner()?;
        let stats = py.detach(|| inner.stats());
        let dict = PyDict::new(py);
        dict.set_item("state", if stats.ended { "ended" } else { "running" })?;
        dict.set_item("steps", stats.steps)?;
        dict.set_item("tokens", stats.tokens)?;
        dict.set_item("dropped_tokens", stats.dropped_tokens)?;
        dict.set_item("lost_tokens", stats.lost_tokens)?;
        dict.set_item("lost_ends", stats.lost_ends)?;
        dict.set_item("unattributed_tokens", stats.unattributed_tokens)?;
        dict.set_item("unkept_tokens", stats.unkept_tokens)?;
        dict.set_item("unslotted_tokens", stats.unslotted_tokens)?;
        dict.set_item("missing_tokens", stats.missing_tokens)?;
        dict.set_item("evicted_requests", stats.evicted_requests)?;
        dict.set_item("corrupt_records", stats.corrupt_records)?;
        dict.set_item("corrupt", stats.corrupt)?;
        dict.set_item("lag_s", stats.lag_s)?;
        dict.set_item("memory_bytes", stats.memory)?;
        dict.set_item("publisher", convert::way(stats.way))?;
        dict.set_item("arenas", stats.arenas)?;
        Ok(dict)
    }

    #[getter]
    fn failure(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let inner = self.inner()?;
        Ok(py.detach(|| inner.failure()))
    }

    fn arenas(&self) -> PyResult<Vec<(u32, u32, u64, u64)>> {
        let key = |id: ArenaId| (id.rank, id.producer.pid, id.producer.start_time, id.created_ns);
        Ok(self.inner()?.arenas().into_iter().map(key).collect())
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}

fn header_to_python<'py>(py: Python<'py>, name: &str, header: &Header, bytes: u64) -> PyResult<Bound<'py, PyDict>> {
    let dict = convert::facts(py, name, &header.facts)?;
    dict.set_item("pid", header.producer.pid)?;
    dict.set_item("alive", is_alive(header.producer))?;
    dict.set_item("arena_bytes", bytes)?;
    Ok(dict)
}

/// The arenas of this user.
#[pyfunction]
#[pyo3(signature = (directory=None))]
pub fn captures(py: Python<'_>, directory: Option<PathBuf>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let captures = list(&directory_or_default(directory)).map_err(to_python)?;
    captures.iter().map(|found| header_to_python(py, &found.name, &found.header, found.bytes)).collect()
}

/// Remove what dead processes of this user left; gives how many captures.
#[pyfunction]
#[pyo3(signature = (directory=None))]
pub fn clean(py: Python<'_>, directory: Option<PathBuf>) -> PyResult<usize> {
    py.detach(|| expert_lens_arena::clean(&directory_or_default(directory))).map_err(to_python)
}

/// Where captures are.
#[pyfunction]
pub fn default_directory() -> String {
    expert_lens_arena::default_directory().display().to_string()
}
