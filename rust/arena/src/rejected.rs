//! Rows that are none: tokens that were drafted, went through a forward, and were rejected; and those whose experts nobody
//! saw.
//!
//! Which they are only the device knows when it publishes, so a step has a place for each, and those that are none have
//! [`NO_POSITION`]. A reader takes them out before anybody sees the step, but for the KV slots that they went to: what
//! stood there before no longer does.

use crate::batch::Span;
use crate::layout::{Facts, NO_POSITION, section};
use std::ops::Range;

/// A row's bytes in each section of a step's payload, in their order.
fn row_sizes(facts: &Facts, sections: u16) -> impl Iterator<Item = (u16, usize)> {
    [
        (section::EXPERTS, facts.row_bytes()),
        (section::TOKEN_IDS, 4),
        (section::POSITIONS, 4),
        (section::KV_SLOTS, 4),
        (section::WEIGHTS, facts.ids_per_row() * 2),
    ]
    .into_iter()
    .filter(move |&(mask, _)| sections & mask != 0)
}

/// The runs of rows that are some, of `rows` in this payload behind the spans; None if all are, or if the payload is
/// shorter than its sections.
pub(crate) fn accepted(facts: &Facts, sections: u16, rows: usize, payload: &[u8]) -> Option<Vec<Range<usize>>> {
    if payload.len() < facts.section_words(sections, rows) * 8 {
        return None;
    }
    let positions = column(facts, sections, rows, payload, section::POSITIONS)?;
    positions.contains(&NO_POSITION).then(|| runs(positions))
}

/// The section of that mask, of a u32 a row, in a payload behind the spans; None if the step has none.
fn column<'a>(facts: &Facts, sections: u16, rows: usize, payload: &'a [u8], wanted: u16) -> Option<&'a [u32]> {
    let mut at = 0;
    for (mask, size) in row_sizes(facts, sections) {
        if mask == wanted {
            return Some(bytemuck::cast_slice(&payload[at..at + rows * 4]));
        }
        at += (rows * size).next_multiple_of(8);
    }
    None
}

fn runs(positions: &[u32]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (row, _) in positions.iter().enumerate().filter(|&(_, &position)| position != NO_POSITION) {
        match runs.last_mut() {
            Some(run) if run.end == row => run.end += 1,
            _ => runs.push(row..row + 1),
        }
    }
    runs
}

/// The KV slots of the rows that are none, in a payload in which [`accepted`] has found some.
pub(crate) fn slots<'a>(
    facts: &Facts,
    sections: u16,
    rows: usize,
    payload: &'a [u8],
) -> impl Iterator<Item = u32> + use<'a> {
    let of_rows = |wanted| column(facts, sections, rows, payload, wanted).unwrap_or_default();
    let rows = of_rows(section::POSITIONS).iter().zip(of_rows(section::KV_SLOTS));
    rows.filter(|&(&position, _)| position == NO_POSITION).map(|(_, &slot)| slot)
}

/// Move these rows, which [`accepted`] has found, of each section together, to where they stand in a step of them alone.
pub(crate) fn keep(facts: &Facts, sections: u16, rows: usize, payload: &mut [u8], runs: &[Range<usize>]) {
    let kept: usize = runs.iter().map(Range::len).sum();
    let (mut from, mut to) = (0, 0);
    for (_, size) in row_sizes(facts, sections) {
        let mut row = 0;
        for run in runs {
            payload.copy_within(from + run.start * size..from + run.end * size, to + row * size);
            row += run.len();
        }
        from += (rows * size).next_multiple_of(8);
        to += (kept * size).next_multiple_of(8);
    }
}

/// The spans over these rows alone.
pub(crate) fn spans_of(spans: &[Span], runs: &[Range<usize>]) -> Vec<Span> {
    let mut found = Vec::new();
    for span in spans {
        let rows = span.first_row as usize..(span.first_row + span.rows) as usize;
        let before: usize = runs.iter().map(|run| run.end.min(rows.start).saturating_sub(run.start)).sum();
        let inside: usize =
            runs.iter().map(|run| run.end.min(rows.end).saturating_sub(run.start.max(rows.start))).sum();
        if inside > 0 {
            found.push(Span { first_row: before as u32, rows: inside as u32, ..span.clone() });
        }
    }
    found
}
