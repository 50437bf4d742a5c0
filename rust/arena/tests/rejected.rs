//! Steps with places of rejected tokens: readers see what a step of the others alone would show.

mod common;

use common::{KV_SLOTS, Row, facts, folder, publisher};
use expert_lens_arena::{Mode, NO_POSITION, OnFull, Phase, Record, Rows, Span, open};
use proptest::prelude::*;

/// A request's rows in a step: which of its drafted tokens were accepted.
type Drafted = Vec<bool>;

fn spans(requests: &[Drafted]) -> Vec<Span> {
    let mut first_row = 0;
    let mut found = Vec::new();
    for (number, drafted) in requests.iter().enumerate().filter(|(_, drafted)| !drafted.is_empty()) {
        let (number, rows) = (number as u64 + 1, drafted.len() as u32);
        let request = format!("request {number}");
        found.push(Span { number, request, first_row, rows, prompt_tokens: 3, phase: Phase::Decode });
        first_row += rows;
    }
    found
}

proptest! {
    #[test]
    fn readers_see_the_accepted_rows_alone(
        num_experts in prop_oneof![Just(16u32), Just(400)],
        weights: bool,
        columns: bool,
        steps in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<bool>(), 0..5), 1..6), 1..8),
        anew: bool,
    ) {
        let folder = folder();
        let facts = facts(num_experts, weights);
        let mut publisher = publisher(folder.path(), 1 << 20, &facts, OnFull::Drop);
        let mut reader = open(publisher.path(), Mode::Lossless).unwrap();
        let garbage = vec![0xff; facts.row_bytes()];
        for requests in &steps {
            let stated = spans(requests);
            if stated.is_empty() {
                continue;
            }
            publisher.set_batch(stated.clone()).unwrap();
            for _ in 0..2 {
                // The second one has the batch of the first, unless that is stated anew.
                if anew {
                    publisher.set_batch(stated.clone()).unwrap();
                }
                let mut expected: Vec<(u64, u32, Row)> = Vec::new();
                let (mut experts, mut tokens, mut positions) = (vec![], vec![], vec![]);
                let (mut slots, mut scores) = (vec![], vec![]);
                for (number, drafted) in requests.iter().enumerate() {
                    for (at, &accepted) in drafted.iter().enumerate() {
                        let row = Row::of(&facts, number as u64 + 1, at as u32, Phase::Decode);
                        experts.extend_from_slice(if accepted { &row.experts } else { &garbage });
                        tokens.push(if accepted { row.token_id } else { 77 });
                        positions.push(if accepted { at as u32 } else { NO_POSITION });
                        slots.push(if accepted { at as u32 % KV_SLOTS } else { u32::MAX });
                        scores.extend(if accepted { row.weights.clone() } else { vec![1; facts.ids_per_row()] });
                        if accepted {
                            expected.push((number as u64 + 1, at as u32, row));
                        }
                    }
                }
                publisher.publish(&Rows {
                    experts: &experts,
                    token_ids: columns.then_some(&tokens),
                    positions: &positions,
                    kv_slots: columns.then_some(&slots),
                    weights: facts.weights.then_some(&scores),
                }).unwrap();
                let Some(Record::Step(step)) = reader.poll().unwrap() else { panic!("no step") };
                prop_assert_eq!(step.rows, expected.len());
                let mut owners = Vec::new();
                for span in step.batch.unwrap().iter() {
                    prop_assert_eq!(span.first_row as usize, owners.len());
                    owners.extend(std::iter::repeat_n(span.number, span.rows as usize));
                }
                let (row_bytes, ids) = (facts.row_bytes(), facts.ids_per_row());
                for (row, (number, at, truth)) in expected.iter().enumerate() {
                    prop_assert_eq!(owners[row], *number);
                    prop_assert_eq!(step.positions[row], *at);
                    prop_assert_eq!(&step.experts[row * row_bytes..][..row_bytes], &truth.experts[..]);
                    if columns {
                        prop_assert_eq!(step.token_ids.unwrap()[row], truth.token_id);
                        prop_assert_eq!(step.kv_slots.unwrap()[row], at % KV_SLOTS);
                    }
                    if facts.weights {
                        prop_assert_eq!(&step.weights.unwrap()[row * ids..][..ids], &truth.weights[..]);
                    }
                }
            }
        }
    }
}
