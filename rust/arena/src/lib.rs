//! Arenas of routed experts: how one engine process hands the experts that it chose to any number of readers.
//!
//! # Rules
//! * **One writer.** An arena belongs to one process, and one thread of it publishes at a time.
//! * **The writer never waits** for a reader unless told to ([`OnFull::Wait`]). It takes no lock, makes no system call
//!   and allocates nothing on the way of a step whose batch stays the same.
//! * **A record is a step or the end of a request.** It has a descriptor in one ring and a contiguous payload in another.
//!   Records are numbered from 0; a record is published by storing its number + 1, last, with release. The descriptor
//!   and the payload of a published record do not change until its space is given away.
//! * **Space is given away oldest first**, by moving the tail past a record *before* any word of it is overwritten. A
//!   record whose copy has not landed, or that a lossless reader has not released, is never given away: if it would have to
//!   be, the new record is dropped, and counted.
//! * **A reader checks everything.** It copies a record out, then looks whether the tail has passed it meanwhile: if so,
//!   the copy is thrown away and counted as lost. What it copied is checked against the arena's geometry and the model's
//!   facts before anybody uses it.
//! * **A batch is published when it changes**, inside the first step that it applies to; later steps name that record.
//!
//! # Example
//! ```
//! use expert_lens_arena::{Facts, Mode, OnFull, Phase, Publisher, Record, Rows, Span, open};
//!
//! let directory = tempfile::tempdir()?;
//! # std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
//! let facts = Facts { layers: vec![0, 1], num_experts: 8, top_k: 2, ..Facts::default() };
//! let mut publisher = Publisher::create(directory.path(), "demo", 1 << 20, &facts, OnFull::Drop)?;
//! let mut reader = open(publisher.path(), Mode::Lossless)?;
//!
//! let prompt = Span { number: 1, request: "a".into(), first_row: 0, rows: 1, prompt_tokens: 1, phase: Phase::Prefill };
//! publisher.set_batch(vec![prompt])?;
//! publisher.publish(&Rows { experts: &[5, 2, 7, 0], token_ids: Some(&[42]), positions: &[0], kv_slots: None, weights: None })?;
//!
//! let Some(Record::Step(step)) = reader.poll()? else { panic!("a step was published") };
//! assert_eq!(step.experts, [5, 2, 7, 0]);
//! assert_eq!(step.batch.unwrap()[0].request, "a");
//!
//! // Two layers of two experts are four ids a row: three are refused, and nothing is published.
//! let refused = publisher.publish(&Rows { experts: &[5, 2, 7], token_ids: None, positions: &[1], kv_slots: None, weights: None });
//! assert!(refused.is_err() && reader.poll()?.is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod arena;
mod batch;
mod captures;
pub mod collector;
mod cuda;
mod error;
mod layout;
mod memory;
#[cfg(loom)]
pub mod model;
#[cfg(loom)]
pub mod posts;
#[cfg(not(loom))]
mod posts;
mod process;
mod reader;
mod rejected;
mod rows;
mod writer;

pub use arena::{Publisher, open};
pub use batch::{End, Outcome, Phase, Span};
pub use captures::{Capture, clean, default_directory, find, list};
pub use cuda::{Mailbox, Way, exchange_capture_mode};
pub use error::{Error, Result};
pub use layout::{Facts, Header, LAYOUT_VERSION, MAX_EXPERTS, MAX_ID_BYTES, MAX_LAYERS, NO_POSITION, Producer};
pub use memory::{Mapped, Memory};
pub use process::is_alive;
pub use reader::{CachedPrefix, Mode, Reader, Record, Step};
pub use rows::{DeviceRows, GraphRows, Prefix, Rows, Source};
pub use writer::{OnFull, Published, Writer};
