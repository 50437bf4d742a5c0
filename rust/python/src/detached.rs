//! What waits for a device when it is dropped: without the GIL, which another thread may need to give that its work.

use pyo3::prelude::*;
use std::ops::{Deref, DerefMut};

/// A value that is dropped without the GIL.
pub struct Detached<T: Send>(Option<T>);

impl<T: Send> Detached<T> {
    pub fn new(value: T) -> Self {
        Self(Some(value))
    }
}

impl<T: Send> Deref for Detached<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("only `drop` takes it out")
    }
}

impl<T: Send> DerefMut for Detached<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("only `drop` takes it out")
    }
}

impl<T: Send> Drop for Detached<T> {
    fn drop(&mut self) {
        let value = &mut self.0;
        // Where the interpreter is going down, there is no GIL to give back, and `value` is dropped behind this.
        let _ = Python::try_attach(|py| py.detach(|| drop(value.take())));
    }
}
