//! What a reader made of a batch, kept as long as steps name the same one.

use crate::batch::Span;
use std::sync::Arc;

/// The batch that an arena's last step named, and what each of its spans is here.
pub(super) struct Known<T>(Option<(Arc<[Span]>, Vec<T>)>);

impl<T> Default for Known<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Known<T> {
    /// What the spans of `batch` are: looked up, unless it is the batch that was looked up last.
    pub fn spans(&mut self, batch: Option<&Arc<[Span]>>, look_up: impl FnMut(&Span) -> T) -> &[T] {
        let same = self.0.as_ref().zip(batch).is_some_and(|((known, _), batch)| Arc::ptr_eq(known, batch));
        if !same {
            self.0 = batch.map(|batch| (Arc::clone(batch), batch.iter().map(look_up).collect()));
        }
        self.0.as_ref().map_or(&[], |(_, spans)| spans)
    }
}
