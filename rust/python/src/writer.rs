//! `_core.Writer`: the publishing end.

use crate::convert::{self, contiguous};
use crate::detached::Detached;
use crate::errors::{OptionError, to_python};
use crate::mailbox::{Mailbox, ReplayRows};
use crate::{directory_or_default, phase_of, seconds};
use expert_lens_arena::{DeviceRows, End, Facts, OnFull, Outcome, Prefix, Publisher, Rows, Source, Span, Way};
use half::f16;
use numpy::{Element, PyReadonlyArray1, PyReadonlyArray3, PyReadonlyArrayDyn};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PySequence, PyString, PyTuple};
use std::path::PathBuf;

/// The publishing end of one arena.
#[pyclass(module = "expert_lens._core")]
pub struct Writer {
    publisher: Option<Detached<Publisher>>,
    path: PathBuf,
    waits: bool,
    /// What `steps`, `dropped_tokens` and `publisher` say once it is closed.
    last: (u64, u64, Option<Way>),
    /// Positions of the last step.
    positions: Vec<u32>,
    /// The ids of `publish_next`, narrowed.
    narrow: Vec<u8>,
    token_ids: Vec<u32>,
}

/// A u32 for each row [n], in an array, or where it is on a device.
#[derive(FromPyObject)]
enum Column<'py> {
    Host(PyReadonlyArray1<'py, u32>),
    Device(u64),
}

impl Writer {
    fn open(&mut self) -> PyResult<&mut Publisher> {
        self.publisher.as_deref_mut().ok_or_else(closed)
    }

    /// As [`released`], on the open publisher.
    fn work<T: Send>(&mut self, py: Python<'_>, work: impl FnOnce(&mut Publisher) -> T + Send) -> PyResult<T> {
        let waits = self.waits;
        let publisher = self.open()?;
        Ok(released(py, waits, || work(publisher)))
    }

    /// Post the rows that are stated for the next replay of the mailbox's graph.
    fn post(&mut self, py: Python<'_>, mailbox: &mut Mailbox) -> PyResult<bool> {
        let Mailbox { inner, rows } = mailbox;
        let rows = rows.as_ref().map(ReplayRows::as_graph_rows);
        let rows = rows.ok_or_else(|| PyValueError::new_err("no rows are stated; Mailbox.set_rows comes first"))?;
        // SAFETY: the stub asks the caller for kernels that write these sections for so many rows.
        #[expect(unsafe_code, reason = "the kernels are Python's")]
        let published = self.work(py, |publisher| unsafe { publisher.publish_graph(inner, &rows) })?;
        Ok(published.map_err(to_python)?.dropped == 0)
    }
}

/// Do what may wait for room in the arena. The GIL is kept unless the writer waits: to get it back could take longer than a
/// copy.
fn released<T: Send>(py: Python<'_>, waits: bool, work: impl FnOnce() -> T + Send) -> T {
    if waits { py.detach(work) } else { work() }
}

/// The spans in a sequence of tuples. A batch of hundreds is stated between two steps, so what can be is read where it lies.
fn spans_of(spans: &Bound<'_, PySequence>) -> PyResult<Vec<Span>> {
    let mut found = Vec::with_capacity(spans.len()?);
    for span in spans.try_iter()? {
        let span = span?;
        let span = span.cast::<PyTuple>()?;
        if span.len() != 6 {
            return Err(PyValueError::new_err(format!("a span of {} values, and it has 6", span.len())));
        }
        let number = |at| span.get_borrowed_item(at)?.extract();
        let (request, phase) = (span.get_borrowed_item(1)?, span.get_borrowed_item(5)?);
        found.push(Span {
            number: span.get_borrowed_item(0)?.extract()?,
            request: request.cast::<PyString>()?.to_str()?.to_owned(),
            first_row: number(2)?,
            rows: number(3)?,
            prompt_tokens: number(4)?,
            phase: phase_of(phase.cast::<PyString>()?.to_str()?)?,
        });
    }
    Ok(found)
}

fn closed() -> PyErr {
    PyRuntimeError::new_err("this writer is closed; attach again to publish under a new capture")
}

/// Expert ids [n, L, K] as bytes.
fn ids<'a, T: Element + bytemuck::Pod>(array: &'a PyReadonlyArray3<'_, T>, facts: &Facts) -> PyResult<&'a [u8]> {
    let shape = numpy::PyUntypedArrayMethods::shape(&**array);
    if shape[1..] != [facts.layers.len(), facts.top_k as usize] {
        return Err(PyValueError::new_err(format!(
            "experts has shape {shape:?}; it must be [n, {}, {}]",
            facts.layers.len(),
            facts.top_k
        )));
    }
    Ok(bytemuck::cast_slice(contiguous("experts", array)?))
}

#[pymethods]
impl Writer {
    #[new]
    #[pyo3(signature = (capture, *, layers, num_experts, top_k, rank=0, other_stages=0, weights=false, kv_slots=0,
                        arena_bytes=268_435_456,
                        on_full="drop", wait_timeout=1.0, engine="", engine_version="", model="", directory=None))]
    #[expect(clippy::too_many_arguments, reason = "they are the keyword arguments of the Python class")]
    fn new(
        capture: &str,
        layers: Vec<u16>,
        num_experts: u32,
        top_k: u32,
        rank: u32,
        other_stages: u32,
        weights: bool,
        kv_slots: u32,
        arena_bytes: usize,
        on_full: &str,
        wait_timeout: f64,
        engine: &str,
        engine_version: &str,
        model: &str,
        directory: Option<PathBuf>,
    ) -> PyResult<Self> {
        let on_full = match on_full {
            "drop" => OnFull::Drop,
            "wait" => OnFull::Wait(seconds("wait_timeout", wait_timeout)?),
            other => {
                return Err(OptionError::new_err(format!("on_full is '{other}'; it is 'drop' or 'wait'")));
            }
        };
        let facts = Facts {
            layers,
            num_experts,
            top_k,
            weights,
            kv_slots,
            rank,
            other_stages,
            engine: engine.into(),
            engine_version: engine_version.into(),
            model: model.into(),
        };
        let publisher = Publisher::create(&directory_or_default(directory), capture, arena_bytes, &facts, on_full)
            .map_err(to_python)?;
        let path = publisher.path().to_owned();
        Ok(Self {
            publisher: Some(Detached::new(publisher)),
            path,
            waits: on_full != OnFull::Drop,
            last: (0, 0, None),
            positions: Vec::new(),
            narrow: Vec::new(),
            token_ids: Vec::new(),
        })
    }

    fn set_batch(&mut self, spans: &Bound<'_, PySequence>) -> PyResult<()> {
        self.open()?.set_batch(spans_of(spans)?).map_err(to_python)
    }

    #[pyo3(signature = (experts, token_ids, positions, weights=None, *, kv_slots=None))]
    fn publish(
        &mut self,
        py: Python<'_>,
        experts: &Bound<'_, PyAny>,
        token_ids: Option<PyReadonlyArray1<'_, u32>>,
        positions: PyReadonlyArray1<'_, u32>,
        weights: Option<PyReadonlyArray3<'_, f16>>,
        kv_slots: Option<PyReadonlyArray1<'_, u32>>,
    ) -> PyResult<bool> {
        let facts = self.open()?.facts();
        let (narrow, wide): (PyReadonlyArray3<'_, u8>, PyReadonlyArray3<'_, u16>);
        let wrong_type = |dtype: &str| {
            let found = experts.getattr("dtype").map_or_else(|_| experts.get_type().to_string(), |d| d.to_string());
            PyTypeError::new_err(format!(
                "experts is {found}; for {} experts it must be {dtype} [n, L, K]",
                facts.num_experts
            ))
        };
        let experts = if facts.id_bytes() == 1 {
            narrow = experts.extract().map_err(|_| wrong_type("uint8"))?;
            ids(&narrow, facts)?
        } else {
            wide = experts.extract().map_err(|_| wrong_type("uint16"))?;
            ids(&wide, facts)?
        };
        let token_ids = token_ids.as_ref().map(|array| contiguous("token_ids", array)).transpose()?;
        let weights = weights.as_ref().map(|array| contiguous("weights", array)).transpose()?;
        let rows = Rows {
            experts,
            token_ids,
            positions: contiguous("positions", &positions)?,
            kv_slots: kv_slots.as_ref().map(|array| contiguous("kv_slots", array)).transpose()?,
            weights: weights.map(bytemuck::cast_slice),
        };
        let published = self.work(py, |publisher| publisher.publish(&rows))?.map_err(to_python)?;
        self.positions.clear();
        self.positions.extend_from_slice(rows.positions);
        Ok(published.dropped == 0)
    }

    fn publish_next(
        &mut self,
        py: Python<'_>,
        experts: PyReadonlyArrayDyn<'_, i64>,
        token_ids: Option<PyReadonlyArrayDyn<'_, i64>>,
    ) -> PyResult<bool> {
        let Self { publisher, positions, narrow, token_ids: tokens, waits, .. } = self;
        let publisher = publisher.as_deref_mut().ok_or_else(closed)?;
        let facts = publisher.facts();
        let wide = contiguous("experts", &experts)?;
        let row = facts.layers.len() * facts.top_k as usize;
        if positions.is_empty() || wide.len() != positions.len() * row {
            return Err(PyValueError::new_err(format!(
                "experts has {} ids; the last step had {} rows of {row}",
                wide.len(),
                positions.len()
            )));
        }
        let in_range = 0..i64::from(facts.num_experts);
        if let Some(id) = wide.iter().find(|id| !in_range.contains(id)) {
            return Err(PyValueError::new_err(format!(
                "expert id {id} lies outside 0 .. {}; nothing of this step was published",
                facts.num_experts - 1
            )));
        }
        narrow.clear();
        if facts.id_bytes() == 1 {
            narrow.extend(wide.iter().map(|&id| id as u8));
        } else {
            narrow.extend(wide.iter().flat_map(|&id| (id as u16).to_ne_bytes()));
        }
        if let Some(ids) = &token_ids {
            tokens.clear();
            tokens.extend(contiguous("token_ids", ids)?.iter().map(|&id| id as u32));
        }
        positions.iter_mut().for_each(|position| *position += 1);
        let rows = Rows {
            experts: narrow,
            token_ids: token_ids.is_some().then_some(tokens.as_slice()),
            positions,
            kv_slots: None,
            weights: None,
        };
        let published = released(py, *waits, || publisher.publish(&rows));
        Ok(published.map_err(to_python)?.dropped == 0)
    }

    fn prepare(&mut self, py: Python<'_>, device: i32) -> PyResult<()> {
        let publisher = self.open()?;
        py.detach(|| publisher.prepare(device)).map_err(to_python)
    }

    fn stream(&mut self, device: i32) -> PyResult<u64> {
        self.open()?.stream(device).map_err(to_python)
    }

    #[expect(clippy::too_many_arguments, reason = "they are the arguments of the Python method")]
    #[pyo3(signature = (experts, num_rows, positions, *, device, stream, token_ids=None, kv_slots=None, weights=None))]
    fn publish_device(
        &mut self,
        py: Python<'_>,
        experts: u64,
        num_rows: usize,
        positions: Column<'_>,
        device: i32,
        stream: u64,
        token_ids: Option<u64>,
        kv_slots: Option<u64>,
        weights: Option<u64>,
    ) -> PyResult<bool> {
        let column = |address| Source::Device(address, num_rows.saturating_mul(4));
        let positions = match &positions {
            Column::Host(array) => Source::Host(bytemuck::cast_slice(contiguous("positions", array)?)),
            Column::Device(address) => column(*address),
        };
        let (token_ids, kv_slots) = (token_ids.map(column), kv_slots.map(column));
        let rows = DeviceRows { rows: num_rows, experts, token_ids, positions, kv_slots, weights };
        // SAFETY: the stub asks the caller for what the arena asks: device memory of these lengths, alive until the stream
        // has come so far, which torch's allocator gives for tensors of that very stream.
        #[expect(unsafe_code, reason = "Python can only give addresses")]
        let published = self.work(py, |publisher| unsafe { publisher.publish_device(&rows, device, stream) })?;
        Ok(published.map_err(to_python)?.dropped == 0)
    }

    fn fail(&mut self, reason: &str) -> PyResult<()> {
        self.open()?.fail(reason);
        Ok(())
    }

    fn drop_step(&mut self, py: Python<'_>, num_rows: usize) -> PyResult<()> {
        self.work(py, |publisher| publisher.drop_step(num_rows))?;
        Ok(())
    }

    #[pyo3(signature = (spans, kv_slots, *, device=None, stream=0))]
    fn publish_prefix(
        &mut self,
        py: Python<'_>,
        spans: &Bound<'_, PySequence>,
        kv_slots: Column<'_>,
        device: Option<i32>,
        stream: u64,
    ) -> PyResult<bool> {
        let spans = spans_of(spans)?;
        let rows = spans.last().map_or(0, |span| (span.first_row + span.rows) as usize);
        let published = match (&kv_slots, device) {
            (Column::Host(array), None) => {
                let kv_slots = Source::Host(bytemuck::cast_slice(contiguous("kv_slots", array)?));
                self.work(py, |publisher| publisher.publish_prefix(&Prefix { spans: &spans, kv_slots }))?
            }
            (Column::Device(address), Some(device)) => {
                let kv_slots = Source::Device(*address, rows.saturating_mul(4));
                // SAFETY: as in `publish_device`.
                #[expect(unsafe_code, reason = "Python can only give addresses")]
                self.work(py, |publisher| unsafe {
                    publisher.publish_prefix_device(&Prefix { spans: &spans, kv_slots }, device, stream)
                })?
            }
            _ => return Err(PyTypeError::new_err("kv_slots is an array, or with a device an address on it")),
        };
        Ok(published.map_err(to_python)?.dropped == 0)
    }

    #[pyo3(signature = (device, table, *, entries=512))]
    fn mailbox(&mut self, device: i32, table: Vec<u64>, entries: usize) -> PyResult<Option<Mailbox>> {
        let inner = self.open()?.mailbox(device, &table, entries).map_err(to_python)?;
        Ok(inner.map(|inner| Mailbox { inner: Detached::new(inner), rows: None }))
    }

    fn publish_graph(&mut self, py: Python<'_>, mailbox: &mut Mailbox) -> PyResult<bool> {
        let before = mailbox.inner.replays();
        let published = self.post(py, mailbox);
        if mailbox.inner.replays() == before {
            mailbox.inner.pass_over();
        }
        published
    }

    fn void(&mut self, record: u64, device: i32, stream: u64) -> PyResult<()> {
        let publisher = self.open()?;
        // SAFETY: the stub asks the caller for the raw stream of the replay.
        #[expect(unsafe_code, reason = "Python can only give handles")]
        let voided = unsafe { publisher.void(record, device, stream) };
        voided.map_err(to_python)
    }

    #[pyo3(signature = (number, request, num_positions, state="finished"))]
    fn finish(
        &mut self,
        py: Python<'_>,
        number: u64,
        request: String,
        num_positions: u32,
        state: &str,
    ) -> PyResult<()> {
        let outcome = match state {
            "finished" => Outcome::Finished,
            "aborted" => Outcome::Aborted,
            other => {
                return Err(OptionError::new_err(format!("state is '{other}'; it is 'finished' or 'aborted'")));
            }
        };
        let end = End { number, request, num_positions, outcome };
        self.work(py, |publisher| publisher.finish(&end))?.map_err(to_python)
    }

    fn close(slf: &Bound<'_, Self>) {
        let mut this = slf.borrow_mut();
        if let Some(publisher) = this.publisher.take() {
            this.last = (publisher.steps(), publisher.dropped_rows(), publisher.way());
            drop(this);
            drop(publisher);
        }
    }

    #[getter]
    fn path(&self) -> String {
        self.path.display().to_string()
    }

    #[getter]
    fn publisher(&self) -> &'static str {
        convert::way(self.publisher.as_ref().map_or(self.last.2, |publisher| publisher.way()))
    }

    #[getter]
    fn steps(&self) -> u64 {
        self.publisher.as_ref().map_or(self.last.0, |publisher| publisher.steps())
    }

    #[getter]
    fn dropped_tokens(&self) -> u64 {
        self.publisher.as_ref().map_or(self.last.1, |publisher| publisher.dropped_rows())
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let name = slf.get_type().qualname()?;
        let Ok(this) = slf.try_borrow() else {
            return Ok(format!("<{name}, in use>"));
        };
        let state = if this.publisher.is_some() { "" } else { " (closed)" };
        Ok(format!("<{name} {}{state}>", this.path.display()))
    }
}
