//! `_core.Turn`: who may use a writer, without waiting.

use pyo3::prelude::*;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Whom no thread is.
const NOBODY: usize = 0;

thread_local! {
    static HERE: u8 = const { 0 };
}

/// A number that no other thread has while this one lives.
fn this_thread() -> usize {
    HERE.with(|here| std::ptr::from_ref(here).addr())
}

/// Had by one thread at a time, in a `with` block: so an interrupt cannot come between taking it and what gives it back,
/// as CPython looks for none there up to 3.13. (In 3.14 it does, for any lock: python/cpython#148874.)
///
/// Whoever finds it taken leaves his work and goes; whoever gives it back looks for that then. Both must be in one order
/// for all, so that one of them sees the other's.
#[pyclass(frozen, module = "expert_lens._core")]
pub struct Turn {
    holder: AtomicUsize,
    /// Blocks that the holder has entered inside the one that gave it the turn.
    inner: AtomicUsize,
}

#[pymethods]
impl Turn {
    #[new]
    fn new() -> Self {
        Self { holder: AtomicUsize::new(NOBODY), inner: AtomicUsize::new(0) }
    }

    /// Whether the thread that asks has it.
    #[getter]
    fn is_mine(&self) -> bool {
        // Nobody else stores this thread's number.
        self.holder.load(Relaxed) == this_thread()
    }

    fn __enter__(&self) -> bool {
        match self.holder.compare_exchange(NOBODY, this_thread(), SeqCst, SeqCst) {
            Ok(_) => true,
            Err(holder) => {
                if holder == this_thread() {
                    self.inner.fetch_add(1, Relaxed);
                }
                false
            }
        }
    }

    fn __exit__(&self, _kind: &Bound<'_, PyAny>, _error: &Bound<'_, PyAny>, _trace: &Bound<'_, PyAny>) {
        // Nobody but the holder changes either.
        if self.is_mine() {
            match self.inner.load(Relaxed) {
                0 => self.holder.store(NOBODY, SeqCst),
                inner => self.inner.store(inner - 1, Relaxed),
            }
        }
    }
}
