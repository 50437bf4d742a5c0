//! Whose rows a step holds: the spans of its requests, and the end of a request.

use crate::error::{Error, Result};
use crate::layout::MAX_ID_BYTES;

/// Whether rows come from a prompt or from generated tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Phase {
    /// Tokens of a prompt.
    Prefill = 0,
    /// Tokens that the model generated.
    Decode = 1,
}

impl TryFrom<u8> for Phase {
    type Error = Error;

    fn try_from(value: u8) -> Result<Self> {
        match value {
            0 => Ok(Self::Prefill),
            1 => Ok(Self::Decode),
            other => Err(Error::corrupt(format!("phase {other}"))),
        }
    }
}

/// Consecutive rows of one request in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Tells requests of one process apart, also those with the same id; 0: rows of no request.
    pub number: u64,
    /// The request's id.
    pub request: String,
    /// First of its rows in the step.
    pub first_row: u32,
    /// How many.
    pub rows: u32,
    /// Tokens of the request's prompt.
    pub prompt_tokens: u32,
    /// Prefill or decode.
    pub phase: Phase,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// It ran to its end.
    Finished = 1,
    /// It was given up.
    Aborted = 2,
}

/// The end of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The request's number.
    pub number: u64,
    /// The request's id.
    pub request: String,
    /// Positions that count; rows past them are void.
    pub num_positions: u32,
    /// How it ended.
    pub outcome: Outcome,
}

const SPAN_BYTES: usize = 24;

fn check_id(request: &str) -> Result<()> {
    if request.len() > MAX_ID_BYTES {
        return Err(Error::invalid(format!(
            "a request id of {} bytes ('{}...'); the longest is {MAX_ID_BYTES}",
            request.len(),
            request.chars().take(32).collect::<String>()
        )));
    }
    Ok(())
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Check spans and write them as the spans section: one word with their number and bytes, then each span.
///
/// # Errors
/// Spans that overlap or are out of order, an id that is too long, or a named span without a number.
pub fn encode_spans(spans: &[Span], out: &mut Vec<u8>) -> Result<()> {
    out.clear();
    out.extend_from_slice(&[0; 8]);
    let mut free_from = 0u32;
    for span in spans {
        check_id(&span.request)?;
        if span.first_row < free_from {
            return Err(Error::invalid(format!(
                "the span of request '{}' begins at row {}, before row {free_from} where the last one ends",
                span.request, span.first_row
            )));
        }
        if span.number == 0 && !span.request.is_empty() {
            return Err(Error::invalid(format!("request '{}' has number 0, which means no request", span.request)));
        }
        free_from = span.first_row.checked_add(span.rows).ok_or_else(|| Error::invalid("a span past row 2^32"))?;
        out.extend_from_slice(&span.number.to_le_bytes());
        out.extend_from_slice(&span.first_row.to_le_bytes());
        out.extend_from_slice(&span.rows.to_le_bytes());
        out.extend_from_slice(&span.prompt_tokens.to_le_bytes());
        out.extend_from_slice(&[span.phase as u8, span.request.len() as u8, 0, 0]);
        out.extend_from_slice(span.request.as_bytes());
        pad(out);
    }
    let length = (out.len() - 8) as u64;
    out[..8].copy_from_slice(&(length << 32 | spans.len() as u64).to_le_bytes());
    Ok(())
}

/// Reads little-endian fields and refuses to read past the end.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (head, rest) = self
            .0
            .split_at_checked(count)
            .ok_or_else(|| Error::corrupt("a section that ends in the middle of a field"))?;
        self.0 = rest;
        Ok(head)
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("8 bytes")))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes")))
    }

    fn text(&mut self, count: usize) -> Result<String> {
        let bytes = self.take(count.next_multiple_of(8))?;
        String::from_utf8(bytes[..count].to_vec()).map_err(|_| Error::corrupt("a request id that is not UTF-8"))
    }
}

/// Read a spans section from the start of `payload`; gives the spans and the section's length in bytes.
///
/// # Errors
/// Everything that [`encode_spans`] would not have written.
pub fn decode_spans(payload: &[u8], rows: u32) -> Result<(Vec<Span>, usize)> {
    let mut fields = Fields(payload);
    let head = fields.u64()?;
    let (count, length) = ((head & 0xffff_ffff) as usize, (head >> 32) as usize);
    let mut fields = Fields(fields.take(length)?);
    if count > length / SPAN_BYTES || length % 8 != 0 {
        return Err(Error::corrupt(format!("{count} spans in {length} bytes")));
    }
    let mut spans = Vec::with_capacity(count);
    let mut free_from = 0;
    for _ in 0..count {
        let (number, first_row, span_rows, prompt_tokens) =
            (fields.u64()?, fields.u32()?, fields.u32()?, fields.u32()?);
        let small = fields.take(4)?;
        let phase = Phase::try_from(small[0])?;
        let request = fields.text(small[1] as usize)?;
        let end = first_row.checked_add(span_rows).filter(|&end| first_row >= free_from && end <= rows);
        free_from = end.ok_or_else(|| {
            Error::corrupt(format!("a span of rows {first_row} + {span_rows} in a step of {rows} rows"))
        })?;
        spans.push(Span { number, request, first_row, rows: span_rows, prompt_tokens, phase });
    }
    if !fields.0.is_empty() {
        return Err(Error::corrupt(format!("{count} spans and {} bytes behind them", fields.0.len())));
    }
    Ok((spans, 8 + length))
}

/// Write the payload of an event.
///
/// # Errors
/// An id that is too long.
pub fn encode_end(end: &End) -> Result<Vec<u8>> {
    check_id(&end.request)?;
    let mut out = Vec::with_capacity(16 + end.request.len() + 8);
    out.extend_from_slice(&end.number.to_le_bytes());
    out.extend_from_slice(&end.num_positions.to_le_bytes());
    out.extend_from_slice(&[end.outcome as u8, end.request.len() as u8, 0, 0]);
    out.extend_from_slice(end.request.as_bytes());
    pad(&mut out);
    Ok(out)
}

/// Read the payload of an event.
///
/// # Errors
/// Everything that [`encode_end`] would not have written.
pub fn decode_end(payload: &[u8]) -> Result<End> {
    let mut fields = Fields(payload);
    let (number, num_positions) = (fields.u64()?, fields.u32()?);
    let small = fields.take(4)?;
    let outcome = match small[0] {
        1 => Outcome::Finished,
        2 => Outcome::Aborted,
        other => return Err(Error::corrupt(format!("outcome {other} of a request"))),
    };
    Ok(End { number, request: fields.text(small[1] as usize)?, num_positions, outcome })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span() -> impl Strategy<Value = (u64, String, u32, u32, u32, bool)> {
        (1..=u64::MAX, ".{0,40}", 0..4u32, 0..9u32, any::<u32>(), any::<bool>())
    }

    proptest! {
        #[test]
        fn spans_come_back_as_they_went_in(parts in proptest::collection::vec(span(), 0..20)) {
            let mut next = 0;
            let spans: Vec<Span> = parts.into_iter().map(|(number, request, gap, rows, prompt_tokens, decode)| {
                let first_row = next + gap;
                next = first_row + rows;
                let phase = if decode { Phase::Decode } else { Phase::Prefill };
                Span { number, request, first_row, rows, prompt_tokens, phase }
            }).collect();
            let mut bytes = Vec::new();
            encode_spans(&spans, &mut bytes).unwrap();
            let (back, length) = decode_spans(&bytes, next).unwrap();
            prop_assert_eq!(back, spans);
            prop_assert_eq!(length, bytes.len());
        }

        #[test]
        fn any_bytes_give_spans_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200), rows in 0..100u32) {
            if let Ok((spans, length)) = decode_spans(&bytes, rows) {
                prop_assert!(length % 8 == 0 && length <= bytes.len());
                for span in spans {
                    prop_assert!(span.first_row + span.rows <= rows);
                }
            }
            let _ = decode_end(&bytes);
        }

        #[test]
        fn ends_come_back_as_they_went_in(number: u64, request in ".{0,60}", num_positions: u32, aborted: bool) {
            let outcome = if aborted { Outcome::Aborted } else { Outcome::Finished };
            let end = End { number, request, num_positions, outcome };
            prop_assert_eq!(decode_end(&encode_end(&end).unwrap()).unwrap(), end);
        }
    }

    #[test]
    fn overlapping_spans_are_refused() {
        let span = |number, first_row| Span {
            number,
            request: format!("r{number}"),
            first_row,
            rows: 3,
            prompt_tokens: 3,
            phase: Phase::Prefill,
        };
        let error = encode_spans(&[span(1, 0), span(2, 2)], &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "the span of request 'r2' begins at row 2, before row 3 where the last one ends");
    }
}
