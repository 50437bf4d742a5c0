//! The memory that the protocol works on: 64-bit words, reached by relaxed or ordered atomic accesses only.
//!
//! The other side of an arena is another process, or a GPU, and nothing keeps it from writing while we read. So every
//! access is atomic: a race can give stale or mixed words, which the protocol detects, but never undefined behaviour.

use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Words that a writer and its readers share.
///
/// Indices are in words; an index past [`Memory::len`] panics.
pub trait Memory: Send + Sync {
    /// The number of words.
    fn len(&self) -> usize;

    /// True if there are no words.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Load one word.
    fn load(&self, word: usize, order: Ordering) -> u64;

    /// Store one word.
    fn store(&self, word: usize, value: u64, order: Ordering);

    /// Replace `current` by `new` (acquire-release); false if the word held something else.
    fn compare_exchange(&self, word: usize, current: u64, new: u64) -> bool;

    /// A fence of the same memory model as the accesses.
    fn fence(&self, order: Ordering);

    /// Copy words out, relaxed and in no particular order.
    fn read_words(&self, word: usize, out: &mut [u64]) {
        for (i, value) in out.iter_mut().enumerate() {
            *value = self.load(word + i, Ordering::Relaxed);
        }
    }

    /// Copy bytes in, relaxed and in no particular order; the last word is filled up with zeros.
    fn write_bytes(&self, word: usize, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        let mut at = word;
        for chunk in &mut chunks {
            let value = u64::from_ne_bytes(chunk.try_into().expect("chunks of 8"));
            self.store(at, value, Ordering::Relaxed);
            at += 1;
        }
        let rest = chunks.remainder();
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.store(at, u64::from_ne_bytes(last), Ordering::Relaxed);
        }
    }
}

/// Words of a file mapped into this process, shared with whoever else maps it.
///
/// The file is its owner's alone. If its owner cuts it short, the next access past its end ends the process, as with any
/// mapping.
pub struct Mapped(memmap2::MmapRaw);

impl Mapped {
    /// Take over a mapping. A length that is no multiple of 8 loses its last bytes.
    #[must_use]
    pub fn new(map: memmap2::MmapRaw) -> Self {
        Self(map)
    }

    /// Where the mapping begins, for the driver to pin and for a device to write to. Not for accesses of our own.
    pub(crate) fn address(&self) -> *mut std::ffi::c_void {
        self.0.as_mut_ptr().cast()
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `MmapRaw` keeps `len` bytes mapped, readable and writable, at a page-aligned address until it is dropped,
        // and the slice borrows it; `len / 8` words do not pass its end; any bit pattern is an AtomicU64. Nothing in this
        // process reaches the mapping but through these atomics (`address` is for the driver, which lets a GPU at it), so
        // no access of ours is a data race, whatever other processes or a GPU store meanwhile.
        unsafe { std::slice::from_raw_parts(self.0.as_mut_ptr().cast::<AtomicU64>(), self.0.len() / 8) }
    }
}

impl Memory for Mapped {
    fn len(&self) -> usize {
        self.words().len()
    }

    #[inline]
    fn load(&self, word: usize, order: Ordering) -> u64 {
        self.words()[word].load(order)
    }

    #[inline]
    fn store(&self, word: usize, value: u64, order: Ordering) {
        self.words()[word].store(value, order);
    }

    fn compare_exchange(&self, word: usize, current: u64, new: u64) -> bool {
        self.words()[word].compare_exchange(current, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    #[inline]
    fn fence(&self, order: Ordering) {
        fence(order);
    }
}
